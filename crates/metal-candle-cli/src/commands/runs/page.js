"use strict";
const runs = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();

// Tick marks at round numbers.
function ticks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const marks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) marks.push(n * step);
  return marks;
}

function label(value) {
  const rounded = Number(value.toPrecision(6));
  const size = Math.abs(rounded);
  return rounded === 0 || (size >= 1e-3 && size < 1e6) ? String(rounded) : rounded.toExponential(2).replace(/\.?0+e/, "e");
}

// All values but the highest hundredth, which may be spikes.
function range(values) {
  values.sort((a, b) => a - b);
  const low = values[0];
  const high = values[values.length - 1 - Math.floor((values.length - 1) / 100)];
  const margin = Math.max((high - low) * 0.06, Math.abs(high) * 1e-3, 1e-12);
  return [Math.max(low - margin, low < 0 ? -Infinity : 0), high + margin];
}

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

class Chart {
  constructor(figure) {
    this.key = figure.dataset.key;
    this.svg = figure.querySelector("svg");
    this.values = figure.querySelector(".values");
    this.box = JSON.parse(figure.dataset.box);
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
  }

  draw() {
    this.leave();
    const { left, top, width, height } = this.box;
    const axes = this.svg.querySelector(".axes");
    axes.replaceChildren();
    const shown = runs.map((run, index) => ({ run, index })).filter(({ index }) => !hidden.has(index));
    const points = shown.flatMap(({ run }) => run[this.key]);
    for (const line of this.svg.querySelectorAll("polyline")) line.setAttribute("points", "");
    if (points.length === 0) return;
    const [low, high] = range(points.map((point) => point[1]));
    const last = Math.max(1, ...shown.flatMap(({ run }) => run[this.key].slice(-1).map((point) => point[0])));
    const x = (step) => left + (step / last) * width;
    const y = (value) => top + height - ((value - low) / (high - low)) * height;
    for (const tick of ticks(low, high)) {
      axes.append(element("line", { class: "grid", x1: left, x2: left + width, y1: y(tick), y2: y(tick) }));
      axes.append(element("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, label(tick)));
    }
    for (const tick of ticks(0, last)) {
      axes.append(element("text", { x: x(tick), y: top + height + 16, "text-anchor": "middle" }, label(tick)));
    }
    for (const { run, index } of shown) {
      const path = run[this.key].map(([step, value]) => x(step).toFixed(1) + "," + y(value).toFixed(1));
      // a line needs two points
      if (path.length === 1) path.push(path[0]);
      this.svg.querySelector(`[data-run="${index}"]`).setAttribute("points", path.join(" "));
    }
    this.last = last;
  }

  // The values of all runs at the step below the pointer, or the last ones before it.
  hover(event) {
    if (this.last === undefined) return;
    const { left, width } = this.box;
    const bounds = this.svg.getBoundingClientRect();
    const at = ((event.clientX - bounds.left) / bounds.width) * this.svg.viewBox.baseVal.width;
    const step = Math.round(Math.min(Math.max((at - left) / width, 0), 1) * this.last);
    const cursor = this.svg.querySelector(".cursor");
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, left + (step / this.last) * width);
    cursor.style.visibility = "visible";
    const head = document.createElement("div");
    head.textContent = "step " + step;
    const rows = [head];
    runs.forEach((run, index) => {
      const point = hidden.has(index) ? undefined : run[this.key].findLast(([at]) => at <= step);
      if (point === undefined) return;
      const row = document.createElement("div");
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = run.color;
      const text = document.createElement("span");
      text.textContent = label(Number(point[1].toPrecision(4))) + "  " + run.name;
      row.append(swatch, text);
      rows.push(row);
    });
    this.values.replaceChildren(...rows);
    this.values.hidden = false;
  }

  leave() {
    this.values.hidden = true;
    this.svg.querySelector(".cursor").style.visibility = "hidden";
  }
}

const charts = [...document.querySelectorAll("figure")].map((figure) => new Chart(figure));
for (const box of document.querySelectorAll(".legend input")) {
  const index = Number(box.value);
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(index);
    else hidden.add(index);
    for (const chart of charts) chart.draw();
  });
  // a browser may remember what was unticked
  if (!box.checked) hidden.add(index);
}
for (const chart of charts) chart.draw();
