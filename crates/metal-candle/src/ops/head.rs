//! The output head and its cross-entropy loss, computed in chunks of rows so that `[tokens, vocab]` is never allocated.

use super::adapters::LayerUpdates;
use super::gpu::{self, Arg, Grid, Kernel, Source, Word};
use super::host::on_cpu;
use super::linear::{Linear, LinearGradients, NeedsGrad};
use super::low_rank::LowRank;
use super::products::add_outer;
use crate::error::{Error, Result};
use crate::profile::{Kind, span};
use candle_core::{D, DType, Device, Tensor};
use metal_candle_kernels::{self as kernels, LogitForm, Row};

/// The maximum number of logits per chunk on the CPU: less than 100 MB with the packed operands of their products.
const CHUNK: usize = 78_000_000 / 4;
/// The maximum on Metal and on CUDA, whose products are faster with many rows.
const CHUNK_METAL: usize = 1 << 26;
const CHUNK_CUDA: usize = 1 << 28;

/// The output head: logits are the products of its layer times `scale`, with an optional soft cap.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) linear: Linear,
    pub(crate) scale: f32,
    /// Scaled products `y` become `c * tanh(y / c)`.
    pub(crate) soft_cap: Option<f32>,
}

impl Head {
    /// A head whose logits are the products themselves.
    #[cfg(test)]
    pub(crate) fn new(linear: Linear) -> Self {
        Self { linear, scale: 1.0, soft_cap: None }
    }

    /// Whether logits are the products themselves.
    pub(crate) fn is_plain(&self) -> bool {
        self.soft_cap.is_none() && (self.scale - 1.0).abs() < f32::EPSILON
    }

    /// The scale and the cap (0 for none), as kernel arguments.
    pub(crate) fn words(&self) -> [Word; 2] {
        [self.scale.into(), self.soft_cap.unwrap_or(0.0).into()]
    }

    /// Converts f32 products to logits in place, with a kernel.
    pub(crate) fn form_on_device(&self, products: &Tensor) -> Result<()> {
        if self.is_plain() {
            return Ok(());
        }
        gpu::by_four("form_logits", &[products], &[Arg::Out(products)], &self.words())
    }

    fn form(&self) -> LogitForm {
        LogitForm { scale: self.scale, soft_cap: self.soft_cap }
    }
}

/// The losses and gradients that [`loss`] returns.
#[derive(Debug)]
pub(crate) struct HeadLoss {
    rows: Vec<f32>,
    /// The losses of chunks that have not been copied to the CPU yet.
    losses_on_device: Vec<Tensor>,
    /// The requested gradients with respect to `hidden`, the head's weight and its low-rank update.
    pub(crate) gradients: LinearGradients,
    /// The gradient with respect to single rows of the head's weight, if requested: `[rows, hidden]`, f32.
    pub(crate) gradient_of_rows: Option<Tensor>,
}

impl HeadLoss {
    /// Weight times loss of each row: `[rows]`. Waits for the device.
    pub(crate) fn rows(&self) -> Result<Vec<f32>> {
        let mut rows = self.rows.clone();
        if !self.losses_on_device.is_empty() {
            rows.extend(Tensor::cat(&self.losses_on_device, 0)?.to_vec1::<f32>()?);
        }
        Ok(rows)
    }
}

/// The requested gradients, and the factor on them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadNeedsGrad<'a> {
    pub(crate) scale: f32,
    /// The gradient with respect to `hidden`.
    pub(crate) input: bool,
    /// The gradient with respect to the head's weight.
    pub(crate) weight: bool,
    /// The gradient with respect to these rows of the head's weight.
    pub(crate) rows: Option<&'a [u32]>,
}

/// Weighted cross-entropy of `head(hidden)` against `rows`, with label smoothing, and its gradients.
///
/// Rows are processed in chunks. The gradient of a chunk overwrites its logits, so `[rows, vocab]` is never allocated.
///
/// # Shapes
/// `hidden: [rows, hidden]`, the head's weight `[vocab, hidden]`.
pub(crate) fn loss(
    hidden: &Tensor,
    head: &Head,
    update: Option<&LowRank>,
    dropout_seed: Option<u64>,
    rows: &[Row],
    smoothing: f32,
    needs_grad: Option<HeadNeedsGrad<'_>>,
) -> Result<HeadLoss> {
    let (form, head) = (head.form(), &head.linear);
    let vocab = head.weight.dims2()?.0;
    if let Some(row) = rows.iter().find(|row| row.target >= vocab) {
        let message = format!("token `{}` is outside the vocabulary of {vocab} tokens", row.target);
        return Err(Error::argument("targets", message));
    }
    let mut result = HeadLoss {
        rows: Vec::with_capacity(rows.len()),
        losses_on_device: Vec::new(),
        gradients: LinearGradients::default(),
        gradient_of_rows: None,
    };
    let ids = needs_grad.and_then(|needs_grad| needs_grad.rows);
    if let Some(id) = ids.into_iter().flatten().find(|&&id| id as usize >= vocab) {
        return Err(Error::argument("rows", format!("token `{id}` is outside the vocabulary of {vocab} tokens")));
    }
    let ids = ids.map(|ids| Tensor::new(ids, hidden.device())).transpose()?;
    let (mut d_hidden, mut losses_on_device) = (Vec::new(), Vec::new());
    let chunk = chunk_rows(rows.len(), vocab, hidden.device());
    for start in (0..rows.len()).step_by(chunk) {
        let rows = &rows[start..rows.len().min(start + chunk)];
        let hidden = hidden.narrow(0, start, rows.len())?;
        // dropout indexes the elements of each chunk from 0
        let seed = dropout_seed.map(|seed| seed.wrapping_add(start as u64));
        let logits = head.forward(&hidden, update, seed, None)?;
        let scale = needs_grad.map(|w| w.scale);
        let gradient = if gpu::has_kernels(&logits) {
            losses_on_device.push(gpu_cross_entropy(&logits, form, rows, smoothing, scale)?);
            needs_grad.map(|_| logits)
        } else {
            let (losses, gradient) = if on_cpu(&logits) {
                cross_entropy(logits, form, rows, smoothing, scale)?
            } else {
                plain_cross_entropy(&logits, form, rows, smoothing, scale)?
            };
            result.rows.extend(losses);
            gradient
        };
        let (Some(gradient), Some(needs_grad)) = (gradient, needs_grad) else { continue };
        if needs_grad.weight {
            result.gradients.weight = Some(add_outer(result.gradients.weight.take(), 1.0, &gradient, &hidden)?);
        }
        if let Some(ids) = &ids {
            let of_rows = gradient.index_select(ids, 1)?;
            result.gradient_of_rows = Some(add_outer(result.gradient_of_rows.take(), 1.0, &of_rows, &hidden)?);
        }
        let of_linear = NeedsGrad { input: needs_grad.input, weight: false, bias: false };
        let of_chunk = head.backward(Some(&hidden), update, seed, &gradient, of_linear, None, None)?;
        d_hidden.extend(of_chunk.input);
        if let Some(of_update) = of_chunk.update {
            result.gradients.update = Some(match result.gradients.update.take() {
                Some(sum) => sum.plus(&of_update)?,
                None => of_update,
            });
        }
    }
    if !d_hidden.is_empty() {
        result.gradients.input =
            Some(if d_hidden.len() == 1 { d_hidden.remove(0) } else { Tensor::cat(&d_hidden, 0)? });
    }
    result.losses_on_device = losses_on_device;
    Ok(result)
}

/// Rows of a chunk: as equal as possible, within the device's maximum number of logits.
pub(crate) fn chunk_rows(rows: usize, vocab: usize, device: &Device) -> usize {
    let logits = match device {
        Device::Cpu => CHUNK,
        Device::Metal(_) => CHUNK_METAL,
        Device::Cuda(_) => CHUNK_CUDA,
    };
    let most = (logits / vocab.max(1)).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

/// The losses, `[rows]`. With a scale, the gradient overwrites the logits.
fn gpu_cross_entropy(
    logits: &Tensor,
    form: LogitForm,
    rows: &[Row],
    smoothing: f32,
    scale: Option<f32>,
) -> Result<Tensor> {
    let _span = span("cross_entropy", Kind::Elementwise);
    let (count, vocab) = logits.dims2()?;
    let targets: Vec<u32> = rows.iter().map(|row| row.target as u32).collect();
    let targets = Tensor::from_vec(targets, count, logits.device())?;
    let weights = Tensor::from_vec(rows.iter().map(|row| row.weight).collect::<Vec<_>>(), count, logits.device())?;
    let losses = gpu::empty_f32(count, logits)?;
    let args = [Arg::Out(logits), Arg::In(&targets), Arg::In(&weights), Arg::Out(&losses)];
    let is_aligned = vocab.is_multiple_of(8) && gpu::are_aligned_to_eight(&args[..1]);
    let words = [
        vocab.into(),
        smoothing.into(),
        scale.unwrap_or(0.0).into(),
        scale.is_some().into(),
        is_aligned.into(),
        form.scale.into(),
        form.soft_cap.unwrap_or(0.0).into(),
    ];
    let kernel = Kernel::new(Source::CrossEntropy, "cross_entropy", logits.dtype());
    let kernel = kernel.with("HAS_FORM", usize::from(!form.is_plain()));
    let threads = gpu::threads(&kernel, logits, 512)?;
    gpu::launch(&kernel, Grid::row(count, threads), &args, &words)?;
    Ok(losses)
}

/// The losses, and with a scale the gradient, which overwrites the logits.
fn cross_entropy(
    logits: Tensor,
    form: LogitForm,
    rows: &[Row],
    smoothing: f32,
    scale: Option<f32>,
) -> Result<(Vec<f32>, Option<Tensor>)> {
    let _span = span("cross_entropy", Kind::Elementwise);
    let losses = std::cell::RefCell::new(vec![0.0; rows.len()]);
    let logits = super::host::edit(logits, |logits| match scale {
        Some(scale) => kernels::cross_entropy_backward(logits, form, rows, smoothing, scale, &mut losses.borrow_mut()),
        None => kernels::cross_entropy(logits, form, rows, smoothing, &mut losses.borrow_mut()),
    })?;
    Ok((losses.into_inner(), scale.map(|_| logits)))
}

/// Losses and gradient with candle's operations, in f32.
pub(crate) fn plain_cross_entropy(
    logits: &Tensor,
    form: LogitForm,
    rows: &[Row],
    smoothing: f32,
    scale: Option<f32>,
) -> Result<(Vec<f32>, Option<Tensor>)> {
    let (device, dtype) = (logits.device(), logits.dtype());
    let (count, vocab) = logits.dims2()?;
    let targets: Vec<u32> = rows.iter().map(|row| row.target as u32).collect();
    let targets = Tensor::from_vec(targets, (count, 1), device)?;
    let weights = Tensor::from_vec(rows.iter().map(|row| row.weight).collect::<Vec<_>>(), (count, 1), device)?;
    let (logits, slope) = plain_form(&logits.to_dtype(DType::F32)?.contiguous()?, form)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let exponentials = shifted.exp()?;
    let sums = exponentials.sum_keepdim(D::Minus1)?;
    let log_probabilities = shifted.broadcast_sub(&sums.log()?)?;
    let of_targets = log_probabilities.gather(&targets, D::Minus1)?;
    let mean = log_probabilities.mean_keepdim(D::Minus1)?;
    let smoothing = f64::from(smoothing);
    let losses = ((of_targets.affine(smoothing - 1.0, 0.0)? - mean.affine(smoothing, 0.0)?)? * &weights)?;
    let losses = losses.flatten_all()?.to_vec1()?;
    let Some(scale) = scale else {
        return Ok((losses, None));
    };
    let ones = Tensor::full((smoothing - 1.0) as f32, (count, 1), device)?;
    let gradient = exponentials.broadcast_div(&sums)?.affine(1.0, -smoothing / vocab as f64)?;
    let gradient = gradient.scatter_add(&targets, &ones, D::Minus1)?;
    let gradient = gradient.broadcast_mul(&weights.affine(f64::from(scale), 0.0)?)?;
    let gradient = if let Some(slope) = slope { (gradient * slope)? } else { gradient };
    Ok((losses, Some(gradient.to_dtype(dtype)?)))
}

/// The logits for the products of a head, f32, and their derivative with respect to the products unless it is 1.
fn plain_form(products: &Tensor, form: LogitForm) -> Result<(Tensor, Option<Tensor>)> {
    if form.is_plain() {
        return Ok((products.clone(), None));
    }
    let scaled = products.affine(f64::from(form.scale), 0.0)?;
    let Some(cap) = form.soft_cap.map(f64::from) else {
        let slope = Tensor::full(form.scale, products.shape(), products.device())?;
        return Ok((scaled, Some(slope)));
    };
    let t = scaled.affine(1.0 / cap, 0.0)?.tanh()?;
    let slope = t.sqr()?.affine(-f64::from(form.scale), f64::from(form.scale))?;
    Ok((t.affine(cap, 0.0)?, Some(slope)))
}

/// The logits of `hidden` in f32: `[rows, vocab]`.
pub(crate) fn logits(hidden: &Tensor, head: &Head, updates: &LayerUpdates) -> Result<Tensor> {
    let (form, products) = (head.form(), head.linear.infer_adapted(hidden, updates, None)?);
    let products = products.to_dtype(DType::F32)?;
    if form.is_plain() {
        return Ok(products);
    }
    if gpu::has_kernels(&products) {
        head.form_on_device(&products)?;
        return Ok(products);
    }
    if on_cpu(&products) {
        return super::host::edit(products, |products| form.apply(products));
    }
    Ok(plain_form(&products, form)?.0)
}

/// A tensor of `count` rows with `rows` at these ascending indices, and 0 elsewhere.
pub(crate) fn scatter_rows(rows: &Tensor, indices: &[usize], count: usize) -> Result<Tensor> {
    let width = rows.dim(1)?;
    if !gpu::has_kernels(rows) {
        let indices: Vec<u32> = indices.iter().map(|&index| index as u32).collect();
        let zeros = Tensor::zeros((count, width), rows.dtype(), rows.device())?;
        return Ok(zeros.index_add(&Tensor::new(indices, rows.device())?, rows, 0)?);
    }
    let mut sources = vec![u32::MAX; count];
    for (row, &index) in indices.iter().enumerate() {
        sources[index] = row as u32;
    }
    let y = gpu::empty((count, width), rows)?;
    gpu::by_row("spread_rows", &y, &[Arg::In(rows), Arg::In(&Tensor::new(sources, rows.device())?), Arg::Out(&y)])?;
    Ok(y)
}
