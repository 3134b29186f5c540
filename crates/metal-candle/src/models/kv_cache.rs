//! The key/value cache for generation.

use super::Batch;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::attention::{self, CacheSlots, Spans};
use crate::ops::host::Host;
use crate::ops::{KVCacheType, cache_write};
use candle_core::{DType, Tensor};
use metal_candle_kernels::{AttentionShape, Matrix, prefer_small_pages};

/// Sizes of a [`KVCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KVCacheConfig {
    /// The maximum number of tokens of a sequence.
    pub max_seq_len: usize,
    /// Number of decoder blocks.
    pub num_layers: usize,
    /// Number of cached heads: the model's key/value heads.
    pub num_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of slots: sequences that are cached at the same time.
    pub batch_size: usize,
}

impl KVCacheConfig {
    /// The memory of a cache of this size and element type, in bytes.
    pub fn num_bytes(&self, kind: KVCacheType) -> usize {
        let row_bytes = kind.row_len(self.head_dim).saturating_mul(kind.dtype().size_in_bytes());
        let sizes = [self.num_layers, self.batch_size, self.num_heads, self.max_seq_len, row_bytes];
        sizes.into_iter().fold(2, usize::saturating_mul)
    }
}

/// The keys and values of the tokens so far, for each block and slot: `[batch_size, num_heads, max_seq_len, head_dim]`,
/// or the bytes of quantized blocks in the last dimension.
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
    /// The device has too little memory.
    pub fn new(config: KVCacheConfig, device: &Device) -> Result<Self> {
        Self::with_dtype(config, device, DType::F32)
    }

    /// An empty cache with elements of `dtype` (f32, f16 or bf16).
    ///
    /// # Errors
    /// The dtype is not supported, or the device has too little memory.
    pub fn with_dtype(config: KVCacheConfig, device: &Device, dtype: DType) -> Result<Self> {
        let Some(kind) = KVCacheType::from_dtype(dtype) else {
            let message = format!("expected f32, f16 or bf16, found {}", dtype.as_str());
            return Err(Error::argument("dtype", message));
        };
        Self::with_type(config, device, kind)
    }

    /// An empty cache with elements of type `kind`.
    ///
    /// # Errors
    /// `kind` is quantized, and `head_dim` is not a multiple of 32 or the device is not the CPU; or the device has too
    /// little memory.
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

    /// Asks the operating system for small pages, so that only memory that is written becomes resident. It affects only
    /// an empty cache on the CPU.
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

    /// The sizes of the cache.
    pub fn config(&self) -> &KVCacheConfig {
        &self.config
    }

    /// The number of tokens in `slot`.
    pub fn len(&self, slot: usize) -> usize {
        self.lengths.get(slot).copied().unwrap_or(0)
    }

    /// Whether all slots are empty.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&n| n == 0)
    }

    /// Removes the tokens of `slot` from position `len` on.
    pub fn truncate(&mut self, slot: usize, len: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = len.min(*length);
        }
    }

    /// Sets the number of tokens in `slot`, after a kernel has written them.
    pub(crate) fn set_len(&mut self, slot: usize, len: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = len;
        }
    }

    /// Empties all slots.
    pub fn clear(&mut self) {
        self.lengths.fill(0);
    }

    /// Grows the cache to at least `max_seq_len` tokens per sequence. Cached tokens are preserved.
    ///
    /// # Errors
    /// The device has too little memory.
    pub fn reserve(&mut self, max_seq_len: usize) -> Result<()> {
        self.resize(self.config.batch_size, max_seq_len)
    }

    /// Grows the cache to at least `batch_size` slots. The new slots are empty.
    ///
    /// # Errors
    /// The device has too little memory.
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
            // one tensor at a time, so that only one is allocated twice
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

    /// The element type.
    pub fn kind(&self) -> KVCacheType {
        self.kind
    }

    /// The memory of the cache, in bytes.
    pub fn num_bytes(&self) -> usize {
        self.config.num_bytes(self.kind)
    }

    /// Checks that a batch continues the sequences in its slots and fits.
    ///
    /// `layers` contains the number of key/value heads of each layer of the model, and their width.
    pub(crate) fn check(&self, batch: &Batch, layers: &[[usize; 2]]) -> Result<()> {
        let wrong = |message: String| Err(Error::argument("cache", message));
        let config = &self.config;
        let own = [config.num_heads, config.head_dim];
        if config.num_layers != layers.len() || layers.iter().any(|shape| *shape != own) {
            let [kv_heads, head_dim] = layers.iter().find(|shape| **shape != own).copied().unwrap_or(own);
            return wrong(format!(
                "the model has {} layers of {kv_heads} key/value heads of width {head_dim}, but the cache has {} layers of {} \
                 heads of width {}",
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
                None => return wrong(format!("expected slots below {}, found {slot}", config.batch_size)),
                Some(true) => return wrong(format!("slot {slot} occurs twice in the batch")),
                Some(seen) => *seen = true,
            }
            let (first, held) = (batch.positions()[start] as usize, self.lengths[slot]);
            if first != held {
                return wrong(format!("a sequence starts at position {first}, but slot {slot} contains {held} tokens"));
            }
            if held + end - start > config.max_seq_len {
                return wrong(format!(
                    "{} tokens do not fit: slot {slot} contains {held} of at most {}",
                    end - start,
                    config.max_seq_len
                ));
            }
        }
        Ok(())
    }

    /// Attention of new queries over the cache of a layer, to which their keys and values have been added.
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

    /// The keys and values of a layer: `[batch_size, num_heads, max_seq_len, head_dim]`.
    pub(crate) fn layer(&self, layer: usize) -> (&Tensor, &Tensor) {
        (&self.keys[layer], &self.values[layer])
    }

    /// Writes new keys and values, `[tokens, num_heads * head_dim]`, after the cached ones.
    ///
    /// [`KVCache::advance`] updates the lengths of the slots, after the last layer.
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

    /// The slots of a batch's sequences, with their lengths after its tokens are added.
    pub(crate) fn slots_of(&self, batch: &Batch) -> CacheSlots {
        let lengths = batch.offsets().windows(2).zip(batch.slots());
        let lengths = lengths.map(|(window, &slot)| self.lengths[slot] + window[1] - window[0]).collect();
        CacheSlots { slots: batch.slots().to_vec(), lengths, max_seq_len: self.config.max_seq_len }
    }

    /// Adds the tokens of a batch to the lengths of their slots.
    pub(crate) fn advance(&mut self, batch: &Batch) {
        for (window, &slot) in batch.offsets().windows(2).zip(batch.slots()) {
            self.lengths[slot] += window[1] - window[0];
        }
    }

    /// Copies the tokens of slot `from` to slot `to`.
    ///
    /// # Errors
    /// A slot is out of range.
    pub fn copy_slot(&mut self, from: usize, to: usize) -> Result<()> {
        self.copy_prefix(from, to, self.len(from))
    }

    /// Copies the first `len` tokens of slot `from`, or all if it has fewer, to slot `to`.
    ///
    /// # Errors
    /// A slot is out of range.
    pub fn copy_prefix(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        let slots = self.config.batch_size;
        if from >= slots || to >= slots {
            return Err(Error::argument("slot", format!("expected slots below {slots}, found {}", from.max(to))));
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

    /// Copies the first `len` tokens of `slot`, or all if it has fewer: keys and values of each layer in turn,
    /// `[num_heads, len, head_dim]`, or the bytes of quantized blocks in the last dimension.
    ///
    /// # Errors
    /// The slot is out of range.
    pub(crate) fn read_slot(&self, slot: usize, len: usize) -> Result<Vec<Tensor>> {
        let len = len.min(self.len(slot));
        let tensors = self.keys.iter().zip(&self.values).flat_map(|(keys, values)| [keys, values]);
        tensors.map(|tensor| Ok(tensor.get(slot)?.narrow(1, 0, len)?.force_contiguous()?)).collect()
    }

    /// Replaces the contents of `slot` by the first `len` tokens of tensors as [`KVCache::read_slot`] returns them.
    ///
    /// # Errors
    /// The slot is out of range, the tokens do not fit, or there are fewer; then the slot is empty.
    pub(crate) fn write_slot(&mut self, slot: usize, len: usize, tensors: &[Tensor]) -> Result<()> {
        self.truncate(slot, 0);
        let expected = self.keys.len() + self.values.len();
        if tensors.len() != expected {
            return Err(Error::argument("tensors", format!("expected {expected}, found {}", tensors.len())));
        }
        let own = self.keys.iter().zip(&self.values).flat_map(|(keys, values)| [keys, values]);
        for (to, from) in own.zip(tensors) {
            to.get(slot)?.slice_set(&from.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
        }
        self.set_len(slot, len);
        Ok(())
    }
}
