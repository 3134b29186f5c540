//! The key/value cache of generation.

use super::Batch;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::attention::{self, Cached, Spans};
use crate::ops::host::Host;
use crate::ops::{KVCacheType, cache_write};
use candle_core::{DType, Tensor};
use metal_candle_kernels::{AttentionShape, Matrix, prefer_small_pages};

/// Sizes of a [`KVCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KVCacheConfig {
    /// Most tokens of a sequence.
    pub max_seq_len: usize,
    /// Number of decoder blocks.
    pub num_layers: usize,
    /// Number of cached heads: the key/value heads of the model.
    pub num_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of sequences held side by side (slots).
    pub batch_size: usize,
}

impl KVCacheConfig {
    /// Memory of a cache of this size that stores `kind`, in bytes.
    pub fn num_bytes(&self, kind: KVCacheType) -> usize {
        let row_bytes = kind.row_len(self.head_dim).saturating_mul(kind.dtype().size_in_bytes());
        let sizes = [self.num_layers, self.batch_size, self.num_heads, self.max_seq_len, row_bytes];
        sizes.into_iter().fold(2, usize::saturating_mul)
    }
}

/// Keys and values of the tokens seen so far, for each block and slot: `[batch_size, num_heads, max_seq_len, head_dim]`, or the
/// bytes of blocks in place of `head_dim` elements.
#[derive(Debug)]
pub struct KVCache {
    config: KVCacheConfig,
    kind: KVCacheType,
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    lengths: Vec<usize>,
}

impl KVCache {
    /// An empty cache in f32.
    ///
    /// # Errors
    /// The device cannot hold it.
    pub fn new(config: KVCacheConfig, device: &Device) -> Result<Self> {
        Self::with_dtype(config, device, DType::F32)
    }

    /// An empty cache that stores `dtype` (f32, f16 or bf16).
    ///
    /// # Errors
    /// Another type, or the device cannot hold it.
    pub fn with_dtype(config: KVCacheConfig, device: &Device, dtype: DType) -> Result<Self> {
        let Some(kind) = KVCacheType::from_dtype(dtype) else {
            let message = format!("expected f32, f16 or bf16, found {}", dtype.as_str());
            return Err(Error::argument("dtype", message));
        };
        Self::with_type(config, device, kind)
    }

    /// An empty cache that stores `kind`.
    ///
    /// # Errors
    /// `kind` is made of blocks, and the width of a head is no multiple of 32 or the device is not the CPU; or the device
    /// cannot hold the cache.
    pub fn with_type(config: KVCacheConfig, device: &Device, kind: KVCacheType) -> Result<Self> {
        kind.check_head_dim(config.head_dim)?;
        if kind.block_format().is_some() && !device.is_cpu() {
            let message = format!("expected `f32`, `f16` or `bf16` on {}, found `{kind}`", device.name());
            return Err(Error::argument("kv_cache", message));
        }
        let shape = (config.batch_size, config.num_heads, config.max_seq_len, kind.row_len(config.head_dim));
        let layers = || {
            (0..config.num_layers)
                .map(|_| Tensor::zeros(shape, kind.dtype(), &device.candle()))
                .collect::<candle_core::Result<Vec<_>>>()
        };
        Ok(Self { config, kind, keys: layers()?, values: layers()?, lengths: vec![0; config.batch_size] })
    }

    /// Lets only the tokens that are written take memory, where the operating system clears memory by large pages. It has an
    /// effect on an empty cache on the CPU only.
    ///
    /// # Errors
    /// The tensors are not contiguous.
    pub(crate) fn prefer_small_pages(&self) -> Result<()> {
        for tensor in self.keys.iter().chain(&self.values).filter(|tensor| tensor.device().is_cpu()) {
            let host = Host::new(tensor)?;
            if self.kind.block_format().is_some() {
                prefer_small_pages(host.bytes()?);
                continue;
            }
            match host.matrix()? {
                Matrix::F32(values) => prefer_small_pages(values),
                Matrix::F16(values) => prefer_small_pages(values),
                Matrix::BF16(values) => prefer_small_pages(values),
            }
        }
        Ok(())
    }

    /// The sizes it was made with.
    pub fn config(&self) -> &KVCacheConfig {
        &self.config
    }

    /// Number of tokens held in `slot`.
    pub fn len(&self, slot: usize) -> usize {
        self.lengths.get(slot).copied().unwrap_or(0)
    }

    /// Whether no slot holds a token.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&n| n == 0)
    }

    /// Forgets all tokens of `slot` from position `len` on.
    pub fn truncate(&mut self, slot: usize, len: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = len.min(*length);
        }
    }

    /// Says how many tokens of `slot` were written.
    pub(crate) fn set_len(&mut self, slot: usize, len: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = len;
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.lengths.fill(0);
    }

    /// Makes room for sequences of `max_seq_len` tokens and keeps what is held.
    ///
    /// # Errors
    /// The device cannot hold it.
    pub fn reserve(&mut self, max_seq_len: usize) -> Result<()> {
        self.resize(self.config.batch_size, max_seq_len)
    }

    /// Grows the cache to at least `batch_size` slots. The new slots are empty.
    ///
    /// # Errors
    /// The device cannot hold them.
    pub fn reserve_slots(&mut self, batch_size: usize) -> Result<()> {
        self.resize(batch_size, self.config.max_seq_len)
    }

    fn resize(&mut self, batch_size: usize, max_seq_len: usize) -> Result<()> {
        let old = self.config;
        let (batch_size, max_seq_len) = (batch_size.max(old.batch_size), max_seq_len.max(old.max_seq_len));
        if (batch_size, max_seq_len) == (old.batch_size, old.max_seq_len) {
            return Ok(());
        }
        for tensor in self.keys.iter_mut().chain(&mut self.values) {
            // one tensor at a time, so that only one is held twice
            let shape = (batch_size, old.num_heads, max_seq_len, self.kind.row_len(old.head_dim));
            let larger = Tensor::zeros(shape, tensor.dtype(), tensor.device())?;
            for (slot, &length) in self.lengths.iter().enumerate().filter(|(_, length)| **length > 0) {
                let rows = tensor.get(slot)?.narrow(1, 0, length)?.force_contiguous()?;
                larger.get(slot)?.slice_set(&rows, 1, 0)?;
            }
            *tensor = larger;
        }
        self.config = KVCacheConfig { max_seq_len, batch_size, ..old };
        self.lengths.resize(batch_size, 0);
        Ok(())
    }

    /// The type of what is stored.
    pub fn kind(&self) -> KVCacheType {
        self.kind
    }

    /// Memory held, in bytes.
    pub fn num_bytes(&self) -> usize {
        self.config.num_bytes(self.kind)
    }

    /// Whether a batch continues what the slots hold and fits.
    ///
    /// `layers` are the key/value heads of each of the model's layers, and their width.
    pub(crate) fn check(&self, batch: &Batch, layers: &[[usize; 2]]) -> Result<()> {
        let wrong = |message: String| Err(Error::argument("cache", message));
        let config = &self.config;
        let own = [config.num_heads, config.head_dim];
        if config.num_layers != layers.len() || layers.iter().any(|shape| *shape != own) {
            let [kv_heads, head_dim] = layers.iter().find(|shape| **shape != own).copied().unwrap_or(own);
            return wrong(format!(
                "the model has {} layers of {kv_heads} key/value heads of width {head_dim}, the cache {} of {} of {}",
                layers.len(),
                config.num_layers,
                config.num_heads,
                config.head_dim
            ));
        }
        let mut seen = vec![false; config.batch_size];
        for (sequence, &slot) in batch.slots().iter().enumerate() {
            let (start, end) = (batch.offsets()[sequence], batch.offsets()[sequence + 1]);
            match seen.get_mut(slot) {
                None => return wrong(format!("slot {slot} is not below the number of slots, {}", config.batch_size)),
                Some(true) => return wrong(format!("slot {slot} occurs twice in a batch")),
                Some(seen) => *seen = true,
            }
            let (first, held) = (batch.positions()[start] as usize, self.lengths[slot]);
            if first != held {
                return wrong(format!("a sequence begins at position {first}, but slot {slot} holds {held} tokens"));
            }
            if held + end - start > config.max_seq_len {
                return wrong(format!(
                    "{} tokens do not fit: slot {slot} holds {held} of at most {}",
                    end - start,
                    config.max_seq_len
                ));
            }
        }
        Ok(())
    }

    /// Attention of new queries over a layer, to which their keys and values were added.
    pub(crate) fn attend(
        &self,
        layer: usize,
        shape: AttentionShape,
        sinks: Option<&Tensor>,
        q: &Tensor,
        spans: &Spans,
    ) -> Result<Tensor> {
        match self.kind.block_format() {
            Some(format) => attention::with_cached_blocks(shape, sinks, q, self.layer(layer), format, spans),
            None => attention::with_cache(shape, sinks, q, self.layer(layer), spans),
        }
    }

    /// Keys and values of a layer: `[batch_size, num_heads, max_seq_len, head_dim]`.
    pub(crate) fn layer(&self, layer: usize) -> (&Tensor, &Tensor) {
        (&self.keys[layer], &self.values[layer])
    }

    /// Writes new keys and values, `[tokens, num_heads * head_dim]`, behind those held.
    ///
    /// The lengths of the slots change with [`KVCache::advance`], after the last layer.
    pub(crate) fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor, spans: &Spans) -> Result<()> {
        if cache_write::append((k, v), (&self.keys[layer], &self.values[layer]), spans)? {
            return Ok(());
        }
        let row_len = self.kind.row_len(self.config.head_dim);
        for (from, to) in [(k, &self.keys[layer]), (v, &self.values[layer])] {
            let blocks = self.kind.block_format().map(|format| cache_write::quantized(from, format)).transpose()?;
            let from = blocks.as_ref().unwrap_or(from);
            for (window, slot) in spans.sequences_in_slots() {
                let (start, count) = (window.start, window.len());
                let rows = from.narrow(0, start, count)?.reshape((count, self.config.num_heads, row_len))?;
                let rows = rows.transpose(0, 1)?.to_dtype(to.dtype())?.contiguous()?;
                to.get(slot)?.slice_set(&rows, 1, self.lengths[slot])?;
            }
        }
        Ok(())
    }

    /// Where the sequences of a batch are when its tokens are added.
    pub(crate) fn cached(&self, batch: &Batch) -> Cached {
        let lengths = batch.offsets().windows(2).zip(batch.slots());
        let lengths = lengths.map(|(window, &slot)| self.lengths[slot] + window[1] - window[0]).collect();
        Cached { slots: batch.slots().to_vec(), lengths, max_seq_len: self.config.max_seq_len }
    }

    /// Counts the tokens of a batch as held.
    pub(crate) fn advance(&mut self, batch: &Batch) {
        for (window, &slot) in batch.offsets().windows(2).zip(batch.slots()) {
            self.lengths[slot] += window[1] - window[0];
        }
    }

    /// Copies the tokens of slot `from` to slot `to`.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn copy_slot(&mut self, from: usize, to: usize) -> Result<()> {
        self.copy_prefix(from, to, self.len(from))
    }

    /// Copies the first `len` tokens of slot `from`, or all if it holds fewer, to slot `to`.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn copy_prefix(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        let slots = self.config.batch_size;
        if from >= slots || to >= slots {
            return Err(Error::argument("slot", format!("expected one below {slots}, found {}", from.max(to))));
        }
        let length = len.min(self.lengths[from]);
        if from != to && length > 0 {
            for tensor in self.keys.iter().chain(&self.values) {
                let rows = tensor.get(from)?.narrow(1, 0, length)?.force_contiguous()?;
                tensor.get(to)?.slice_set(&rows, 1, 0)?;
            }
        }
        self.lengths[to] = length;
        Ok(())
    }
}
