//! The generator: prompt in, text out.

use super::generation::{Collected, Finish, FinishReason, Generation, GenerationConfig, Piece, Prompt};
use super::sequence::{Sequence, step};
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::models::{Decoding, KVCache, KVCacheConfig, Model};
use crate::ops::LowRankTerms;
use candle_core::DType;
use std::ops::ControlFlow;

/// Number of prompt tokens that go through the model at once: on the CPU, and on devices that need many to be busy.
const PREFILL_CHUNK_CPU: usize = 512;
const PREFILL_CHUNK_DEVICE: usize = 4096;

fn prefill_chunk(model: &Model) -> usize {
    if model.device().is_cpu() { PREFILL_CHUNK_CPU } else { PREFILL_CHUNK_DEVICE }
}

/// Continues prompts with a model, and with an adapter that can be swapped at any time.
///
/// The keys and values of the last generation are kept: a prompt that begins with the same tokens, such as the next
/// turn of a conversation, is computed from the first other token on.
///
/// ```no_run
/// use metal_candle::data::Tokenizer;
/// use metal_candle::inference::{GenerationConfig, Generator};
/// use metal_candle::ModelLoader;
///
/// # fn main() -> metal_candle::Result<()> {
/// let model = ModelLoader::new().load("model")?;
/// let mut generator = Generator::new(model).with_tokenizer(Tokenizer::from_folder("model")?);
/// let config = GenerationConfig::default().with_max_tokens(64);
/// for piece in generator.stream("fn main() {", &config)? {
///     print!("{}", piece?.text);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Generator {
    model: Model,
    tokenizer: Option<Tokenizer>,
    adapter: Option<LowRankTerms>,
    /// The adapter's terms as the present generation takes them.
    terms: Option<LowRankTerms>,
    cache: Option<KVCache>,
    /// What single-token steps of the present generation keep on the device.
    decoding: Option<Decoding>,
    /// The tokens in the cache, as the present adapter computed them.
    cached_ids: Vec<u32>,
}

impl Clone for Generator {
    /// A generator of the same shared weights, tokenizer and adapter, with a cache of its own that is empty.
    fn clone(&self) -> Self {
        Self {
            model: self.model.clone(),
            tokenizer: self.tokenizer.clone(),
            adapter: self.adapter.clone(),
            terms: None,
            cache: None,
            decoding: None,
            cached_ids: Vec::new(),
        }
    }
}

impl Generator {
    /// Most prompts of [`Generator::generate_batch`] that are generated at the same time.
    pub const MAX_BATCH_SIZE: usize = 32;

    /// A generator that takes token ids and gives token ids.
    pub fn new(model: Model) -> Self {
        Self { model, tokenizer: None, adapter: None, terms: None, cache: None, decoding: None, cached_ids: Vec::new() }
    }

    /// Lets it take and give text.
    #[must_use]
    pub fn with_tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// Adds the low-rank terms of an adapter to the model.
    #[must_use]
    pub fn with_adapter(mut self, adapter: LowRankTerms) -> Self {
        self.set_adapter(Some(adapter));
        self
    }

    /// Swaps the low-rank terms of the adapter, or takes them away. The next prompt is computed from its beginning.
    pub fn set_adapter(&mut self, adapter: Option<LowRankTerms>) {
        if adapter.is_some() || self.adapter.is_some() {
            self.cached_ids.clear();
        }
        self.adapter = adapter;
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The low-rank terms of the adapter.
    pub fn adapter(&self) -> Option<&LowRankTerms> {
        self.adapter.as_ref()
    }

    /// Memory of the keys and values that are kept, in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.cache.as_ref().map_or(0, KVCache::num_bytes)
    }

    /// Gives the memory of the kept keys and values back.
    pub fn clear_cache(&mut self) {
        self.cache = None;
        self.decoding = None;
        self.cached_ids.clear();
    }

    /// Continues `prompt`.
    ///
    /// # Errors
    /// The prompt is empty, does not fit the context of the model or is text without a tokenizer; a setting is out of
    /// its range; the model gives numbers that are not finite.
    pub fn generate(&mut self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Generation> {
        self.generate_with(prompt, config, |_| ControlFlow::Continue(()))
    }

    /// Continues `prompt` and calls `on_piece` with every token; `Break` ends the generation with the reason
    /// [`FinishReason::Cancelled`].
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn generate_with(
        &mut self,
        prompt: impl Into<Prompt>,
        config: &GenerationConfig,
        mut on_piece: impl FnMut(&Piece) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut pieces = self.stream(prompt, config)?;
        let mut collected = Collected::default();
        while let Some(piece) = pieces.next() {
            let piece = piece?;
            collected.push(&piece);
            let flow = on_piece(&piece);
            if let Some(finish) = piece.finish {
                return Ok(collected.finish(finish));
            }
            if flow.is_break() {
                return Ok(collected.finish(pieces.cancel()));
            }
        }
        Err(Error::Stopped)
    }

    /// Continues `prompt` token by token: each step of the iterator computes one, so dropping it cancels the rest.
    ///
    /// After an error the iterator ends.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn stream(&mut self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Pieces<'_>> {
        let sequence = self.start(prompt.into(), config)?;
        Ok(Pieces { generator: self, sequence })
    }

    /// Continues several prompts at once, in ragged batches without padding; the generations in the order of the
    /// prompts. `configs` holds one for all or one for each.
    ///
    /// # Errors
    /// As [`Generator::generate`], before anything is computed if it is a prompt or setting.
    pub fn generate_batch<P: Into<Prompt>>(
        &mut self,
        prompts: impl IntoIterator<Item = P>,
        configs: &[GenerationConfig],
    ) -> Result<Vec<Generation>> {
        self.generate_batch_with(prompts, configs, |_, _| ControlFlow::Continue(()))
    }

    /// Continues several prompts at once and calls `on_piece` with the number of the prompt, from 0, and every token of it;
    /// `Break` ends the generation of that prompt with the reason [`FinishReason::Cancelled`].
    ///
    /// # Errors
    /// As [`Generator::generate_batch`].
    pub fn generate_batch_with<P: Into<Prompt>>(
        &mut self,
        prompts: impl IntoIterator<Item = P>,
        configs: &[GenerationConfig],
        mut on_piece: impl FnMut(usize, &Piece) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>> {
        let prompts: Vec<Prompt> = prompts.into_iter().map(Into::into).collect();
        if configs.len() != 1 && configs.len() != prompts.len() {
            let message =
                format!("expected one, or one for each of {} prompts, found {}", prompts.len(), configs.len());
            return Err(Error::argument("configs", message));
        }
        let mut waiting = Vec::with_capacity(prompts.len());
        for (index, prompt) in prompts.into_iter().enumerate() {
            let config = configs.get(index).unwrap_or(&configs[0]);
            let ids = self.encode(prompt)?;
            let sequence = Sequence::new(ids, 0, config, &self.model, self.tokenizer.as_ref());
            waiting.push((index, sequence.map_err(|error| of_prompt(index, error))?));
        }
        let num_prompts = waiting.len();
        if num_prompts == 0 {
            return Ok(Vec::new());
        }
        let max_seq_len = waiting.iter().map(|(_, sequence)| sequence.first_room()).max().unwrap_or(0);
        let num_slots = num_prompts.min(Self::MAX_BATCH_SIZE);
        let mut cache = self.new_cache(max_seq_len, num_slots)?;
        let mut waiting = waiting.into_iter();
        self.terms = self.fixed_terms()?;
        self.decoding = None;
        let mut decoding = None;
        let (mut indices, mut sequences) = (Vec::new(), Vec::new());
        let mut free_slots: Vec<usize> = (0..num_slots).rev().collect();
        let mut collected: Vec<Collected> = (0..num_prompts).map(|_| Collected::default()).collect();
        let mut finished: Vec<Option<Finish>> = vec![None; num_prompts];
        loop {
            while let Some(&slot) = free_slots.last()
                && let Some((index, mut sequence)) = waiting.next()
            {
                free_slots.pop();
                cache.truncate(slot, 0);
                sequence.start(slot, 0);
                indices.push(index);
                sequences.push(sequence);
            }
            if sequences.is_empty() {
                break;
            }
            let pieces = step(
                &self.model,
                self.terms.as_ref(),
                &mut cache,
                &mut sequences,
                prefill_chunk(&self.model),
                &mut decoding,
            )?;
            for (place, piece) in pieces {
                let index = indices[place];
                collected[index].push(&piece);
                let flow = on_piece(index, &piece);
                finished[index] = match piece.finish {
                    None if flow.is_break() => Some(sequences[place].finish(FinishReason::Cancelled)),
                    finish => finish,
                };
            }
            for place in (0..sequences.len()).rev() {
                if sequences[place].is_finished() {
                    free_slots.push(sequences.swap_remove(place).slot());
                    indices.swap_remove(place);
                }
            }
        }
        let all = collected.into_iter().zip(finished);
        all.map(|(collected, finish)| Ok(collected.finish(finish.ok_or(Error::Stopped)?))).collect()
    }

    fn encode(&self, prompt: Prompt) -> Result<Vec<u32>> {
        match (prompt, &self.tokenizer) {
            (Prompt::Ids(ids), _) => Ok(ids),
            (Prompt::Text(text), Some(tokenizer)) => tokenizer.encode(&text, true),
            (Prompt::Text(_), None) => Err(Error::argument(
                "prompt",
                "expected token ids, found text, which the generator has no tokenizer for",
            )),
        }
    }

    fn fixed_terms(&self) -> Result<Option<LowRankTerms>> {
        self.adapter.as_ref().map(|terms| self.model.with_fixed_norms(terms)).transpose()
    }

    fn new_cache(&self, max_seq_len: usize, batch_size: usize) -> Result<KVCache> {
        let config = self.model.config();
        let sizes = KVCacheConfig {
            max_seq_len,
            num_layers: config.num_hidden_layers,
            num_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            batch_size,
        };
        let dtype = match self.model.dtype() {
            DType::F32 => DType::F32,
            _ if self.model.device().is_cpu() => DType::F16,
            other => other,
        };
        KVCache::with_dtype(sizes, &self.model.device(), dtype)
    }

    /// A sequence that continues as much of the cache as it can.
    pub(super) fn start(&mut self, prompt: Prompt, config: &GenerationConfig) -> Result<Sequence> {
        let ids = self.encode(prompt)?;
        let mut sequence = Sequence::new(ids, 0, config, &self.model, self.tokenizer.as_ref())?;
        self.terms = self.fixed_terms()?;
        self.decoding = None;
        let mut cache = match self.cache.take() {
            Some(cache) => cache,
            None => self.new_cache(sequence.first_room(), 1)?,
        };
        // the last token of the prompt is always computed, for its logits
        let ids = &sequence.ids()[..sequence.ids().len() - 1];
        let reused = self.cached_ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        self.cached_ids.truncate(reused);
        cache.truncate(0, reused);
        self.cache = Some(cache);
        sequence.start(0, reused);
        Ok(sequence)
    }

    /// The next piece of `sequence`, or `None` if it is finished.
    pub(super) fn next_piece(&mut self, sequence: &mut Sequence) -> Result<Option<Piece>> {
        let Some(mut cache) = self.cache.take() else { return Err(Error::Stopped) };
        while !sequence.is_finished() {
            let sequences = std::slice::from_mut(sequence);
            let terms = self.terms.as_ref();
            let stepped =
                step(&self.model, terms, &mut cache, sequences, prefill_chunk(&self.model), &mut self.decoding);
            let mut pieces = match stepped {
                Ok(pieces) => pieces,
                Err(error) => {
                    // the cache may hold a part of the step: it is dropped
                    self.cached_ids.clear();
                    self.decoding = None;
                    sequence.finish(FinishReason::Cancelled);
                    return Err(error);
                }
            };
            self.cached_ids.extend_from_slice(&sequence.cached_ids()[self.cached_ids.len()..]);
            if let Some((_, piece)) = pieces.pop() {
                self.cache = Some(cache);
                return Ok(Some(piece));
            }
        }
        self.cache = Some(cache);
        Ok(None)
    }
}

/// An error about a prompt, with its place among several.
fn of_prompt(index: usize, error: Error) -> Error {
    match error {
        Error::Argument { name, message } if name == "prompt" => Error::argument(format!("prompts[{index}]"), message),
        other => other,
    }
}

/// The pieces of a generation, one token a step.
#[derive(Debug)]
pub struct Pieces<'a> {
    generator: &'a mut Generator,
    sequence: Sequence,
}

impl Pieces<'_> {
    /// Ends the generation here.
    pub fn cancel(mut self) -> Finish {
        self.sequence.finish(FinishReason::Cancelled)
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.sequence.is_finished() {
            return None;
        }
        self.generator.next_piece(&mut self.sequence).transpose()
    }
}

impl std::iter::FusedIterator for Pieces<'_> {}
