//! Draws the chart of a run: training and validation loss, and the learning rate.

use metal_candle::files::write_atomically;
use metal_candle::{Error, Result};
use plotters::prelude::*;
use std::path::Path;

/// The curves of a run; each point is a step and a value.
#[derive(Debug, Clone, Default)]
pub(crate) struct Curves {
    /// Loss of each training step.
    pub(crate) train: Vec<(f64, f64)>,
    /// Validation loss.
    pub(crate) valid: Vec<(f64, f64)>,
    /// Learning rate of each training step.
    pub(crate) learning_rate: Vec<(f64, f64)>,
    /// Global norm of the gradients of each training step; not in the chart.
    pub(crate) grad_norm: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (960, 540);
const TRAIN: RGBColor = RGBColor(31, 98, 168);
const VALID: RGBColor = RGBColor(206, 84, 26);
const RATE: RGBColor = RGBColor(120, 120, 120);
const TEXT: RGBColor = RGBColor(40, 40, 40);

/// Draws `curves` to the SVG file `path`. Without points, no file is written.
pub(crate) fn draw(path: &Path, title: &str, curves: &Curves) -> Result<()> {
    let losses: Vec<f64> =
        curves.train.iter().chain(&curves.valid).map(|point| point.1).filter(|loss| loss.is_finite()).collect();
    let Some(last) = curves.train.iter().chain(&curves.valid).map(|point| point.0).reduce(f64::max) else {
        return Ok(());
    };
    if losses.is_empty() {
        return Ok(());
    }
    let mut svg = String::new();
    render(&mut svg, title, curves, &losses, last.max(1.0))
        .map_err(|message| Error::Write { path: path.to_path_buf(), source: std::io::Error::other(message) })?;
    write_atomically(path, |file| file.write_all(svg.as_bytes()))
}

fn render(
    svg: &mut String,
    title: &str,
    curves: &Curves,
    losses: &[f64],
    last: f64,
) -> std::result::Result<(), String> {
    let (low, high) = range(losses);
    let highest_rate = curves.learning_rate.iter().map(|point| point.1).fold(0.0, f64::max);
    let rates = 0.0..if highest_rate > 0.0 { highest_rate * 1.15 } else { 1.0 };
    let text = |error: DrawingAreaErrorKind<_>| error.to_string();

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(text)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20).into_font().color(&TEXT))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .right_y_label_area_size(76)
        .build_cartesian_2d(0.0..last * 1.01, low..high)
        .map_err(text)?
        .set_secondary_coord(0.0..last * 1.01, rates);
    let style = ("sans-serif", 14).into_font().color(&TEXT);
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .label_style(style.clone())
        .axis_desc_style(style.clone())
        .draw()
        .map_err(text)?;
    chart
        .configure_secondary_axes()
        .y_desc("learning rate")
        .y_labels(6)
        .y_label_formatter(&|rate| if *rate == 0.0 { "0".into() } else { format!("{rate:.1e}") })
        .label_style(style.clone())
        .axis_desc_style(style.clone())
        .draw()
        .map_err(text)?;

    chart
        .draw_secondary_series(LineSeries::new(curves.learning_rate.iter().copied(), RATE.mix(0.7).stroke_width(1)))
        .map_err(text)?
        .label("learning rate")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], RATE.stroke_width(1)));
    let finite = |points: &[(f64, f64)]| points.iter().copied().filter(|point| point.1.is_finite()).collect::<Vec<_>>();
    chart.draw_series(LineSeries::new(finite(&curves.train), TRAIN.mix(0.3).stroke_width(1))).map_err(text)?;
    chart
        .draw_series(LineSeries::new(smoothed(&finite(&curves.train)), TRAIN.stroke_width(2)))
        .map_err(text)?
        .label("training loss (smoothed)")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], TRAIN.stroke_width(2)));
    if !curves.valid.is_empty() {
        chart
            .draw_series(LineSeries::new(finite(&curves.valid), VALID.stroke_width(2)))
            .map_err(text)?
            .label("validation loss")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], VALID.stroke_width(2)));
        chart
            .draw_series(finite(&curves.valid).into_iter().map(|point| Circle::new(point, 4, VALID.filled())))
            .map_err(text)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(12)
        .legend_area_size(30)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.2))
        .label_font(style)
        .draw()
        .map_err(text)?;
    area.present().map_err(text)
}

/// The axis range of at least one value: the values without the highest hundredth, which may be spikes, with a margin.
pub(crate) fn range(values: &[f64]) -> (f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() {
        return (0.0, 1.0);
    }
    let (low, high) = (sorted[0], sorted[(sorted.len() - 1) - (sorted.len() - 1) / 100]);
    let margin = ((high - low) * 0.06).max(high.abs() * 1e-3).max(f64::MIN_POSITIVE);
    ((low - margin).max(0.0), high + margin)
}

/// Thins a curve to about `most` points without changing its look: the lowest and highest point of each section, and the
/// first and last point. Points that are not finite are omitted.
pub(crate) fn thinned(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let points: Vec<_> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    if points.len() <= most.max(2) {
        return points;
    }
    let stretch = points.len().div_ceil((most / 2).max(1));
    let mut thin = vec![points[0]];
    for part in points.chunks(stretch) {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (Some(&low), Some(&high)) = (part.iter().min_by(by_value), part.iter().max_by(by_value)) else { continue };
        let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
        thin.extend([first, second]);
    }
    thin.push(points[points.len() - 1]);
    thin.dedup();
    thin
}

/// Exponential moving average, corrected for its start.
pub(crate) fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (1.0 + points.len() as f64 / 20.0);
    let (mut mean, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(step, loss)| {
            mean = keep * mean + (1.0 - keep) * loss;
            weight = keep * weight + (1.0 - keep);
            (step, mean / weight)
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Curves, draw, range, smoothed, thinned};

    #[test]
    fn smoothing_preserves_constants_and_follows_steps() {
        let flat: Vec<_> = (0..50).map(|i| (f64::from(i), 2.5)).collect();
        assert!(smoothed(&flat).iter().all(|point| (point.1 - 2.5).abs() < 1e-12));
        let step: Vec<_> = (0..200).map(|i| (f64::from(i), if i < 100 { 4.0 } else { 1.0 })).collect();
        assert!((smoothed(&step)[199].1 - 1.0).abs() < 0.01);
    }

    #[test]
    fn thinned_curves_preserve_ends_and_spikes() {
        let mut points: Vec<_> = (0..100_000).map(|i| (f64::from(i), 1.0 + 1.0 / f64::from(i + 1))).collect();
        points[777].1 = 50.0;
        points[778].1 = f64::NAN;
        let thin = thinned(&points, 500);
        assert!(thin.len() <= 502, "{}", thin.len());
        assert!(thin.contains(&(777.0, 50.0)) && thin[0] == points[0] && thin.last() == points.last());
        assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(thinned(&points[..10], 500), points[..10]);
        assert_eq!(thinned(&[], 500), []);
    }

    #[test]
    fn a_spike_does_not_flatten_the_rest() {
        let mut losses: Vec<f64> = (0..400).map(|i| 3.0 - f64::from(i) / 400.0).collect();
        losses[7] = 900.0;
        assert!(range(&losses).1 < 4.0);
    }

    #[test]
    fn the_chart_names_its_curves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        draw(&path, "empty", &Curves::default()).unwrap();
        assert!(!path.exists());
        let curves = Curves {
            train: (1..=100).map(|i| (f64::from(i), 5.0 / f64::from(i).sqrt())).collect(),
            valid: vec![(0.0, 5.0), (50.0, 1.0), (100.0, f64::NAN)],
            learning_rate: (1..=100).map(|i| (f64::from(i), 1e-4 * f64::from(i))).collect(),
            grad_norm: Vec::new(),
        };
        draw(&path, "a & <b>", &curves).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["validation loss", "training loss (smoothed)", "learning rate", "step", "a &amp; &lt;b&gt;"] {
            assert!(svg.contains(text), "{text} is not in the chart");
        }
        assert!(!svg.contains("NaN"));
    }
}
