//! Low-rank updates of the rows of a decode step, each of which may have another adapter (`cuda/row_updates.cu`).
//!
//! The kernels read the addresses of A and B from a table on the device, so rows may join, leave and change their adapter
//! without a new recording.

use super::adapters::BatchUpdates;
use super::gpu::{self, Arg, Grid, Kernel, Source, Word};
use super::low_rank::LowRankUpdates;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor, TensorId};

/// The maximum rank, and the words of an update in the table.
const MAX_RANK: usize = 64;
const UPDATE_WORDS: usize = 6;
/// Rows per thread group where updates are added, and thread groups that share the ranks of an update.
const ROWS: usize = 4;
const RANK_PARTS: usize = 2;
const THREADS: usize = 256;
/// The index of no adapter.
const NONE: u32 = u32::MAX;
/// The maximum number of layers that share an input.
const MAX_LAYERS: usize = 3;

/// The updates of a step's rows, on the device.
#[derive(Debug)]
pub(crate) struct RowUpdates {
    rows: usize,
    num_linears: usize,
    table: Tensor,
    of_rows: Tensor,
    z: Tensor,
    /// The adapters in the table. Their tensors stay allocated while the table has their addresses.
    adapters: Vec<LowRankUpdates>,
    indices: Vec<u32>,
}

/// A layer of a step: its id, the first of its rows of B, and its output.
pub(crate) type RowLayer<'a> = (usize, usize, &'a Tensor);

impl RowUpdates {
    /// Room for `rows` rows and the first adapters.
    pub(crate) fn new(rows: usize, num_linears: usize, like: &Tensor) -> Result<Self> {
        Ok(Self {
            rows,
            num_linears,
            table: gpu::words(4 * num_linears * UPDATE_WORDS, like)?,
            of_rows: gpu::words(rows, like)?,
            z: gpu::empty_f32(MAX_LAYERS * rows * MAX_RANK, like)?,
            adapters: Vec::new(),
            indices: Vec::new(),
        })
    }

    /// Writes the adapters of the rows to the device; rows after the last run have the last run's. Returns whether a
    /// recorded step is still valid.
    pub(crate) fn set(&mut self, updates: BatchUpdates) -> Result<bool> {
        let mut adapters: Vec<&LowRankUpdates> = Vec::new();
        let runs: Vec<(usize, Option<&LowRankUpdates>)> = match updates {
            BatchUpdates::Same(updates) => vec![(self.rows, updates)],
            BatchUpdates::ByRows(runs) => runs.iter().map(|run| (run.rows.len(), run.updates)).collect(),
        };
        let mut indices = Vec::with_capacity(self.rows);
        for (count, updates) in runs {
            let index = match updates {
                None => NONE,
                Some(updates) => {
                    let found = adapters.iter().position(|other| std::ptr::eq(*other, updates));
                    found.unwrap_or_else(|| {
                        adapters.push(updates);
                        adapters.len() - 1
                    }) as u32
                }
            };
            indices.extend(std::iter::repeat_n(index, count));
        }
        indices.resize(self.rows, indices.last().copied().unwrap_or(NONE));
        let mut is_valid = true;
        let is_same = adapters.len() == self.adapters.len()
            && adapters.iter().zip(&self.adapters).all(|(new, old)| identity(new) == identity(old));
        if !is_same {
            let num_words = adapters.len() * self.num_linears * UPDATE_WORDS;
            if num_words > self.table.elem_count() {
                self.table = gpu::words(num_words.next_power_of_two(), &self.z)?;
                is_valid = false;
            }
            let mut words = vec![0; self.table.elem_count()];
            for (index, updates) in adapters.iter().enumerate() {
                for (id, update) in updates.iter() {
                    let start = (index * self.num_linears + id) * UPDATE_WORDS;
                    let address = |tensor| gpu::device_address(tensor).map(|of| [of as u32, (of >> 32) as u32]);
                    let ([a, a_high], [b, b_high]) = (address(&update.a)?, address(&update.b)?);
                    let entry = [a, a_high, b, b_high, update.a.dim(0)? as u32, update.scale.to_bits()];
                    words[start..start + UPDATE_WORDS].copy_from_slice(&entry);
                }
            }
            gpu::write_words(&self.table, &words)?;
            self.adapters = adapters.into_iter().cloned().collect();
        }
        if indices != self.indices {
            gpu::write_words(&self.of_rows, &indices)?;
            self.indices = indices;
        }
        Ok(is_valid)
    }

    /// `y += factor * scale * x A^T B^T` for layers that share `x: [rows, width]`.
    pub(crate) fn add(&self, x: &Tensor, layers: &[RowLayer], factor: f32) -> Result<()> {
        let Some((_, _, first)) = layers.first().filter(|_| layers.len() <= MAX_LAYERS) else {
            return Err(Error::Bug(format!("expected 1 to {MAX_LAYERS} layers, found {}", layers.len())));
        };
        let kernel = |name| {
            let is_f32 = first.dtype() == DType::F32 && x.dtype() != DType::F32;
            Kernel::new(Source::RowUpdates, name, x.dtype()).with("OUT_F32", usize::from(is_f32))
        };
        let each = |of: &dyn Fn(&RowLayer) -> usize| {
            let mut all = [Word(0); MAX_LAYERS];
            for (word, layer) in all.iter_mut().zip(layers) {
                *word = of(layer).into();
            }
            all
        };
        let tables = [Arg::In(&self.table), Arg::In(&self.of_rows)];
        let mut words: Vec<Word> = vec![self.rows.into(), x.dim(1)?.into(), self.num_linears.into()];
        words.extend(each(&|(id, _, _)| *id));
        let args: Vec<Arg> = [Arg::In(x)].into_iter().chain(tables).chain([Arg::Out(&self.z)]).collect();
        let grid = Grid { groups: [self.rows, layers.len(), RANK_PARTS], ..Grid::row(1, THREADS) };
        gpu::launch(&kernel("row_inputs"), grid, &args, &words)?;
        let width = |y: &Tensor| y.dims()[1];
        let mut words: Vec<Word> = vec![self.rows.into(), self.num_linears.into()];
        words.extend(each(&|(id, _, _)| *id));
        words.extend(each(&|(_, _, y)| width(y)));
        words.extend(each(&|(_, start, _)| *start));
        words.push(factor.into());
        let mut outputs = [Arg::None; MAX_LAYERS];
        for (output, (_, _, y)) in outputs.iter_mut().zip(layers) {
            *output = Arg::Out(y);
        }
        let args: Vec<Arg> = [Arg::In(&self.z)].into_iter().chain(tables).chain(outputs).collect();
        let tiles = layers.iter().map(|(_, _, y)| width(y).div_ceil(THREADS)).sum();
        gpu::launch(&kernel("row_outputs"), Grid::plane((tiles, self.rows.div_ceil(ROWS)), THREADS), &args, &words)
    }
}

/// Differs for any two adapters with different tensors or factors.
fn identity(updates: &LowRankUpdates) -> Vec<(usize, TensorId, TensorId, u32)> {
    updates.iter().map(|(id, update)| (id, update.a.id(), update.b.id(), update.scale.to_bits())).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ops::LowRank;
    use candle_core::Device;

    #[test]
    fn adapters_with_the_same_tensors_differ_by_layer_and_factor() {
        let tensor = |shape| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let (a, b) = (tensor((2, 4)), tensor((4, 2)));
        let adapter = |layer: usize, a: &Tensor, scale: f32| {
            let mut updates = LowRankUpdates::new();
            updates.insert(layer, LowRank::new(a.clone(), b.clone(), scale));
            identity(&updates)
        };
        let first = adapter(1, &a, 1.0);
        assert_eq!(first, adapter(1, &a, 1.0));
        for other in [adapter(1, &a, 2.0), adapter(0, &a, 1.0), adapter(1, &tensor((2, 4)), 1.0)] {
            assert_ne!(first, other);
        }
    }
}
