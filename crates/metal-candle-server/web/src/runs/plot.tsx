// Draws curves with uPlot: several series over one x-axis, and a legend with the values at the cursor.
import { useEffect, useRef } from 'preact/hooks';
import uPlot from 'uplot';
import 'uplot/dist/uPlot.min.css';
import { figure } from '../base/format';
import { align } from './curves';

export interface PlotSeries {
  label: string;
  /** The index of a colour of the style sheet, 0 to 5. */
  color: number;
  style: 'line' | 'faint' | 'points';
  points: { x: number; y: number }[];
}

interface Props {
  series: PlotSeries[];
  xLabel: string;
  logarithmic: boolean;
  label: string;
}

const HEIGHT = 260;

export function Plot({ series, xLabel, logarithmic, label }: Props) {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const shape = JSON.stringify([series.map(({ label, color, style }) => [label, color, style]), xLabel, logarithmic]);
  const data = align(series.map((entry) => entry.points)) as uPlot.AlignedData;
  const latest = useRef(data);
  latest.current = data;

  useEffect(() => {
    const element = host.current!;
    const build = () => {
      plot.current?.destroy();
      plot.current = new uPlot(options(element, series, xLabel, logarithmic), latest.current, element);
    };
    build();
    const resized = new ResizeObserver(() => plot.current?.setSize({ width: element.clientWidth, height: HEIGHT }));
    resized.observe(element);
    const scheme = matchMedia('(prefers-color-scheme: dark)');
    scheme.addEventListener('change', build);
    document.addEventListener('themechange', build);
    return () => {
      resized.disconnect();
      scheme.removeEventListener('change', build);
      document.removeEventListener('themechange', build);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape]);
  useEffect(() => {
    if (plot.current && plot.current.data !== data) plot.current.setData(data);
  }, [data]);
  return <div ref={host} class="plot" role="img" aria-label={label} />;
}

function options(host: HTMLElement, series: PlotSeries[], xLabel: string, logarithmic: boolean): uPlot.Options {
  const color = (name: string) => resolveColor(host, `var(--${name})`);
  const axis = {
    stroke: color('muted'),
    font: '12px system-ui, sans-serif',
    grid: { stroke: color('line'), width: 1 },
    ticks: { stroke: color('line'), width: 1, size: 4 },
  };
  return {
    width: host.clientWidth,
    height: HEIGHT,
    scales: { x: { time: false }, y: logarithmic ? { distr: 3 } : {} },
    axes: [
      { ...axis, size: 34, values: (_, values) => values.map((value) => (value === null ? '' : figure(value))) },
      { ...axis, size: 56, values: (_, values) => values.map((value) => (value === null ? '' : figure(value))) },
    ],
    legend: { markers: { width: 0, fill: (_, index) => (index === 0 ? 'transparent' : color(`series-${series[index - 1]!.color + 1}`)) } },
    cursor: { drag: { x: true, y: false }, points: { size: 6 } },
    series: [
      { label: xLabel, value: (_, value) => (value === null ? '–' : figure(value)) },
      ...series.map((entry): uPlot.Series => {
        const stroke = color(`series-${entry.color + 1}`);
        return {
          label: entry.label,
          stroke: entry.style === 'faint' ? withAlpha(stroke, 0.3) : stroke,
          width: entry.style === 'faint' ? 1 : 1.75,
          spanGaps: true,
          ...(entry.style === 'points' ? { dash: [5, 4] } : {}),
          points: { show: entry.style === 'points' || entry.points.length === 1, size: 6, fill: stroke },
          value: (_, value) => (value === null ? '–' : figure(value)),
        };
      }),
    ],
  };
}

/** The computed value of a colour, because a canvas cannot use CSS variables. */
function resolveColor(host: HTMLElement, value: string): string {
  const probe = document.createElement('span');
  probe.style.color = value;
  host.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

function withAlpha(color: string, alpha: number): string {
  return color.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`);
}
