//! Computes norms of the runs of a row, and their gradients: RMS norm (<https://arxiv.org/abs/1910.07467>, section 4) and layer
//! norm (<https://arxiv.org/abs/1607.06450>, section 3.1).

use crate::isa::{Arithmetic, dispatch};
use crate::math::{LANES, add_lanes, dot, sum};
use crate::parallel::{Shared, for_each, rows_per_task, written};
use std::borrow::Cow;

/// The formula for a run `x`, before the product with the weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps)`; `offset` is added to each weight: 1 in Gemma.
    Rms {
        /// Added to each weight.
        offset: f32,
    },
    /// `(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)`.
    Layer,
}

/// A norm: each run of `width` elements is normalized separately, multiplied by the weight and shifted by the bias.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// The formula.
    pub kind: NormKind,
    /// `[m * width]`: run `i` is multiplied by the `i % m`-th part; none for a weight of 1.
    pub weight: Option<&'a [f32]>,
    /// The same length as the weight, or `[width]` without a weight.
    pub bias: Option<&'a [f32]>,
    /// Added to the mean square.
    pub eps: f32,
    /// The number of elements of a run.
    pub width: usize,
}

/// A norm with precomputed factors.
#[derive(Clone, Copy)]
struct Plan<'a> {
    is_layer: bool,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    width: usize,
}

impl<'a> Norm<'a> {
    /// The factors of each run: the weight plus the offset.
    fn factors(&self) -> Cow<'a, [f32]> {
        match (self.weight, self.kind) {
            (None, _) => Cow::Owned(vec![1.0; self.bias.map_or(self.width, <[f32]>::len)]),
            (Some(weight), NormKind::Rms { offset }) if offset != 0.0 => {
                Cow::Owned(weight.iter().map(|w| offset + w).collect())
            }
            (Some(weight), _) => Cow::Borrowed(weight),
        }
    }

    fn plan<'b>(&self, weight: &'b [f32], len: usize) -> Plan<'b>
    where
        'a: 'b,
    {
        let width = self.width;
        let fits = width > 0 && weight.len().is_multiple_of(width) && len.is_multiple_of(weight.len().max(1));
        assert!(fits, "{len} elements in runs of {width} with {} weights", weight.len());
        assert!(self.bias.is_none_or(|bias| bias.len() == weight.len()), "bias and weight differ in length");
        Plan { is_layer: self.kind == NormKind::Layer, weight, bias: self.bias, eps: self.eps, width }
    }

    /// The norm of `x`.
    ///
    /// # Panics
    /// `x` does not consist of whole runs, or the length of a weight or bias does not match.
    #[must_use]
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let factors = self.factors();
        let plan = self.plan(&factors, x.len());
        let step = factors.len() * rows_per_task(factors.len());
        let write = |y: Shared<f32>| {
            for_each(x.len().div_ceil(step), x.len(), |task| {
                let start = task * step;
                let x = &x[start..x.len().min(start + step)];
                // SAFETY: tasks write disjoint runs.
                forward_runs(x, plan, unsafe { y.part(start, x.len()) });
            });
        };
        // SAFETY: the tasks cover all runs.
        unsafe { written(x.len(), write) }
    }

    /// Adds the gradient of [`Norm::forward`] with respect to `x` to `dx`, and the gradients with respect to weight and bias to
    /// `dw` and `db` if given.
    ///
    /// # Panics
    /// The lengths of the operands do not match.
    pub fn backward(&self, x: &[f32], dy: &[f32], dx: &mut [f32], dw: Option<&mut [f32]>, db: Option<&mut [f32]>) {
        assert_eq!((x.len(), x.len()), (dy.len(), dx.len()), "lengths of x, dy and dx");
        let factors = self.factors();
        let plan = self.plan(&factors, x.len());
        let step = factors.len() * rows_per_task(factors.len());
        let shared = Shared::new(dx);
        for_each(x.len().div_ceil(step), 2 * x.len(), |task| {
            let start = task * step;
            let end = x.len().min(start + step);
            // SAFETY: tasks write disjoint runs.
            backward_runs(&x[start..end], plan, &dy[start..end], unsafe { shared.part(start, end - start) });
        });
        if let Some(dw) = dw {
            assert_eq!(dw.len(), factors.len(), "the length of the weight's gradient");
            weight_gradient(x, plan, dy, dw);
        }
        if let Some(db) = db {
            assert_eq!(db.len(), factors.len(), "the length of the bias' gradient");
            for dy in dy.chunks_exact(db.len().max(1)) {
                db.iter_mut().zip(dy).for_each(|(db, dy)| *db += dy);
            }
        }
    }
}

/// The shift to subtract from a run, and the scale of the difference.
#[inline(always)]
fn shift_and_scale<A: Arithmetic>(x: &[f32], plan: Plan) -> (f32, f32) {
    if plan.is_layer {
        let mean = sum(x, |v| v) / x.len() as f32;
        let variance = sum(x, |v| (v - mean) * (v - mean)) / x.len() as f32;
        (mean, 1.0 / (variance + plan.eps).sqrt())
    } else {
        (0.0, 1.0 / (dot::<A, f32>(x, x) / x.len() as f32 + plan.eps).sqrt())
    }
}

dispatch! {
    fn forward_runs(x: &[f32], plan: Plan, y: &mut [f32]) = forward_runs_body
}

#[inline(always)]
fn forward_runs_body<A: Arithmetic>(x: &[f32], plan: Plan, y: &mut [f32]) {
    let width = plan.width;
    for (i, (x, y)) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).enumerate() {
        let at = i * width % plan.weight.len();
        let w = &plan.weight[at..][..width];
        let (shift, scale) = shift_and_scale::<A>(x, plan);
        if plan.is_layer {
            for i in 0..width {
                y[i] = (x[i] - shift) * scale * w[i];
            }
        } else {
            for i in 0..width {
                y[i] = x[i] * scale * w[i];
            }
        }
        if let Some(bias) = plan.bias {
            y.iter_mut().zip(&bias[at..]).for_each(|(y, bias)| *y += bias);
        }
    }
}

dispatch! {
    fn backward_runs(x: &[f32], plan: Plan, dy: &[f32], dx: &mut [f32]) = backward_runs_body
}

#[inline(always)]
fn backward_runs_body<A: Arithmetic>(x: &[f32], plan: Plan, dy: &[f32], dx: &mut [f32]) {
    let width = plan.width;
    let runs = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for (i, ((x, dy), dx)) in runs.enumerate() {
        let w = &plan.weight[i * width % plan.weight.len()..][..width];
        let (shift, scale) = shift_and_scale::<A>(x, plan);
        let mut lanes = [0.0f32; LANES];
        let whole = width / LANES * LANES;
        for start in (0..whole).step_by(LANES) {
            for i in 0..LANES {
                lanes[i] = A::mul_add((x[start + i] - shift) * w[start + i], dy[start + i], lanes[i]);
            }
        }
        for i in whole..width {
            lanes[i - whole] = A::mul_add((x[i] - shift) * w[i], dy[i], lanes[i - whole]);
        }
        let mean = add_lanes(lanes) * scale * scale / width as f32;
        if plan.is_layer {
            let mean_of_product = dot::<A, f32>(w, dy) / width as f32;
            for i in 0..width {
                dx[i] += scale * (A::mul_add(-mean, x[i] - shift, w[i] * dy[i]) - mean_of_product);
            }
        } else {
            for i in 0..width {
                dx[i] += scale * A::mul_add(-mean, x[i], w[i] * dy[i]);
            }
        }
    }
}

dispatch! {
    fn weight_gradient(x: &[f32], plan: Plan, dy: &[f32], dw: &mut [f32]) = weight_gradient_body
}

#[inline(always)]
fn weight_gradient_body<A: Arithmetic>(x: &[f32], plan: Plan, dy: &[f32], dw: &mut [f32]) {
    let width = plan.width;
    for (i, (x, dy)) in x.chunks_exact(width).zip(dy.chunks_exact(width)).enumerate() {
        let at = i * width % dw.len();
        let dw = &mut dw[at..][..width];
        let (shift, scale) = shift_and_scale::<A>(x, plan);
        for i in 0..width {
            dw[i] = A::mul_add((x[i] - shift) * scale, dy[i], dw[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Norm, NormKind};

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// The definition, in f64.
    fn expected(norm: Norm, x: &[f64]) -> Vec<f64> {
        let width = norm.width;
        let mut y = Vec::new();
        for (run, x) in x.chunks(width).enumerate() {
            let mean = if norm.kind == NormKind::Layer { x.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let square = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width as f64;
            let offset = if let NormKind::Rms { offset } = norm.kind { f64::from(offset) } else { 0.0 };
            for (i, x) in x.iter().enumerate() {
                let of = |values: &[f32]| f64::from(values[(run * width + i) % values.len()]);
                let weight = norm.weight.map_or(1.0, |weight| of(weight) + offset);
                y.push((x - mean) / (square + f64::from(norm.eps)).sqrt() * weight + norm.bias.map_or(0.0, of));
            }
        }
        y
    }

    #[test]
    fn values_and_gradients_match_the_definition() {
        for (kind, width, parts, has_weight, has_bias) in [
            (NormKind::Rms { offset: 0.0 }, 33, 1, true, false),
            (NormKind::Rms { offset: 1.0 }, 8, 3, true, false),
            (NormKind::Rms { offset: 0.0 }, 5, 1, false, false),
            (NormKind::Layer, 33, 1, true, true),
            (NormKind::Layer, 6, 4, true, false),
            (NormKind::Layer, 40, 1, false, false),
            (NormKind::Layer, 7, 1, false, true),
        ] {
            let (weight, bias) = (noise(parts * width, 1), noise(parts * width, 2));
            let norm = Norm {
                kind,
                weight: has_weight.then_some(&weight[..]),
                bias: has_bias.then_some(&bias[..]),
                eps: 1e-3,
                width,
            };
            let x: Vec<f32> = noise(5 * parts * width, 3).iter().map(|x| x + 0.7).collect();
            let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let close = |found: f32, expected: f64| {
                assert!((f64::from(found) - expected).abs() < 2e-5 * (1.0 + expected.abs()), "{found} {expected}");
            };
            norm.forward(&x).iter().zip(expected(norm, &wide(&x))).for_each(|(a, b)| close(*a, b));

            let (dy, before) = (noise(x.len(), 4), noise(x.len(), 5));
            let (mut dx, mut dw, mut db) = (before.clone(), vec![0.0; weight.len()], vec![0.0; weight.len()]);
            norm.backward(&x, &dy, &mut dx, Some(&mut dw), Some(&mut db));
            let loss = |y: Vec<f64>| y.iter().zip(&dy).map(|(y, dy)| y * f64::from(*dy)).sum::<f64>();
            for i in 0..x.len() {
                let at = |step: f64| {
                    let mut x = wide(&x);
                    x[i] += step;
                    loss(expected(norm, &x))
                };
                close(dx[i] - before[i], (at(1e-5) - at(-1e-5)) / 2e-5);
            }
            for i in 0..weight.len() {
                let one = |value: f32| if has_weight { value } else { 1.0 };
                let weights = |step: f32| {
                    let weight: Vec<f32> =
                        weight.iter().enumerate().map(|(j, w)| one(*w) + if i == j { step } else { 0.0 }).collect();
                    loss(expected(Norm { weight: Some(&weight), ..norm }, &wide(&x)))
                };
                // the norm is linear in the weight, so a large step is exact
                assert!((f64::from(dw[i]) - (weights(1.0) - weights(-1.0)) / 2.0).abs() < 1e-4, "{}", dw[i]);
                let sum: f32 = dy.chunks(weight.len()).map(|dy| dy[i]).sum();
                close(db[i], f64::from(sum));
            }
        }
    }
}
