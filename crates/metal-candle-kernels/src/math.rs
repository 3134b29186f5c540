//! Element types, conversions and the exponential.

use crate::isa::{Arithmetic, dispatch, half_to_f32};
use half::{bf16, f16};

/// An element type that kernels read: `f32`, `f16` or `bf16`.
pub trait Element: Copy + Send + Sync + 'static {
    /// The value as `f32`, exactly.
    fn to_f32(self) -> f32;
    /// The nearest value of this type.
    fn from_f32(value: f32) -> Self;
    /// The slice itself if the type is `f32`.
    fn as_f32(slice: &[Self]) -> Option<&[f32]> {
        let _ = slice;
        None
    }
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    fn as_f32(slice: &[Self]) -> Option<&[f32]> {
        Some(slice)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        half_to_f32(self.to_bits())
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

dispatch! {
    /// Converts `from` to `f32`; both have the same length.
    pub fn widen<T: Element>(from: &[T], to: &mut [f32]) = widen_body
}

#[inline(always)]
fn widen_body<A: Arithmetic, T: Element>(from: &[T], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

/// Converts `from` to the nearest values of `T`; both have the same length.
pub fn narrow<T: Element>(from: &[f32], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = T::from_f32(*from);
    }
}

/// `e^x` within 2 units in the last place; 0 below -87.3, the largest finite power above 88.
#[inline(always)]
pub(crate) fn exp<A: Arithmetic>(x: f32) -> f32 {
    let (p, power) = reduced_exp::<A>(x);
    let value = (p + 1.0) * power;
    if x < -87.3 { 0.0 } else { value }
}

/// `p` and `2^n` with `e^x = (1 + p) 2^n`, for `x` within -87.3 and 88.
///
/// Range reduction by `ln 2` in two parts and a polynomial of degree 6 (J.-M. Muller, Elementary Functions, chapter 4).
#[inline(always)]
fn reduced_exp<A: Arithmetic>(x: f32) -> (f32, f32) {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = A::mul_add(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = A::mul_add(n, -0.693_359_4, clamped);
    let r = A::mul_add(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    p = A::mul_add(p, r, 1.398_199_9e-3);
    p = A::mul_add(p, r, 8.333_452e-3);
    p = A::mul_add(p, r, 4.166_579_6e-2);
    p = A::mul_add(p, r, 1.666_666_5e-1);
    p = A::mul_add(p, r, 0.5);
    let exponent = (shifted.to_bits() << 23).wrapping_add(0x3f80_0000);
    (A::mul_add(p, r * r, r), f32::from_bits(exponent))
}

/// The hyperbolic tangent within 4 units in the last place, including small values: from `e^(2x) - 1`.
#[inline(always)]
pub(crate) fn tanh<A: Arithmetic>(x: f32) -> f32 {
    let (p, power) = reduced_exp::<A>(2.0 * x.clamp(-15.0, 15.0));
    let less_one = A::mul_add(p, power, power - 1.0);
    less_one / (less_one + 2.0)
}

/// `c tanh(x / c)`.
#[inline(always)]
pub(crate) fn soft_cap<A: Arithmetic>(x: f32, cap: f32) -> f32 {
    cap * tanh::<A>(x / cap)
}

/// The logistic function `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<A: Arithmetic>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<A>(-x))
}

/// Lanes of the accumulators of a sum.
pub(crate) const LANES: usize = 32;

/// Sums the lanes of an accumulator pairwise; `N` is a power of two.
#[inline(always)]
pub(crate) fn add_lanes<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of `term(values[i])`.
#[inline(always)]
pub(crate) fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += term(chunk[i]);
        }
    }
    for (i, v) in rest.iter().enumerate() {
        lanes[i] += term(*v);
    }
    add_lanes(lanes)
}

/// `sum a[i] b[i]` of slices of equal length.
#[inline(always)]
pub(crate) fn dot<A: Arithmetic, T: Element>(a: &[T], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = A::mul_add(a[i].to_f32(), b[i], lanes[i]);
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] = A::mul_add(a.to_f32(), *b, lanes[i]);
    }
    add_lanes(lanes)
}

/// The largest element; negative infinity for an empty slice. NaN is ignored.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::isa::{Fused, Separate};

    #[test]
    fn exponential_is_within_two_ulps() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let exact = f64::from(x).exp();
            for value in [exp::<Fused>(x), exp::<Separate>(x)] {
                assert!((f64::from(value) / exact - 1.0).abs() < 2.5e-7, "{x}: {value} {exact}");
            }
            x += 0.0137;
        }
        assert_eq!(exp::<Fused>(-1e30), 0.0);
        assert_eq!(exp::<Fused>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<Fused>(0.0), 1.0);
        assert!(exp::<Fused>(1000.0).is_finite());
        assert!(exp::<Fused>(f32::NAN).is_nan());
    }

    #[test]
    fn hyperbolic_tangent_is_exact_to_a_few_ulps() {
        let mut x = 1e-6f32;
        while x < 20.0 {
            let exact = f64::from(x).tanh();
            for value in [tanh::<Fused>(x), tanh::<Separate>(x), -tanh::<Fused>(-x)] {
                assert!((f64::from(value) / exact - 1.0).abs() < 4e-7, "{x}: {value} {exact}");
            }
            x *= 1.003;
        }
        assert_eq!(tanh::<Fused>(0.0), 0.0);
        assert_eq!([tanh::<Fused>(1e30), tanh::<Fused>(f32::NEG_INFINITY)], [1.0, -1.0]);
        assert!(tanh::<Fused>(f32::NAN).is_nan());
    }

    #[test]
    fn half_conversion_is_exact_for_every_value() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (Element::to_f32(f16::from_bits(bits)), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
            let (ours, theirs) = (Element::to_f32(bf16::from_bits(bits)), bf16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
        }
    }
}
