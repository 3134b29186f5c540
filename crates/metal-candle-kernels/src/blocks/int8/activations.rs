//! Quantizes rows of activations.

use super::kernels::activation_bytes;
use super::lanes::COLUMNS;
use crate::gemm_rows::Line;
use crate::isa::{Arithmetic, dispatch};
use crate::parallel::{Shared, for_each};
use std::cell::Cell;

/// Quantized rows. Each 32 columns are stored as 32 integers, the scale, and for each group of columns the sum of its integers:
/// as f32 for weights with minimums, otherwise as an integer times the negative zero point of the weights.
#[derive(Clone, Copy)]
pub(super) struct Activations {
    first: *const u8,
    /// The row stride in bytes.
    pub(super) stride: usize,
}

// SAFETY: it is only read while the buffer is borrowed.
unsafe impl Sync for Activations {}
// SAFETY: as above.
unsafe impl Send for Activations {}

impl Activations {
    /// Row `row`, starting at the block of 32 columns `block`.
    pub(super) fn row(self, row: usize, block: usize, groups: usize) -> *const u8 {
        self.first.wrapping_add(row * self.stride + block * activation_bytes(groups))
    }
}

/// The purpose of the sums of the integers.
#[derive(Clone, Copy)]
pub(super) enum Sums {
    /// Weights with this zero point.
    Zero(i32),
    /// Weights with minimums.
    Minimums,
}

thread_local! {
    static ROWS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Calls `run` with the quantized rows of A: `[m, k]`.
pub(super) fn with_quantized(
    a: &[f32],
    (m, k): (usize, usize),
    (groups, sums): (usize, Sums),
    run: impl FnOnce(Activations),
) {
    let bytes = k / COLUMNS * activation_bytes(groups);
    // an odd number of cache lines: with a power of two, rows would share cache sets
    let lines = bytes.div_ceil(64) | 1;
    let mut buffer = ROWS.take();
    if buffer.len() < m * lines {
        // free first: growing in place would need memory for both buffers
        drop(buffer);
        buffer = vec![Line::default(); m * lines];
    }
    let shared = Shared::new(&mut buffer);
    for_each(m, m * k, |row| {
        // SAFETY: tasks have disjoint rows.
        let to = Line::bytes_mut(unsafe { shared.part(row * lines, lines) });
        quantize(&a[row * k..][..k], groups, sums, &mut to[..bytes]);
    });
    run(Activations { first: buffer.as_ptr().cast(), stride: 64 * lines });
    ROWS.set(buffer);
}

dispatch! {
    /// Quantizes a row.
    fn quantize(from: &[f32], groups: usize, sums: Sums, to: &mut [u8]) = quantize_body
}

/// Without fused multiply-add, so that results are identical on every instruction set.
#[inline(always)]
fn quantize_body<A: Arithmetic>(from: &[f32], groups: usize, sums: Sums, to: &mut [u8]) {
    /// Added to a number below 2^22, it leaves the nearest integer in the low bits; ties are to even.
    const ROUND: f32 = 12_582_912.0;
    for (from, to) in from.as_chunks::<COLUMNS>().0.iter().zip(to.chunks_exact_mut(activation_bytes(groups))) {
        // the bits of absolute values have the same order as the values; infinities and NaN are above all of them
        let mut largest = 0;
        for i in 0..COLUMNS {
            largest = (from[i].to_bits() & 0x7fff_ffff).max(largest);
        }
        let largest = f32::from_bits(largest);
        let (scale, inverse) = if !largest.is_finite() {
            // these have no integer representation: the result is NaN
            (f32::NAN, 0.0)
        } else if largest < 1e-30 {
            // the inverse might overflow
            (0.0, 0.0)
        } else {
            (largest / 127.0, 127.0 / largest)
        };
        let mut q = [0_i8; COLUMNS];
        for i in 0..COLUMNS {
            q[i] = (from[i] * inverse + ROUND).to_bits() as i8;
        }
        let (mut low, mut high) = (0, 0);
        for i in 0..COLUMNS / 2 {
            low += i32::from(q[i]);
            high += i32::from(q[COLUMNS / 2 + i]);
        }
        for i in 0..COLUMNS {
            to[i] = q[i].cast_unsigned();
        }
        to[COLUMNS..COLUMNS + 4].copy_from_slice(&scale.to_ne_bytes());
        let of_groups = if groups == 1 { [low + high, 0] } else { [low, high] };
        for group in 0..groups {
            let bytes = match sums {
                Sums::Zero(zero) => (-zero * of_groups[group]).to_ne_bytes(),
                Sums::Minimums => (of_groups[group] as f32).to_ne_bytes(),
            };
            to[COLUMNS + 4 + 4 * group..][..4].copy_from_slice(&bytes);
        }
    }
}
