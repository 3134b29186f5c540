//! Reads the answers of a job, for all generating routes. Each update is for one choice; it combines several pieces if the
//! reader is behind.

use crate::adapters::{Adapter, InFlight};
use crate::app::App;
use crate::engine::{Answers, Job, Update};
use crate::error::ApiError;
use crate::served::Served;
use crate::tools::{Delta, ToolParser};
use metal_candle::inference::{Choice, Finish, FinishReason, Piece};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Replaces negative infinity, which JSON does not have.
const MIN_LOGPROB: f32 = -9999.0;

/// A token with its log-probability, and the log-probabilities of the most likely tokens.
#[derive(Debug, Clone)]
pub(crate) struct Scored {
    pub(crate) id: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<Choice>,
}

impl Scored {
    /// OpenAI's object for chats.
    pub(crate) fn chat_form(&self, served: &Served) -> Value {
        let form = |id, logprob: f32| {
            let (token, bytes) = served.token_text(id);
            json!({"token": token, "logprob": finite(logprob), "bytes": bytes})
        };
        let mut object = form(self.id, self.logprob);
        object["top_logprobs"] = self.top.iter().map(|choice| form(choice.token, choice.log_probability)).collect();
        object
    }
}

/// Makes a log-probability finite, for JSON.
pub(crate) fn finite(logprob: f32) -> f32 {
    logprob.max(MIN_LOGPROB)
}

/// The new text and tokens of a choice since the last update.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) choice: usize,
    pub(crate) text: String,
    pub(crate) tokens: Vec<Scored>,
    pub(crate) finish: Option<Finish>,
    /// The text, split into reasoning, content and calls.
    pub(crate) deltas: Vec<Delta>,
    /// Whether the choice has called a tool.
    pub(crate) has_calls: bool,
}

/// Token counts.
#[allow(clippy::struct_field_names)] // the names of the wire format
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) reasoning_tokens: usize,
    pub(crate) accepted_tokens: usize,
    pub(crate) rejected_tokens: usize,
}

impl Usage {
    /// Adds the counts of another prompt.
    pub(crate) fn add(&mut self, other: Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.completion_tokens += other.completion_tokens;
        self.reasoning_tokens += other.reasoning_tokens;
        self.accepted_tokens += other.accepted_tokens;
        self.rejected_tokens += other.rejected_tokens;
    }

    /// OpenAI's object.
    pub(crate) fn openai_form(self) -> Value {
        let Self { prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, .. } = self;
        let (accepted_tokens, rejected_tokens) = (self.accepted_tokens, self.rejected_tokens);
        json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": reasoning_tokens, "audio_tokens": 0, "accepted_prediction_tokens": accepted_tokens, "rejected_prediction_tokens": rejected_tokens
            },
        })
    }
}

/// A job whose answers are being generated.
#[derive(Debug)]
pub(crate) struct Answering {
    answers: Answers,
    app: Arc<App>,
    owner: usize,
    _adapter: Option<InFlight>,
    /// Tokens that are charged and not used yet.
    charged: usize,
    pub(crate) usage: Usage,
    /// The parser of each choice, if its text may contain reasoning or calls.
    parsers: Vec<Option<ToolParser>>,
    num_open: usize,
    ready: VecDeque<Progress>,
    failure: Option<ApiError>,
}

impl Answering {
    /// Charges the client and queues the job.
    ///
    /// # Errors
    /// The client has used up its tokens, or the queue is full.
    pub(crate) fn start(app: &Arc<App>, job: Job, client: &crate::auth::Client) -> Result<Self, ApiError> {
        let (num_open, owner, prompt_tokens) = (job.num_samples, job.owner, job.prompt.len());
        let charged = prompt_tokens + job.config.max_tokens * num_open;
        app.keys.charge(client, charged).inspect_err(|_| app.metrics.reject("rate_limit"))?;
        let adapter = job.adapter.as_ref().map(Adapter::use_in_job);
        let answers = app.engine.submit(job).inspect_err(|_| app.keys.refund(owner, charged))?;
        let usage = Usage { prompt_tokens, ..Usage::default() };
        let charged = charged - prompt_tokens;
        Ok(Self {
            answers,
            app: Arc::clone(app),
            owner,
            _adapter: adapter,
            charged,
            usage,
            parsers: Vec::new(),
            num_open,
            ready: VecDeque::new(),
            failure: None,
        })
    }

    /// Splits the text of each choice with a copy of `parser`.
    pub(crate) fn parse_by(&mut self, parser: &ToolParser) {
        self.parsers = vec![Some(parser.clone()); self.num_open];
    }

    /// The next update; `None` after the last choice has ended.
    ///
    /// # Errors
    /// The job failed.
    pub(crate) async fn next(&mut self) -> Result<Option<Progress>, ApiError> {
        loop {
            if let Some(progress) = self.ready.pop_front() {
                return Ok(Some(progress));
            }
            if let Some(error) = self.failure.take() {
                return Err(error);
            }
            if self.num_open == 0 {
                return Ok(None);
            }
            match self.answers.next().await {
                Some(update) => self.take(update),
                None => return Err(ApiError::server("the answers of a request ended unexpectedly")),
            }
            while let Some(update) = self.answers.try_next() {
                self.take(update);
            }
        }
    }

    /// The next update; `None` if there is none within `time`.
    pub(crate) async fn next_within(&mut self, time: Duration) -> Option<Result<Option<Progress>, ApiError>> {
        tokio::time::timeout(time, self.next()).await.ok()
    }

    fn take(&mut self, update: Update) {
        match update {
            Update::Failed(error) => self.failure = Some(error),
            Update::Piece(choice, piece) => self.add(choice, piece),
            Update::Stopped(choice, finish) => self.end(choice, finish),
        }
    }

    /// The pending update of a choice.
    fn progress(&mut self, choice: usize) -> &mut Progress {
        let index = self.ready.iter().position(|progress| progress.choice == choice).unwrap_or(self.ready.len());
        if index == self.ready.len() {
            self.ready.push_back(Progress { choice, ..Progress::default() });
        }
        &mut self.ready[index]
    }

    fn add(&mut self, choice: usize, piece: Piece) {
        let Piece { text, token, log_probability, top_log_probabilities, finish } = piece;
        self.usage.completion_tokens += 1;
        self.charged = self.charged.saturating_sub(1);
        let (mut deltas, mut has_calls) = (Vec::new(), false);
        match self.parsers.get_mut(choice) {
            Some(slot) => {
                if let Some(parser) = slot {
                    let was_reasoning = parser.is_reasoning();
                    deltas = parser.push(&text);
                    self.usage.reasoning_tokens += usize::from(was_reasoning || parser.is_reasoning());
                    has_calls = parser.has_calls();
                    if parser.is_done() && finish.is_none() {
                        self.answers.stop(choice);
                    }
                }
            }
            None if text.is_empty() => {}
            None => deltas.push(Delta::Content(text.clone())),
        }
        let progress = self.progress(choice);
        progress.text.push_str(&text);
        progress.deltas.append(&mut deltas);
        progress.has_calls |= has_calls;
        // the end-of-text token is not part of the text
        if finish.as_ref().is_none_or(|finish| finish.reason != FinishReason::EndOfText) {
            progress.tokens.push(Scored { id: token, logprob: log_probability, top: top_log_probabilities });
        }
        if let Some(finish) = finish {
            self.end(choice, finish);
        }
    }

    fn end(&mut self, choice: usize, finish: Finish) {
        self.num_open = self.num_open.saturating_sub(1);
        self.usage.accepted_tokens += finish.accepted_draft_tokens;
        self.usage.rejected_tokens += finish.rejected_draft_tokens;
        if choice == 0 {
            self.usage.cached_tokens = finish.reused_tokens;
        }
        let is_cut = matches!(finish.reason, FinishReason::MaxTokens | FinishReason::Length);
        let parser = self.parsers.get_mut(choice).and_then(Option::take);
        let had_calls = parser.as_ref().is_some_and(ToolParser::has_calls);
        let rest = parser.map(|parser| parser.finish(is_cut)).unwrap_or_default();
        let progress = self.progress(choice);
        progress.has_calls = had_calls || rest.iter().any(|delta| matches!(delta, Delta::CallStart { .. }));
        progress.deltas.extend(rest);
        progress.finish = Some(finish);
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.app.keys.refund(self.owner, self.charged);
    }
}

/// An update of one of several jobs.
#[derive(Debug)]
pub(crate) enum MergedUpdate {
    /// New text of a choice of the job with this index.
    Progress(usize, Progress),
    /// A job ended.
    Ended(Usage),
    /// A job failed, so the request fails.
    Failed(ApiError),
}

/// The answers of several jobs, in the order they are generated. Dropping it cancels all jobs.
#[derive(Debug)]
pub(crate) struct Merged {
    receiver: mpsc::Receiver<MergedUpdate>,
    _tasks: JoinSet<()>,
}

impl Merged {
    pub(crate) fn new(all: Vec<Answering>) -> Self {
        let (sender, receiver) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        for (number, mut answering) in all.into_iter().enumerate() {
            let sender = sender.clone();
            tasks.spawn(async move {
                loop {
                    let update = match answering.next().await {
                        Ok(Some(progress)) => MergedUpdate::Progress(number, progress),
                        Ok(None) => MergedUpdate::Ended(answering.usage),
                        Err(error) => MergedUpdate::Failed(error),
                    };
                    let is_last = !matches!(update, MergedUpdate::Progress(..));
                    if sender.send(update).await.is_err() || is_last {
                        return;
                    }
                }
            });
        }
        Self { receiver, _tasks: tasks }
    }

    /// The next update; `None` after all jobs have ended.
    pub(crate) async fn next(&mut self) -> Option<MergedUpdate> {
        self.receiver.recv().await
    }
}
