//! Rotary position embeddings (<https://arxiv.org/abs/2104.09864>): tables of cosines and sines, and the rotation of
//! the first elements of each head.

use super::gpu::{self, Arg, Grid, Kernel, Source};
use super::host::{Host, edit, on_cpu};
pub(crate) use super::rotary_scaling::{RotaryScaling, RotarySpec};
use crate::error::{Error, Result};
use crate::profile::{Kind, span};
use candle_core::{D, Device, Tensor};
use metal_candle_kernels as kernels;
pub(crate) use metal_candle_kernels::Pairs;
use std::sync::{Arc, RwLock};

/// The cosines and sines of a layer's positions, for sequences of any length.
#[derive(Debug)]
pub(crate) struct RotaryTable {
    spec: RotarySpec,
    /// For all sequences, or for those of up to `spec.fixed_until()` tokens.
    short: Frequencies,
    /// For longer sequences, if all of them share frequencies.
    long: Option<Frequencies>,
}

/// The frequencies of each pair, and the cosines and sines of all positions up to the longest sequence so far.
#[derive(Debug)]
struct Frequencies {
    of_pairs: Vec<f32>,
    /// The factor on cosines and sines.
    factor: f32,
    rows: RwLock<Arc<CosSin>>,
}

/// `[positions, dim / 2]` each.
#[derive(Debug, Default)]
struct CosSin {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// The cosines and sines of a batch: `[tokens, dim / 2]`. They are f32 if there are kernels, otherwise in the dtype of
/// the activations.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
    pairs: Pairs,
}

impl Frequencies {
    fn new(spec: &RotarySpec, length: usize) -> Self {
        let factor = spec.attention_factor() as f32;
        Self { of_pairs: spec.frequencies(length), factor, rows: RwLock::default() }
    }

    /// Cosine and sine of each pair at a position.
    fn at(&self, position: usize) -> impl Iterator<Item = (f32, f32)> {
        self.of_pairs.iter().map(move |frequency| {
            let angle = f64::from(position as f32 * frequency);
            (angle.cos() as f32 * self.factor, angle.sin() as f32 * self.factor)
        })
    }

    fn rows(&self, positions: usize) -> Result<Arc<CosSin>> {
        let half = self.of_pairs.len();
        let poisoned = || Error::Bug("the lock of the rotary table is poisoned".into());
        let rows = Arc::clone(&*self.rows.read().map_err(|_| poisoned())?);
        if rows.cos.len() >= positions * half {
            return Ok(rows);
        }
        let positions = positions.next_power_of_two().max(64);
        let (cos, sin) = (0..positions).flat_map(|position| self.at(position)).unzip();
        let rows = Arc::new(CosSin { cos, sin });
        *self.rows.write().map_err(|_| poisoned())? = Arc::clone(&rows);
        Ok(rows)
    }
}

impl RotaryTable {
    /// # Errors
    /// A setting of the embedding is out of range.
    pub(crate) fn new(spec: &RotarySpec) -> Result<Self> {
        spec.check()?;
        let is_long = matches!(spec.scaling, RotaryScaling::LongRope { .. });
        Ok(Self {
            spec: spec.clone(),
            short: Frequencies::new(spec, 1),
            long: is_long.then(|| Frequencies::new(spec, usize::MAX)),
        })
    }

    /// The number of rotated elements of a head.
    pub(crate) fn dim(&self) -> usize {
        2 * self.spec.num_pairs()
    }

    /// The sequence length above which all positions of a sequence have other frequencies.
    pub(crate) fn limit(&self) -> Option<usize> {
        let RotaryScaling::LongRope { original_max_position_embeddings: limit, .. } = self.spec.scaling else {
            return None;
        };
        (limit < self.spec.max_position_embeddings).then_some(limit)
    }

    /// Whether all sequences of up to `positions` tokens share one table.
    pub(crate) fn is_fixed(&self, positions: usize) -> bool {
        self.spec.fixed_until().is_none_or(|until| positions <= until)
    }

    /// The rotations of tokens at `positions`, with the device and dtype of `like`. Sequence `i` of the batch has the
    /// tokens `offsets[i]..offsets[i + 1]`. If frequencies depend on the length, its last position determines them.
    pub(crate) fn rotation(&self, positions: &[u32], offsets: &[usize], like: &Tensor) -> Result<Rotation> {
        if offsets.first() != Some(&0) || offsets.last() != Some(&positions.len()) || !offsets.is_sorted() {
            let message =
                format!("the offsets of a batch do not run from 0 to its number of positions, {}", positions.len());
            return Err(Error::Bug(message));
        }
        let half = self.spec.num_pairs();
        let capacity = positions.len() * half;
        let (mut cos, mut sin) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        for sequence in offsets.windows(2).map(|window| &positions[window[0]..window[1]]) {
            let length = sequence.iter().max().map_or(0, |&last| last as usize + 1);
            let frequencies = if self.is_fixed(length) { Some(&self.short) } else { self.long.as_ref() };
            if let Some(frequencies) = frequencies {
                let rows = frequencies.rows(length)?;
                for &position in sequence {
                    let at = position as usize * half;
                    cos.extend_from_slice(&rows.cos[at..][..half]);
                    sin.extend_from_slice(&rows.sin[at..][..half]);
                }
            } else {
                let frequencies = Frequencies::new(&self.spec, length);
                for (c, s) in sequence.iter().flat_map(|&position| frequencies.at(position as usize)) {
                    cos.push(c);
                    sin.push(s);
                }
            }
        }
        let on_device = |values: Vec<f32>| {
            let rows = Tensor::from_vec(values, (positions.len(), half), like.device())?;
            if gpu::has_kernels(like) { Ok(rows) } else { rows.to_dtype(like.dtype()) }
        };
        Ok(Rotation { cos: on_device(cos)?, sin: on_device(sin)?, pairs: self.spec.pairs })
    }

    /// The cosines and sines of the first `positions` positions, `[positions, dim / 2]` each, in f32.
    ///
    /// # Errors
    /// They depend on the length of a sequence: [`RotaryTable::is_fixed`] returns false.
    pub(crate) fn on_device(&self, positions: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        if !self.is_fixed(positions) {
            let message =
                format!("one rotary table for sequences of up to {positions} tokens with {:?}", self.spec.scaling);
            return Err(Error::Unsupported(message));
        }
        let (rows, half) = (self.short.rows(positions)?, self.spec.num_pairs());
        let part = |table: &[f32]| Tensor::from_slice(&table[..positions * half], (positions, half), device);
        Ok((part(&rows.cos)?, part(&rows.sin)?))
    }
}

impl Rotation {
    /// Cosines and sines: `[tokens, dim / 2]` each.
    pub(super) fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Rotates `q` and `k`, `[tokens, heads * head_dim]` each, in place. `inverse` rotates backwards, for the gradient.
    pub(crate) fn apply_to_both(
        &self,
        q: Tensor,
        k: Tensor,
        head_dim: usize,
        inverse: bool,
    ) -> Result<(Tensor, Tensor)> {
        self.check(&q, head_dim)?;
        self.check(&k, head_dim)?;
        if !gpu::has_kernels(&q) {
            return Ok((self.apply(q, head_dim, inverse)?, self.apply(k, head_dim, inverse)?));
        }
        let _span = span("rotary", Kind::Elementwise);
        let half = self.cos.dim(1)?;
        let ((tokens, q_width), k_width) = (q.dims2()?, k.dim(1)?);
        let (q_heads, k_heads) = (q_width / head_dim, k_width / head_dim);
        let count = tokens * (q_heads + k_heads) * half;
        let sign = if inverse { -1.0f32 } else { 1.0 };
        let args = [Arg::In(&self.cos), Arg::In(&self.sin), Arg::Out(&q), Arg::Out(&k)];
        let is_adjacent = self.pairs == Pairs::Adjacent;
        let words = [
            count.into(),
            q_heads.into(),
            k_heads.into(),
            head_dim.into(),
            half.into(),
            is_adjacent.into(),
            sign.into(),
        ];
        gpu::launch(&Kernel::new(Source::Elementwise, "rotate", q.dtype()), Grid::elements(count), &args, &words)?;
        Ok((q, k))
    }

    /// Rotates `x: [tokens, heads * head_dim]` in place. `inverse` rotates backwards, for the gradient.
    pub(super) fn apply(&self, x: Tensor, head_dim: usize, inverse: bool) -> Result<Tensor> {
        self.check(&x, head_dim)?;
        if !on_cpu(&x) {
            return self.plain(&x, head_dim, inverse);
        }
        let _span = span("rotary", Kind::Elementwise);
        let (cos, sin) = (Host::new(&self.cos)?, Host::new(&self.sin)?);
        let (cos, sin) = (cos.f32()?, sin.f32()?);
        let (half, heads) = (self.cos.dim(1)?, x.dim(1)? / head_dim);
        edit(x, |x| kernels::rotary(x, (heads, head_dim), (cos, sin, half), self.pairs, inverse))
    }

    fn check(&self, x: &Tensor, head_dim: usize) -> Result<()> {
        let ((tokens, half), (x_tokens, width)) = (self.cos.dims2()?, x.dims2()?);
        if tokens == x_tokens && head_dim > 0 && width.is_multiple_of(head_dim) && 2 * half <= head_dim {
            return Ok(());
        }
        let message = format!(
            "a rotation of {tokens} tokens and {} elements does not fit {x_tokens} tokens, {width} wide, with heads of {head_dim}",
            2 * half
        );
        Err(Error::Bug(message))
    }

    /// The rotation with candle's operations.
    pub(crate) fn plain(&self, x: &Tensor, head_dim: usize, inverse: bool) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let half = self.cos.dim(1)?;
        let (like, heads) = (x.dtype(), width / head_dim);
        let x = x.reshape((tokens, heads, head_dim))?.to_dtype(self.cos.dtype())?;
        let rotated = x.narrow(D::Minus1, 0, 2 * half)?;
        let (first, second) = match self.pairs {
            Pairs::Halves => (rotated.narrow(D::Minus1, 0, half)?, rotated.narrow(D::Minus1, half, half)?),
            Pairs::Adjacent => {
                let pairs = rotated.contiguous()?.reshape((tokens, heads, half, 2))?;
                let of_pair = |i| pairs.narrow(D::Minus1, i, 1)?.squeeze(D::Minus1);
                (of_pair(0)?, of_pair(1)?)
            }
        };
        let cos = self.cos.unsqueeze(1)?;
        let sin = if inverse { self.sin.neg()? } else { self.sin.clone() }.unsqueeze(1)?;
        let a = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let b = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        let rotated = match self.pairs {
            Pairs::Halves => Tensor::cat(&[a, b], D::Minus1)?,
            Pairs::Adjacent => Tensor::stack(&[a, b], D::Minus1)?.reshape((tokens, heads, 2 * half))?,
        };
        let rest = head_dim - 2 * half;
        let x =
            if rest == 0 { rotated } else { Tensor::cat(&[rotated, x.narrow(D::Minus1, 2 * half, rest)?], D::Minus1)? };
        Ok(x.reshape((tokens, width))?.to_dtype(like)?)
    }
}

/// Multiplies row `i` of `x: [tokens, width]` by `factors[i]`, f32, in place.
pub(crate) fn scale_rows(x: Tensor, factors: &Tensor) -> Result<Tensor> {
    if factors.elem_count() != x.dim(0)? {
        return Err(Error::Bug(format!("{} factors do not fit {} rows", factors.elem_count(), x.dim(0)?)));
    }
    if gpu::has_kernels(&x) {
        gpu::by_row("scale_rows", &x, &[Arg::In(factors), Arg::Out(&x)])?;
        return Ok(x);
    }
    if !on_cpu(&x) {
        return Ok(x.broadcast_mul(&factors.to_dtype(x.dtype())?.reshape(((), 1))?)?);
    }
    let _span = span("scale_rows", Kind::Elementwise);
    let factors = Host::new(factors)?;
    let factors = factors.f32()?;
    edit(x, |x| kernels::scale_rows(x, factors))
}
