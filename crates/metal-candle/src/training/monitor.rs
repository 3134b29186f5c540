//! Watches the losses and gradients of a run and returns warnings about spikes, divergence and over-fitting.

use super::report::{EvaluationMetrics, StepMetrics};
use super::warnings::TrainingWarning;
use std::collections::VecDeque;

/// The number of steps in the window of a running median.
const WINDOW: usize = 100;
/// The number of steps before the first warning.
const MIN_HISTORY: usize = 12;
/// A loss is a spike if it exceeds the median by this factor,
const SPIKE_RATIO: f64 = 1.5;
/// and by this many standard deviations of the noise of its logarithm: both losses and norms have long upper tails.
const SPIKE_DEVIATIONS: f64 = 6.0;
/// A gradient norm has exploded if it exceeds the median by this factor, and by [`SPIKE_DEVIATIONS`].
const EXPLOSION_RATIO: f64 = 10.0;
/// Gradient norms up to the common clipping norm are harmless, however small the previous ones.
const HARMLESS_GRAD_NORM: f64 = 1.0;
/// The current loss is the median of this many steps.
const LEVEL_STEPS: usize = 10;
/// The loss has risen if it exceeds the lowest level of the first steps by this share,
const RISE_FROM_START: f64 = 0.1;
/// or the lowest level since then by this share,
const RISE_FROM_BEST: f64 = 0.5;
/// and by this many nats (spikes, too): differences are meaningless once rows are memorized and losses tiny,
const MIN_RISE: f64 = 0.2;
/// and by this many standard deviations of the noise of one step.
const RISE_DEVIATIONS: f64 = 4.0;
/// A run over-fits if this many evaluations in a row are worse than the best one while the training loss falls,
const OVERFITTING_EVALUATIONS: usize = 3;
/// and the validation loss has risen by this share.
const OVERFITTING_RISE: f64 = 0.01;
/// The number of steps without a second warning of the same kind; it doubles after each warning.
const BACKOFF_STEPS: usize = 50;
/// The standard deviation of normal noise divided by the median of its absolute values.
const DEVIATION_BY_MEDIAN: f64 = 1.4826;

/// Checks the steps and evaluations of a run, passed in order, and returns warnings.
///
/// All rules compare with medians of the last 100 steps. They measure noise by the median absolute difference of
/// neighbouring steps, which is robust against trends and outliers:
///
/// - a spike: a loss above 1.5 medians, and above the median by 6 standard deviations of the logarithm and by 0.2 nats;
/// - an explosion: a gradient norm above 1, above 10 medians, and above the median by 6 of these deviations;
/// - a rising loss: the median of the last 10 losses exceeds the median of the first 3, 5 or 10 by a tenth, or the
///   lowest so far by half, and in both cases by 0.2 nats and 4 standard deviations. Or the validation loss exceeds the
///   first one by a tenth while the training loss does not fall;
/// - over-fitting: three evaluations in a row are worse than the best one, the last by 1 %, while the training loss fell.
///
/// After a warning, no other of its kind is returned for 50 steps, then for 100, and so on; the last two kinds are
/// returned once per run. A resumed run starts without history.
#[derive(Debug, Clone, Default)]
pub struct TrainingMonitor {
    max_grad_norm: Option<f64>,
    losses: Window,
    grad_norms: Window,
    first_losses: Vec<f64>,
    first_step: usize,
    highest_learning_rate: f64,
    /// Lowest median of [`LEVEL_STEPS`] losses, with its step.
    best_level: Option<(usize, f64)>,
    spikes: Backoff,
    explosions: Backoff,
    has_risen: bool,
    has_overfitted: bool,
    /// Sum and number of the losses since the last evaluation.
    since_evaluation: (f64, usize),
    first_evaluation: Option<Evaluated>,
    best_evaluation: Option<Evaluated>,
    evaluations_since_best: usize,
}

/// An evaluation, and the mean training loss since the previous evaluation.
#[derive(Debug, Clone, Copy)]
struct Evaluated {
    step: usize,
    loss: f64,
    train_loss: Option<f64>,
}

impl TrainingMonitor {
    /// A monitor of a run whose gradients are clipped to `max_grad_norm`.
    pub fn new(max_grad_norm: Option<f64>) -> Self {
        Self { max_grad_norm, ..Self::default() }
    }

    /// Records a step and returns the warnings about it.
    pub fn step(&mut self, step: &StepMetrics) -> Vec<TrainingWarning> {
        let mut warnings = Vec::new();
        let &StepMetrics { step, loss, grad_norm, learning_rate, .. } = step;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return warnings;
        }
        self.highest_learning_rate = self.highest_learning_rate.max(learning_rate);
        if self.losses.len() >= MIN_HISTORY {
            let median = self.losses.median();
            let is_spike = loss > (median * self.losses.tail().max(SPIKE_RATIO)).max(median + MIN_RISE);
            if is_spike && self.spikes.allows(step) {
                warnings.push(TrainingWarning::LossSpike { loss, median });
            }
            let median = self.grad_norms.median();
            let is_large = grad_norm > HARMLESS_GRAD_NORM.max(median * self.grad_norms.tail().max(EXPLOSION_RATIO));
            if is_large && self.explosions.allows(step) {
                let max_grad_norm = self.max_grad_norm;
                warnings.push(TrainingWarning::GradientExplosion { grad_norm, median, max_grad_norm });
            }
        }
        self.losses.push(loss);
        self.grad_norms.push(grad_norm);
        self.since_evaluation.0 += loss;
        self.since_evaluation.1 += 1;
        if self.first_losses.is_empty() {
            self.first_step = step;
        }
        if self.first_losses.len() < LEVEL_STEPS {
            self.first_losses.push(loss);
        }
        warnings.extend(self.rise(step));
        warnings
    }

    /// Returns a warning once the level of the loss has risen.
    fn rise(&mut self, step: usize) -> Option<TrainingWarning> {
        if self.has_risen || self.losses.len() < 2 * LEVEL_STEPS {
            return None;
        }
        let now = self.losses.median_of_last(LEVEL_STEPS);
        let noise = RISE_DEVIATIONS * self.losses.deviation();
        // the first few losses alone, too: later ones may have been driven up by the updates
        let levels = [3, 5, LEVEL_STEPS].map(|steps| median(&self.first_losses[..steps.min(self.first_losses.len())]));
        let start = levels.into_iter().fold(f64::INFINITY, f64::min);
        let is_above = |from: f64, share: f64| now - from > (share * from).max(MIN_RISE).max(noise);
        let (best_step, best) = *self.best_level.get_or_insert((step, now));
        let from = if is_above(start, RISE_FROM_START) {
            (self.first_step, start)
        } else if is_above(best, RISE_FROM_BEST) {
            (best_step, best)
        } else {
            if now < best {
                self.best_level = Some((step, now));
            }
            return None;
        };
        Some(self.risen(from, now, false))
    }

    fn risen(&mut self, (from_step, from): (usize, f64), to: f64, is_validation: bool) -> TrainingWarning {
        self.has_risen = true;
        TrainingWarning::LossRises { from, from_step, to, learning_rate: self.highest_learning_rate, is_validation }
    }

    /// Records an evaluation and returns the warnings about it.
    pub fn evaluation(&mut self, evaluation: &EvaluationMetrics) -> Vec<TrainingWarning> {
        let &EvaluationMetrics { step, loss } = evaluation;
        if !loss.is_finite() {
            return Vec::new();
        }
        let (sum, count) = std::mem::take(&mut self.since_evaluation);
        let train_loss = (count > 0).then(|| sum / count as f64);
        let now = Evaluated { step, loss, train_loss };
        let (Some(first), Some(best)) = (self.first_evaluation, self.best_evaluation) else {
            (self.first_evaluation, self.best_evaluation) = (Some(now), Some(now));
            return Vec::new();
        };
        if loss < best.loss {
            self.best_evaluation = Some(now);
            self.evaluations_since_best = 0;
            return Vec::new();
        }
        self.evaluations_since_best += 1;
        let start = self.first_losses.first().copied();
        let train_falls = train_loss.zip(best.train_loss.or(start)).is_none_or(|(now, then)| now < then);
        let mut warnings = Vec::new();
        if !self.has_risen && !train_falls && loss - first.loss > (RISE_FROM_START * first.loss).max(MIN_RISE) {
            warnings.push(self.risen((first.step, first.loss), loss, true));
        }
        let is_worse = self.evaluations_since_best >= OVERFITTING_EVALUATIONS
            && loss > best.loss * (1.0 + OVERFITTING_RISE)
            && train_falls;
        if let (true, false, Some(train_loss_now), Some(train_loss_then)) =
            (is_worse, self.has_overfitted, train_loss, best.train_loss.or(start))
        {
            self.has_overfitted = true;
            warnings.push(TrainingWarning::Overfitting {
                best_step: best.step,
                best_loss: best.loss,
                loss,
                train_loss_then,
                train_loss_now,
            });
        }
        warnings
    }
}

/// Limits how often one kind of warning is returned.
#[derive(Debug, Clone, Copy, Default)]
struct Backoff {
    until: usize,
    warnings: u32,
}

impl Backoff {
    fn allows(&mut self, step: usize) -> bool {
        let is_allowed = step >= self.until;
        if is_allowed {
            self.until = step.saturating_add(BACKOFF_STEPS.saturating_mul(1 << self.warnings.min(16)));
            self.warnings += 1;
        }
        is_allowed
    }
}

/// The most recent values.
#[derive(Debug, Clone, Default)]
struct Window {
    values: VecDeque<f64>,
}

impl Window {
    fn push(&mut self, value: f64) {
        if self.values.len() == WINDOW {
            self.values.pop_front();
        }
        self.values.push_back(value);
    }

    fn len(&self) -> usize {
        self.values.len()
    }

    fn median(&self) -> f64 {
        self.median_of_last(self.len())
    }

    fn median_of_last(&self, count: usize) -> f64 {
        let values: Vec<f64> = self.values.iter().rev().take(count).copied().collect();
        median(&values)
    }

    /// The standard deviation of the noise of one value.
    fn deviation(&self) -> f64 {
        Self::noise(self.values.iter().copied())
    }

    /// The factor within which noise may scale a value.
    fn tail(&self) -> f64 {
        let noise = Self::noise(self.values.iter().map(|value| value.max(f64::MIN_POSITIVE).ln()));
        // an estimate from few values is uncertain
        let caution = 1.0 + 5.0 / self.len().max(1) as f64;
        (SPIKE_DEVIATIONS * caution * noise).exp()
    }

    /// The standard deviation, from the differences of neighbours, which have twice the variance of a value.
    fn noise(values: impl Iterator<Item = f64> + Clone) -> f64 {
        let differences: Vec<f64> =
            values.clone().skip(1).zip(values).map(|(next, value)| (next - value).abs()).collect();
        DEVIATION_BY_MEDIAN * median(&differences) / std::f64::consts::SQRT_2
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        len if len % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::{TrainingMonitor, TrainingWarning, median};
    use crate::data::Random;
    use crate::training::{EvaluationMetrics, StepMetrics};

    /// The first 60 steps of the built-in model on its sample data.
    const LOSSES: [f64; 60] = [
        2.02, 2.093, 2.09, 1.86, 1.866, 1.483, 1.447, 1.669, 1.423, 1.528, 1.319, 1.502, 1.303, 1.558, 1.407, 1.255,
        1.344, 1.301, 1.359, 1.101, 1.294, 1.411, 1.289, 1.149, 1.374, 1.568, 1.198, 1.233, 1.355, 1.296, 1.164, 1.3,
        1.238, 1.032, 1.141, 1.357, 1.437, 1.279, 1.39, 1.347, 1.161, 1.253, 1.141, 1.293, 1.132, 1.11, 1.285, 1.09,
        0.996, 1.14, 1.165, 1.093, 1.19, 1.12, 1.119, 1.069, 1.319, 1.302, 1.23, 1.185,
    ];
    const GRAD_NORMS: [f64; 60] = [
        0.637, 0.577, 0.498, 0.639, 0.57, 0.42, 0.463, 0.708, 0.645, 0.514, 0.348, 0.336, 0.327, 0.35, 0.33, 0.31,
        0.319, 0.328, 0.326, 0.308, 0.27, 0.309, 0.305, 0.333, 0.315, 0.323, 0.321, 0.371, 0.345, 0.366, 0.329, 0.323,
        0.323, 0.306, 0.363, 0.349, 0.366, 0.322, 0.368, 0.38, 0.315, 0.356, 0.314, 0.312, 0.354, 0.369, 0.321, 0.317,
        0.31, 0.307, 0.298, 0.329, 0.328, 0.31, 0.276, 0.311, 0.317, 0.347, 0.329, 0.309,
    ];
    const VALID_LOSSES: [f64; 11] = [2.141, 1.45, 1.318, 1.261, 1.252, 1.228, 1.211, 1.204, 1.199, 1.191, 1.186];

    fn step(step: usize, loss: f64, grad_norm: f64) -> StepMetrics {
        StepMetrics {
            step,
            epoch: 1,
            loss,
            learning_rate: 3e-3,
            grad_norm,
            tokens: 2000,
            trained_tokens: 500,
            tokens_per_second: 1e4,
        }
    }

    /// The step and kind of each warning of a run.
    fn warnings(losses: &[f64], grad_norms: &[f64], valid: &[f64], interval: usize) -> Vec<(usize, &'static str)> {
        let mut monitor = TrainingMonitor::new(Some(1.0));
        let mut found = Vec::new();
        for number in 0..=losses.len() {
            let mut warnings = Vec::new();
            if number > 0 {
                warnings = monitor.step(&step(number, losses[number - 1], grad_norms[(number - 1) % grad_norms.len()]));
            }
            if let (0, Some(&loss)) = (number % interval, valid.get(number / interval)) {
                warnings.extend(monitor.evaluation(&EvaluationMetrics { step: number, loss }));
            }
            found.extend(warnings.iter().map(|warning| (number, warning.kind())));
        }
        found
    }

    fn of_losses(losses: &[f64]) -> Vec<(usize, &'static str)> {
        warnings(losses, &[0.3], &[], 1)
    }

    /// A standard normal number.
    fn normal(random: &mut Random) -> f64 {
        let (a, b) = (random.next_f64().max(1e-300), random.next_f64());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }

    /// A loss that falls from `from` to `to` with multiplicative noise, as with small batches.
    fn falling(steps: usize, from: f64, to: f64, noise: f64, random: &mut Random) -> Vec<f64> {
        let level = |i: usize| to + (from - to) * (-5.0 * i as f64 / steps as f64).exp();
        (0..steps).map(|i| level(i) * (noise * normal(random)).exp()).collect()
    }

    #[test]
    fn a_healthy_run_has_no_warnings() {
        assert_eq!(warnings(&LOSSES, &GRAD_NORMS, &VALID_LOSSES, 6), []);
    }

    #[test]
    fn noise_causes_no_warnings() {
        let mut random = Random::new(5);
        for run in 0..300 {
            let noise = [0.02, 0.1, 0.2, 0.4][run % 4];
            let to = [0.3, 1.2, 2.5][run % 3];
            let losses = falling(400, 2.6, to, noise, &mut random);
            let norms: Vec<f64> = (0..400).map(|_| (0.5 * normal(&mut random)).exp()).collect();
            assert_eq!(warnings(&losses, &norms, &[], 1), [], "noise {noise}, to {to}");
        }
    }

    #[test]
    fn spikes_are_reported_at_growing_intervals() {
        let mut losses = falling(400, 2.0, 1.2, 0.1, &mut Random::new(1));
        for at in [100, 101, 103, 110] {
            losses[at] = 4.0;
        }
        assert_eq!(of_losses(&losses), [(101, "loss spike")]);
        for at in [200, 250, 399] {
            losses[at] = 4.0;
        }
        // silent for 50 steps, then for 100
        assert_eq!(of_losses(&losses), [101, 201, 400].map(|step| (step, "loss spike")));
        // the losses of memorized rows are near zero
        let known: Vec<f64> = falling(200, 0.01, 0.001, 0.1, &mut Random::new(3));
        let jumped: Vec<f64> = known.iter().enumerate().map(|(i, &loss)| if i == 150 { 0.1 } else { loss }).collect();
        assert_eq!(of_losses(&jumped), []);
        // the real run, once with a bad batch
        let mut losses = LOSSES;
        losses[40] = 3.0;
        assert_eq!(warnings(&losses, &GRAD_NORMS, &VALID_LOSSES, 6), [(41, "loss spike")]);
    }

    #[test]
    fn exploding_gradients_are_reported() {
        let mut norms = GRAD_NORMS;
        norms[30] = 5.0;
        assert_eq!(warnings(&LOSSES, &norms, &VALID_LOSSES, 6), [(31, "gradient explosion")]);
        // three medians are too few, and norms below 1 are harmless
        norms[30] = 0.95;
        assert_eq!(warnings(&LOSSES, &norms, &VALID_LOSSES, 6), []);
        let tiny: Vec<f64> = GRAD_NORMS.iter().map(|norm| norm / 1e3).collect();
        norms[..30].copy_from_slice(&tiny[..30]);
        assert_eq!(warnings(&LOSSES, &norms, &VALID_LOSSES, 6), []);
    }

    #[test]
    fn a_rising_loss_is_reported_once() {
        let noise = &mut Random::new(2);
        // from the first step on
        let diverged: Vec<f64> = (0..200)
            .map(|i| if i < 3 { 2.0 } else { 2.0 + 5.0 * (f64::from(i - 2) / 4.0).min(1.0) } + 0.1 * normal(noise))
            .collect();
        let found = of_losses(&diverged);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0], (20, "loss rises"));
        // slowly
        let slow: Vec<f64> = (0..300).map(|i| 2.0 + f64::from(i) * 0.005 + 0.1 * normal(noise)).collect();
        let found = of_losses(&slow);
        assert!(found.len() == 1 && found[0].1 == "loss rises" && found[0].0 < 120, "{found:?}");
        // after it had fallen
        let mut late = falling(200, 2.5, 1.0, 0.05, noise);
        late.extend((0..100).map(|i| 1.0 + f64::from(i) * 0.01));
        let found = of_losses(&late);
        assert!(found.len() == 1 && found[0].1 == "loss rises" && (200..290).contains(&found[0].0), "{found:?}");
        // seen in the validation loss
        assert_eq!(warnings(&[2.0; 12], &[0.3], &[2.0, 2.1, 2.3], 6), [(12, "loss rises")]);
    }

    #[test]
    fn messages_suggest_a_remedy() {
        let mut monitor = TrainingMonitor::new(None);
        let mut warnings = Vec::new();
        for number in 1..=40 {
            warnings.extend(monitor.step(&step(number, if number < 4 { 2.0 } else { 7.0 }, 0.3)));
        }
        assert!(matches!(warnings.as_slice(), [TrainingWarning::LossRises { from_step: 1, .. }]), "{warnings:?}");
        let text = warnings[0].to_string();
        assert!(
            text.contains("from 2.000 at step 1 to 7.000")
                && text.contains("rate of 0.003")
                && text.contains("try 0.001"),
            "{text}"
        );
    }

    #[test]
    fn over_fitting_is_reported_once() {
        let train: Vec<f64> = (0..120).map(|i| 2.0 - f64::from(i) / 80.0).collect();
        let valid = [2.0, 1.6, 1.5, 1.52, 1.56, 1.6, 1.7, 1.8];
        assert_eq!(warnings(&train, &[0.3], &valid, 10), [(50, "over-fitting")]);
        // neither a constant validation loss nor one that rises with the training loss is over-fitting
        let flat = [2.0, 1.6, 1.5, 1.501, 1.502, 1.503, 1.504, 1.505];
        assert_eq!(warnings(&train, &[0.3], &flat, 10), []);
        let same: Vec<f64> = (0..80).map(|i| if i < 20 { 1.5 } else { 1.6 }).collect();
        assert_eq!(warnings(&same, &[0.3], &valid, 10), []);
    }

    #[test]
    fn non_finite_numbers_are_ignored() {
        let mut losses = LOSSES;
        (losses[20], losses[30]) = (f64::NAN, f64::INFINITY);
        assert_eq!(warnings(&losses, &GRAD_NORMS, &[2.141, f64::NAN, 1.318], 6), []);
        assert!((median(&[]) - 0.0).abs() < 1e-12 && (median(&[3.0, 1.0, 2.0, 4.0]) - 2.5).abs() < 1e-12);
    }
}
