//! Where the sequences of a batch are, for attention: on the CPU as numbers, for kernels as tables on their device.

use super::gpu;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{AttentionShape, Mask};

/// The sequences of a batch: `offsets[i]..offsets[i + 1]`.
#[derive(Debug)]
pub(crate) struct Spans {
    pub(super) offsets: Vec<usize>,
    pub(super) cached: Option<Cached>,
    /// Of each kind of attention among the layers.
    tables: Vec<(TableKey, Tables)>,
    /// The cache's slot and position of each token.
    places: Option<Tensor>,
}

/// What tables depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TableKey {
    kv_heads: usize,
    head_dim: usize,
    mask: Mask,
}

impl TableKey {
    fn new(shape: AttentionShape) -> Self {
        Self { kv_heads: shape.kv_heads, head_dim: shape.head_dim, mask: shape.mask }
    }
}

/// Where the sequences' keys and values are in a cache.
#[derive(Debug)]
pub(crate) struct Cached {
    /// The slot of each sequence.
    pub(crate) slots: Vec<usize>,
    /// The tokens that each slot holds, those of the batch included.
    pub(crate) lengths: Vec<usize>,
    /// Most tokens of a slot.
    pub(crate) max_seq_len: usize,
}

/// What kernels read; see `attention.metal` and `attention.cu`.
#[derive(Debug)]
pub(super) enum Tables {
    /// Tiles of queries and of keys, four words each.
    Portable { queries: Tensor, keys: Option<Tensor> },
    /// The offsets, tiles of queries and of keys (sequence and number in it), and slots and lengths.
    TensorCore { offsets: Tensor, queries: Tensor, keys: Option<Tensor>, slots_and_lengths: Option<(Tensor, Tensor)> },
}

/// The widest head that kernels take.
const MAX_HEAD_DIM: usize = 128;

/// Queries of a tile of `attention.metal`, and keys of one in the backward pass.
fn rows_of_tile(head_dim: usize) -> usize {
    if head_dim <= 64 { 16 } else { 8 }
}

/// Queries and keys of a tile of `attention.cu`.
const TENSOR_CORE_TILES: (usize, usize) = (128, 64);

/// Whether kernels take this attention.
fn has_kernels(shape: AttentionShape) -> bool {
    let fits = shape.head_dim <= MAX_HEAD_DIM && shape.head_dim.is_multiple_of(4);
    fits && shape.mask == Mask::Causal && shape.soft_cap.is_none()
}

/// Whether `attention.cu` takes heads of this width and type.
pub(super) fn is_for_tensor_cores(head_dim: usize, dtype: DType, device: &Device) -> bool {
    device.is_cuda() && matches!(dtype, DType::BF16 | DType::F16) && matches!(head_dim, 32 | 64 | 128)
}

impl Spans {
    /// Whether kernels of a device other than the CPU take this attention of the batch.
    pub(crate) fn has_tables(&self, shape: AttentionShape) -> bool {
        self.tables(shape).is_some()
    }

    /// What kernels read for this attention, where there are kernels for it.
    pub(super) fn tables(&self, shape: AttentionShape) -> Option<&Tables> {
        let key = TableKey::new(shape);
        self.tables.iter().find(|(of, _)| *of == key && has_kernels(shape)).map(|(_, tables)| tables)
    }

    /// Sequences over themselves, or over what a cache holds. `shapes` are those of the layers' attention, each as often as you
    /// like; `like` gives type and device of the activations.
    ///
    /// # Errors
    /// A mask hides every key.
    pub(crate) fn new(
        offsets: &[usize],
        shapes: &[AttentionShape],
        cached: Option<Cached>,
        like: &Tensor,
    ) -> Result<Self> {
        if let Some(shape) = shapes.iter().find(|shape| !shape.mask.is_valid()) {
            return Err(Error::argument("mask", format!("{:?} hides every key", shape.mask)));
        }
        let mut spans = Self { offsets: offsets.to_vec(), cached, tables: Vec::new(), places: None };
        if !gpu::has_kernels(like) {
            return Ok(spans);
        }
        spans.places = spans.places(like.device())?;
        for &shape in shapes.iter().filter(|shape| has_kernels(**shape)) {
            let key = TableKey::new(shape);
            if spans.tables.iter().any(|(of, _)| *of == key) {
                continue;
            }
            let tables = if is_for_tensor_cores(shape.head_dim, like.dtype(), like.device()) {
                spans.tensor_core_tables(like.device())?
            } else {
                spans.portable_tables(shape, like.device())?
            };
            spans.tables.push((key, tables));
        }
        Ok(spans)
    }

    /// The tokens of each sequence, and its slot of the cache.
    pub(crate) fn sequences_in_slots(&self) -> impl Iterator<Item = (std::ops::Range<usize>, usize)> {
        let slots = self.cached.iter().flat_map(|cached| cached.slots.iter().copied());
        self.offsets.windows(2).map(|window| window[0]..window[1]).zip(slots)
    }

    /// The number of queries of each sequence, and how many keys its first query sees.
    fn sequences(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        self.offsets.windows(2).enumerate().map(|(i, window)| {
            let count = window[1] - window[0];
            let seen = self.cached.as_ref().map_or(1, |cached| cached.lengths[i] + 1 - count);
            (window[0], count, seen)
        })
    }

    /// The slot and the position of each token, on the device.
    pub(super) fn places_on_device(&self) -> Option<&Tensor> {
        self.places.as_ref()
    }

    fn places(&self, device: &Device) -> Result<Option<Tensor>> {
        let Some(cached) = &self.cached else { return Ok(None) };
        let mut places = Vec::new();
        for ((_, count, seen), slot) in self.sequences().zip(&cached.slots) {
            places.extend((seen - 1..seen - 1 + count).flat_map(|position| [*slot as u32, position as u32]));
        }
        Ok(Some(words(places, device)?))
    }

    fn portable_tables(&self, shape: AttentionShape, device: &Device) -> Result<Tables> {
        let rows = rows_of_tile(shape.head_dim);
        let kv_width = shape.kv_heads * shape.head_dim;
        let (mut queries, mut keys) = (Vec::new(), Vec::new());
        for (i, (start, count, seen)) in self.sequences().enumerate() {
            let base = self.cached.as_ref().map_or(start * kv_width, |c| c.slots[i] * c.max_seq_len * kv_width);
            for first in (0..count).step_by(rows) {
                let tile = [start + first, rows.min(count - first), base, seen + first];
                queries.extend(tile.map(|word| word as u32));
                let tile = [start + first, rows.min(count - first), start + first, start + count];
                keys.extend(tile.map(|word| word as u32));
            }
        }
        let keys = if self.cached.is_none() { Some(words(keys, device)?) } else { None };
        Ok(Tables::Portable { queries: words(queries, device)?, keys })
    }

    fn tensor_core_tables(&self, device: &Device) -> Result<Tables> {
        let (query_rows, key_rows) = TENSOR_CORE_TILES;
        let (mut queries, mut keys) = (Vec::new(), Vec::new());
        for (i, (_, count, seen)) in self.sequences().enumerate() {
            for tile in 0..count.div_ceil(query_rows) {
                queries.push((seen + count.min((tile + 1) * query_rows), [i as u32, tile as u32]));
            }
            for tile in 0..count.div_ceil(key_rows) {
                keys.push((count - tile * key_rows, [i as u32, tile as u32]));
            }
        }
        // those with most work first; equal ones in order
        let sorted = |mut tiles: Vec<(usize, [u32; 2])>| {
            tiles.sort_by_key(|(work, tile)| (std::cmp::Reverse(*work), *tile));
            tiles.into_iter().flat_map(|(_, tile)| tile).collect::<Vec<u32>>()
        };
        let numbers = |values: &[usize]| words(values.iter().map(|&value| value as u32).collect(), device);
        let keys = if self.cached.is_none() { Some(words(sorted(keys), device)?) } else { None };
        let slots_and_lengths = self
            .cached
            .as_ref()
            .map(|c| Ok::<_, crate::Error>((numbers(&c.slots)?, numbers(&c.lengths)?)))
            .transpose()?;
        Ok(Tables::TensorCore {
            offsets: numbers(&self.offsets)?,
            queries: words(sorted(queries), device)?,
            keys,
            slots_and_lengths,
        })
    }
}

fn words(words: Vec<u32>, device: &Device) -> Result<Tensor> {
    let count = words.len();
    Ok(Tensor::from_vec(words, count, device)?)
}
