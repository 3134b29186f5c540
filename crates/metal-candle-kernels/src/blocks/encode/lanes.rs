//! Arithmetic on several numbers in parallel.
//!
//! Quantizers search for the scales of sixteen groups of weights in parallel, one group per lane. Each lane adds its numbers in
//! ascending order without fused operations, so results are identical on every instruction set.

use std::ops::{Add, Div, Mul, Sub};

/// The number of groups that are quantized in parallel.
pub(super) const LANES: usize = 16;

/// 1.5 * 2^23: adding it rounds numbers below 2^22 to integers, which are then in the low bits.
pub(super) const ROUNDER: f32 = 12_582_912.0;

/// A number per lane.
#[derive(Clone, Copy)]
pub(super) struct Lanes<const L: usize = LANES>(pub(super) [f32; L]);

macro_rules! operator {
    ($operator:ident, $method:ident, $symbol:tt) => {
        impl<const L: usize> $operator for Lanes<L> {
            type Output = Self;

            #[inline(always)]
            fn $method(mut self, other: Self) -> Self {
                for lane in 0..L {
                    self.0[lane] $symbol other.0[lane];
                }
                self
            }
        }
    };
}

operator!(Add, add, +=);
operator!(Sub, sub, -=);
operator!(Mul, mul, *=);
operator!(Div, div, /=);

impl<const L: usize> Lanes<L> {
    pub(super) const ZERO: Self = Self([0.0; L]);

    #[inline(always)]
    pub(super) fn splat(value: f32) -> Self {
        Self([value; L])
    }

    /// The smaller number; `other` if `self` is NaN.
    #[inline(always)]
    pub(super) fn min(mut self, other: Self) -> Self {
        for lane in 0..L {
            self.0[lane] = if self.0[lane] < other.0[lane] { self.0[lane] } else { other.0[lane] };
        }
        self
    }

    /// The larger number; `other` if `self` is NaN.
    #[inline(always)]
    pub(super) fn max(mut self, other: Self) -> Self {
        for lane in 0..L {
            self.0[lane] = if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] };
        }
        self
    }

    #[inline(always)]
    pub(super) fn abs(mut self) -> Self {
        for lane in 0..L {
            self.0[lane] = self.0[lane].abs();
        }
        self
    }

    #[inline(always)]
    pub(super) fn sqrt(mut self) -> Self {
        for lane in 0..L {
            self.0[lane] = self.0[lane].sqrt();
        }
        self
    }

    /// The nearest integers between `low` and `high`; ties to even. `high` for NaN.
    #[inline(always)]
    pub(super) fn rounded(self, low: f32, high: f32) -> Self {
        let rounder = Self::splat(ROUNDER);
        ((self + rounder) - rounder).min(Self::splat(high)).max(Self::splat(low))
    }

    /// Rounds down to integers between `low` and `high`. `high` for NaN.
    #[inline(always)]
    pub(super) fn floor(self, low: f32, high: f32) -> Self {
        let rounder = Self::splat(ROUNDER);
        let nearest = (self + rounder) - rounder;
        let below = Self::where_less(self, nearest, nearest - Self::splat(1.0), nearest);
        below.min(Self::splat(high)).max(Self::splat(low))
    }

    /// `yes` where `a < b`, else `no`.
    #[inline(always)]
    pub(super) fn where_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
        let mut chosen = no;
        for lane in 0..L {
            chosen.0[lane] = if a.0[lane] < b.0[lane] { yes.0[lane] } else { no.0[lane] };
        }
        chosen
    }

    /// The lowest eight bits of integers in two's complement.
    #[inline(always)]
    pub(super) fn bytes(self) -> [u8; L] {
        let mut bytes = [0; L];
        for (byte, integer) in bytes.iter_mut().zip(&self.0) {
            *byte = (integer + ROUNDER).to_bits() as u8;
        }
        bytes
    }
}

/// The integer nearest to `value`, which is below 2^22, between `low` and `high`; ties to even.
#[inline(always)]
pub(super) fn rounded(value: f32, low: f32, high: f32) -> f32 {
    Lanes([value]).rounded(low, high).0[0]
}

/// Lane `k` of element `i` is value `i` of group `k`. Lanes without a group are zero.
///
/// Never inlined: compiled for AVX-512, the loops become gathers and scatters, which are slower.
#[inline(never)]
pub(super) fn transposed<const N: usize>(values: &[f32]) -> [Lanes; N] {
    let mut lanes = [Lanes::ZERO; N];
    for (lane, group) in values.as_chunks::<N>().0.iter().enumerate().take(LANES) {
        for i in 0..N {
            lanes[i].0[lane] = group[i];
        }
    }
    lanes
}
