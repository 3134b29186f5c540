//! [`ToolSyntax`]: detects the syntax of tool calls in a chat template.

use metal_candle::data::Tokenizer;

/// The syntax of tool calls in a chat template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToolSyntax {
    pub(super) form: Form,
    open_id: Option<u32>,
    close_id: Option<u32>,
    args_id: Option<u32>,
    /// The marker before the id of a call, if the template has one.
    call_id: Option<(&'static str, Option<u32>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A JSON object for each call, between `<tool_call>` and `</tool_call>` (Hermes, Qwen 2.5 and 3, Granite 4).
    Hermes,
    /// XML-like parameters between `<tool_call>` and `</tool_call>` (Qwen3-Coder).
    Xml,
    /// An answer that is a JSON object, with `parameters` for the arguments (Llama 3).
    Bare,
    /// A JSON list after `[TOOL_CALLS]` (Mistral 7B v0.3, Nemo).
    MistralList,
    /// A name, `[ARGS]` and a JSON object after `[TOOL_CALLS]` (Mistral Small 3.2, Devstral). Small has `[CALL_ID]` too.
    MistralArgs,
    /// A JSON list after `<|tool_call|>` (Granite 3).
    GraniteList,
    /// A JSON object for each call, between `<|tool_call|>` and `<|/tool_call|>` (Phi-4 mini).
    Phi,
    /// A JSON list between `<TOOLCALL>` and `</TOOLCALL>` (Nemotron Nano 2).
    Nemotron,
}

/// Markers of unsupported forms. A template with one of them must not be treated as another form.
const FOREIGN: [&str; 26] = [
    "<arg_key>",
    "<|tool_call_begin|>",
    "<|tool_call:begin|>",
    "<|tool_call_start|>",
    "<|tool_calls_section_begin|>",
    "<|tool_list_start|>",
    "<|tool_call>",
    "<|tools_prefix|>",
    "<|function_call|>",
    "<|role_sep|>",
    "<|open|>",
    "<|START_ACTION|>",
    "<|channel|>",
    "DSML",
    "tool▁call",
    "<minimax:tool_call>",
    "<seed:tool_call>",
    "<function=",
    "<function name=",
    "<tool_calls>",
    "ns_token",
    "atem:",
    ":opensource",
    ">>>",
    "functools",
    "Action:",
];

impl ToolSyntax {
    /// Detects the syntax in the source of a chat template. `None` if it has no tools or an unsupported form; a template with
    /// tools and no recognizable form uses the form of Hermes.
    pub(crate) fn of(template: &str, tokenizer: &Tokenizer) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        let is_foreign = |except: &str| FOREIGN.iter().any(|marker| *marker != except && has(marker));
        let form = if has("<tool_call>") && has("<function=") && has("<parameter=") && !is_foreign("<function=") {
            Form::Xml
        } else if is_foreign("") {
            return None;
        } else if has("[TOOL_CALLS]") {
            if has("[ARGS]") { Form::MistralArgs } else { Form::MistralList }
        } else if has("<tool_call>") {
            Form::Hermes
        } else if has("<TOOLCALL>") {
            Form::Nemotron
        } else if has("<|/tool_call|>") {
            Form::Phi
        } else if has("<|tool_call|>") {
            Form::GraniteList
        } else if has("\"parameters\": dictionary") {
            Form::Bare
        } else if has("tools") {
            Form::Hermes
        } else {
            return None;
        };
        let id = |marker: &str| tokenizer.token_to_id(marker);
        Some(Self {
            form,
            open_id: id(form.open()),
            close_id: form.close().and_then(id),
            args_id: id(ARGS).filter(|_| form == Form::MistralArgs),
            call_id: (form == Form::MistralArgs && has(CALL_ID)).then(|| (CALL_ID, id(CALL_ID))),
        })
    }

    /// The ids of the tokens that mark calls. A decoder must not skip them, although some are special.
    pub(crate) fn marker_ids(&self) -> impl Iterator<Item = u32> {
        [self.open_id, self.close_id, self.args_id, self.call_id.and_then(|(_, id)| id)].into_iter().flatten()
    }

    pub(super) fn open(&self) -> (&'static str, Option<u32>) {
        (self.form.open(), self.open_id)
    }

    pub(super) fn close(&self) -> Option<(&'static str, Option<u32>)> {
        self.form.close().map(|close| (close, self.close_id))
    }

    pub(super) fn args(&self) -> (&'static str, Option<u32>) {
        (ARGS, self.args_id)
    }

    /// The marker before the id of a call, if the template has one.
    pub(super) fn call_id(&self) -> Option<(&'static str, Option<u32>)> {
        self.call_id
    }
}

pub(super) const ARGS: &str = "[ARGS]";
pub(super) const CALL_ID: &str = "[CALL_ID]";

impl Form {
    pub(super) fn open(self) -> &'static str {
        match self {
            Self::Hermes | Self::Xml => "<tool_call>",
            Self::Bare => "<|python_tag|>",
            Self::MistralList | Self::MistralArgs => "[TOOL_CALLS]",
            Self::GraniteList | Self::Phi => "<|tool_call|>",
            Self::Nemotron => "<TOOLCALL>",
        }
    }

    pub(super) fn close(self) -> Option<&'static str> {
        match self {
            Self::Hermes | Self::Xml => Some("</tool_call>"),
            Self::Phi => Some("<|/tool_call|>"),
            Self::Nemotron => Some("</TOOLCALL>"),
            Self::Bare | Self::MistralList | Self::MistralArgs | Self::GraniteList => None,
        }
    }

    /// The key of the arguments.
    pub(super) fn arguments_key(self) -> &'static str {
        if self == Self::Bare { "parameters" } else { "arguments" }
    }
}

impl Form {
    /// Whether one marker precedes a list of all calls.
    pub(super) fn is_list(self) -> bool {
        matches!(self, Self::MistralList | Self::GraniteList | Self::Nemotron)
    }
}
