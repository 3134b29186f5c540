//! Generates text for one prompt or a batch of prompts.

use super::generation::{Collected, Finish, Generation, GenerationConfig, Piece, Prompt};
use super::request::{AdapterId, Request, SequenceId};
use super::scheduler::Scheduler;
use super::scheduler_config::SchedulerConfig;
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::models::{KVCacheType, Model};
use crate::ops::LowRankUpdates;
use std::ops::ControlFlow;

/// All generations of a generator share cached prefixes.
const PREFIX_KEY: u128 = 0;

/// Continues prompts with a model and optionally an adapter, which can be swapped between generations.
///
/// It is a thin layer over a [`Scheduler`] that runs one sequence at a time, or all prompts of a batch. `Generator` keeps
/// the KV cache of the last single generation: if the next prompt starts with the same tokens, such as the next turn of a
/// conversation, only the tokens from the first difference on are computed.
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
    scheduler: Scheduler,
    adapter: Option<LowRankUpdates>,
    /// The id of the adapter in the scheduler, after the first generation.
    scheduled_adapter: Option<AdapterId>,
}

impl Clone for Generator {
    /// Returns a generator that shares weights, tokenizer and adapter, with its own empty cache.
    fn clone(&self) -> Self {
        Self { scheduler: self.new_scheduler(1), adapter: self.adapter.clone(), scheduled_adapter: None }
    }
}

impl Generator {
    /// Maximum number of prompts of [`Generator::generate_batch`] that are generated at the same time.
    pub const MAX_BATCH_SIZE: usize = SchedulerConfig::MAX_SEQUENCES;

    /// Creates a generator of token ids.
    pub fn new(model: Model) -> Self {
        let config = SchedulerConfig { max_sequences: 1, ..SchedulerConfig::of(&model) };
        Self { scheduler: Scheduler::with_limits(model, config), adapter: None, scheduled_adapter: None }
    }

    /// A scheduler without sequences for the same model and tokenizer.
    fn new_scheduler(&self, max_sequences: usize) -> Scheduler {
        self.scheduler_of(SchedulerConfig { max_sequences, ..*self.scheduler.config() })
    }

    fn scheduler_of(&self, config: SchedulerConfig) -> Scheduler {
        let scheduler = Scheduler::with_limits(self.model().clone(), config);
        match self.tokenizer() {
            Some(tokenizer) => scheduler.with_tokenizer(tokenizer.clone()),
            None => scheduler,
        }
    }

    /// Sets the type of the KV cache, see [`SchedulerConfig::kv_cache`]. The current cache is freed.
    ///
    /// # Errors
    /// The width of a head is not a multiple of 32, which `Q8_0` and `Q4_0` require, or the device does not support the type.
    pub fn with_kv_cache(mut self, kind: KVCacheType) -> Result<Self> {
        let config = SchedulerConfig { kv_cache: Some(kind), ..*self.scheduler.config() };
        config.validate(self.model())?;
        self.scheduled_adapter = None;
        self.scheduler = self.scheduler_of(config);
        Ok(self)
    }

    /// Sets the tokenizer, to accept text prompts and decode tokens to text.
    #[must_use]
    pub fn with_tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.scheduler = self.scheduler.with_tokenizer(tokenizer);
        self
    }

    /// Sets the low-rank updates of an adapter.
    #[must_use]
    pub fn with_adapter(mut self, adapter: LowRankUpdates) -> Self {
        self.set_adapter(Some(adapter));
        self
    }

    /// Replaces or removes the low-rank updates of the adapter. The cache of the previous adapter is not reused.
    pub fn set_adapter(&mut self, adapter: Option<LowRankUpdates>) {
        if let Some(id) = self.scheduled_adapter.take() {
            self.scheduler.cancel_all();
            // this cannot fail, because no sequence is left
            let _ = self.scheduler.remove_adapter(id);
        }
        self.adapter = adapter;
    }

    /// The model.
    pub fn model(&self) -> &Model {
        self.scheduler.model()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.scheduler.tokenizer()
    }

    /// The low-rank updates of the adapter.
    pub fn adapter(&self) -> Option<&LowRankUpdates> {
        self.adapter.as_ref()
    }

    /// Memory of the KV cache in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.scheduler.cache_bytes()
    }

    /// Frees the KV cache.
    pub fn clear_cache(&mut self) {
        self.scheduler.cancel_all();
        // this cannot fail, because no sequence is left
        let _ = self.scheduler.clear_cache();
    }

    /// Continues `prompt`.
    ///
    /// # Errors
    /// The prompt is empty, does not fit in the model's context, or is text and there is no tokenizer; a setting is out of its
    /// range; the logits of the model are not finite.
    pub fn generate(&mut self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Generation> {
        self.generate_with(prompt, config, |_| ControlFlow::Continue(()))
    }

    /// Continues `prompt` and calls `on_piece` with every token; `Break` ends the generation with the reason
    /// [`FinishReason::Cancelled`](super::FinishReason::Cancelled).
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

    /// Continues `prompt` token by token. Each step of the iterator computes one token, so dropping it cancels the rest. The
    /// iterator ends after an error.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn stream(&mut self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Pieces<'_>> {
        let sequence = self.start(prompt.into(), config)?;
        Ok(Pieces { generator: self, sequence, finish: None, is_over: false })
    }

    /// Continues several prompts at the same time, in ragged batches without padding. Returns the generations in the order of
    /// the prompts. `configs` has one entry for all prompts, or one per prompt.
    ///
    /// # Errors
    /// As [`Generator::generate`]. Errors of prompts and settings are returned before anything is computed.
    pub fn generate_batch<P: Into<Prompt>>(
        &mut self,
        prompts: impl IntoIterator<Item = P>,
        configs: &[GenerationConfig],
    ) -> Result<Vec<Generation>> {
        self.generate_batch_with(prompts, configs, |_, _| ControlFlow::Continue(()))
    }

    /// Continues several prompts at the same time and calls `on_piece` with the index of the prompt and each of its tokens;
    /// `Break` ends the generation of that prompt with the reason [`FinishReason::Cancelled`](super::FinishReason::Cancelled).
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
            let message = format!("expected one, or one per prompt ({}), found {}", prompts.len(), configs.len());
            return Err(Error::argument("configs", message));
        }
        let mut scheduler = self.new_scheduler(Self::MAX_BATCH_SIZE);
        let adapter = self.adapter.as_ref().map(|terms| scheduler.add_adapter(terms)).transpose()?;
        let mut ids = Vec::with_capacity(prompts.len());
        for (index, prompt) in prompts.into_iter().enumerate() {
            let config = configs.get(index).unwrap_or(&configs[0]);
            let request = Request::new(self.encode(prompt)?, config.clone()).with_adapter(adapter);
            ids.extend(scheduler.admit(request).map_err(|error| of_prompt(index, error))?);
        }
        let mut collected: Vec<Collected> = ids.iter().map(|_| Collected::default()).collect();
        let mut finished: Vec<Option<Finish>> = vec![None; ids.len()];
        while !scheduler.is_idle() {
            for event in scheduler.step()? {
                // ids increase in the order of admission
                let index = ids.binary_search(&event.sequence).map_err(|_| Error::Stopped)?;
                let piece = event.result?;
                collected[index].push(&piece);
                let flow = on_piece(index, &piece);
                finished[index] = match piece.finish {
                    None if flow.is_break() => Some(scheduler.cancel(event.sequence)?),
                    finish => finish,
                };
            }
        }
        let all = collected.into_iter().zip(finished);
        all.map(|(collected, finish)| Ok(collected.finish(finish.ok_or(Error::Stopped)?))).collect()
    }

    fn encode(&self, prompt: Prompt) -> Result<Vec<u32>> {
        match (prompt, self.tokenizer()) {
            (Prompt::Ids(ids), _) => Ok(ids),
            (Prompt::Text(text), Some(tokenizer)) => tokenizer.encode(&text, true),
            (Prompt::Text(_), None) => {
                Err(Error::argument("prompt", "expected token ids, found text, which needs a tokenizer"))
            }
        }
    }

    /// Starts a sequence that reuses the cached tokens that its prompt starts with.
    pub(super) fn start(&mut self, prompt: Prompt, config: &GenerationConfig) -> Result<SequenceId> {
        // end the sequence of a dropped iterator
        self.scheduler.cancel_all();
        let ids = self.encode(prompt)?;
        if let (Some(terms), None) = (&self.adapter, self.scheduled_adapter) {
            self.scheduled_adapter = Some(self.scheduler.add_adapter(terms)?);
        }
        let request =
            Request::new(ids, config.clone()).with_adapter(self.scheduled_adapter).with_prefix_key(PREFIX_KEY);
        self.scheduler.admit(request)?.pop().ok_or(Error::Stopped)
    }

    /// The next piece of the last started sequence, which must not have ended. An error ends it.
    pub(super) fn next_piece(&mut self) -> Result<Piece> {
        loop {
            let events = self.scheduler.step().inspect_err(|_| self.scheduler.cancel_all())?;
            if let Some(event) = events.into_iter().next() {
                return event.result;
            }
            if self.scheduler.is_idle() {
                return Err(Error::Stopped);
            }
        }
    }

    /// Ends the sequence; `None` if it has ended.
    pub(super) fn cancel(&mut self, sequence: SequenceId) -> Option<Finish> {
        self.scheduler.cancel(sequence).ok()
    }
}

/// Adds the index of the prompt to an error about a prompt of a batch.
fn of_prompt(index: usize, error: Error) -> Error {
    match error {
        Error::Argument { name, message } if name == "prompt" => Error::argument(format!("prompts[{index}]"), message),
        other => other,
    }
}

/// An iterator over the pieces of a generation, one token per step.
#[derive(Debug)]
pub struct Pieces<'a> {
    generator: &'a mut Generator,
    sequence: SequenceId,
    /// The end, once a piece has contained it.
    finish: Option<Finish>,
    is_over: bool,
}

impl Pieces<'_> {
    /// Ends the generation; returns its end also if it has ended already.
    pub fn cancel(mut self) -> Finish {
        let cancelled = self.generator.cancel(self.sequence);
        // `None` after an error
        cancelled.or_else(|| self.finish.take()).unwrap_or_else(Finish::unknown)
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let piece = self.generator.next_piece();
        self.finish = piece.as_ref().ok().and_then(|piece| piece.finish.clone());
        self.is_over = self.finish.is_some() || piece.is_err();
        Some(piece)
    }
}

impl std::iter::FusedIterator for Pieces<'_> {}
