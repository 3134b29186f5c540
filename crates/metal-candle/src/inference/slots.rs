//! The KV cache of a scheduler: slots that sequences take and release, and the prefixes that released slots still hold.

use super::request::AdapterId;
use crate::error::Result;
use crate::models::{KVCache, KVCacheConfig, Model};
use candle_core::DType;

/// Slots by use, and the cache that they index.
#[derive(Debug, Default)]
pub(super) struct Slots {
    cache: Option<KVCache>,
    all: Vec<Slot>,
    /// Number of releases so far.
    releases: u64,
}

#[derive(Debug, Default)]
struct Slot {
    is_taken: bool,
    prefix: Option<Prefix>,
    /// The number of the last release.
    released: u64,
}

/// The tokens that a slot holds.
#[derive(Debug)]
pub(super) struct Prefix {
    pub(super) ids: Vec<u32>,
    pub(super) key: u64,
    pub(super) adapter: Option<AdapterId>,
}

impl Slots {
    /// The cache, once slots are reserved.
    pub(super) fn cache(&mut self) -> Option<&mut KVCache> {
        self.cache.as_mut()
    }

    /// Number of slots.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Number of slots that sequences have taken.
    pub(super) fn num_taken(&self) -> usize {
        self.all.iter().filter(|slot| slot.is_taken).count()
    }

    /// Memory of the cache in bytes.
    pub(super) fn num_bytes(&self) -> usize {
        self.cache.as_ref().map_or(0, KVCache::num_bytes)
    }

    /// Frees the cache.
    pub(super) fn clear(&mut self) {
        self.cache = None;
        self.all.iter_mut().for_each(|slot| slot.prefix = None);
    }

    /// Grows the cache to at least this number of slots and tokens per slot; reports whether it moved in memory.
    ///
    /// # Errors
    /// The device cannot hold it. The cache is freed then: what its slots held has to be computed again.
    pub(super) fn reserve(&mut self, model: &Model, num_slots: usize, num_tokens: usize) -> Result<bool> {
        let num_slots = num_slots.max(self.all.len());
        let Some(cache) = &mut self.cache else {
            self.cache = Some(new_cache(model, num_slots, num_tokens)?);
            self.all.resize_with(num_slots, Slot::default);
            return Ok(true);
        };
        let config = *cache.config();
        if num_slots <= config.batch_size && num_tokens <= config.max_seq_len {
            return Ok(false);
        }
        let grown = cache.reserve_slots(num_slots).and_then(|()| cache.reserve(num_tokens));
        if grown.is_err() {
            // some layers may have grown and others not
            self.clear();
        }
        self.all.resize_with(num_slots, Slot::default);
        grown.map(|()| true)
    }

    /// Takes a free slot for a sequence that starts with `ids`; returns the slot and the number of first tokens that it
    /// holds already, at most all but the last, whose logits are needed. `key` and `adapter` are those of
    /// [`Prefix`]; without a key no prefix is used.
    pub(super) fn take(&mut self, ids: &[u32], key: Option<u64>, adapter: Option<AdapterId>) -> Option<(usize, usize)> {
        let ids = &ids[..ids.len().saturating_sub(1)];
        let shared = |slot: &Slot| {
            let prefix = slot.prefix.as_ref().filter(|prefix| Some(prefix.key) == key && prefix.adapter == adapter);
            prefix.map_or(0, |prefix| prefix.ids.iter().zip(ids).take_while(|(a, b)| a == b).count())
        };
        let free = self.all.iter().enumerate().filter(|(_, slot)| !slot.is_taken);
        // the longest prefix, else an empty slot, else the slot that was released first
        let (index, slot) = free.min_by_key(|(index, slot)| {
            (std::cmp::Reverse(shared(slot)), slot.prefix.is_some(), slot.released, *index)
        })?;
        let reused = shared(slot);
        let slot = &mut self.all[index];
        slot.is_taken = true;
        slot.prefix = None;
        self.truncate(index, reused);
        Some((index, reused))
    }

    /// Frees a slot, which may keep a prefix for later sequences.
    pub(super) fn release(&mut self, index: usize, prefix: Option<Prefix>) {
        self.truncate(index, prefix.as_ref().map_or(0, |prefix| prefix.ids.len()));
        self.releases += 1;
        if let Some(slot) = self.all.get_mut(index) {
            *slot = Slot { is_taken: false, prefix, released: self.releases };
        }
    }

    /// Forgets the prefixes that an adapter computed.
    pub(super) fn forget_adapter(&mut self, adapter: AdapterId) {
        for slot in &mut self.all {
            slot.prefix.take_if(|prefix| prefix.adapter == Some(adapter));
        }
    }

    /// Forgets all tokens of a slot from position `len` on.
    pub(super) fn truncate(&mut self, index: usize, len: usize) {
        if let Some(cache) = &mut self.cache {
            cache.truncate(index, len);
        }
    }
}

fn new_cache(model: &Model, num_slots: usize, num_tokens: usize) -> Result<KVCache> {
    let (sizes, dtype) = cache_config(model, num_slots, num_tokens);
    KVCache::with_dtype(sizes, &model.device(), dtype)
}

/// The bytes of a cache.
pub(super) fn cache_bytes(model: &Model, num_slots: usize, num_tokens: usize) -> usize {
    let (sizes, dtype) = cache_config(model, num_slots, num_tokens);
    let KVCacheConfig { max_seq_len, num_layers, num_heads, head_dim, batch_size } = sizes;
    let sizes = [2, num_layers, num_heads, head_dim, batch_size, max_seq_len, dtype.size_in_bytes()];
    sizes.into_iter().fold(1, usize::saturating_mul)
}

fn cache_config(model: &Model, num_slots: usize, num_tokens: usize) -> (KVCacheConfig, DType) {
    let config = model.config();
    let sizes = KVCacheConfig {
        max_seq_len: num_tokens,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: num_slots,
    };
    let dtype = match model.dtype() {
        DType::F32 => DType::F32,
        _ if model.device().is_cpu() => DType::F16,
        other => other,
    };
    (sizes, dtype)
}
