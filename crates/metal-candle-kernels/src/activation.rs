//! Computes the activations of MLPs, plain and gated.

use crate::elementwise::chunks;
use crate::isa::{Arithmetic, dispatch};
use crate::math::{Element, exp, sigmoid};
use crate::parallel::{Shared, written};

/// The activation `f` of an MLP, or of a gate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` (<https://arxiv.org/abs/1606.08415>).
    GeluTanh,
    /// `x / 2 * (1 + erf(x / sqrt(2)))`.
    Gelu,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2` (<https://arxiv.org/abs/2109.08668>).
    Relu2,
    /// `g * sigmoid(alpha * g)` with `g = min(x, limit)`. As a gate its product is with `clamp(up, -limit, limit) + 1`.
    Clamped {
        /// The largest value of a gate, and of the magnitude of `up`.
        limit: f32,
        /// The factor in the sigmoid.
        alpha: f32,
    },
    /// `1 / (1 + e^-x)`, the gate of gated attention.
    Sigmoid,
}

/// An activation as vector code.
trait Curve: Copy + Send + Sync {
    /// `f(x)`, and its slope.
    fn at<A: Arithmetic>(self, x: f32) -> (f32, f32);

    /// The factor of `f(gate)`, and its slope.
    #[inline(always)]
    fn up(self, up: f32) -> (f32, f32) {
        (up, 1.0)
    }

    /// The gradients of the gated product with respect to gate and up.
    #[inline(always)]
    fn gated_gradients<A: Arithmetic>(self, gate: f32, up: f32, dy: f32) -> (f32, f32) {
        let ((value, slope), (up, up_slope)) = (self.at::<A>(gate), self.up(up));
        (dy * up * slope, dy * value * up_slope)
    }
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct Gelu;
#[derive(Clone, Copy)]
struct Relu;
#[derive(Clone, Copy)]
struct Relu2;
#[derive(Clone, Copy)]
struct Sigmoid;
#[derive(Clone, Copy)]
struct Clamped {
    limit: f32,
    alpha: f32,
}

impl Curve for Silu {
    #[inline(always)]
    fn at<A: Arithmetic>(self, x: f32) -> (f32, f32) {
        let s = sigmoid::<A>(x);
        (x * s, s * (1.0 + x * (1.0 - s)))
    }

    #[inline(always)]
    fn gated_gradients<A: Arithmetic>(self, gate: f32, up: f32, dy: f32) -> (f32, f32) {
        let s = sigmoid::<A>(gate);
        (dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s)
    }
}

impl Curve for GeluTanh {
    #[inline(always)]
    fn at<A: Arithmetic>(self, x: f32) -> (f32, f32) {
        const FACTOR: f32 = 0.797_884_6; // sqrt(2 / pi)
        let square = x * x;
        // (1 + tanh(u)) / 2 = sigmoid(2 u), which is accurate where tanh is near -1
        let s = sigmoid::<A>(2.0 * FACTOR * x * (1.0 + 0.044_715 * square));
        let slope = 2.0 * FACTOR * (1.0 + 3.0 * 0.044_715 * square);
        // for large |x| the product is 0 times a number that may be infinite
        let bend = if s > 1e-30 && s < 1.0 { x * s * (1.0 - s) * slope } else { 0.0 };
        (x * s, s + bend)
    }
}

impl Curve for Gelu {
    #[inline(always)]
    fn at<A: Arithmetic>(self, x: f32) -> (f32, f32) {
        const FACTOR: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
        let tail = 0.5 * complementary_error::<A>(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
        let share = if x < 0.0 { tail } else { 1.0 - tail };
        (x * share, A::mul_add(x, FACTOR * exp::<A>(-0.5 * x * x), share))
    }
}

/// `erfc(z)` for `z >= 0` as `t e^(P(t) - z^2)` with `t = 1 / (1 + z / 2)`; P is fitted by least squares at Chebyshev points,
/// within 2e-7.
#[inline(always)]
fn complementary_error<A: Arithmetic>(z: f32) -> f32 {
    let t = 1.0 / A::mul_add(0.5, z, 1.0);
    let mut p = 0.144_930_21;
    for coefficient in [
        -0.680_827_2,
        1.156_733_8,
        -0.696_251_9,
        -0.080_280_43,
        0.001_267_586_7,
        0.034_602_8,
        0.386_640_4,
        0.998_632_8,
        -1.265_448,
    ] {
        p = A::mul_add(p, t, coefficient);
    }
    t * exp::<A>(p - z * z)
}

impl Curve for Relu {
    #[inline(always)]
    fn at<A: Arithmetic>(self, x: f32) -> (f32, f32) {
        // NaN is preserved
        (if x < 0.0 { 0.0 } else { x }, if x > 0.0 { 1.0 } else { 0.0 })
    }
}

impl Curve for Relu2 {
    #[inline(always)]
    fn at<A: Arithmetic>(self, x: f32) -> (f32, f32) {
        let x = if x < 0.0 { 0.0 } else { x };
        (x * x, 2.0 * x)
    }
}

impl Curve for Sigmoid {
    #[inline(always)]
    fn at<A: Arithmetic>(self, x: f32) -> (f32, f32) {
        let s = sigmoid::<A>(x);
        (s, s * (1.0 - s))
    }
}

impl Curve for Clamped {
    #[inline(always)]
    fn at<A: Arithmetic>(self, x: f32) -> (f32, f32) {
        let is_above = x > self.limit;
        let g = if is_above { self.limit } else { x };
        let s = sigmoid::<A>(self.alpha * g);
        let slope = s * (1.0 + self.alpha * g * (1.0 - s));
        (g * s, if is_above { 0.0 } else { slope })
    }

    #[inline(always)]
    fn up(self, up: f32) -> (f32, f32) {
        let is_outside = up.abs() > self.limit;
        (up.clamp(-self.limit, self.limit) + 1.0, if is_outside { 0.0 } else { 1.0 })
    }
}

/// Runs an expression with `$curve` as the activation's own type.
macro_rules! with_curve {
    ($activation:expr, $curve:ident => $run:expr) => {
        match $activation {
            Activation::Silu => with_curve!(@ $curve = Silu, $run),
            Activation::GeluTanh => with_curve!(@ $curve = GeluTanh, $run),
            Activation::Gelu => with_curve!(@ $curve = Gelu, $run),
            Activation::Relu => with_curve!(@ $curve = Relu, $run),
            Activation::Relu2 => with_curve!(@ $curve = Relu2, $run),
            Activation::Sigmoid => with_curve!(@ $curve = Sigmoid, $run),
            Activation::Clamped { limit, alpha } => with_curve!(@ $curve = Clamped { limit, alpha }, $run),
        }
    };
    (@ $curve:ident = $value:expr, $run:expr) => {{
        let $curve = $value;
        $run
    }};
}

/// `f(gate) * up` (<https://arxiv.org/abs/2002.05202>).
///
/// # Panics
/// The operands have different lengths, or a limit is not a positive number.
#[must_use]
pub fn gated<T: Element>(activation: Activation, gate: &[T], up: &[T]) -> Vec<f32> {
    assert_eq!(gate.len(), up.len(), "lengths of gate and up");
    check(activation);
    let write = |y: Shared<f32>| {
        chunks(gate.len(), |start, end| {
            // SAFETY: chunks are disjoint.
            let y = unsafe { y.part(start, end - start) };
            with_curve!(activation, curve => gated_chunk(curve, &gate[start..end], &up[start..end], y));
        });
    };
    // SAFETY: the chunks cover all elements.
    unsafe { written(gate.len(), write) }
}

fn check(activation: Activation) {
    if let Activation::Clamped { limit, .. } = activation {
        assert!(limit > 0.0, "a limit of {limit}");
    }
}

dispatch! {
    fn gated_chunk<C: Curve, T: Element>(curve: C, gate: &[T], up: &[T], y: &mut [f32]) = gated_chunk_body
}

#[inline(always)]
fn gated_chunk_body<A: Arithmetic, C: Curve, T: Element>(curve: C, gate: &[T], up: &[T], y: &mut [f32]) {
    for ((g, u), y) in gate.iter().zip(up).zip(y) {
        *y = curve.at::<A>(g.to_f32()).0 * curve.up(u.to_f32()).0;
    }
}

/// The gradients of [`gated`]: returns the gradient with respect to `up`, and replaces `dy` with the gradient with respect to
/// `gate`.
///
/// # Panics
/// The operands have different lengths, or a limit is not a positive number.
#[must_use]
pub fn gated_backward<T: Element>(activation: Activation, gate: &[T], up: &[T], dy: &mut [f32]) -> Vec<f32> {
    assert_eq!((gate.len(), gate.len()), (up.len(), dy.len()), "lengths of gate, up and dy");
    check(activation);
    let dy = Shared::new(dy);
    let write = |d_up: Shared<f32>| {
        chunks(gate.len(), |start, end| {
            // SAFETY: chunks are disjoint.
            let (dy, d_up) = unsafe { (dy.part(start, end - start), d_up.part(start, end - start)) };
            let (gate, up) = (&gate[start..end], &up[start..end]);
            with_curve!(activation, curve => gated_backward_chunk(curve, gate, up, dy, d_up));
        });
    };
    // SAFETY: the chunks cover all elements.
    unsafe { written(gate.len(), write) }
}

dispatch! {
    fn gated_backward_chunk<C: Curve, T: Element>(curve: C, gate: &[T], up: &[T], dy: &mut [f32], d_up: &mut [f32]) = gated_backward_chunk_body
}

#[inline(always)]
fn gated_backward_chunk_body<A: Arithmetic, C: Curve, T: Element>(
    curve: C,
    gate: &[T],
    up: &[T],
    dy: &mut [f32],
    d_up: &mut [f32],
) {
    for i in 0..gate.len() {
        (dy[i], d_up[i]) = curve.gated_gradients::<A>(gate[i].to_f32(), up[i].to_f32(), dy[i]);
    }
}

/// `f(x)`.
///
/// # Panics
/// A limit is not a positive number.
#[must_use]
pub fn activate<T: Element>(activation: Activation, x: &[T]) -> Vec<f32> {
    check(activation);
    let write = |y: Shared<f32>| {
        chunks(x.len(), |start, end| {
            // SAFETY: chunks are disjoint.
            let y = unsafe { y.part(start, end - start) };
            with_curve!(activation, curve => activate_chunk(curve, &x[start..end], y));
        });
    };
    // SAFETY: the chunks cover all elements.
    unsafe { written(x.len(), write) }
}

dispatch! {
    fn activate_chunk<C: Curve, T: Element>(curve: C, x: &[T], y: &mut [f32]) = activate_chunk_body
}

#[inline(always)]
fn activate_chunk_body<A: Arithmetic, C: Curve, T: Element>(curve: C, x: &[T], y: &mut [f32]) {
    for (x, y) in x.iter().zip(y) {
        *y = curve.at::<A>(x.to_f32()).0;
    }
}

/// Replaces `dy` with the gradient of [`activate`] with respect to `x`.
///
/// # Panics
/// The operands have different lengths, or a limit is not a positive number.
pub fn activate_backward<T: Element>(activation: Activation, x: &[T], dy: &mut [f32]) {
    assert_eq!(x.len(), dy.len(), "lengths of x and dy");
    check(activation);
    let dy = Shared::new(dy);
    chunks(x.len(), |start, end| {
        // SAFETY: chunks are disjoint.
        let dy = unsafe { dy.part(start, end - start) };
        with_curve!(activation, curve => activate_backward_chunk(curve, &x[start..end], dy));
    });
}

dispatch! {
    fn activate_backward_chunk<C: Curve, T: Element>(curve: C, x: &[T], dy: &mut [f32]) = activate_backward_chunk_body
}

#[inline(always)]
fn activate_backward_chunk_body<A: Arithmetic, C: Curve, T: Element>(curve: C, x: &[T], dy: &mut [f32]) {
    for (x, dy) in x.iter().zip(dy) {
        *dy *= curve.at::<A>(x.to_f32()).1;
    }
}

#[cfg(test)]
mod tests {
    use super::{Activation, activate, activate_backward, gated, gated_backward};

    /// The definitions in f64; erf is integrated by Simpson's rule.
    fn expected(activation: Activation, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match activation {
            Activation::Silu => x * sigmoid(x),
            Activation::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + u.tanh())
            }
            Activation::Gelu => {
                let (steps, end) = (2000, x / std::f64::consts::SQRT_2);
                let step = end / f64::from(steps);
                let weight = |i: i32| if i == 0 || i == steps { 1.0 } else { f64::from(2 + 2 * (i % 2)) };
                let area: f64 = (0..=steps).map(|i| weight(i) * (-(f64::from(i) * step).powi(2)).exp()).sum();
                0.5 * x * (1.0 + area * step / 3.0 * std::f64::consts::FRAC_2_SQRT_PI)
            }
            Activation::Relu => x.max(0.0),
            Activation::Relu2 => x.max(0.0).powi(2),
            Activation::Sigmoid => sigmoid(x),
            Activation::Clamped { limit, alpha } => {
                let g = x.min(f64::from(limit));
                g * sigmoid(f64::from(alpha) * g)
            }
        }
    }

    fn up_of(activation: Activation, up: f64) -> f64 {
        match activation {
            Activation::Clamped { limit, .. } => up.clamp(-f64::from(limit), f64::from(limit)) + 1.0,
            _ => up,
        }
    }

    #[test]
    fn values_and_gradients_match_the_definitions() {
        let gates: Vec<f32> = (0..701).map(|i| (i as f32 - 350.0) * 0.031_7 + 0.001).collect();
        let ups: Vec<f32> = gates.iter().map(|g| 1.3 * (g * 2.9).sin() * 4.0).collect();
        for activation in [
            Activation::Silu,
            Activation::GeluTanh,
            Activation::Gelu,
            Activation::Relu,
            Activation::Relu2,
            Activation::Sigmoid,
            Activation::Clamped { limit: 3.1, alpha: 1.702 },
        ] {
            let (plain, product) = (activate(activation, &gates), gated(activation, &gates, &ups));
            let (mut slopes, mut d_gate) = (vec![1.0; gates.len()], vec![0.7; gates.len()]);
            activate_backward(activation, &gates, &mut slopes);
            let d_up = gated_backward(activation, &gates, &ups, &mut d_gate);
            for i in 0..gates.len() {
                let (gate, up) = (f64::from(gates[i]), f64::from(ups[i]));
                let close = |what: &str, found: f32, expected: f64| {
                    let error = (f64::from(found) - expected).abs();
                    assert!(
                        error < 2e-6 * (1.0 + expected.abs()),
                        "{activation:?} {what} of {gate}, {up}: {found} {expected}"
                    );
                };
                let slope = |f: &dyn Fn(f64) -> f64, x: f64| (f(x + 1e-5) - f(x - 1e-5)) / 2e-5;
                let of_gate = slope(&|x| expected(activation, x), gate);
                close("value", plain[i], expected(activation, gate));
                close("slope", slopes[i], of_gate);
                close("product", product[i], expected(activation, gate) * up_of(activation, up));
                close("d_gate", d_gate[i], 0.7 * of_gate * up_of(activation, up));
                let of_up = slope(&|x| up_of(activation, x), up);
                close("d_up", d_up[i], f64::from(0.7f32) * expected(activation, gate) * of_up);
            }
        }
    }
}
