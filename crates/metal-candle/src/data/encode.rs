//! Tokenizes rows and determines the trained tokens.

use super::chat::REASONING_KEYS;
use super::rows::{Conversation, Row, Schema};
use super::spans::{RenderNote, RenderedConversation, SpanFinder};
use super::{DatasetOptions, Message, Tokenizer, TrainedTurns};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

/// The token counts of one role.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct RoleTokens {
    /// All tokens.
    pub tokens: usize,
    /// The trained tokens.
    pub trained: usize,
}

/// A tokenized row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct EncodedRow {
    pub schema: Schema,
    pub ids: Vec<u32>,
    pub trained: Vec<bool>,
    /// Whether a token straddles the edge of a trained part and is therefore not trained.
    pub has_straddling_token: bool,
    pub is_cut: bool,
    /// Whether the row needs an end-of-text token and the tokenizer has none.
    pub lacks_eos: bool,
    /// Other irregularities.
    pub notes: BTreeSet<String>,
    pub details: Option<Details>,
}

/// The details of a row for reports.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Details {
    pub roles: BTreeMap<String, RoleTokens>,
    /// The hash of the text.
    pub exact_hash: u64,
    /// The hash of the text with normalized white space.
    pub normalized_hash: u64,
}

/// Tokenizes rows.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a DatasetOptions,
    finder: Option<SpanFinder<'a>>,
    with_details: bool,
}

/// A text with its trained parts and roles.
struct Parts {
    text: String,
    /// The trained parts; `None` if everything is trained.
    trained: Option<Vec<Range<usize>>>,
    /// The end of the part of each role.
    roles: Vec<(String, usize)>,
    /// Whether to add special tokens around the text, and the end-of-text token after it.
    is_plain: bool,
    /// Whether tokens that straddle an edge are trained, as transformers does with a template's own marks.
    trains_touched: bool,
    notes: BTreeSet<String>,
}

/// The note on a trained answer without text.
const EMPTY_ANSWER: &str = "a trained answer is empty";
/// Keys of an answer that a template may ignore without a note.
const KNOWN_KEYS: [&str; 10] =
    ["role", "content", "tool_calls", "tool_call_id", "name", "id", "model", "date", "timestamp", "created"];

impl<'a> Encoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, options: &'a DatasetOptions, with_details: bool) -> Self {
        let finder = tokenizer.chat_template().map(|t| SpanFinder::new(t, tokenizer.special_tokens()));
        Self { tokenizer, options, finder, with_details }
    }

    /// Tokenizes a parsed row.
    pub(super) fn encode(&self, schema: Schema, row: Row) -> Result<EncodedRow, String> {
        let parts = match row {
            Row::Text(text) => {
                let roles = vec![("text".to_string(), text.len())];
                Parts { text, trained: None, roles, is_plain: true, trains_touched: false, notes: BTreeSet::new() }
            }
            Row::Completion { prompt, completion, tools, variables } if self.finder.is_some() => {
                let messages = vec![Message::user(prompt), Message::assistant(completion)];
                self.conversation(schema, Conversation { train: vec![None; 2], messages, tools, variables })?
            }
            Row::Completion { prompt, completion, .. } => {
                let text = prompt.clone() + &completion;
                let whole = prompt.len()..text.len();
                let roles = vec![("prompt".to_string(), prompt.len()), ("completion".to_string(), text.len())];
                let notes = completion.is_empty().then(|| EMPTY_ANSWER.to_string()).into_iter().collect();
                let trained = self.options.mask_prompt.then(|| vec![whole]);
                Parts { trained, text, roles, is_plain: true, trains_touched: false, notes }
            }
            Row::Conversation(conversation) => self.conversation(schema, conversation)?,
        };
        self.tokens(schema, &parts)
    }

    fn conversation(&self, schema: Schema, conversation: Conversation) -> Result<Parts, String> {
        let Some(finder) = &self.finder else {
            return Err(format!("the tokenizer has no chat template, which the schema {schema} needs"));
        };
        let Conversation { messages, train, tools, variables } = conversation;
        let is_assistant = |index: &usize| messages[*index].role() == "assistant";
        let last = (0..messages.len()).rev().find(is_assistant);
        if let Some(index) = (0..messages.len()).find(|index| train[*index] == Some(true) && !is_assistant(index)) {
            let role = messages[index].role();
            return Err(format!("message {}: only assistant messages can be trained, found `{role}`", index + 1));
        }
        let turns: Vec<usize> = (0..messages.len())
            .filter(is_assistant)
            .filter(|&index| {
                let default = self.options.trained_turns == TrainedTurns::All || Some(index) == last;
                train[index].unwrap_or(default)
            })
            .collect();
        if turns.is_empty() && self.options.mask_prompt {
            return Err("no assistant message is trained".into());
        }
        let mask_prompt = self.options.mask_prompt;
        let rendered = finder.render(&messages, tools.as_deref(), &variables, &turns, mask_prompt)?;
        let roles = if self.with_details {
            roles(finder, &messages, tools.as_deref(), &variables, &rendered)
        } else {
            Vec::new()
        };
        let answers: Vec<&Message> = turns.iter().map(|&index| &messages[index]).collect();
        let mut notes = notes(&rendered, &answers);
        notes.extend(self.unread_keys(&answers));
        let RenderedConversation { text, spans, has_marks, .. } = rendered;
        let trained = mask_prompt.then_some(spans);
        Ok(Parts { text, trained, roles, is_plain: false, trains_touched: has_marks, notes })
    }

    /// Notes on texts of trained answers that the template does not read.
    fn unread_keys(&self, answers: &[&Message]) -> Vec<String> {
        let sources = self.finder.as_ref().map_or(&[][..], |finder| finder.template().sources());
        let is_read = |key: &str| sources.iter().any(|(_, source)| source.contains(key));
        let fields = answers.iter().flat_map(|message| message.fields());
        let texts = fields.filter(|(_, value)| value.as_str().is_some_and(|text| !text.is_empty()));
        let unknown = texts.map(|(key, _)| key.as_str()).filter(|key| {
            let is_known = KNOWN_KEYS.contains(key) || REASONING_KEYS.contains(key);
            !is_known && !is_read(key)
        });
        let unknown: BTreeSet<&str> = unknown.collect();
        unknown
            .into_iter()
            .take(5)
            .map(|key| {
                let short: String = key.chars().take(40).collect();
                format!("the chat template does not read the key `{}` of a trained answer", short.escape_debug())
            })
            .collect()
    }

    fn tokens(&self, schema: Schema, parts: &Parts) -> Result<EncodedRow, String> {
        let encoding = self.tokenizer.encode_with_offsets(&parts.text, parts.is_plain).map_err(|e| e.to_string())?;
        let (mut ids, offsets) = (encoding.ids, encoding.offsets);
        let mut has_straddling_token = false;
        let mut trained: Vec<bool> = offsets
            .iter()
            .map(|&(start, end)| {
                let Some(spans) = &parts.trained else { return true };
                let after = spans.partition_point(|span| span.end <= start);
                let is_touched = start < end && spans.get(after).is_some_and(|span| span.start < end);
                let is_inside = spans.get(after).is_some_and(|span| covers(span, &parts.text, start, end));
                has_straddling_token |= is_touched && !is_inside && !parts.trains_touched;
                is_touched && (is_inside || parts.trains_touched)
            })
            .collect();
        let mut lacks_eos = false;
        if parts.is_plain {
            match self.tokenizer.eos_token_id() {
                Some(eos) if ids.last() != Some(&eos) => {
                    ids.push(eos);
                    trained.push(true);
                }
                Some(_) => {}
                None => lacks_eos = true,
            }
        }
        let details = self.with_details.then(|| details(parts, &offsets, &trained));
        let max_tokens = self.options.max_tokens.unwrap_or(usize::MAX);
        let is_cut = ids.len() > max_tokens;
        if is_cut && !self.options.truncate {
            return Err(format!("expected at most {max_tokens} tokens, found {}", ids.len()));
        }
        ids.truncate(max_tokens);
        self.check_ids(&ids)?;
        trained.truncate(max_tokens);
        // the first token has no context, so it cannot be predicted
        if !trained.iter().skip(1).any(|&trained| trained) {
            let which = if is_cut { format!(" of the first {max_tokens}") } else { String::new() };
            return Err(format!("no token{which} is trained"));
        }
        if parts.trained.is_some() && !parts.is_plain && trained.iter().all(|&trained| trained) {
            return Err("every token is trained, because the chat template writes nothing before the answer".into());
        }
        let notes = parts.notes.clone();
        Ok(EncodedRow { schema, ids, trained, has_straddling_token, is_cut, lacks_eos, notes, details })
    }
}

impl Encoder<'_> {
    /// Returns an error for a token without an embedding.
    fn check_ids(&self, ids: &[u32]) -> Result<(), String> {
        let Some(vocab_size) = self.options.vocab_size else { return Ok(()) };
        let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) else { return Ok(()) };
        let token = self.tokenizer.id_to_token(id).unwrap_or_default();
        Err(format!(
            "token `{token}` has id {id}, outside the model's vocabulary of {vocab_size}: the tokenizer belongs to another model, \
             or the model's embedding was not resized after tokens were added"
        ))
    }
}

/// Whether a token is in a span, or extends beyond it by white space only. In some tokenizers, end tokens include the white space
/// after them, and the first word of an answer the space before it.
fn covers(span: &Range<usize>, text: &str, start: usize, end: usize) -> bool {
    let part = |from: usize, to: usize| text.get(from..to).unwrap_or_default().trim();
    let (inner_start, inner_end) = (start.max(span.start), end.min(span.end));
    let is_whole = inner_start == start && inner_end == end;
    is_whole
        || (part(start, inner_start).is_empty()
            && part(inner_end, end).is_empty()
            && !part(inner_start, inner_end).is_empty()
            && text.is_char_boundary(inner_start)
            && text.is_char_boundary(inner_end)
            && text.is_char_boundary(start)
            && text.is_char_boundary(end))
}

/// Notes on a conversation and its trained answers.
fn notes(rendered: &RenderedConversation, answers: &[&Message]) -> BTreeSet<String> {
    let of_text = rendered.notes.iter().map(|note| match note {
        RenderNote::LosesText => "the chat template omits the text of a trained answer",
        RenderNote::LosesCalls => "the chat template omits the tool calls of a trained answer",
        RenderNote::WritesNone => {
            "the chat template writes `None` for an answer whose `content` is null; leave it empty"
        }
        RenderNote::LosesReasoning => "the chat template omits the reasoning of a trained answer",
        RenderNote::ReplacesIds => {
            "the chat template requires tool call ids of nine characters, so the ids are replaced"
        }
    });
    let mut notes: BTreeSet<String> = of_text.map(str::to_string).collect();
    if answers.iter().any(|answer| answer.text().is_empty() && answer.tool_calls().is_empty()) {
        notes.insert(EMPTY_ANSWER.to_string());
    }
    notes
}

/// The end of the part of each role in the text of a conversation.
fn roles(
    finder: &SpanFinder,
    messages: &[Message],
    tools: Option<&[Value]>,
    variables: &Map<String, Value>,
    rendered: &RenderedConversation,
) -> Vec<(String, usize)> {
    let mut roles = Vec::new();
    let mut has_gap = false;
    for (message, end) in messages.iter().zip(finder.boundaries(messages, tools, variables, rendered)) {
        let Some(end) = end else {
            has_gap = true;
            continue;
        };
        let role = if has_gap { "several" } else { message.role() };
        roles.push((role.to_string(), end));
        has_gap = false;
    }
    roles
}

fn details(parts: &Parts, offsets: &[(usize, usize)], trained: &[bool]) -> Details {
    let mut roles: BTreeMap<String, RoleTokens> = BTreeMap::new();
    for (index, &is_trained) in trained.iter().enumerate() {
        // an added end-of-text token belongs to the last role
        let start = offsets.get(index).map_or(parts.text.len(), |&(start, _)| start);
        let role = parts.roles.iter().find(|(_, end)| start < *end).or(parts.roles.last());
        let Some((role, _)) = role else { continue };
        let counts = roles.entry(role.clone()).or_default();
        counts.tokens += 1;
        counts.trained += usize::from(is_trained);
    }
    let mut exact = DefaultHasher::new();
    parts.text.hash(&mut exact);
    let mut normalized = DefaultHasher::new();
    parts.text.split_whitespace().for_each(|word| word.hash(&mut normalized));
    Details { roles, exact_hash: exact.finish(), normalized_hash: normalized.finish() }
}
