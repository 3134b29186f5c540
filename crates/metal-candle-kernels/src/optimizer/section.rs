//! Sections of flat buffers, and parallel loops over their elements.

use crate::isa::{Arithmetic, dispatch};
use crate::parallel::{Shared, for_each};

/// The number of elements of a task; a multiple of [`BLOCK`](super::BLOCK).
pub(super) const CHUNK: usize = 64 * 1024;

/// A range of the flat parameters with its own settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Section {
    /// Its offset in the parameters and gradients.
    pub start: usize,
    /// Its number of elements.
    pub len: usize,
    /// The offset of its state.
    pub state: usize,
    /// Factor of the learning rate.
    pub rate: f64,
    /// Whether weight decay applies.
    pub decays: bool,
}

impl Section {
    pub(super) fn learning_rate(&self, learning_rate: f64) -> f64 {
        learning_rate * self.rate
    }

    pub(super) fn weight_decay(&self, weight_decay: f64) -> f64 {
        if self.decays { weight_decay } else { 0.0 }
    }
}

/// A section that is a row-major matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatrixSection {
    /// Its elements; `state` is the offset of the state of its rows or of all its elements.
    pub section: Section,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// The offset of the state of its columns, if it is separate.
    pub column_state: usize,
}

/// Checks that the ranges (start and length) are sorted, do not overlap, and do not exceed `len`.
pub(super) fn check(ranges: impl Iterator<Item = (usize, usize)>, len: usize, what: &str) {
    let end = ranges.fold(0, |end, (start, count)| {
        assert!(start >= end, "{what}: sections overlap or are out of order");
        start + count
    });
    assert!(end <= len, "{what}: expected at least {end} elements, found {len}");
}

/// Runs `update` in parallel on chunks of the parameters, gradients and states of each section.
///
/// # Panics
/// Sections are out of order, overlap, or exceed a buffer.
pub(super) fn for_each_piece<const N: usize>(
    sections: &[Section],
    params: &mut [f32],
    grads: &[f32],
    states: [&mut [f32]; N],
    update: impl Fn(&Section, &mut [f32], &[f32], [&mut [f32]; N]) + Send + Sync,
) {
    check(sections.iter().map(|s| (s.start, s.len)), params.len().min(grads.len()), "parameters");
    for state in &states {
        check(sections.iter().map(|s| (s.state, s.len)), state.len(), "state");
    }
    let pieces: Vec<Section> = sections
        .iter()
        .flat_map(|section| {
            (0..section.len).step_by(CHUNK).map(move |done| Section {
                start: section.start + done,
                len: CHUNK.min(section.len - done),
                state: section.state + done,
                ..*section
            })
        })
        .collect();
    let work = params.len();
    let (params, states) = (Shared::new(params), states.map(Shared::new));
    for_each(pieces.len(), work, |number| {
        let piece = &pieces[number];
        // SAFETY: the sections are disjoint and within the buffers, and so are their chunks.
        let (params, states) =
            unsafe { (params.part(piece.start, piece.len), states.map(|state| state.part(piece.state, piece.len))) };
        update(piece, params, &grads[piece.start..][..piece.len], states);
    });
}

/// The sum of squares in f64. The order of summation does not depend on the number of threads.
#[must_use]
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let mut sums = vec![0.0; values.len().div_ceil(CHUNK)];
    let shared = Shared::new(&mut sums);
    for_each(values.len().div_ceil(CHUNK), values.len(), |chunk| {
        let start = chunk * CHUNK;
        // SAFETY: tasks have disjoint elements.
        let sum = unsafe { shared.part(chunk, 1) };
        sum[0] = squares(&values[start..values.len().min(start + CHUNK)]);
    });
    sums.iter().sum()
}

dispatch! {
    fn squares(values: &[f32]) -> f64 = squares_body
}

#[inline(always)]
fn squares_body<A: Arithmetic>(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0.0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            let value = f64::from(chunk[i]);
            lanes[i] += value * value;
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>()
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    fn section(start: usize, len: usize) -> Section {
        Section { start, len, state: start, rate: 1.0, decays: true }
    }

    #[test]
    fn every_element_is_visited_once_with_its_own_settings() {
        let n = 2 * CHUNK + 17;
        let mut params = vec![0.0; n];
        let mut state = vec![0.0; n + 5];
        let grads: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let sections = [section(0, 3), Section { state: 4, rate: 2.0, ..section(5, n - 5) }];
        for_each_piece(&sections, &mut params, &grads, [&mut state], |piece, params, grads, [state]| {
            for i in 0..params.len() {
                params[i] += grads[i] * piece.rate as f32;
                state[i] += 1.0;
            }
        });
        assert_eq!(params[..6], [0.0, 1.0, 2.0, 0.0, 0.0, 10.0]);
        assert_eq!(params[n - 1], 2.0 * (n - 1) as f32);
        assert_eq!(state[..5], [1.0, 1.0, 1.0, 0.0, 1.0]);
        assert!(state[4..n - 1].iter().all(|&count| count == 1.0) && state[n - 1..].iter().all(|&count| count == 0.0));
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_sections_are_refused() {
        for_each_piece(&[section(0, 3), section(2, 2)], &mut [0.0; 8], &[0.0; 8], [], |_, _, _, []| {});
    }

    #[test]
    fn squares_are_summed_in_f64() {
        let values: Vec<f32> = (0..CHUNK + 1000).map(|i| ((i * 7919) % 1000) as f32 * 1e-3).collect();
        let expected: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
        assert!((sum_of_squares(&values) / expected - 1.0).abs() < 1e-13);
        assert_eq!(sum_of_squares(&[]), 0.0);
    }
}
