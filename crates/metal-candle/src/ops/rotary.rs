//! Rotary position embedding (<https://arxiv.org/abs/2104.09864>), halves rotated against each other.

use super::gpu::{self, Arg, Grid, Kernel, Source};
use super::host::{Host, edit, on_cpu};
use crate::error::{Error, Result};
use crate::profile::{Kind, span};
use candle_core::{D, Device, Tensor};
use metal_candle_kernels as kernels;
use std::sync::{Arc, RwLock};

/// Cosines and sines of all positions met so far; it grows with the longest.
#[derive(Debug)]
pub(crate) struct RotaryTable {
    frequencies: Vec<f32>,
    rows: RwLock<Arc<Rows>>,
}

/// `[positions, head_dim / 2]` each.
#[derive(Debug, Default)]
struct Rows {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// The cosines and sines of a batch: `[tokens, head_dim / 2]`, f32 where there are kernels, else in the dtype of the activations.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl RotaryTable {
    /// Frequencies `theta^(-2 i / head_dim)`, rounded to f32 as the reference implementation does.
    pub(crate) fn new(head_dim: usize, theta: f64) -> Self {
        let frequency = |i: usize| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / (theta.powf(f64::from(exponent)) as f32)
        };
        Self { frequencies: (0..head_dim / 2).map(frequency).collect(), rows: RwLock::default() }
    }

    /// The rows of these positions, like `like` in device and dtype.
    pub(crate) fn rotation(&self, positions: &[u32], like: &Tensor) -> Result<Rotation> {
        let half = self.frequencies.len();
        let longest = positions.iter().max().map_or(0, |&p| p as usize + 1);
        let rows = self.rows(longest)?;
        let gather = |table: &[f32]| {
            let mut values = Vec::with_capacity(positions.len() * half);
            for &position in positions {
                values.extend_from_slice(&table[position as usize * half..][..half]);
            }
            let rows = Tensor::from_vec(values, (positions.len(), half), like.device())?;
            if gpu::has_kernels(like) { Ok(rows) } else { rows.to_dtype(like.dtype()) }
        };
        Ok(Rotation { cos: gather(&rows.cos)?, sin: gather(&rows.sin)? })
    }

    /// Cosines and sines of the first `positions`, `[positions, head_dim / 2]` each, in f32.
    pub(crate) fn on_device(&self, positions: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let (rows, half) = (self.rows(positions)?, self.frequencies.len());
        let part = |table: &[f32]| Tensor::from_slice(&table[..positions * half], (positions, half), device);
        Ok((part(&rows.cos)?, part(&rows.sin)?))
    }

    fn rows(&self, positions: usize) -> Result<Arc<Rows>> {
        let half = self.frequencies.len();
        let poisoned = || Error::Device("the rotary table is unusable after a panic".into());
        let rows = Arc::clone(&*self.rows.read().map_err(|_| poisoned())?);
        if rows.cos.len() >= positions * half {
            return Ok(rows);
        }
        let positions = positions.next_power_of_two().max(64);
        let angles = (0..positions).flat_map(|p| self.frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let (sin, cos) = angles.map(|angle| (angle.sin() as f32, angle.cos() as f32)).unzip();
        let rows = Arc::new(Rows { cos, sin });
        *self.rows.write().map_err(|_| poisoned())? = Arc::clone(&rows);
        Ok(rows)
    }
}

impl Rotation {
    /// Cosines and sines: `[tokens, head_dim / 2]` each.
    pub(super) fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Rotates `q` and `k`, `[tokens, heads * head_dim]` each, in place; with `inverse` back, which is the gradient.
    pub(crate) fn apply_to_both(&self, q: Tensor, k: Tensor, inverse: bool) -> Result<(Tensor, Tensor)> {
        if !gpu::has_kernels(&q) {
            return Ok((self.apply(q, inverse)?, self.apply(k, inverse)?));
        }
        let _span = span("rotary", Kind::Elementwise);
        let half = self.cos.dim(1)?;
        let ((tokens, q_width), k_width) = (q.dims2()?, k.dim(1)?);
        let (q_heads, k_heads) = (q_width / (2 * half), k_width / (2 * half));
        let count = tokens * (q_heads + k_heads) * half;
        let sign = if inverse { -1.0f32 } else { 1.0 };
        let args = [Arg::In(&self.cos), Arg::In(&self.sin), Arg::Out(&q), Arg::Out(&k)];
        let words = [count.into(), q_heads.into(), k_heads.into(), half.into(), sign.into()];
        gpu::launch(&Kernel::new(Source::Elementwise, "rotate", q.dtype()), Grid::elements(count), &args, &words)?;
        Ok((q, k))
    }

    /// Rotates `x: [tokens, heads * head_dim]` in place; with `inverse` back, which is the gradient.
    pub(super) fn apply(&self, x: Tensor, inverse: bool) -> Result<Tensor> {
        if !on_cpu(&x) {
            return self.plain(&x, inverse);
        }
        let _span = span("rotary", Kind::Elementwise);
        let head_dim = 2 * self.cos.dim(1)?;
        let heads = x.dim(1)? / head_dim;
        let (cos, sin) = (Host::new(&self.cos)?, Host::new(&self.sin)?);
        let (cos, sin) = (cos.f32()?, sin.f32()?);
        edit(x, |x| kernels::rotary(x, (heads, head_dim), cos, sin, inverse))
    }

    /// The rotation in candle's operations.
    pub(crate) fn plain(&self, x: &Tensor, inverse: bool) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let half = self.cos.dim(1)?;
        let like = x.dtype();
        let x = x.reshape((tokens, width / (2 * half), 2 * half))?.to_dtype(self.cos.dtype())?;
        let (first, second) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let cos = self.cos.unsqueeze(1)?;
        let sin = if inverse { self.sin.neg()? } else { self.sin.clone() }.unsqueeze(1)?;
        let a = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let b = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[a, b], D::Minus1)?.reshape((tokens, width))?.to_dtype(like)?)
    }
}
