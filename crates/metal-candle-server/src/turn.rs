//! [`Turn`]: answers a conversation for all wire formats; renders the chat template and starts the job.

use crate::answer::Answering;
use crate::app::{App, Target};
use crate::auth::Client;
use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::grammar::{Grammar, GrammarMask};
use crate::sampling::generation_config;
use crate::served::Served;
use crate::tools::{Reasoning, ToolChoice, ToolParser, ToolRequest, tools_grammar};
use crate::untrusted::ControlTokens;
use metal_candle::data::Message;
use metal_candle::inference::{FinishReason, GenerationConfig, TokenMask};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Maximum number of messages in a request.
pub(crate) const MAX_MESSAGES: usize = 4096;

/// A conversation to answer.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) target: Target,
    /// The messages of the client.
    pub(crate) messages: Vec<Message>,
    /// The tools that the template shows and the answer may call.
    pub(crate) tools: Option<ToolRequest>,
    /// The grammar of the answer, and the field that specifies it.
    pub(crate) grammar: Option<(String, Grammar)>,
    /// Variables of the template.
    pub(crate) variables: Map<String, Value>,
    /// Whether the answer continues the last message.
    pub(crate) continues: bool,
    pub(crate) add_generation_prompt: bool,
    /// The settings of generation; `max_tokens` may exceed the context.
    pub(crate) config: GenerationConfig,
    pub(crate) num_choices: usize,
    pub(crate) num_top: usize,
    pub(crate) cache_salt: Option<String>,
    /// The expected answer, which is verified several tokens at a time.
    pub(crate) prediction: Option<String>,
    /// The field with the conversation.
    pub(crate) param: &'static str,
}

impl Turn {
    /// Creates a turn from the fields that all formats share: one answer, without tools.
    ///
    /// # Errors
    /// A field is malformed, or there is no such model.
    pub(crate) fn new(
        app: &App,
        fields: &Fields,
        messages: Vec<Message>,
        max_tokens: usize,
        param: &'static str,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            target: app.target(fields)?,
            messages,
            tools: None,
            grammar: None,
            variables: template_variables(fields)?,
            continues: fields.flag("continue_final_message")?.unwrap_or(false),
            add_generation_prompt: fields.flag("add_generation_prompt")?.unwrap_or(true),
            config: generation_config(fields, &app.served, max_tokens)?,
            num_choices: 1,
            num_top: 0,
            cache_salt: fields.text("cache_salt")?.map(ToOwned::to_owned),
            prediction: None,
            param,
        })
    }

    /// The number of tokens of the prompt.
    ///
    /// # Errors
    /// The chat template refuses the conversation.
    pub(crate) async fn count_tokens(self, app: &Arc<App>) -> Result<usize, ApiError> {
        let served = app.served.clone();
        app.compute(move || Ok(served.encode(&self.render(&served)?, false)?.len())).await
    }

    /// Renders the conversation and queues it.
    ///
    /// # Errors
    /// The chat template refuses the conversation, the prompt does not fit in the context, or the queue is full.
    pub(crate) async fn start(self, app: &Arc<App>, client: &Client) -> Result<Answering, ApiError> {
        let served = app.served.clone();
        let turn = self;
        let (prompt, prediction, mask, parser, turn) = app
            .compute(move || {
                let text = turn.render(&served)?;
                let prediction = turn.prediction.as_deref().map(|text| served.encode_text(text)).transpose()?;
                let (mask, parser) = (turn.mask(&served, &text)?, turn.parser(&served, &text));
                Ok((served.encode(&text, false)?, prediction, mask, parser, turn))
            })
            .await?;
        let mut config = turn.config;
        // markers of calls may be special tokens
        let syntax = app.served.tool_syntax.as_ref().filter(|_| turn.tools.is_some());
        let marks = syntax.into_iter().flat_map(|syntax| syntax.marker_ids());
        let marks = marks.chain(app.served.reasoning.iter().flat_map(Reasoning::marker_ids));
        if marks.into_iter().any(|id| app.served.tokenizer.is_special(id)) {
            config.skip_special_tokens = false;
        }
        if let Some(id) = app.served.end_of_turn.filter(|_| !config.ignore_eos) {
            config.stop_ids.push(id);
        }
        let prompt = (turn.param, prompt);
        let mut job = app.job(client, &turn.target, prompt, config, turn.cache_salt.as_deref())?;
        (job.num_samples, job.num_top) = (turn.num_choices, turn.num_top);
        job.mask = mask.map(|mask| Box::new(mask) as Box<dyn TokenMask>);
        if let Some(mut prediction) = prediction {
            // more tokens can never be used
            prediction.truncate(job.config.max_tokens);
            (job.speculation, job.prediction) = (app.speculation(true), prediction);
        }
        let mut answering = Answering::start(app, job, client)?;
        if let Some(parser) = parser {
            answering.parse_by(&parser);
        }
        Ok(answering)
    }

    /// Reads `tools`, and the fields of the answer's grammar, in the format of the chat route.
    ///
    /// # Errors
    /// A field is invalid, or the model's chat template does not support tools.
    pub(crate) fn constrain(&mut self, served: &Served, fields: &Fields) -> Result<(), ApiError> {
        self.tools = ToolRequest::from_request(fields)?.filter(|tools| tools.choice != ToolChoice::None);
        self.grammar = Grammar::from_request(fields)?;
        if self.grammar.is_some() {
            self.variables.entry("enable_thinking").or_insert(false.into());
        }
        if self.tools.is_some() && served.tool_syntax.is_none() {
            return Err(ApiError::unsupported("tools", "`tools`: the model's chat template does not support tools"));
        }
        Ok(())
    }

    /// The mask of the answer to `prompt`, if the answer is constrained.
    fn mask(&self, served: &Served, prompt: &str) -> Result<Option<GrammarMask>, ApiError> {
        let form = self.grammar.as_ref();
        // with tools, too, so that errors of the format name its field
        let alone = form.map(|(param, grammar)| served.mask(grammar, param)).transpose()?;
        let Some((tools, syntax)) = self.tools.as_ref().zip(served.tool_syntax.as_ref()) else {
            return Ok(alone);
        };
        let reasoning = served.reasoning.as_ref().map(|marks| (marks, marks.is_open_after(prompt)));
        let grammar = tools_grammar(syntax, tools, reasoning, form.map(|(_, grammar)| grammar))?;
        grammar.map(|grammar| served.mask(&grammar, "tools")).transpose()
    }

    /// The parser that splits the answer to `prompt` into reasoning, content and calls; none if there can only be content.
    fn parser(&self, served: &Served, prompt: &str) -> Option<ToolParser> {
        let syntax = served.tool_syntax.as_deref().filter(|_| self.tools.is_some());
        // a grammar without tools does not allow reasoning
        let reasoning = served.reasoning.as_ref().filter(|_| self.grammar.is_none() || syntax.is_some());
        if syntax.is_none() && reasoning.is_none() {
            return None;
        }
        let (tools, parallel) = self.tools.as_ref().map_or((&[][..], true), |tools| (&tools.tools, tools.parallel));
        Some(ToolParser::new(syntax, reasoning, prompt, tools, parallel))
    }

    /// Renders the conversation, with control tokens in the client's text disarmed.
    ///
    /// # Errors
    /// There is no chat template, or it refuses the conversation.
    pub(crate) fn render(&self, served: &Served) -> Result<String, ApiError> {
        let template = served.template()?;
        let mut messages = Vec::with_capacity(self.messages.len());
        for (index, message) in self.messages.iter().enumerate() {
            let path = || format!("{}[{index}]", self.param);
            let message = message.clone().normalized().map_err(|error| {
                let path = path();
                ApiError::unsupported(path.clone(), format!("`{path}`: {error}"))
            })?;
            let is_assistant = message.role() == "assistant";
            let mut value = serde_json::to_value(&message).map_err(ApiError::server)?;
            served.control.disarm_value(&mut value, is_assistant);
            messages.push(serde_json::from_value::<Message>(value).map_err(ApiError::server)?);
        }
        let mut tools = self.tools.as_ref().and_then(ToolRequest::template_tools);
        for tool in tools.iter_mut().flatten() {
            served.control.disarm_value(tool, false);
        }
        let mut variables = self.variables.clone();
        for value in variables.values_mut() {
            served.control.disarm_value(value, false);
        }
        if self.continues
            && let Some(last) = messages.pop()
        {
            let text = ControlTokens::with_end(last.text().trim_end());
            messages.push(last.with("content", text));
        }
        let adds_prompt = self.add_generation_prompt && !self.continues;
        let text = template.render(&messages, tools.as_deref(), adds_prompt, &variables).map_err(|error| {
            ApiError::field(self.param, format!("the chat template refuses the conversation: {error}"))
        })?;
        if !self.continues {
            return Ok(text);
        }
        let until = ControlTokens::until_end(&text).map(ToOwned::to_owned);
        until.ok_or_else(|| {
            let message = "`continue_final_message`: the chat template changes the last message";
            ApiError::field("continue_final_message", message)
        })
    }
}

/// Reads the messages of a request in OpenAI's format.
///
/// # Errors
/// A message is malformed, or has an unsupported role or content.
pub(crate) fn messages(fields: &Fields) -> Result<Vec<Message>, ApiError> {
    let list = fields.required_list("messages", MAX_MESSAGES)?;
    if list.is_empty() {
        return Err(ApiError::field("messages", "`messages`: expected at least one message, found none"));
    }
    let mut messages = Vec::with_capacity(list.len());
    for (index, value) in list.iter().enumerate() {
        let inner = Fields::of(value, format!("messages[{index}]"))?;
        messages.push(message(&inner)?);
    }
    Ok(messages)
}

/// Reads a message in OpenAI's format.
///
/// # Errors
/// The message is malformed, or has an unsupported role or content.
pub(crate) fn message(fields: &Fields) -> Result<Message, ApiError> {
    let path = |name: &str| fields.path(name);
    let role = match fields.required_text("role")? {
        // OpenAI's name for the system role in newer models
        "developer" => "system",
        role @ ("system" | "user" | "assistant" | "tool") => role,
        other => {
            let expected = "`system`, `developer`, `user`, `assistant` or `tool`";
            let found = describe(&Value::from(other));
            let message = format!("`{}`: expected {expected}, found {found}", path("role"));
            return Err(ApiError::field(path("role"), message));
        }
    };
    fields.refuse(&["audio", "function_call"])?;
    let mut map = fields.map().clone();
    map.retain(|_, value| !value.is_null());
    map.insert("role".into(), role.into());
    let calls = fields.objects("tool_calls", 128)?;
    match fields.get("content") {
        None if role == "assistant" && !calls.is_empty() => {
            map.insert("content".into(), Value::Null);
        }
        None if role == "assistant" && fields.text("refusal")?.is_some() => {
            map.insert("content".into(), fields.text("refusal")?.unwrap_or_default().into());
        }
        None => return Err(ApiError::field(path("content"), format!("`{}` is required", path("content")))),
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (index, part) in parts.iter().enumerate() {
                let part = Fields::of(part, format!("{}[{index}]", path("content")))?;
                let name = match part.required_text("type")? {
                    "text" | "input_text" | "output_text" => "text",
                    "refusal" => "refusal",
                    _ => {
                        let message = format!("`{}`: only text is supported", part.path("type"));
                        return Err(ApiError::unsupported(part.path("type"), message));
                    }
                };
                text.push_str(part.required_text(name)?);
            }
            map.insert("content".into(), text.into());
        }
        Some(other) => {
            let message =
                format!("`{}`: expected a string or a list of parts, found {}", path("content"), describe(other));
            return Err(ApiError::field(path("content"), message));
        }
    }
    for value in map.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        // templates use them without checking whether they exist
        if let Some(Value::Object(function)) = value.get_mut("function") {
            let arguments = function.entry("arguments").or_insert(Value::Null);
            if arguments.is_null() {
                *arguments = "{}".into();
            }
        }
    }
    for call in &calls {
        let function = call.object("function")?;
        let function = function.ok_or_else(|| {
            ApiError::unsupported(call.path("function"), format!("`{}` is required", call.path("function")))
        })?;
        function.required_text("name")?;
    }
    Message::try_from(map).map_err(|error| ApiError::field(path("role"), error))
}

/// Reads template variables from `chat_template_kwargs`; only plain values are allowed.
///
/// # Errors
/// A value is a list or an object, or a variable is set by the server.
pub(crate) fn template_variables(fields: &Fields) -> Result<Map<String, Value>, ApiError> {
    let mut variables = Map::new();
    let given = fields.object("chat_template_kwargs")?;
    for (name, value) in given.iter().flat_map(Fields::map) {
        let path = format!("chat_template_kwargs.{}", name.chars().take(40).collect::<String>());
        if value.is_array() || value.is_object() || value.as_str().is_some_and(|text| text.len() > 4096) {
            return Err(ApiError::field(
                path.clone(),
                format!("`{path}`: expected a short text, a number, true or false"),
            ));
        }
        let is_internal = name.starts_with('_');
        if is_internal
            || matches!(name.as_str(), "messages" | "tools" | "add_generation_prompt" | "bos_token" | "eos_token")
        {
            return Err(ApiError::unsupported(path.clone(), format!("`{path}` cannot be set by a request")));
        }
        variables.insert(name.clone(), value.clone());
    }
    if let Some(effort) = fields.text("reasoning_effort")? {
        variables.entry("enable_thinking").or_insert((effort != "none").into());
        variables.entry("reasoning_effort").or_insert(effort.into());
    }
    Ok(variables)
}

/// OpenAI's finish reason of a choice. A truncated choice is reported as such, even after a call.
pub(crate) fn finish_reason(reason: FinishReason, has_calls: bool) -> &'static str {
    match reason {
        FinishReason::EndOfText | FinishReason::StopString | FinishReason::Cancelled if has_calls => "tool_calls",
        FinishReason::EndOfText | FinishReason::StopString | FinishReason::Cancelled => "stop",
        FinishReason::MaxTokens | FinishReason::Length => "length",
    }
}
