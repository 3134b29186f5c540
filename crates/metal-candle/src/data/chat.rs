//! Renders conversations with a model's chat template.

use super::Message;
use super::jinja::{self, STORABLE};
use super::side_files::{read_json_if_exists, special_token, token_text};
use crate::error::{Error, Result};
use crate::files::guard;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value as TemplateValue};
use serde_json::{Map, Value};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

/// Maximum size of a rendered template, in bytes.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// Maximum size of a template's source, in bytes.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// The fuel of a rendering besides the fuel for its input: an instruction costs 1, as does each 64 bytes of data created.
const FUEL: u64 = 600_000;
/// Fuel for each value of the input.
const FUEL_PER_VALUE: u64 = 400;
/// Fuel for each byte of text in the input.
const FUEL_PER_BYTE: u64 = 16;
/// Fuel for each pair of messages: some templates search all messages at each message.
const FUEL_PER_PAIR: u64 = 60;
/// Maximum fuel for pairs.
const MAX_PAIR_FUEL: u64 = 60_000_000;
/// The fuel that most conversations need. Each level of nested lists costs at least 1, and the engine needs up to 512 bytes of
/// stack per level to print or drop it, so this amount is safe on any thread.
const SMALL_FUEL: u64 = 3_000;
/// Stack, in bytes, of the thread for renderings that need more than [`SMALL_FUEL`].
const STACK_BYTES: usize = 256 << 20;
/// Maximum nesting of macros and blocks (a macro counts more than once).
const RECURSION_LIMIT: usize = 200;

/// A chat template (Jinja), rendered as transformers' `apply_chat_template` does.
///
/// A template can use only its arguments: it cannot open files or other templates, and its steps, output and nesting are
/// limited.
///
/// ```
/// use metal_candle::data::{ChatTemplate, Message};
///
/// let template = ChatTemplate::new("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")?;
/// let text = template.render(&[Message::user("hello")], None, false, &Default::default())?;
/// assert_eq!(text, "[user] hello\n");
/// # Ok::<(), metal_candle::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    sources: Vec<(String, String)>,
    variables: Vec<(String, TemplateValue)>,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// The source is not a valid template.
    pub fn new(source: impl Into<String>) -> Result<Self> {
        Self::from_named([("default".to_string(), source.into())])
    }

    /// Compiles several templates of one model; `tool_use` is used if there are tools, otherwise `default`.
    ///
    /// # Errors
    /// A source is not a valid template, or there are several and none is named `default`.
    pub fn from_named(sources: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let sources: Vec<(String, String)> = sources.into_iter().collect();
        if sources.len() != 1 && !sources.iter().any(|(name, _)| name == "default") {
            let names: Vec<&str> = sources.iter().map(|(name, _)| name.as_str()).collect();
            return Err(Error::Template(format!("expected a template named `default`, found {names:?}")));
        }
        let mut environment = environment()?;
        for (name, source) in &sources {
            if source.len() > MAX_SOURCE_BYTES {
                let found = source.len();
                return Err(Error::Template(format!("expected at most {MAX_SOURCE_BYTES} bytes, found {found}")));
            }
            let source = jinja::rewritten(source).map_err(Error::Template)?;
            // the parser recurses
            on_large_stack(|| environment.add_template_owned(name.clone(), source))?
                .map_err(|e| template_error(&e, sources.len() > 1))?;
        }
        let template = Self { environment: Arc::new(environment), sources, variables: Vec::new() };
        Ok(template.with_clock(SystemTime::now))
    }

    /// The template of a parsed `tokenizer_config.json`, with its special tokens as variables; `None` if it has no template.
    ///
    /// # Errors
    /// `chat_template` is neither a string nor a list of `{name, template}`, or is not a valid template.
    pub fn from_tokenizer_config(config: &Value) -> Result<Option<Self>> {
        let template = match config.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(source)) => Self::new(source.clone())?,
            Some(Value::Array(entries)) => {
                let named = entries.iter().map(|entry| {
                    let text = |key: &str| entry.get(key).and_then(Value::as_str).map(str::to_string);
                    Some((text("name")?, text("template")?))
                });
                let named: Option<Vec<_>> = named.collect();
                Self::from_named(named.ok_or_else(|| {
                    Error::Template("expected a `chat_template` list of `name` and `template`".into())
                })?)?
            }
            Some(other) => {
                let found = super::message::kind(other);
                return Err(Error::Template(format!(
                    "expected `chat_template` to be a string or a list, found {found}"
                )));
            }
        };
        Ok(Some(template.with_special_tokens(config)))
    }

    /// The template of a model folder: `chat_template.jinja` (with `additional_chat_templates/*.jinja`) if it exists, else
    /// the one in `tokenizer_config.json`; `None` if there is neither.
    ///
    /// # Errors
    /// A file cannot be read or is not a valid template.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let folder = folder.as_ref();
        let config = read_json_if_exists(&folder.join("tokenizer_config.json"))?;
        let config = config.unwrap_or(Value::Null);
        let path = folder.join("chat_template.jinja");
        if !path.is_file() {
            return Self::from_tokenizer_config(&config);
        }
        let read = |path: &Path| crate::files::read_text(path, MAX_SOURCE_BYTES as u64);
        let mut sources = vec![("default".to_string(), read(&path)?)];
        if let Ok(entries) = std::fs::read_dir(folder.join("additional_chat_templates")) {
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            for path in paths.iter().filter(|path| path.extension().is_some_and(|e| e == "jinja")) {
                if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
                    sources.push((name.to_string(), read(path)?));
                }
            }
        }
        Ok(Some(Self::from_named(sources)?.with_special_tokens(&config)))
    }

    /// Sets a variable such as `bos_token` or `enable_thinking`; `chat_template_kwargs` of a row overrides it.
    #[must_use]
    pub fn with_variable(mut self, name: impl Into<String>, value: &Value) -> Self {
        let name = name.into();
        self.variables.retain(|(known, _)| *known != name);
        self.variables.push((name, template_value(value)));
        self
    }

    /// Sets the clock of `strftime_now`, which prints local time.
    #[must_use]
    pub fn with_clock(mut self, clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        let mut environment = (*self.environment).clone();
        environment.add_function("strftime_now", move |format: &str| jinja::strftime_local(format, clock()));
        self.environment = Arc::new(environment);
        self
    }

    /// Sets the special tokens of a `tokenizer_config.json` as variables.
    pub(super) fn with_special_tokens(mut self, config: &Value) -> Self {
        for name in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
            if let Some(token) = special_token(config, name) {
                self = self.with_variable(name, &Value::String(token));
            }
        }
        if let Some(Value::Array(tokens)) = config.get("additional_special_tokens") {
            let tokens: Vec<Value> = tokens.iter().filter_map(token_text).map(Value::String).collect();
            self = self.with_variable("additional_special_tokens", &Value::Array(tokens));
        }
        self
    }

    /// The name and source of each template.
    pub fn sources(&self) -> &[(String, String)] {
        &self.sources
    }

    /// Whether a template marks the assistant's text with `{% generation %}`.
    pub(super) fn has_generation_marks(&self) -> bool {
        self.sources.iter().any(|(_, source)| source.contains("endgeneration"))
    }

    /// Renders a conversation as text.
    ///
    /// `tools` are JSON schemas of functions, `extra` are more variables such as `enable_thinking`. With
    /// `add_generation_prompt`, the text ends where the assistant's answer starts.
    ///
    /// # Errors
    /// The template raises an exception, fails, or exceeds its limits; the message names the line.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let messages: Vec<TemplateValue> = messages.iter().map(message_value).collect();
        self.render_values(&messages, tools_value(tools).as_ref(), add_generation_prompt, extra)
    }

    pub(super) fn render_values(
        &self,
        messages: &[TemplateValue],
        tools: Option<&TemplateValue>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let has_tools = tools.is_some();
        let name = |key: &str| self.sources.iter().map(|(name, _)| name.as_str()).find(|name| *name == key);
        let first = self.sources.first().map_or("default", |(name, _)| name.as_str());
        let name = name("tool_use").filter(|_| has_tools).or_else(|| name("default")).unwrap_or(first);
        let mut context = self.variables.clone();
        context.extend(extra.iter().map(|(key, value)| (key.clone(), template_value(value))));
        context.push(("messages".into(), TemplateValue::from(messages.to_vec())));
        context.push(("tools".into(), tools.cloned().unwrap_or(TemplateValue::from(()))));
        if !extra.contains_key("documents") {
            context.push(("documents".into(), TemplateValue::from(())));
        }
        context.push(("add_generation_prompt".into(), TemplateValue::from(add_generation_prompt)));
        let context = TemplateValue::from_pairs(context);
        let pairs = (messages.len() as u64).saturating_pow(2);
        match render_within(&self.environment, name, &context) {
            Err(error) if error.kind() == ErrorKind::OutOfFuel => self.render_on_large_stack(name, &context, pairs)?,
            rendered => rendered,
        }
        .map_err(|e| template_error(&e, self.sources.len() > 1))
    }

    fn render_on_large_stack(&self, name: &str, context: &TemplateValue, pairs: u64) -> Result<Rendered> {
        let mut environment = (*self.environment).clone();
        let fuel = fuel_for(context, 0).saturating_add(MAX_PAIR_FUEL.min(FUEL_PER_PAIR.saturating_mul(pairs)));
        environment.set_fuel(Some(FUEL.saturating_add(fuel)));
        on_large_stack(|| render_within(&environment, name, context))
    }
}

/// Runs deeply recursive work on a thread with a large stack.
fn on_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, || guard(work));
        let thread = thread.map_err(|e| Error::Template(format!("cannot start a thread to render on: {e}")))?;
        let failed = |panic: String| Error::Template(format!("the template engine failed: {panic}"));
        thread.join().map_err(|_| failed("its thread ended".into()))?.map_err(failed)
    })
}

/// The fuel for an input: templates iterate over messages and characters.
fn fuel_for(value: &TemplateValue, depth: usize) -> u64 {
    if let Some(text) = value.as_str() {
        return FUEL_PER_VALUE + FUEL_PER_BYTE * text.len() as u64;
    }
    let is_list = matches!(value.kind(), ValueKind::Seq | ValueKind::Map) && depth < MAX_STORED_DEPTH;
    let Some(items) = value.try_iter().ok().filter(|_| is_list) else { return FUEL_PER_VALUE };
    let items = items.map(|item| match value.kind() {
        ValueKind::Map => fuel_for(&value.get_item(&item).unwrap_or_default(), depth + 1),
        _ => fuel_for(&item, depth + 1),
    });
    items.fold(FUEL_PER_VALUE, u64::saturating_add)
}

/// A text or the engine's error.
type Rendered = std::result::Result<String, minijinja::Error>;

fn render_within(environment: &Environment, name: &str, context: &TemplateValue) -> Rendered {
    // the engine panics on some unusual numbers
    guard(|| render_unguarded(environment, name, context)).unwrap_or_else(|panic| {
        let message = format!("the template engine failed: {panic}");
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    })
}

fn render_unguarded(environment: &Environment, name: &str, context: &TemplateValue) -> Rendered {
    let mut out = Bounded { bytes: Vec::new(), is_full: false };
    let rendered = environment.get_template(name)?.render_captured_to(context.clone(), &mut out).map(drop);
    if out.is_full {
        let message = format!("the text is longer than {MAX_OUTPUT_BYTES} bytes");
        return Err(minijinja::Error::new(ErrorKind::WriteFailure, message));
    }
    rendered?;
    let not_text = |_| minijinja::Error::new(ErrorKind::WriteFailure, "the text is not UTF-8");
    String::from_utf8(out.bytes).map_err(not_text)
}

/// A buffer of at most `MAX_OUTPUT_BYTES`.
struct Bounded {
    bytes: Vec<u8>,
    is_full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            self.is_full = true;
            return Err(io::Error::other("the text is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn environment() -> Result<Environment<'static>> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    let mut environment = Environment::new();
    environment.set_syntax(syntax.map_err(|e| template_error(&e, false))?);
    environment.set_debug(false);
    environment.set_fuel(Some(SMALL_FUEL));
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(jinja::method);
    jinja::install(&mut environment);
    environment.add_filter(STORABLE, storable);
    environment.add_function("raise_exception", |message: &str| {
        Err::<TemplateValue, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    Ok(environment)
}

/// Maximum depth of lists and maps in a value of a namespace.
const MAX_STORED_DEPTH: usize = 100;

/// Checks a value before it is stored in a namespace. Deeply nested values, and namespaces that contain themselves, would
/// overflow the stack when they are printed, compared or dropped.
fn storable(state: &State, value: TemplateValue) -> std::result::Result<TemplateValue, minijinja::Error> {
    if value.kind() == ValueKind::Iterable {
        // some iterables can be iterated only once
        return storable(state, value.try_iter()?.collect::<Vec<_>>().into());
    }
    check_storable(state, &value, 0).map(|()| value)
}

fn check_storable(state: &State, value: &TemplateValue, depth: usize) -> std::result::Result<(), minijinja::Error> {
    let refuse = |message: &'static str| Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        return Ok(());
    }
    if depth > MAX_STORED_DEPTH {
        return refuse("a namespace cannot contain a value of more than 100 levels");
    }
    if jinja::is_namespace(value) {
        return refuse("a namespace cannot contain a namespace");
    }
    state.consume_fuel(1 + value.len().unwrap_or(0) as u64)?;
    for item in value.try_iter()? {
        let item = if value.kind() == ValueKind::Map { value.get_item(&item)? } else { item };
        check_storable(state, &item, depth + 1)?;
    }
    Ok(())
}

fn template_error(error: &minijinja::Error, has_names: bool) -> Error {
    let name = error.name().filter(|_| has_names).map(|name| format!("`{name}`, ")).unwrap_or_default();
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "the template exceeds its limit of steps and memory".to_string(),
        (_, Some(detail)) => detail.to_string(),
        (kind, None) => kind.to_string(),
    };
    let mut message = name + &line + &what;
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    Error::Template(message)
}

/// The keys of a message's reasoning; most templates read the first.
pub(super) const REASONING_KEYS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The message as templates see it: null keys other than `content` are omitted, and the reasoning has both names that
/// transformers uses, `reasoning_content` and `thinking`.
pub(super) fn message_value(message: &Message) -> TemplateValue {
    let fields = message.fields();
    let present = fields.iter().filter(|(key, value)| !value.is_null() || *key == "content");
    let mut pairs: Vec<(String, TemplateValue)> =
        present.map(|(key, value)| (key.clone(), template_value(value))).collect();
    let reasoning = REASONING_KEYS.into_iter().filter_map(|key| fields.get(key)).find(|value| !value.is_null());
    if let Some(reasoning) = reasoning.map(template_value) {
        let has_key = |pairs: &[(String, TemplateValue)], key: &str| pairs.iter().any(|(known, _)| known == key);
        if !has_key(&pairs, "thinking") {
            pairs.insert(0, ("thinking".into(), reasoning.clone()));
        }
        if !has_key(&pairs, "reasoning_content") {
            pairs.push(("reasoning_content".into(), reasoning));
        }
    }
    TemplateValue::from_pairs(pairs)
}

pub(super) fn tools_value(tools: Option<&[Value]>) -> Option<TemplateValue> {
    tools.map(|tools| tools.iter().map(template_value).collect())
}

fn map_value(map: &Map<String, Value>) -> TemplateValue {
    TemplateValue::from_pairs(map.iter().map(|(key, value)| (key.clone(), template_value(value))))
}

/// The template engine's form of a JSON value.
pub(super) fn template_value(value: &Value) -> TemplateValue {
    match value {
        Value::Null => TemplateValue::from(()),
        Value::Bool(value) => TemplateValue::from(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => TemplateValue::from(integer),
            (None, Some(integer)) => TemplateValue::from(integer),
            (None, None) => TemplateValue::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => TemplateValue::from(text.as_str()),
        Value::Array(items) => TemplateValue::from(items.iter().map(template_value).collect::<Vec<_>>()),
        Value::Object(map) => map_value(map),
    }
}
