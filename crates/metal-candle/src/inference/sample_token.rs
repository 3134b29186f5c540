//! [`sample_token`]: samples a token from one row of logits, without state.

use super::sampler::Sampler;
use super::sampling::{SamplingConfig, SamplingStrategy};
use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, Storage, Tensor};
use std::cell::RefCell;

thread_local! {
    static SAMPLER: RefCell<Option<Sampler>> = const { RefCell::new(None) };
}

/// Samples a token from one row of logits.
///
/// The random generator belongs to the calling thread and is seeded by the operating system. Use [`Sampler`] for
/// reproducible sampling, penalties or several filters.
///
/// # Shapes
/// `logits`: `[vocab]`, or more dimensions if all except the last are 1; any float dtype, any device.
///
/// # Errors
/// The shape or dtype is wrong, a logit is NaN or infinite, or the strategy's parameter is out of its range.
pub fn sample_token(logits: &Tensor, strategy: &SamplingStrategy) -> Result<u32> {
    let config = SamplingConfig::from(*strategy);
    config.validate()?;
    if matches!(strategy, SamplingStrategy::TopK { k: 0 }) {
        return Err(Error::argument("k", "expected at least 1, found 0"));
    }
    SAMPLER.with(|sampler| {
        let mut sampler = sampler.try_borrow_mut().map_err(|_| Error::Stopped)?;
        let sampler = match sampler.as_mut() {
            Some(sampler) => sampler,
            None => sampler.insert(Sampler::new(SamplingConfig::greedy())?),
        };
        sampler.set_filters(&config);
        with_logits(logits, |logits| sampler.choose(logits))
    })
}

/// Calls `read` with the values of one row of logits, without a copy if they are f32 in CPU memory.
pub(crate) fn with_logits<T>(logits: &Tensor, read: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let vocab = logits.dims().last().copied().unwrap_or(0);
    if vocab == 0 || logits.elem_count() != vocab {
        return Err(Error::shape("logits", "[vocab] or [1, vocab]", logits.dims()));
    }
    if !logits.dtype().is_float() {
        let message = format!("expected a float dtype, found `{}`", logits.dtype().as_str());
        return Err(Error::argument("logits", message));
    }
    let logits = logits.to_dtype(DType::F32)?.contiguous()?;
    {
        let (storage, layout) = logits.storage_and_layout();
        if let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) = (&*storage, layout.contiguous_offsets())
            && let Some(values) = values.get(start..end)
        {
            return read(values);
        }
    }
    read(&logits.flatten_all()?.to_vec1()?)
}
