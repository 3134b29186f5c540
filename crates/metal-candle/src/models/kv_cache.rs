//! The key/value cache of generation.

use crate::device::Device;
use crate::error::Result;
use candle_core::{DType, Tensor};

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
    /// Memory of a cache of this size, in bytes.
    pub fn num_bytes(&self, dtype: DType) -> usize {
        2 * self.num_layers
            * self.batch_size
            * self.num_heads
            * self.max_seq_len
            * self.head_dim
            * dtype.size_in_bytes()
    }
}

/// Keys and values of the tokens seen so far, for each block and slot: `[batch_size, num_heads, max_seq_len, head_dim]`.
#[derive(Debug)]
pub struct KVCache {
    config: KVCacheConfig,
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
    /// The device cannot hold it.
    pub fn with_dtype(config: KVCacheConfig, device: &Device, dtype: DType) -> Result<Self> {
        let shape = (config.batch_size, config.num_heads, config.max_seq_len, config.head_dim);
        let layers = || {
            (0..config.num_layers)
                .map(|_| Tensor::zeros(shape, dtype, &device.candle()))
                .collect::<candle_core::Result<Vec<_>>>()
        };
        Ok(Self { config, keys: layers()?, values: layers()?, lengths: vec![0; config.batch_size] })
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

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.lengths.fill(0);
    }

    /// Memory held, in bytes.
    pub fn num_bytes(&self) -> usize {
        self.keys.first().map_or(0, |k| self.config.num_bytes(k.dtype()))
    }
}
