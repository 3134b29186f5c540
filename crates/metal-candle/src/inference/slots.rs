//! Manages the slots of a scheduler's KV cache, and the prefixes that remain in released slots.

use super::prefix_folder::{MIN_TOKENS, PrefixFolder, PrefixStorage, Scope, num_common};
use super::request::AdapterId;
use crate::error::{Error, Result};
use crate::models::{KVCache, KVCacheConfig, KVCacheType, Model};
use crate::ops::LowRankUpdates;
use candle_core::DType;
use std::cmp::Reverse;
use std::collections::HashMap;

/// The slots and the cache that they index.
#[derive(Debug, Default)]
pub(super) struct Slots {
    cache: Option<KVCache>,
    /// The type of the cache; `None` for the default of the model.
    kind: Option<KVCacheType>,
    all: Vec<Slot>,
    /// The number of releases so far.
    releases: u64,
    /// The folder for prefixes that are overwritten.
    folder: Option<PrefixFolder>,
    /// The digests of the adapters, if there is a folder.
    adapters: HashMap<AdapterId, [u8; 32]>,
    /// The number of tokens read from the folder since [`Slots::take_num_read`].
    num_read: usize,
}

#[derive(Debug, Default)]
struct Slot {
    is_taken: bool,
    /// The prefix in a free slot that later sequences may reuse.
    prefix: Option<Prefix>,
    /// The value of `releases` at its last release.
    released: u64,
}

/// The tokens in a slot.
#[derive(Debug)]
pub(super) struct Prefix {
    pub(super) ids: Vec<u32>,
    pub(super) sharing: Sharing,
}

/// The key for sharing prefixes: sequences with equal values share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sharing {
    pub(super) key: u128,
    pub(super) adapter: Option<AdapterId>,
}

impl Slots {
    /// Creates an empty cache of this type; `None` for the default of the model.
    pub(super) fn new(kind: Option<KVCacheType>) -> Self {
        Self { kind, ..Self::default() }
    }

    /// Saves prefixes of at least [`MIN_TOKENS`] that are overwritten, and reads them when a sequence needs them.
    ///
    /// # Errors
    /// As [`PrefixFolder::open`].
    pub(super) fn open_folder(&mut self, storage: &PrefixStorage, model: &Model) -> Result<()> {
        let kind = self.kind.unwrap_or_else(|| default_kind(model));
        let longest = cache_config(model, 1, model.config().max_sequence_length());
        self.folder = Some(PrefixFolder::open(storage, model, kind, longest)?);
        Ok(())
    }

    /// Computes the digest of a new adapter, if there is a folder.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn add_adapter(&mut self, adapter: AdapterId, updates: &LowRankUpdates) -> Result<()> {
        if self.folder.is_some() {
            self.adapters.insert(adapter, updates.digest()?);
        }
        Ok(())
    }

    /// Saves the prefixes of all free slots, and waits until they are written.
    pub(super) fn save_prefixes(&mut self) {
        let len = |index: &usize| self.all[*index].prefix.as_ref().map_or(0, |prefix| prefix.ids.len());
        let mut order: Vec<usize> = (0..self.all.len()).collect();
        // a text that contains another is saved first, so that the other is not saved
        order.sort_by_key(|index| Reverse(len(index)));
        for index in order {
            self.save(index, 0, true);
        }
        self.folder.iter().for_each(PrefixFolder::finish);
    }

    /// The number of tokens that were read from the folder since the last call.
    pub(super) fn take_num_read(&mut self) -> usize {
        std::mem::take(&mut self.num_read)
    }

    /// The cache, once slots are allocated.
    pub(super) fn cache(&mut self) -> Option<&mut KVCache> {
        self.cache.as_mut()
    }

    /// Number of slots.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// The number of taken slots.
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

    /// Grows the cache to at least this number of slots and tokens per slot; returns whether it moved in memory.
    ///
    /// # Errors
    /// The cache does not fit on the device. Then it is freed, and the tokens of its slots must be recomputed.
    pub(super) fn reserve(&mut self, model: &Model, num_slots: usize, num_tokens: usize) -> Result<bool> {
        let num_slots = num_slots.max(self.all.len());
        let Some(cache) = &mut self.cache else {
            self.cache = Some(new_cache(model, self.kind, num_slots, num_tokens)?);
            self.all.resize_with(num_slots, Slot::default);
            return Ok(true);
        };
        let config = *cache.config();
        if num_slots <= config.batch_size && num_tokens <= config.max_seq_len {
            return Ok(false);
        }
        let grown = cache.reserve_slots(num_slots).and_then(|()| cache.reserve(num_tokens));
        if grown.is_err() {
            // some layers may have grown, others not
            self.clear();
        }
        self.all.resize_with(num_slots, Slot::default);
        grown.map(|()| true)
    }

    /// Takes a free slot and clears it.
    pub(super) fn take(&mut self) -> Option<usize> {
        let index = self.next_free()?;
        self.mark_taken(index, 0);
        Some(index)
    }

    /// Takes a free slot for a sequence that starts with `ids`; returns the slot and the number of these tokens that it
    /// contains. `busy` is a slot in use, with its number of these tokens.
    pub(super) fn take_with_prefix(
        &mut self,
        ids: &[u32],
        sharing: Sharing,
        busy: Option<(usize, usize)>,
    ) -> Option<(usize, usize)> {
        let free = self.next_free()?;
        let held = |(index, slot): (usize, &Slot)| {
            let prefix = slot.prefix.as_ref().filter(|prefix| prefix.sharing == sharing)?;
            Some((num_common(&prefix.ids, ids), index, prefix.ids.len()))
        };
        let (count, index, len) = self.all.iter().enumerate().filter_map(held).max().unwrap_or((0, free, 0));
        let longest = busy.map_or(count, |(_, shared)| shared.max(count));
        if let Some(read) = self.read(free, ids, sharing, longest) {
            return Some((free, read));
        }
        let (from, count, is_copied) = match busy {
            Some((slot, shared)) if shared > count => (slot, shared, true),
            // do not overwrite another text that has little in common with this one
            _ => (index, count, 2 * count < len),
        };
        if !is_copied || from == free {
            self.mark_taken(from, count);
            return Some((from, count));
        }
        self.mark_taken(free, 0);
        let copied = self.cache.as_mut().is_some_and(|cache| cache.copy_prefix(from, free, count).is_ok());
        Some((free, if copied { count } else { 0 }))
    }

    /// Takes free slot `index` for a text and reads its first tokens from the folder; returns their number. `None` if no file
    /// has enough tokens more than `held`, the number in another slot.
    fn read(&mut self, index: usize, ids: &[u32], sharing: Sharing, held: usize) -> Option<usize> {
        // before the files are searched
        if ids.len() < held + MIN_TOKENS {
            return None;
        }
        let scope = self.scope(sharing)?;
        let capacity = self.cache.as_ref()?.config().max_seq_len;
        let folder = self.folder.as_mut()?;
        let found = folder.find(&scope, ids)?;
        let count = found.shared.min(capacity);
        if count < held + MIN_TOKENS {
            return None;
        }
        let tensors = folder.load(&scope, &found)?;
        self.mark_taken(index, 0);
        match self.cache.as_mut()?.write_slot(index, count, &tensors) {
            Ok(()) => {
                self.num_read += count;
                Some(count)
            }
            Err(error) => {
                tracing::warn!("a saved prefix is not used: {error}");
                Some(0)
            }
        }
    }

    /// Saves the prefix of a slot whose first `kept` tokens remain in the cache, if it is long and no file has it. If other
    /// prefixes are being written, it is dropped, unless `waits`.
    fn save(&mut self, index: usize, kept: usize, waits: bool) {
        let Some(prefix) = self.all.get(index).and_then(|slot| slot.prefix.as_ref()) else { return };
        if prefix.ids.len() < kept + MIN_TOKENS {
            return;
        }
        let Some(scope) = self.scope(prefix.sharing) else { return };
        let (Some(folder), Some(cache)) = (&mut self.folder, &self.cache) else { return };
        if !folder.lacks(&scope, &prefix.ids) {
            return;
        }
        match cache.read_slot(index, prefix.ids.len()) {
            Ok(tensors) => folder.save(&scope, &prefix.ids, tensors, waits),
            Err(error) => tracing::warn!("a prefix was not saved: {error}"),
        }
    }

    /// The scope of files, if there is a folder.
    fn scope(&self, sharing: Sharing) -> Option<Scope> {
        let adapter = sharing.adapter.map(|adapter| self.adapters.get(&adapter));
        match adapter {
            // its digest is unknown
            Some(None) => None,
            adapter => Some(self.folder.as_ref()?.scope(sharing.key, adapter.flatten())),
        }
    }

    /// The free slot to overwrite: an empty one, else the least recently released one.
    fn next_free(&self) -> Option<usize> {
        let free = self.all.iter().enumerate().filter(|(_, slot)| !slot.is_taken);
        free.min_by_key(|(index, slot)| (slot.prefix.is_some(), slot.released, *index)).map(|(index, _)| index)
    }

    /// Takes a slot and keeps its first `len` tokens.
    fn mark_taken(&mut self, index: usize, len: usize) {
        self.save(index, len, false);
        (self.all[index].is_taken, self.all[index].prefix) = (true, None);
        self.truncate(index, len);
    }

    /// Frees a slot, optionally keeping a prefix for later sequences.
    pub(super) fn release(&mut self, index: usize, prefix: Option<Prefix>) {
        self.truncate(index, prefix.as_ref().map_or(0, |prefix| prefix.ids.len()));
        self.releases += 1;
        if let Some(slot) = self.all.get_mut(index) {
            *slot = Slot { is_taken: false, prefix, released: self.releases };
        }
    }

    /// Drops the prefixes of an adapter.
    pub(super) fn forget_adapter(&mut self, adapter: AdapterId) {
        self.adapters.remove(&adapter);
        for slot in &mut self.all {
            slot.prefix.take_if(|prefix| prefix.sharing.adapter == Some(adapter));
        }
    }

    /// Truncates a slot to `len` tokens.
    pub(super) fn truncate(&mut self, index: usize, len: usize) {
        if let Some(cache) = &mut self.cache {
            cache.truncate(index, len);
        }
    }
}

/// Creates an empty cache for a model, of this type or the default of the model.
pub(super) fn new_cache(
    model: &Model,
    kind: Option<KVCacheType>,
    num_slots: usize,
    num_tokens: usize,
) -> Result<KVCache> {
    check_kind(model, kind)?;
    let kind = kind.unwrap_or_else(|| default_kind(model));
    KVCache::with_type(cache_config(model, num_slots, num_tokens), &model.device(), kind)
}

/// The size of a cache in bytes.
pub(super) fn cache_bytes(model: &Model, kind: Option<KVCacheType>, num_slots: usize, num_tokens: usize) -> usize {
    cache_config(model, num_slots, num_tokens).num_bytes(kind.unwrap_or_else(|| default_kind(model)))
}

/// Checks that the cache of a model supports this type on its device.
pub(super) fn check_kind(model: &Model, kind: Option<KVCacheType>) -> Result<()> {
    let Some(kind) = kind else { return Ok(()) };
    let default = default_kind(model);
    if !model.device().is_cpu() && kind != default {
        let message = format!(
            "expected `{default}`, the type of the weights, the only type that {} supports, found `{kind}`",
            model.device().name()
        );
        return Err(Error::argument("kv_cache", message));
    }
    kind.check_head_dim(model.config().head_dim)
}

/// The default type for a model: f32 for f32 weights and where any weight is quantized; for other weights f16 on the CPU, and
/// the type of the weights on other devices.
fn default_kind(model: &Model) -> KVCacheType {
    if !model.device().is_cpu() {
        return KVCacheType::from_dtype(model.dtype()).unwrap_or(KVCacheType::F32);
    }
    let mut weights = model.parameters().iter().map(|(_, weight)| weight);
    let is_f32 = model.dtype() == DType::F32 || weights.any(|weight| weight.block_format().is_some());
    if is_f32 { KVCacheType::F32 } else { KVCacheType::F16 }
}

fn cache_config(model: &Model, num_slots: usize, num_tokens: usize) -> KVCacheConfig {
    let config = model.config();
    KVCacheConfig {
        max_seq_len: num_tokens,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: num_slots,
    }
}
