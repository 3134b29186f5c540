//! Writes an HTML page with the curves and tables of runs. It loads nothing from the network.

use super::summary::Run;
use super::table::{columns, compared};
use crate::plot::{range, smoothed, thinned};
use serde_json::json;
use std::fmt::Write;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Maximum number of points in a curve.
const MAX_POINTS: usize = 600;

/// Colours that are distinguishable on white and on black.
const COLORS: [&str; 10] =
    ["#3b82f6", "#ef4444", "#10b981", "#f59e0b", "#8b5cf6", "#ec4899", "#14b8a6", "#84cc16", "#f97316", "#64748b"];

/// The size of a chart, and the area of its curves.
const SIZE: (f64, f64) = (600.0, 280.0);
const LEFT: f64 = 58.0;
const TOP: f64 = 8.0;
const WIDTH: f64 = 510.0;
const HEIGHT: f64 = 244.0;

/// A curve of one run.
type Points = Vec<(f64, f64)>;

/// A chart: the key of its curves, its title, and the points of a run.
type Chart = (&'static str, &'static str, fn(&Run) -> Points);

const CHARTS: [Chart; 4] = [
    ("train", "Training loss, smoothed", |run| smoothed(&finite(&run.curves.train))),
    ("valid", "Validation loss", |run| run.curves.valid.clone()),
    ("rate", "Learning rate", |run| run.curves.learning_rate.clone()),
    ("norm", "Gradient norm, smoothed", |run| smoothed(&finite(&run.curves.grad_norm))),
];

fn finite(points: &[(f64, f64)]) -> Points {
    points.iter().copied().filter(|point| point.1.is_finite()).collect()
}

/// The page.
pub(super) fn page(runs: &[Run]) -> String {
    let curves: Vec<Vec<Points>> =
        CHARTS.iter().map(|chart| runs.iter().map(|run| thinned(&chart.2(run), MAX_POINTS)).collect()).collect();
    let mut html = String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    let count = if runs.len() == 1 { "1 run".to_owned() } else { format!("{} runs", runs.len()) };
    let _ = write!(
        html,
        "<meta name=\"viewport\" content=\"width=device-width\">\n<title>{count}</title>\n<style>\n{STYLE}</style>\n\
         </head>\n<body>\n<h1>{count}</h1>\n<p>Curves by step. Untick a run to hide it; the axes adapt to the visible runs.</p>\n\
         <div class=\"legend\">\n"
    );
    for (index, run) in runs.iter().enumerate() {
        let _ = writeln!(
            html,
            "<label><input type=\"checkbox\" value=\"{index}\" checked><span class=\"swatch\" style=\"background:{}\"></span>{}</label>",
            color(index),
            escaped(&run.name)
        );
    }
    html.push_str("</div>\n<div class=\"charts\">\n");
    for ((key, title, _), curves) in CHARTS.iter().zip(&curves) {
        chart(&mut html, key, title, curves);
    }
    html.push_str("</div>\n");
    tables(&mut html, runs);
    let data: Vec<_> = runs
        .iter()
        .enumerate()
        .map(|(index, run)| {
            let mut object = json!({"name": run.name, "color": color(index)});
            for ((key, ..), curves) in CHARTS.iter().zip(&curves) {
                object[*key] =
                    json!(curves[index].iter().map(|&(step, value)| (step, rounded(value))).collect::<Vec<_>>());
            }
            object
        })
        .collect();
    // `<` could end the element
    let data = json!(data).to_string().replace('<', "\\u003c");
    let _ = write!(
        html,
        "<script type=\"application/json\" id=\"data\">{data}</script>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n"
    );
    html
}

fn color(index: usize) -> &'static str {
    COLORS[index % COLORS.len()]
}

/// Rounds to six digits, more than a chart can show.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// A static chart, which the script replaces.
fn chart(html: &mut String, key: &str, title: &str, curves: &[Points]) {
    let frame = json!({"left": LEFT, "top": TOP, "width": WIDTH, "height": HEIGHT}).to_string();
    let _ = write!(
        html,
        "<figure data-key=\"{key}\" data-box=\"{}\"><figcaption>{title}</figcaption>\n\
         <svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{title}\">\n\
         <defs><clipPath id=\"{key}-frame\"><rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/></clipPath></defs>\n\
         <g class=\"axes\">\n",
        escaped(&frame),
        SIZE.0,
        SIZE.1
    );
    let values: Vec<f64> = curves.iter().flatten().map(|point| point.1).collect();
    let (low, high) = range(&values);
    let last = curves.iter().flatten().map(|point| point.0).fold(1.0, f64::max);
    let x = |step: f64| LEFT + step / last * WIDTH;
    let y = |value: f64| TOP + HEIGHT - (value - low) / (high - low) * HEIGHT;
    for tick in ticks(low, high) {
        let (at, right) = (y(tick), LEFT + WIDTH);
        let _ = writeln!(html, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
        let (left, text) = (LEFT - 6.0, super::summary::short_number(tick));
        let _ = writeln!(html, "<text x=\"{left}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>", at + 4.0);
    }
    for tick in ticks(0.0, last) {
        let (below, text) = (TOP + HEIGHT + 16.0, super::summary::short_number(tick));
        let _ = writeln!(html, "<text x=\"{:.1}\" y=\"{below}\" text-anchor=\"middle\">{text}</text>", x(tick));
    }
    let _ = writeln!(html, "</g>\n<g clip-path=\"url(#{key}-frame)\">");
    for (index, points) in curves.iter().enumerate() {
        let mut path = String::new();
        // a line needs two points
        let doubled = if points.len() == 1 { points.first() } else { None };
        for &(step, value) in points.iter().chain(doubled) {
            let _ = write!(path, "{:.1},{:.1} ", x(step), y(value));
        }
        // ten colours, then dashes
        let dashes = if index < COLORS.len() { "" } else { " stroke-dasharray=\"6 3\"" };
        let _ = writeln!(
            html,
            "<polyline data-run=\"{index}\" stroke=\"{}\"{dashes} points=\"{}\"/>",
            color(index),
            path.trim_end()
        );
    }
    let bottom = TOP + HEIGHT;
    let _ = write!(
        html,
        "</g>\n<line class=\"cursor\" x1=\"{LEFT}\" x2=\"{LEFT}\" y1=\"{TOP}\" y2=\"{bottom}\"/>\n</svg>\n\
         <div class=\"values\" hidden></div></figure>\n"
    );
}

/// About five round numbers within a range.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
    let Some(step) = step.filter(|step| step.is_finite() && *step > 0.0) else { return vec![low] };
    let first = (low / step - 1e-9).ceil();
    (0..20).map(|n| (first + f64::from(n)) * step).take_while(|tick| *tick <= high + 1e-9 * step).collect()
}

fn tables(html: &mut String, runs: &[Run]) {
    html.push_str("<h2>Runs</h2>\n<div class=\"scroll\"><table>\n<tr>");
    let columns = columns(runs);
    for column in &columns {
        let _ = write!(html, "<th>{}</th>", column.name);
    }
    html.push_str("</tr>\n");
    for row in 0..runs.len() {
        html.push_str("<tr>");
        for column in &columns {
            let _ = write!(html, "<td>{}</td>", escaped(&column.cells[row]));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
    let (settings, results) = compared(runs);
    for (title, rows) in [("Settings that differ", settings), ("Results", results)] {
        if runs.len() < 2 || rows.is_empty() {
            continue;
        }
        let _ = write!(html, "<h2>{title}</h2>\n<div class=\"scroll\"><table>\n<tr><th></th>");
        for run in runs {
            let _ = write!(html, "<th>{}</th>", escaped(&run.name));
        }
        html.push_str("</tr>\n");
        for row in rows {
            html.push_str("<tr>");
            for cell in &row {
                let _ = write!(html, "<td>{}</td>", escaped(cell));
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</table></div>\n");
    }
    let notes: Vec<String> = runs
        .iter()
        .flat_map(|run| {
            let warnings = run.record.warnings.iter().map(|warning| format!("step {}: {}", warning.step, warning.text));
            let all = run.problems.iter().cloned().chain(warnings);
            all.map(|note| format!("<li><b>{}</b> {}</li>\n", escaped(&run.name), escaped(&note))).collect::<Vec<_>>()
        })
        .collect();
    if !notes.is_empty() {
        let _ = writeln!(html, "<h2>Notes</h2>\n<ul>\n{}</ul>", notes.concat());
    }
}

fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::super::summary::{Run, State};
    use super::{page, ticks};
    use crate::plot::Curves;
    use crate::run_record::RunRecord;

    fn run(name: &str, steps: u32) -> Run {
        let curve = |of: fn(f64) -> f64| (1..=steps).map(|i| (f64::from(i), of(f64::from(i)))).collect();
        Run {
            name: name.into(),
            state: State::Done,
            record: RunRecord::default(),
            curves: Curves {
                train: curve(|i| 1.0 + 1.0 / i),
                valid: vec![(0.0, 2.0), (3.0, f64::NAN), (5.0, 1.5)],
                learning_rate: curve(|i| i * 1e-6),
                grad_norm: curve(f64::sqrt),
            },
            steps: steps as usize,
            tokens: 0,
            problems: vec!["a < b".into()],
        }
    }

    #[test]
    fn round_ticks() {
        assert_eq!(ticks(0.0, 10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(0.93, 2.2), [1.0, 1.5, 2.0]);
        assert_eq!(ticks(1.0, 1.0), [1.0]);
    }

    #[test]
    fn pages_are_complete_small_and_safe() {
        let html = page(&[run("a</script><b>&\"'", 100_000), run("second", 5), run("none", 0)]);
        assert!(html.len() < 400_000, "{}", html.len());
        assert_eq!(html.matches("<polyline").count(), 4 * 3);
        assert_eq!(html.matches("</script>").count(), 2);
        assert!(html.contains("a&lt;/script&gt;&lt;b&gt;&amp;&quot;&#39;") && html.contains("a &lt; b"));
        assert!(!html.contains("NaN") && !html.contains("null"), "non-finite numbers");
        // nothing is loaded from the network
        for outside in ["src=", "href=", "@import", "url(http", "https://"] {
            assert!(!html.contains(outside), "{outside}");
        }
        let data = html.split("id=\"data\">").nth(1).and_then(|rest| rest.split("</script>").next());
        let data: serde_json::Value = serde_json::from_str(data.unwrap_or_default()).unwrap_or_default();
        assert_eq!(data[0]["name"], "a</script><b>&\"'");
        assert_eq!(data[1]["valid"], serde_json::json!([[0.0, 2.0], [5.0, 1.5]]));
        assert!(page(&[]).contains("0 runs"));
    }
}
