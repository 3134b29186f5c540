//! The reference implementation of 8-bit products without vectors, which defines the results bit for bit.

use super::activations::{Activations, Sums, with_quantized};
use super::kernels::activation_bytes;
use super::lanes::{COLUMNS, Kind, Unpack};
use crate::blocks::decode::{Decoder, IQ4NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Target};
use crate::blocks::matrix::{BlockFormat, with_writable};
use crate::blocks::superblocks::{IQ4XS, Q2K, Q3K, Q4K, Q5K, Q6K};
use crate::blocks::task::Task;
use crate::isa::Arithmetic;
use crate::parallel::for_each;
use std::marker::PhantomData;

/// Computes the product.
pub(super) fn run<A: Arithmetic>(task: &Task) {
    with_writable!(task.b.format(), F => run_format::<A, F>(task), unreachable!());
}

fn run_format<A: Arithmetic, F: Decoder + Unpack>(task: &Task) {
    let ((m, n), k) = (task.shape, task.b.columns());
    // weights are centered, but weights with minimums need the sums
    with_quantized(task.a, (m, k), (F::Kind::GROUPS, Sums::Minimums), |a| {
        for_each(n, m * n * k, |j| {
            // SAFETY: tasks have disjoint columns.
            unsafe { task.start.write_columns(task.c, (m, n), j..j + 1) };
            for i in 0..m {
                let dot = dot::<A, F>(task.b.blocks(j, 0..k), a, i);
                // SAFETY: as above.
                let c = unsafe { &mut task.c.part(i * n + j, 1)[0] };
                *c = A::mul_add(task.alpha, dot, *c);
            }
        });
    });
}

#[inline(always)]
fn dot<A: Arithmetic, F: Decoder + Unpack>(row: &[u8], a: Activations, i: usize) -> f32 {
    let mut sum = 0.0;
    for (number, block) in row.chunks_exact(F::BYTES).enumerate() {
        let a = a.row(i, number * F::LEN / COLUMNS, F::Kind::GROUPS);
        let mut terms = Terms::<A, F::Kind> { a, dot: 0, term: 0.0, minimums: [0.0; 2], sum, kind: PhantomData };
        F::decode::<A, _>(block, &mut terms);
        sum = terms.sum;
    }
    sum
}

/// Sums the products with 32 columns, which arrive in two halves of 16.
struct Terms<A, K> {
    /// The activations of these columns.
    a: *const u8,
    /// The integer sum so far.
    dot: i32,
    term: f32,
    minimums: [f32; 2],
    sum: f32,
    kind: PhantomData<(A, K)>,
}

impl<A: Arithmetic, K: Kind> Terms<A, K> {
    #[inline(always)]
    fn add(&mut self, q: &[i8; 16], scale: f32, offset: f32, at: usize) {
        let half = at % COLUMNS / 16;
        for i in 0..16 {
            // SAFETY: the activations have the columns of the block.
            let a = unsafe { self.a.add(16 * half + i).cast::<i8>().read() };
            self.dot += i32::from(q[i]) * i32::from(a);
        }
        self.minimums[half] = offset;
        if half == 0 && K::GROUPS == 1 {
            return;
        }
        let dot = std::mem::take(&mut self.dot) as f32;
        self.term = if K::GROUPS == 1 || half == 0 { dot * scale } else { A::mul_add(dot, scale, self.term) };
        if half == 0 {
            return;
        }
        // SAFETY: as above; these follow the integers.
        let factor = |at: usize| unsafe { self.a.add(COLUMNS + 4 * at).cast::<f32>().read_unaligned() };
        if K::HAS_MINIMUMS {
            for group in 0..K::GROUPS {
                self.term = A::mul_add(factor(1 + group), self.minimums[group], self.term);
            }
        }
        self.sum = A::mul_add(self.term, factor(0), self.sum);
        self.a = self.a.wrapping_add(activation_bytes(K::GROUPS));
    }
}

impl<A: Arithmetic, K: Kind> Target for Terms<A, K> {
    #[inline(always)]
    fn scaled(&mut self, q: &[i8; 16], scale: f32, at: usize) {
        self.add(q, scale, 0.0, at);
    }

    #[inline(always)]
    fn shifted(&mut self, q: &[i8; 16], scale: f32, offset: f32, at: usize) {
        self.add(q, scale, offset, at);
    }
}
