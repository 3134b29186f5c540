//! Single-token steps on a device with kernels: no memory that is not there yet, and the chosen token stays on the device. For few
//! rows a block is five kernels that read rows of weights; for many, on CUDA, its products are those of matrices.

use super::block::{Block, DOWN, GATE, K, O, Q, UP, V};
use super::decoder::NUM_LINEARS;
use super::decoding_threads::{StepShape, Threads};
use super::{KVCache, Model};
use crate::error::{Error, Result};
use crate::ops::activation::{self, Activation};
use crate::ops::gpu::{self, Arg, Grid, Kernel, Recording, Source};
use crate::ops::{LowRank, LowRankTerms};
use candle_core::{DType, Tensor};

/// Most tokens that a group of threads takes together.
const MAX_BATCH: usize = 8;

/// Largest rank of a term.
const MAX_RANK: usize = 64;

/// Most elements of the tokens of a step that are taken by rows of weights; with more, products of matrices are faster.
const MAX_ELEMENTS: usize = 32 * 1024;

/// Most rows of that kind where there are products that can be recorded.
const MAX_ROWS: usize = 4;

/// Most rows of a step.
const MAX_WIDE_ROWS: usize = 512;

/// Logits of a part in which the largest is looked for, after a product of matrices.
const PART: usize = 4096;

/// Threads of a group that has an element each.
const ROW_THREADS: usize = 128;

/// A token to go on from, and how the next one is chosen.
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
    /// What is on the device: rows as the next step takes them.
    rows: Vec<DecodingRow>,
    max_seq_len: usize,
    shape: StepShape,
    threads: Threads,
    state: Tensor,
    settings: Tensor,
    result: Tensor,
    x: Tensor,
    q: Tensor,
    attention: Tensor,
    activation: Tensor,
    logits: Tensor,
    parts: Tensor,
    cosines: Tensor,
    sines: Tensor,
    wide: Option<Wide>,
    recording: Option<Recording>,
}

/// What products of matrices need beside that.
#[derive(Debug)]
struct Wide {
    normed: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    up: Tensor,
    /// Of terms: `rows * MAX_RANK` elements.
    z: Tensor,
}

impl Model {
    /// Whether [`Model::decode`] can run here with these terms, and is the faster way for so many rows.
    pub(crate) fn can_decode(&self, rows: usize, terms: Option<&LowRankTerms>, cache: &KVCache) -> bool {
        let config = self.config();
        let is_wide = self.is_wide(rows);
        if rows > MAX_WIDE_ROWS || (!is_wide && rows * config.hidden_size > MAX_ELEMENTS) {
            return false;
        }
        let widths = [config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim];
        let dtype = self.activation_dtype();
        let is_usual = |block: &Block| {
            // eight elements are read at once
            let fits = |weight: &Tensor| weight.dtype() == dtype && weight.layout().start_offset().is_multiple_of(8);
            let weights = block.linears.iter().all(|linear| linear.weight.dense().is_ok_and(fits));
            let biases = [O, GATE, UP, DOWN].iter().all(|&place| block.linears[place].bias.is_none());
            let same = [Q, K, V].iter().all(|&p| block.linears[p].bias.is_some() == block.linears[Q].bias.is_some());
            weights && biases && same
        };
        let head = self.head_number();
        let fits = |(number, term): (usize, &LowRank)| {
            let is_plain = term.start.is_none() && term.magnitude.is_none() && term.a.dtype() == dtype;
            is_plain && term.a.dims()[0] <= MAX_RANK && (number < self.embedding_number() || number == head)
        };
        self.inner.embedding.dense().is_ok_and(gpu::has_kernels)
            && cache.dtype() == Some(dtype)
            && widths.iter().all(|width| width.is_multiple_of(8))
            && (is_wide || config.hidden_size <= self.max_normed())
            && config.head_dim.is_multiple_of(8)
            && config.head_dim <= 128
            && self.inner.blocks.iter().all(is_usual)
            && terms.into_iter().flat_map(LowRankTerms::iter).all(fits)
    }

    /// Whether a step of so many rows is one of products of matrices.
    fn is_wide(&self, rows: usize) -> bool {
        let elements = rows * self.config().hidden_size;
        self.inner.embedding.dense().is_ok_and(gpu::has_products) && (rows > MAX_ROWS || elements > MAX_ELEMENTS)
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
            // rows that ended are made up for by copies of the last one, which do what it does, until half of them have ended
            let fits = |held: &Decoding| {
                let has_room = (rows.len()..2 * rows.len()).contains(&held.rows.len());
                has_room && held.max_seq_len == max_seq_len
            };
            if !decoding.as_ref().is_some_and(fits) {
                *decoding = Some(self.new_decoding(rows.len(), max_seq_len)?);
            }
            let held = decoding.as_mut().ok_or(Error::Stopped)?;
            let copies = rows.last().into_iter().cycle().take(held.rows.len() - rows.len());
            let padded: Vec<DecodingRow> = rows.iter().chain(copies).copied().collect();
            if held.rows != padded {
                held.write(&padded)?;
            }
            if let Some(recording) = &mut held.recording {
                recording.replay()?;
            } else {
                self.launch_step(held, terms, cache)?;
                // what was compiled for the first step can be recorded for the next ones
                held.recording = gpu::record(&held.x, || self.launch_step(held, terms, cache))?;
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

    fn new_decoding(&self, rows: usize, max_seq_len: usize) -> Result<Decoding> {
        let config = self.config();
        let like = self.inner.embedding.dense()?;
        let batch = rows.min(MAX_BATCH).min(self.max_normed() / config.hidden_size).max(1);
        let shape = StepShape { batch, is_wide: self.is_wide(rows) };
        let threads = self.decoding_threads(shape)?;
        let (cosines, sines) = self.inner.rotary.on_device(max_seq_len, like.device())?;
        let empty = |width: usize| gpu::empty((rows, width), like);
        let heads = config.num_attention_heads * config.head_dim;
        let kv_heads = config.num_key_value_heads * config.head_dim;
        let wide = if shape.is_wide {
            Some(Wide {
                normed: empty(config.hidden_size)?,
                k: empty(kv_heads)?,
                v: empty(kv_heads)?,
                gate: empty(config.intermediate_size)?,
                up: empty(config.intermediate_size)?,
                z: gpu::empty(rows * MAX_RANK, like)?,
            })
        } else {
            None
        };
        let groups = config.vocab_size.div_ceil(if shape.is_wide { PART } else { threads.head_part() });
        Ok(Decoding {
            rows: vec![UNSET; rows],
            max_seq_len,
            shape,
            threads,
            state: gpu::words(5 * rows, like)?,
            settings: gpu::words(5 * rows, like)?,
            result: gpu::words(4 * rows, like)?,
            x: empty(config.hidden_size)?,
            q: empty(heads)?,
            attention: empty(heads)?,
            activation: empty(config.intermediate_size)?,
            logits: gpu::empty_f32((rows, config.vocab_size), like)?,
            parts: gpu::empty_f32(3 * rows * groups, like)?,
            cosines,
            sines,
            wide,
            recording: None,
        })
    }

    /// Most floats of normed tokens in the memory of a group: with the rest, less than 32 KiB on Metal and 48 KiB on CUDA.
    fn max_normed(&self) -> usize {
        if self.device().is_metal() { 6144 } else { 7168 }
    }

    fn kernel(&self, name: &'static str, held: &Decoding) -> Kernel {
        self.decoding_kernel(name, held.shape, &held.threads)
    }

    fn launch_step(&self, held: &Decoding, terms: Option<&LowRankTerms>, cache: &KVCache) -> Result<()> {
        let rows = held.rows.len();
        let (hidden, vocab) = (self.config().hidden_size, self.config().vocab_size);
        let args = [Arg::In(self.inner.embedding.dense()?), Arg::In(&held.state), Arg::Out(&held.x)];
        gpu::launch(&self.kernel("decode_embed", held), Grid::row(rows, ROW_THREADS), &args, &[hidden.into()])?;
        let groups = if let Some(wide) = &held.wide {
            for block in &self.inner.blocks {
                self.launch_wide_block(block, held, wide, terms, cache)?;
            }
            self.launch_wide_head(held, wide, terms)?
        } else {
            for block in &self.inner.blocks {
                self.launch_block(block, held, terms, cache)?;
            }
            self.launch_head(held, terms)?
        };
        let args = [
            Arg::In(&held.logits),
            Arg::In(&held.parts),
            Arg::In(&held.settings),
            Arg::Out(&held.state),
            Arg::Out(&held.result),
        ];
        let words = [vocab.into(), rows.into(), groups.into()];
        gpu::launch(
            &Kernel::new(Source::Sampling, "sample", DType::F32),
            Grid::row(rows, held.threads.sample),
            &args,
            &words,
        )
    }

    /// Norm, logits and the largest of each part of them; returns the number of parts.
    fn launch_head(&self, held: &Decoding, terms: Option<&LowRankTerms>) -> Result<usize> {
        let (rows, vocab) = (held.rows.len(), self.config().vocab_size);
        let chunks = rows.div_ceil(held.shape.batch);
        let groups = vocab.div_ceil(held.threads.head_part());
        let (a, b, rank, scale) = term_args(terms.and_then(|terms| terms.get(self.head_number())));
        let norm = &self.inner.norm;
        let args = [
            Arg::In(&held.x),
            norm.plain_weight().map_or(Arg::None, Arg::In),
            Arg::In(self.inner.head.linear.weight.dense()?),
            a,
            b,
            Arg::Out(&held.logits),
            Arg::Out(&held.parts),
        ];
        let words = [rows.into(), (norm.eps as f32).into(), vocab.into(), rank.into(), scale.into()];
        gpu::launch(&self.kernel("decode_head", held), Grid::row(groups * chunks, held.threads.head), &args, &words)?;
        Ok(groups)
    }

    /// The same by a product of matrices.
    fn launch_wide_head(&self, held: &Decoding, wide: &Wide, terms: Option<&LowRankTerms>) -> Result<usize> {
        let vocab = self.config().vocab_size;
        self.inner.norm.forward_into(&held.x, &wide.normed)?;
        let term = terms.and_then(|terms| terms.get(self.head_number()));
        multiply(self.inner.head.linear.weight.dense()?, term, &wide.normed, (&held.logits, 0.0), wide)?;
        let groups = vocab.div_ceil(PART);
        let args = [Arg::In(&held.logits), Arg::Out(&held.parts)];
        let kernel = Kernel::new(Source::Sampling, "parts_of_logits", DType::F32);
        gpu::launch(&kernel, Grid::plane((groups, held.rows.len()), 256), &args, &[vocab.into(), PART.into()])?;
        Ok(groups)
    }

    /// A block by products of matrices.
    fn launch_wide_block(
        &self,
        block: &Block,
        held: &Decoding,
        wide: &Wide,
        terms: Option<&LowRankTerms>,
        cache: &KVCache,
    ) -> Result<()> {
        let config = self.config();
        let (heads, kv_heads, half) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim / 2);
        let rows = held.rows.len();
        let multiply = |place: usize, x: &Tensor, y: &Tensor, beta: f32| {
            let term = terms.and_then(|terms| terms.get(NUM_LINEARS * block.layer + place));
            multiply(block.linears[place].weight.dense()?, term, x, (y, beta), wide)
        };
        block.input_layernorm.forward_into(&held.x, &wide.normed)?;
        multiply(Q, &wide.normed, &held.q, 0.0)?;
        multiply(K, &wide.normed, &wide.k, 0.0)?;
        multiply(V, &wide.normed, &wide.v, 0.0)?;
        let bias = |place: usize| block.linears[place].bias.as_ref().map_or(Arg::None, Arg::In);
        let (keys, values) = cache.layer(block.layer);
        let args = [
            Arg::In(&wide.k),
            Arg::In(&wide.v),
            bias(Q),
            bias(K),
            bias(V),
            Arg::In(&held.cosines),
            Arg::In(&held.sines),
            Arg::In(&held.state),
            Arg::Out(&held.q),
            Arg::Out(keys),
            Arg::Out(values),
        ];
        let has_bias = block.linears[Q].bias.is_some();
        let words = [rows, heads, kv_heads, half, held.max_seq_len, usize::from(has_bias)].map(Into::into);
        let grid = Grid::elements(rows * (heads + 2 * kv_heads) * half);
        gpu::launch(&self.kernel("decode_rotate", held), grid, &args, &words)?;
        self.launch_attention(held, (keys, values))?;
        multiply(O, &held.attention, &held.x, 1.0)?;
        block.post_attention_layernorm.forward_into(&held.x, &wide.normed)?;
        multiply(GATE, &wide.normed, &wide.gate, 0.0)?;
        multiply(UP, &wide.normed, &wide.up, 0.0)?;
        activation::gated_into(Activation::Silu, &wide.gate, &wide.up, &held.activation)?;
        multiply(DOWN, &held.activation, &held.x, 1.0)
    }

    /// Attention of each row over its slot of a layer's cache.
    fn launch_attention(&self, held: &Decoding, (keys, values): (&Tensor, &Tensor)) -> Result<()> {
        let (heads, kv_heads) = (self.config().num_attention_heads, self.config().num_key_value_heads);
        let rows = held.rows.len();
        let args = [Arg::In(&held.q), Arg::In(keys), Arg::In(values), Arg::In(&held.state), Arg::Out(&held.attention)];
        let words =
            [rows.into(), heads.into(), kv_heads.into(), held.max_seq_len.into(), self.inner.attention.scale.into()];
        let kernel = self.kernel("decode_attention", held);
        gpu::launch(&kernel, Grid::plane((heads, rows), held.threads.attention), &args, &words)
    }

    fn launch_block(
        &self,
        block: &Block,
        held: &Decoding,
        terms: Option<&LowRankTerms>,
        cache: &KVCache,
    ) -> Result<()> {
        let config = self.config();
        let (heads, kv_heads, head_dim) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let (rows, chunks) = (held.rows.len(), held.rows.len().div_ceil(held.shape.batch));
        let term = |place: usize| term_args(terms.and_then(|terms| terms.get(NUM_LINEARS * block.layer + place)));
        let weight = |place: usize| block.linears[place].weight.dense().map(Arg::In);
        let bias = |place: usize| block.linears[place].bias.as_ref().map_or(Arg::None, Arg::In);
        let (keys, values) = cache.layer(block.layer);
        let [q, k, v] = [Q, K, V].map(term);
        let norm = &block.input_layernorm;
        let args = [
            Arg::In(&held.x),
            norm.plain_weight().map_or(Arg::None, Arg::In),
            weight(Q)?,
            bias(Q),
            weight(K)?,
            bias(K),
            weight(V)?,
            bias(V),
            q.0,
            q.1,
            k.0,
            k.1,
            v.0,
            v.1,
            Arg::In(&held.cosines),
            Arg::In(&held.sines),
            Arg::In(&held.state),
            Arg::Out(&held.q),
            Arg::Out(keys),
            Arg::Out(values),
        ];
        let words = [
            rows.into(),
            (norm.eps as f32).into(),
            heads.into(),
            kv_heads.into(),
            (head_dim / 2).into(),
            held.max_seq_len.into(),
            block.linears[Q].bias.is_some().into(),
            q.2.into(),
            k.2.into(),
            v.2.into(),
            q.3.into(),
            k.3.into(),
            v.3.into(),
        ];
        let groups = (heads + 2 * kv_heads) * (head_dim / 2) / (held.threads.projections / 32);
        let kernel = self.kernel("decode_projections", held);
        gpu::launch(&kernel, Grid::row(groups * chunks, held.threads.projections), &args, &words)?;

        self.launch_attention(held, (keys, values))?;
        self.launch_linear(block, O, term(O), &held.attention, held)?;

        let [gate, up] = [GATE, UP].map(term);
        let norm = &block.post_attention_layernorm;
        let args = [
            Arg::In(&held.x),
            norm.plain_weight().map_or(Arg::None, Arg::In),
            weight(GATE)?,
            weight(UP)?,
            gate.0,
            gate.1,
            up.0,
            up.1,
            Arg::Out(&held.activation),
        ];
        let inner = config.intermediate_size;
        let words = [
            rows.into(),
            (norm.eps as f32).into(),
            inner.into(),
            gate.2.into(),
            up.2.into(),
            gate.3.into(),
            up.3.into(),
        ];
        let groups = inner.div_ceil(held.threads.gated / 32);
        gpu::launch(&self.kernel("decode_gated", held), Grid::row(groups * chunks, held.threads.gated), &args, &words)?;

        self.launch_linear(block, DOWN, term(DOWN), &held.activation, held)
    }

    /// A linear layer whose result is added to the stream.
    fn launch_linear(&self, block: &Block, place: usize, term: TermArgs, x: &Tensor, held: &Decoding) -> Result<()> {
        let (a, b, rank, scale) = term;
        let weight = block.linears[place].weight.dense()?;
        let (out_features, in_features) = weight.dims2()?;
        let rows = held.rows.len();
        let args = [Arg::In(x), Arg::In(weight), a, b, Arg::Out(&held.x)];
        let words = [rows.into(), in_features.into(), out_features.into(), rank.into(), scale.into()];
        let groups = out_features.div_ceil(held.threads.linear_rows()) * rows.div_ceil(held.shape.batch);
        gpu::launch(&self.kernel("decode_linear", held), Grid::row(groups, held.threads.linear), &args, &words)
    }
}

/// `y = x W^T + beta y`, and what a term adds, by products of matrices.
fn multiply(weight: &Tensor, term: Option<&LowRank>, x: &Tensor, (y, beta): (&Tensor, f32), wide: &Wide) -> Result<()> {
    gpu::product(y, (x, false), (weight, true), 1.0, beta)?;
    let Some(term) = term else { return Ok(()) };
    let (rows, rank) = (x.dim(0)?, term.a.dim(0)?);
    let z = wide.z.narrow(0, 0, rows * rank)?.reshape((rows, rank))?;
    gpu::product(&z, (x, false), (&term.a, true), term.scale, 0.0)?;
    gpu::product(y, (&z, false), (&term.b, true), 1.0, 1.0)
}

/// A and B of a term, its rank and its scale.
type TermArgs<'a> = (Arg<'a>, Arg<'a>, usize, f32);

fn term_args(term: Option<&LowRank>) -> TermArgs<'_> {
    match term {
        Some(term) => (Arg::In(&term.a), Arg::In(&term.b), term.a.dims()[0], term.scale),
        None => (Arg::None, Arg::None, 0, 0.0),
    }
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

    /// Tells the device the rows.
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
        gpu::write_words(&self.state, &state)?;
        gpu::write_words(&self.settings, &settings)?;
        self.rows.clear();
        self.rows.extend_from_slice(rows);
        Ok(())
    }
}
