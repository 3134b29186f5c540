//! Describes the sequences of a batch to attention: offsets on the CPU, and tables of tiles for GPU kernels.

use super::gpu;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{AttentionShape, Mask};

/// The sequences of a batch: `offsets[i]..offsets[i + 1]`.
#[derive(Debug)]
pub(crate) struct Spans {
    pub(super) offsets: Vec<usize>,
    pub(super) cached: Option<CacheSlots>,
    /// The tables for each kind of attention among the layers.
    tables: Vec<(TableKey, Tables)>,
    /// The cache slot and position of each token, on the device.
    cache_positions: Option<Tensor>,
}

/// The settings of attention that tables depend on.
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

/// The cache slots of the sequences of a batch.
#[derive(Debug)]
pub(crate) struct CacheSlots {
    /// The slot of each sequence.
    pub(crate) slots: Vec<usize>,
    /// The number of tokens in each slot, including those of the batch.
    pub(crate) lengths: Vec<usize>,
    /// The capacity of a slot in tokens.
    pub(crate) max_seq_len: usize,
}

/// The tables that kernels read; see `attention.metal` and `attention.cu`.
#[derive(Debug)]
pub(super) enum Tables {
    /// Tiles of queries and of keys, four words each.
    Portable { queries: Tensor, keys: Option<Tensor> },
    /// The offsets, the tiles of queries and of keys (sequence, and index in it), and slots and lengths.
    TensorCore { offsets: Tensor, queries: Tensor, keys: Option<Tensor>, slots_and_lengths: Option<(Tensor, Tensor)> },
}

/// The largest head width that kernels support.
const MAX_HEAD_DIM: usize = 256;

/// Queries per tile of `attention.metal`, and keys per tile of its backward pass.
fn rows_of_tile(head_dim: usize) -> usize {
    match head_dim {
        0..=64 => 16,
        65..=128 => 8,
        _ => 4,
    }
}

/// The tile sizes of `attention.cu`.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorCoreTiles {
    /// Elements of a row in shared memory.
    row: usize,
    /// Queries per tile.
    queries: usize,
    /// Keys that the forward pass and the gradient of the queries load at a time.
    forward_keys: usize,
    backward_keys: usize,
    /// Queries that the gradient of the keys loads at a time.
    backward_queries: usize,
    /// The number of passes over the queries for the gradients of the keys and values.
    pub(super) key_passes: usize,
}

/// Keys per tile of `attention.cu`.
const TENSOR_CORE_KEYS: usize = 64;

impl TensorCoreTiles {
    pub(super) fn new(head_dim: usize) -> Self {
        let row = head_dim.next_power_of_two().max(32);
        let backward_keys = if row <= 64 { 64 } else { 32 };
        if row <= 128 {
            let (queries, forward_keys, backward_queries) = (128, 64, 64);
            return Self { row, queries, forward_keys, backward_keys, backward_queries, key_passes: 1 };
        }
        Self { row, queries: 64, forward_keys: 32, backward_keys: 16, backward_queries: 16, key_passes: 2 }
    }

    /// The number of threads that share a row in the kernel of `out . d_out`.
    pub(super) fn chunks(self) -> usize {
        self.row / 8
    }

    pub(super) fn forward_bytes(self) -> usize {
        (self.queries + 4 * self.forward_keys) * 2 * self.row
    }

    pub(super) fn queries_bytes(self) -> usize {
        (2 * self.queries + 4 * self.backward_keys) * 2 * self.row
    }

    pub(super) fn keys_bytes(self) -> usize {
        (2 * TENSOR_CORE_KEYS + 4 * self.backward_queries) * 2 * self.row + 16 * self.backward_queries
    }
}

/// Whether kernels support this kind of attention.
fn has_kernels(shape: AttentionShape) -> bool {
    shape.head_dim <= MAX_HEAD_DIM && shape.head_dim.is_multiple_of(4)
}

/// Whether `attention.cu` supports heads of this width and dtype.
fn is_for_tensor_cores(head_dim: usize, dtype: DType, device: &Device) -> bool {
    let fits = (32..=MAX_HEAD_DIM).contains(&head_dim) && head_dim.is_multiple_of(8);
    device.is_cuda() && matches!(dtype, DType::BF16 | DType::F16) && fits
}

impl Spans {
    /// Whether GPU kernels support this kind of attention for the batch.
    pub(crate) fn has_tables(&self, shape: AttentionShape) -> bool {
        self.tables(shape).is_some()
    }

    /// The tables for this kind of attention, if there are kernels for it.
    pub(super) fn tables(&self, shape: AttentionShape) -> Option<&Tables> {
        let key = TableKey::new(shape);
        self.tables.iter().find(|(of, _)| *of == key && has_kernels(shape)).map(|(_, tables)| tables)
    }

    /// The sequences `offsets[i]..offsets[i + 1]` of a batch, which attend to themselves or to a cache. `shapes` are
    /// those of the layers' attention, with or without duplicates. `like` has the dtype and device of the activations.
    ///
    /// # Errors
    /// A mask hides every key.
    pub(crate) fn new(
        offsets: &[usize],
        shapes: &[AttentionShape],
        cached: Option<CacheSlots>,
        like: &Tensor,
    ) -> Result<Self> {
        if let Some(shape) = shapes.iter().find(|shape| !shape.mask.is_valid()) {
            return Err(Error::argument("mask", format!("{:?} hides every key", shape.mask)));
        }
        let mut spans = Self { offsets: offsets.to_vec(), cached, tables: Vec::new(), cache_positions: None };
        if !gpu::has_kernels(like) {
            return Ok(spans);
        }
        spans.cache_positions = spans.upload_cache_positions(like.device())?;
        for &shape in shapes.iter().filter(|shape| has_kernels(**shape)) {
            let key = TableKey::new(shape);
            if spans.tables.iter().any(|(of, _)| *of == key) {
                continue;
            }
            let tables = if is_for_tensor_cores(shape.head_dim, like.dtype(), like.device()) {
                spans.tensor_core_tables(shape, like.device())?
            } else {
                spans.portable_tables(shape, like.device())?
            };
            spans.tables.push((key, tables));
        }
        Ok(spans)
    }

    /// The tokens of each sequence, and its cache slot.
    pub(crate) fn sequences_in_slots(&self) -> impl Iterator<Item = (std::ops::Range<usize>, usize)> {
        let slots = self.cached.iter().flat_map(|cached| cached.slots.iter().copied());
        self.offsets.windows(2).map(|window| window[0]..window[1]).zip(slots)
    }

    /// For each sequence: its first query, its number of queries, and the number of keys that its first query sees.
    fn sequences(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        self.offsets.windows(2).enumerate().map(|(i, window)| {
            let count = window[1] - window[0];
            let seen = self.cached.as_ref().map_or(1, |cached| cached.lengths[i] + 1 - count);
            (window[0], count, seen)
        })
    }

    /// The cache slot and position of each token, on the device.
    pub(super) fn cache_positions(&self) -> Option<&Tensor> {
        self.cache_positions.as_ref()
    }

    fn upload_cache_positions(&self, device: &Device) -> Result<Option<Tensor>> {
        let Some(cached) = &self.cached else { return Ok(None) };
        let mut positions = Vec::new();
        for ((_, count, seen), slot) in self.sequences().zip(&cached.slots) {
            positions.extend((seen - 1..seen - 1 + count).flat_map(|position| [*slot as u32, position as u32]));
        }
        Ok(Some(words(positions, device)?))
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
                let last = first + rows.min(count - first) - 1;
                let end = count.min(shape.mask.queries_end(last));
                let tile = [start + first, rows.min(count - first), start, start + end];
                keys.extend(tile.map(|word| word as u32));
            }
        }
        let keys = if self.cached.is_none() { Some(words(keys, device)?) } else { None };
        Ok(Tables::Portable { queries: words(queries, device)?, keys })
    }

    fn tensor_core_tables(&self, shape: AttentionShape, device: &Device) -> Result<Tables> {
        let (query_rows, key_rows) = (TensorCoreTiles::new(shape.head_dim).queries, TENSOR_CORE_KEYS);
        let (mut queries, mut keys) = (Vec::new(), Vec::new());
        for (i, (_, count, seen)) in self.sequences().enumerate() {
            for tile in 0..count.div_ceil(query_rows) {
                let first = seen - 1 + tile * query_rows;
                let end = seen + count.min((tile + 1) * query_rows);
                queries.push((end - shape.mask.first_key(first), [i as u32, tile as u32]));
            }
            for tile in 0..count.div_ceil(key_rows) {
                let (first, last) = (tile * key_rows, count.min((tile + 1) * key_rows) - 1);
                keys.push((count.min(shape.mask.queries_end(last)) - first, [i as u32, tile as u32]));
            }
        }
        // tiles with the most work first; ties in order
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
