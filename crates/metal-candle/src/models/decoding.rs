//! Decodes one token per sequence on the GPU without allocating. The next step reads the sampled tokens from device
//! memory.

use super::parts::pass::missing;
use super::parts::step::{
    MAX_RANK, MatmulBuffers, Posts, ROW_THREADS, Step, StepLinear, StepShape, Threads, norm_words,
};
use super::{KVCache, Model};
use crate::error::{Error, Result};
use crate::ops::activation::kernel_kind;
use crate::ops::adapters::BatchUpdates;
use crate::ops::gpu::{self, Arg, Grid, Kernel, Recording, Source, Word};
use crate::ops::gpu_blocks::MAX_VECTORS;
use crate::ops::row_updates::RowUpdates;
use crate::ops::{LowRank, LowRankUpdates};
use candle_core::{DType, Tensor};

/// Maximum number of tokens that a thread group processes together.
const MAX_BATCH: usize = 8;

/// Maximum number of activation elements (rows times hidden size) for matrix-vector kernels; with more, matrix products
/// are faster.
const MAX_VECTOR_ELEMENTS: usize = 32 * 1024;

/// Maximum number of rows for matrix-vector kernels, on a device whose matrix products can be recorded.
const MAX_VECTOR_ROWS: usize = 4;

/// Maximum number of rows of a decode step.
const MAX_ROWS: usize = 512;

/// The number of logits in each part whose maximum is computed first, after a matrix product.
const LOGITS_PER_PART: usize = 4096;

/// The last token of a sequence, and how to sample the next one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DecodingRow {
    pub(crate) id: u32,
    /// The number of tokens before it.
    pub(crate) position: usize,
    pub(crate) slot: usize,
    pub(crate) sampling: DecodingSampling,
}

/// How a token is sampled on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DecodingSampling {
    /// 0 for greedy decoding.
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    /// 0 for no limit.
    pub(crate) top_k: usize,
    /// The state of the random number generator.
    pub(crate) random: u64,
}

/// The sampled token of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Decoded {
    pub(crate) token: u32,
    /// The logarithm of its probability before all filters; NaN if the logits are not finite.
    pub(crate) log_probability: f32,
    /// The state of the random number generator afterwards.
    pub(crate) random: u64,
}

/// The buffers of a batch of decoding sequences, and the recorded step.
#[derive(Debug)]
pub(crate) struct Decoding {
    /// The rows that the device will use in the next step.
    rows: Vec<DecodingRow>,
    step: Step,
    settings: Tensor,
    result: Tensor,
    logits: Tensor,
    /// The largest logit of each part of a row.
    parts: Tensor,
    recording: Option<Recording>,
    /// Whether recording has not failed yet.
    is_recordable: bool,
}

impl Model {
    /// Whether [`Model::decode`] supports these low-rank updates and this cache, and is the fastest path for this
    /// number of rows.
    pub(crate) fn can_decode(&self, rows: usize, updates: BatchUpdates, cache: &KVCache) -> bool {
        let hidden = self.config().hidden_size;
        let uses_matmul = self.uses_matmul(rows, updates);
        if rows > MAX_ROWS || (!uses_matmul && (rows * hidden > MAX_VECTOR_ELEMENTS || updates.is_mixed())) {
            return false;
        }
        let dtype = self.activation_dtype();
        let fits = |(id, update): (usize, &LowRank)| {
            let fits = |tensor| gpu::supports_vector_loads(tensor, dtype);
            let is_plain =
                update.initial_factors.is_none() && update.magnitude.is_none() && fits(&update.a) && fits(&update.b);
            is_plain && update.a.dims()[0] <= MAX_RANK && (id < self.embedding_id() || id == self.head_id())
        };
        self.inner.decode_sizes.is_some()
            && cache.kind().dtype() == dtype
            && (uses_matmul || hidden <= self.max_normed())
            && self.inner.rotary.iter().all(|table| table.is_fixed(cache.config().max_seq_len))
            && updates.all().flat_map(LowRankUpdates::iter).all(fits)
    }

    /// Whether a step with these rows reads their adapters from a table, so that any rows can have any adapter.
    pub(crate) fn decodes_by_row(&self, rows: usize, updates: BatchUpdates) -> bool {
        has_updates(updates) && self.uses_matmul(rows, updates)
    }

    /// Whether a step with this number of rows uses matrix products.
    fn uses_matmul(&self, rows: usize, updates: BatchUpdates) -> bool {
        let elements = rows * self.config().hidden_size;
        let is_large = elements > MAX_VECTOR_ELEMENTS || self.config().hidden_size > self.max_normed();
        // quantized weights have a kernel for few vectors
        let has_own = self.inner.formats.has_blocks() && self.activation_dtype() != DType::F32;
        let most = if has_own || updates.is_mixed() { 0 } else { MAX_VECTOR_ROWS };
        self.like().is_ok_and(gpu::has_products) && (rows > most || is_large)
    }

    /// A tensor with the dtype and device of the activations.
    fn like(&self) -> Result<&Tensor> {
        self.inner.norm.norm.weight.as_ref().ok_or_else(missing)
    }

    /// Decodes the next token of each row. `decoding` stores the buffers between steps; as long as it is reused, `cache`
    /// must be the same, and so must `updates` unless the step [decodes by row](Model::decodes_by_row).
    pub(crate) fn decode(
        &self,
        decoding: &mut Option<Decoding>,
        rows: &[DecodingRow],
        updates: BatchUpdates,
        cache: &mut KVCache,
    ) -> Result<Vec<Decoded>> {
        self.device().pooled(|| {
            let max_seq_len = cache.config().max_seq_len;
            // rows that ended are replaced by copies of the last row until half of them have ended
            let fits = |held: &Decoding| {
                let fits_rows = (rows.len()..2 * rows.len()).contains(&held.rows.len());
                fits_rows
                    && held.step.max_seq_len == max_seq_len
                    && held.step.updates_by_row() == self.decodes_by_row(held.rows.len(), updates)
            };
            if !decoding.as_ref().is_some_and(fits) {
                // capacity grows in powers of two, so that rows that join one by one cause few recordings
                let has_grown = decoding.as_ref().is_some_and(|held| held.rows.len() < rows.len());
                let grown = rows.len().next_power_of_two();
                let count = if has_grown && self.can_decode(grown, updates, cache) { grown } else { rows.len() };
                *decoding = Some(self.new_decoding(count, max_seq_len, updates)?);
            }
            let held = decoding.as_mut().ok_or(Error::Stopped)?;
            let copies = rows.last().into_iter().cycle().take(held.rows.len() - rows.len());
            let padded: Vec<DecodingRow> = rows.iter().chain(copies).copied().collect();
            if held.rows != padded {
                held.write(&padded)?;
            }
            if held.step.grow(rows.iter().map(|row| row.position + 1).max().unwrap_or(1)) {
                held.recording = None;
            }
            let mut updates_of_step = updates.same();
            if let Some(by_row) = held.step.matmul.as_mut().and_then(|matmul| matmul.updates.as_mut()) {
                if !by_row.set(updates)? {
                    held.recording = None;
                }
                updates_of_step = None;
            }
            let updates = updates_of_step;
            if let Some(recording) = &mut held.recording {
                recording.replay()?;
            } else {
                self.launch_step(held, updates, cache)?;
                if held.is_recordable {
                    // the first step compiled the kernels; later steps replay them, or launch them if recording fails
                    let recording = gpu::record(&held.step.x, || self.launch_step(held, updates, cache));
                    held.recording = recording.unwrap_or_else(|error| {
                        tracing::warn!("cannot record a CUDA graph, so decoding is slower: {error}");
                        held.is_recordable = false;
                        None
                    });
                }
            }
            let words = gpu::read_words(&held.result)?;
            let mut decoded: Vec<Decoded> = words
                .chunks_exact(4)
                .map(|words| Decoded {
                    token: words[0],
                    log_probability: f32::from_bits(words[1]),
                    random: u64::from(words[2]) | (u64::from(words[3]) << 32),
                })
                .collect();
            for (row, decoded) in held.rows.iter_mut().zip(&decoded) {
                row.id = decoded.token;
                row.position += 1;
                row.sampling.random = decoded.random;
            }
            decoded.truncate(rows.len());
            Ok(decoded)
        })
    }

    fn new_decoding(&self, rows: usize, max_seq_len: usize, updates: BatchUpdates) -> Result<Decoding> {
        let (hidden, vocab) = (self.config().hidden_size, self.config().vocab_size);
        let like = self.like()?;
        let blocks = self.inner.decode_sizes.ok_or_else(missing)?;
        let shape = StepShape {
            batch: rows.min(MAX_BATCH).min(self.max_normed() / hidden).max(1),
            uses_matmul: self.uses_matmul(rows, updates),
            dtype: self.activation_dtype(),
            hidden,
            heads: blocks.heads,
            activation: kernel_kind(blocks.activation).0,
            is_cuda: self.device().is_cuda(),
            formats: self.inner.formats,
        };
        let has_updates = !shape.uses_matmul && has_updates(updates);
        let threads = Threads::new(&shape, rows, has_updates, like)?;
        let max_parts = Step::max_parts(&shape, &threads, rows, max_seq_len);
        let empty = |width: usize| gpu::empty((rows, width), like);
        let [heads, kv_heads, head_dim] = shape.heads;
        let words = |value: u32, count: usize| Tensor::full(value, count, like.device());
        let dequantizes = rows > MAX_VECTORS || shape.dtype == DType::F32;
        let matmul = if shape.uses_matmul {
            let dequantized = self.dequantized_len().filter(|_| dequantizes);
            let by_row = self.decodes_by_row(rows, updates);
            Some(MatmulBuffers {
                normed: empty(hidden)?,
                gate: empty(blocks.inner)?,
                up: empty(blocks.inner)?,
                updates: by_row.then(|| RowUpdates::new(rows, self.linears().len(), like)).transpose()?,
                scratch: dequantized.map(|len| gpu::empty(len, like)).transpose()?,
            })
        } else {
            None
        };
        let groups = vocab.div_ceil(if shape.uses_matmul { LOGITS_PER_PART } else { threads.head_part() });
        let rotary = self.inner.rotary.iter().map(|table| table.on_device(max_seq_len, like.device()));
        let step = Step {
            rows,
            max_seq_len,
            shape,
            threads,
            state: gpu::words(5 * rows, like)?,
            x: empty(hidden)?,
            q: empty(heads * head_dim)?,
            k: empty(kv_heads * head_dim)?,
            v: empty(kv_heads * head_dim)?,
            attention: empty(heads * head_dim)?,
            parts: 1,
            max_parts,
            results: words(u32::MAX, Step::num_results(&shape, rows, max_parts))?,
            counters: words(0, rows * heads)?,
            has_updates,
            posted: words(u32::MAX, if shape.uses_matmul { 1 } else { rows * Posts::WORDS })?,
            activation: empty(blocks.inner)?,
            branch: empty(hidden)?,
            rotary: rotary.collect::<Result<_>>()?,
            matmul,
        };
        Ok(Decoding {
            rows: vec![UNSET; rows],
            step,
            settings: gpu::words(5 * rows, like)?,
            result: gpu::words(4 * rows, like)?,
            logits: gpu::empty_f32((rows, vocab), like)?,
            parts: gpu::empty_f32(3 * rows * groups, like)?,
            recording: None,
            is_recordable: true,
        })
    }

    /// Maximum number of normed activations in the shared memory of a thread group. With the rest it is below 32 KiB on
    /// Metal and 48 KiB on CUDA.
    fn max_normed(&self) -> usize {
        if self.device().is_metal() { 6144 } else { 7168 }
    }

    fn launch_step(&self, held: &Decoding, updates: Option<&LowRankUpdates>, cache: &KVCache) -> Result<()> {
        let step = &held.step;
        let (rows, hidden, vocab) = (step.rows, self.config().hidden_size, self.config().vocab_size);
        let embedding = &self.inner.embedding;
        let args = [Arg::In(embedding.stored()?), Arg::In(&step.state), Arg::Out(&step.x), Arg::Out(&step.posted)];
        let [from, count] = step.cleared(Posts::Head);
        let words = [hidden.into(), embedding.format_word(), self.inner.embedding_scale.into(), from, count];
        gpu::launch(&step.kernel("decode_embed", &[]), Grid::row(rows, ROW_THREADS), &args, &words)?;
        for block in &self.inner.blocks {
            block.step(step, updates, cache)?;
        }
        let groups =
            if step.shape.uses_matmul { self.matmul_head(held, updates)? } else { self.vector_head(held, updates)? };
        let args = [
            Arg::In(&held.logits),
            Arg::In(&held.parts),
            Arg::In(&held.settings),
            Arg::Out(&step.state),
            Arg::Out(&held.result),
        ];
        let words = [vocab.into(), rows.into(), groups.into()];
        let kernel = Kernel::new(Source::Sampling, "sample", DType::F32);
        gpu::launch(&kernel, Grid::row(rows, step.threads.sample), &args, &words)
    }

    fn step_head<'a>(&self, updates: Option<&'a LowRankUpdates>) -> StepLinear<'a> {
        StepLinear::new(&self.inner.head.linear, self.head_id(), updates)
    }

    /// Computes the norm, the logits and the maximum of each part of them with matrix-vector kernels; returns the
    /// number of parts.
    fn vector_head(&self, held: &Decoding, updates: Option<&LowRankUpdates>) -> Result<usize> {
        let (step, vocab) = (&held.step, self.config().vocab_size);
        let groups = vocab.div_ceil(step.threads.head_part());
        let head = self.step_head(updates);
        let [a, b] = head.update_args();
        let (norm, rank) = (&self.inner.norm.norm, head.rank());
        let args = [
            Arg::In(&step.x),
            norm.weight.as_ref().map_or(Arg::None, Arg::In),
            head.weight()?,
            a,
            b,
            Arg::Out(&held.logits),
            Arg::Out(&held.parts),
            Arg::Out(&step.posted),
        ];
        let mut words: Vec<Word> = vec![step.rows.into()];
        words.extend(norm_words(Some(&self.inner.norm)));
        words.extend(self.inner.head.words());
        words.extend([Word::from(vocab), rank.into(), head.scale().into(), head.weight.format_word()]);
        words.extend(step.posts(Posts::Head, Some(Posts::Down)));
        let of_a = Step::groups_of_a(&[rank], step.threads.head / 32);
        let grid = Grid::row((groups + of_a) * step.chunks(), step.threads.head);
        gpu::launch(&step.kernel("decode_head", &[rank]), grid, &args, &words)?;
        Ok(groups)
    }

    /// [`Self::vector_head`] with a matrix product.
    fn matmul_head(&self, held: &Decoding, updates: Option<&LowRankUpdates>) -> Result<usize> {
        let (step, vocab) = (&held.step, self.config().vocab_size);
        let matmul = step.matmul()?;
        self.inner.norm.norm.forward_into(&step.x, &matmul.normed)?;
        step.multiply(&self.step_head(updates), &matmul.normed, (&held.logits, 1.0, 0.0))?;
        self.inner.head.form_on_device(&held.logits)?;
        let groups = vocab.div_ceil(LOGITS_PER_PART);
        let args = [Arg::In(&held.logits), Arg::Out(&held.parts)];
        let kernel = Kernel::new(Source::Sampling, "parts_of_logits", DType::F32);
        gpu::launch(&kernel, Grid::plane((groups, step.rows), 256), &args, &[vocab.into(), LOGITS_PER_PART.into()])?;
        Ok(groups)
    }
}

fn has_updates(updates: BatchUpdates) -> bool {
    updates.all().any(|updates| updates.iter().next().is_some())
}

/// A row that equals no sequence's.
const UNSET: DecodingRow = DecodingRow {
    id: u32::MAX,
    position: usize::MAX,
    slot: usize::MAX,
    sampling: DecodingSampling { temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0, random: 0 },
};

impl Decoding {
    /// The logits of the last step: `[rows, vocab_size]`, f32.
    pub(crate) fn logits(&self) -> &Tensor {
        &self.logits
    }

    /// Writes the rows to the device.
    fn write(&mut self, rows: &[DecodingRow]) -> Result<()> {
        let mut state = Vec::with_capacity(5 * rows.len());
        state.extend(rows.iter().map(|row| row.id));
        state.extend(rows.iter().map(|row| row.position as u32));
        state.extend(rows.iter().map(|row| row.slot as u32));
        state.extend(rows.iter().flat_map(|row| [row.sampling.random as u32, (row.sampling.random >> 32) as u32]));
        let settings: Vec<u32> = rows
            .iter()
            .flat_map(|row| {
                let DecodingSampling { temperature, top_p, min_p, top_k, .. } = row.sampling;
                [temperature.to_bits(), top_p.to_bits(), min_p.to_bits(), top_k as u32, 1]
            })
            .collect();
        gpu::write_words(&self.step.state, &state)?;
        gpu::write_words(&self.settings, &settings)?;
        self.rows.clear();
        self.rows.extend_from_slice(rows);
        Ok(())
    }
}
