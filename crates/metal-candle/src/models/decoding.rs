//! Single-token steps on a device with kernels: nothing is allocated per token, and the chosen token stays on the device.

use super::parts::pass::missing;
use super::parts::step::{
    MAX_RANK, Posts, ROW_THREADS, Step, StepLinear, StepShape, Threads, Wide, multiply, norm_words,
};
use super::{KVCache, Model};
use crate::error::{Error, Result};
use crate::ops::activation::kernel_kind;
use crate::ops::gpu::{self, Arg, Grid, Kernel, Recording, Source, Word};
use crate::ops::gpu_blocks::part_len;
use crate::ops::{LowRank, LowRankTerms};
use candle_core::{DType, Tensor};

/// Most tokens that a group of threads takes together.
const MAX_BATCH: usize = 8;

/// Most elements of the tokens of a step that are taken by rows of weights; with more, products of matrices are faster.
const MAX_ELEMENTS: usize = 32 * 1024;

/// Most rows of that kind where there are products that can be recorded.
const MAX_ROWS: usize = 4;

/// Most rows of a step.
const MAX_WIDE_ROWS: usize = 512;

/// Logits of a part in which the largest is looked for, after a product of matrices.
const PART: usize = 4096;

/// The last token of a sequence, and how the next one is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DecodingRow {
    pub(crate) id: u32,
    /// The number of tokens before it.
    pub(crate) position: usize,
    pub(crate) slot: usize,
    pub(crate) choice: DecodingChoice,
}

/// How a token is chosen on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DecodingChoice {
    /// 0 for the largest logit.
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    /// 0 for all.
    pub(crate) top_k: usize,
    /// The state of the generator.
    pub(crate) random: u64,
}

/// What was chosen for a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Decoded {
    pub(crate) token: u32,
    /// The logarithm of its probability before all filters; no number if the logits are none.
    pub(crate) log_probability: f32,
    /// The state of the generator afterwards.
    pub(crate) random: u64,
}

/// The buffers of a batch of tokens, and the recorded step.
#[derive(Debug)]
pub(crate) struct Decoding {
    /// The rows as they are on the device, for the next step.
    rows: Vec<DecodingRow>,
    step: Step,
    settings: Tensor,
    result: Tensor,
    logits: Tensor,
    /// The largest logit of each part of a row.
    parts: Tensor,
    recording: Option<Recording>,
    /// Whether no recording has failed yet.
    is_recordable: bool,
}

impl Model {
    /// Whether [`Model::decode`] can run here with these low-rank updates, and is the faster way for this number of rows.
    pub(crate) fn can_decode(&self, rows: usize, terms: Option<&LowRankTerms>, cache: &KVCache) -> bool {
        let hidden = self.config().hidden_size;
        let is_wide = self.is_wide(rows, has_terms(terms));
        if rows > MAX_WIDE_ROWS || (!is_wide && rows * hidden > MAX_ELEMENTS) {
            return false;
        }
        let dtype = self.activation_dtype();
        let fits = |(id, term): (usize, &LowRank)| {
            let fits = |tensor| gpu::is_read_by_eights(tensor, dtype);
            let is_plain = term.start.is_none() && term.magnitude.is_none() && fits(&term.a) && fits(&term.b);
            is_plain && term.a.dims()[0] <= MAX_RANK && (id < self.embedding_id() || id == self.head_id())
        };
        self.inner.stepped.is_some()
            && cache.kind().dtype() == dtype
            && (is_wide || hidden <= self.max_normed())
            && self.inner.rotary.iter().all(|table| table.is_fixed(cache.config().max_seq_len))
            && terms.into_iter().flat_map(LowRankTerms::iter).all(fits)
    }

    /// Whether a step of this number of rows is one of products of matrices.
    fn is_wide(&self, rows: usize, has_terms: bool) -> bool {
        let elements = rows * self.config().hidden_size;
        let is_large = elements > MAX_ELEMENTS || self.config().hidden_size > self.max_normed();
        // quantized weights have a kernel for few vectors, which takes no low-rank updates
        let has_own = self.inner.formats.has_blocks() && self.activation_dtype() != DType::F32 && !has_terms;
        let most = if has_own { 0 } else { MAX_ROWS };
        self.like().is_ok_and(gpu::has_products) && (rows > most || is_large)
    }

    /// A tensor of the type and the device of activations.
    fn like(&self) -> Result<&Tensor> {
        self.inner.norm.norm.weight.as_ref().ok_or_else(missing)
    }

    /// The next token of each row. `decoding` keeps buffers from step to step: `terms` and `cache` must be the same as long
    /// as it is.
    pub(crate) fn decode(
        &self,
        decoding: &mut Option<Decoding>,
        rows: &[DecodingRow],
        terms: Option<&LowRankTerms>,
        cache: &mut KVCache,
    ) -> Result<Vec<Decoded>> {
        self.device().pooled(|| {
            let max_seq_len = cache.config().max_seq_len;
            // rows that ended are replaced by copies of the last one, which do what it does, until half of them have ended
            let fits = |held: &Decoding| {
                let has_room = (rows.len()..2 * rows.len()).contains(&held.rows.len());
                has_room && held.step.max_seq_len == max_seq_len
            };
            if !decoding.as_ref().is_some_and(fits) {
                // rows that come one by one are recorded a few times, not each time
                let has_grown = decoding.as_ref().is_some_and(|held| held.rows.len() < rows.len());
                let grown = rows.len().next_power_of_two();
                let count = if has_grown && self.can_decode(grown, terms, cache) { grown } else { rows.len() };
                *decoding = Some(self.new_decoding(count, max_seq_len, terms)?);
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
            if let Some(recording) = &mut held.recording {
                recording.replay()?;
            } else {
                self.launch_step(held, terms, cache)?;
                if held.is_recordable {
                    // the first step compiled the kernels; the next steps replay them, or launch them if recording fails
                    let recording = gpu::record(&held.step.x, || self.launch_step(held, terms, cache));
                    held.recording = recording.unwrap_or_else(|error| {
                        tracing::warn!("decoding without a CUDA graph, which is slower: {error}");
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
                row.choice.random = decoded.random;
            }
            decoded.truncate(rows.len());
            Ok(decoded)
        })
    }

    fn new_decoding(&self, rows: usize, max_seq_len: usize, terms: Option<&LowRankTerms>) -> Result<Decoding> {
        let (hidden, vocab) = (self.config().hidden_size, self.config().vocab_size);
        let like = self.like()?;
        let blocks = self.inner.stepped.ok_or_else(missing)?;
        let shape = StepShape {
            batch: rows.min(MAX_BATCH).min(self.max_normed() / hidden).max(1),
            is_wide: self.is_wide(rows, has_terms(terms)),
            dtype: self.activation_dtype(),
            hidden,
            heads: blocks.heads,
            activation: kernel_kind(blocks.activation).0,
            is_cuda: self.device().is_cuda(),
            formats: self.inner.formats,
        };
        let has_terms = !shape.is_wide && has_terms(terms);
        let threads = Threads::new(&shape, rows, has_terms, like)?;
        let most_parts = Step::most_parts(&shape, &threads, rows, max_seq_len);
        let empty = |width: usize| gpu::empty((rows, width), like);
        let [heads, kv_heads, head_dim] = shape.heads;
        let words = |value: u32, count: usize| Tensor::full(value, count, like.device());
        let wide = if shape.is_wide {
            Some(Wide {
                normed: empty(hidden)?,
                gate: empty(blocks.inner)?,
                up: empty(blocks.inner)?,
                z: gpu::empty(rows * MAX_RANK, like)?,
                scratch: self.scratch_len().map(|len| gpu::empty(len, like)).transpose()?,
            })
        } else {
            None
        };
        let groups = vocab.div_ceil(if shape.is_wide { PART } else { threads.head_part() });
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
            most_parts,
            results: words(u32::MAX, Step::num_results(&shape, rows, most_parts))?,
            counters: words(0, rows * heads)?,
            has_terms,
            posted: words(u32::MAX, if shape.is_wide { 1 } else { rows * Posts::WORDS })?,
            activation: empty(blocks.inner)?,
            branch: empty(hidden)?,
            rotary: rotary.collect::<Result<_>>()?,
            wide,
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

    /// The most weights that are dequantized at a time, where there are quantized ones.
    fn scratch_len(&self) -> Option<usize> {
        let weights = [&self.inner.head.linear.weight].into_iter();
        let weights = weights.chain(self.parameters().iter().map(|(_, weight)| weight));
        weights.filter(|weight| weight.block_format().is_some()).map(|weight| part_len(weight.dims())).max()
    }

    /// Most floats of normed tokens in the memory of a group: with the rest, less than 32 KiB on Metal and 48 KiB on CUDA.
    fn max_normed(&self) -> usize {
        if self.device().is_metal() { 6144 } else { 7168 }
    }

    fn launch_step(&self, held: &Decoding, terms: Option<&LowRankTerms>, cache: &KVCache) -> Result<()> {
        let step = &held.step;
        let (rows, hidden, vocab) = (step.rows, self.config().hidden_size, self.config().vocab_size);
        let embedding = &self.inner.embedding;
        let args = [Arg::In(embedding.stored()?), Arg::In(&step.state), Arg::Out(&step.x), Arg::Out(&step.posted)];
        let [from, count] = step.emptied(Posts::Head);
        let words = [hidden.into(), embedding.format_word(), self.inner.embedding_scale.into(), from, count];
        gpu::launch(&step.kernel("decode_embed", &[]), Grid::row(rows, ROW_THREADS), &args, &words)?;
        for block in &self.inner.blocks {
            block.step(step, terms, cache)?;
        }
        let groups = if step.shape.is_wide { self.wide_head(held, terms)? } else { self.narrow_head(held, terms)? };
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

    fn step_head<'a>(&self, terms: Option<&'a LowRankTerms>) -> StepLinear<'a> {
        StepLinear::new(&self.inner.head.linear, terms.and_then(|terms| terms.get(self.head_id())))
    }

    /// Norm, logits and the largest of each part of them; returns the number of parts.
    fn narrow_head(&self, held: &Decoding, terms: Option<&LowRankTerms>) -> Result<usize> {
        let (step, vocab) = (&held.step, self.config().vocab_size);
        let groups = vocab.div_ceil(step.threads.head_part());
        let head = self.step_head(terms);
        let [a, b] = head.term_args();
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

    /// The same by a product of matrices.
    fn wide_head(&self, held: &Decoding, terms: Option<&LowRankTerms>) -> Result<usize> {
        let (step, vocab) = (&held.step, self.config().vocab_size);
        let wide = step.wide()?;
        self.inner.norm.norm.forward_into(&step.x, &wide.normed)?;
        multiply(&self.step_head(terms), &wide.normed, (&held.logits, 1.0, 0.0), wide)?;
        self.inner.head.form_on_device(&held.logits)?;
        let groups = vocab.div_ceil(PART);
        let args = [Arg::In(&held.logits), Arg::Out(&held.parts)];
        let kernel = Kernel::new(Source::Sampling, "parts_of_logits", DType::F32);
        gpu::launch(&kernel, Grid::plane((groups, step.rows), 256), &args, &[vocab.into(), PART.into()])?;
        Ok(groups)
    }
}

fn has_terms(terms: Option<&LowRankTerms>) -> bool {
    terms.is_some_and(|terms| terms.iter().next().is_some())
}

/// A row that no sequence is at.
const UNSET: DecodingRow = DecodingRow {
    id: u32::MAX,
    position: usize::MAX,
    slot: usize::MAX,
    choice: DecodingChoice { temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0, random: 0 },
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
        state.extend(rows.iter().flat_map(|row| [row.choice.random as u32, (row.choice.random >> 32) as u32]));
        let settings: Vec<u32> = rows
            .iter()
            .flat_map(|row| {
                let DecodingChoice { temperature, top_p, min_p, top_k, .. } = row.choice;
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
