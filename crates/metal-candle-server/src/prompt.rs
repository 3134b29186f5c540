//! Reads prompts of text completion: texts, tokens, and texts with a gap to fill.

use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::sampling::token_id;
use crate::served::Served;
use serde_json::Value;

/// Maximum number of prompts in a request.
const MAX_PROMPTS: usize = 64;
/// Maximum number of tokens in a tokenized prompt.
const MAX_PROMPT_TOKENS: usize = 1 << 20;

/// A prompt of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TextPrompt {
    /// Text in which control tokens are active, because editors insert gap markers.
    Text(String),
    Tokens(Vec<u32>),
    /// The text before and after a gap.
    Gap {
        prefix: String,
        suffix: String,
    },
}

/// The prompts of a request, from `prompt` and `suffix`.
///
/// # Errors
/// A prompt is malformed, or the model cannot fill gaps.
pub(crate) fn prompts(fields: &Fields, served: &Served) -> Result<Vec<TextPrompt>, ApiError> {
    let wrong = |found: &Value| {
        let expected = "a string, a list of strings, a list of tokens, or a list of lists of tokens";
        Err(ApiError::field("prompt", format!("`prompt`: expected {expected}, found {}", describe(found))))
    };
    let suffix = fields.text("suffix")?;
    if suffix.is_some() && served.fim.is_none() {
        return Err(ApiError::unsupported("suffix", "`suffix`: the model has no fill-in-the-middle tokens"));
    }
    let of_text = |text: &str| match suffix {
        Some(suffix) => TextPrompt::Gap { prefix: text.to_owned(), suffix: suffix.to_owned() },
        None => TextPrompt::Text(text.to_owned()),
    };
    let prompts = match fields.get("prompt") {
        None => vec![of_text("")],
        Some(Value::String(text)) => vec![of_text(text)],
        Some(Value::Array(list)) if list.is_empty() => {
            return Err(ApiError::field("prompt", "`prompt`: expected at least one prompt, found an empty list"));
        }
        Some(Value::Array(list)) if list.iter().all(Value::is_number) => {
            vec![TextPrompt::Tokens(tokens(list, "prompt", served)?)]
        }
        Some(Value::Array(list)) if list.len() > MAX_PROMPTS => {
            let message = format!("`prompt`: expected at most {MAX_PROMPTS} prompts, found {}", list.len());
            return Err(ApiError::field("prompt", message));
        }
        Some(found @ Value::Array(list)) => {
            let mut prompts = Vec::with_capacity(list.len());
            for (index, value) in list.iter().enumerate() {
                prompts.push(match value {
                    Value::String(text) => of_text(text),
                    Value::Array(ids) if !ids.is_empty() => {
                        TextPrompt::Tokens(tokens(ids, &format!("prompt[{index}]"), served)?)
                    }
                    _ => return wrong(found),
                });
            }
            prompts
        }
        Some(found) => return wrong(found),
    };
    if suffix.is_some() && prompts.iter().any(|prompt| matches!(prompt, TextPrompt::Tokens(_))) {
        return Err(ApiError::unsupported("suffix", "`suffix` needs prompts that are text"));
    }
    Ok(prompts)
}

fn tokens(list: &[Value], path: &str, served: &Served) -> Result<Vec<u32>, ApiError> {
    if list.len() > MAX_PROMPT_TOKENS {
        return Err(ApiError::field(path, format!("`{path}`: expected at most {MAX_PROMPT_TOKENS} tokens")));
    }
    let one = |(index, value)| token_id(value, || format!("{path}[{index}]"), served);
    list.iter().enumerate().map(one).collect()
}

impl TextPrompt {
    /// The tokens of the prompt, at least one.
    ///
    /// # Errors
    /// The tokenizer fails, or the prompt is empty.
    pub(crate) fn encode(&self, served: &Served) -> Result<Vec<u32>, ApiError> {
        let ids = match self {
            Self::Tokens(ids) => ids.clone(),
            Self::Text(text) => {
                let ids = served.encode(text, true)?;
                // OpenAI treats an empty prompt as the start of a text
                let start = || served.tokenizer.bos_token().and_then(|token| served.tokenizer.token_to_id(token));
                if ids.is_empty() { start().or(served.tokenizer.eos_token_id()).into_iter().collect() } else { ids }
            }
            Self::Gap { prefix, suffix } => gap(served, &[], prefix, suffix)?,
        };
        if ids.is_empty() {
            return Err(ApiError::field("prompt", "`prompt`: expected at least one token, found none"));
        }
        Ok(ids)
    }

    /// The text, as `echo` returns it.
    pub(crate) fn text(&self, served: &Served) -> String {
        match self {
            Self::Text(text) | Self::Gap { prefix: text, .. } => text.clone(),
            Self::Tokens(ids) => served.tokenizer.decode(ids, false).unwrap_or_default(),
        }
    }
}

/// A fill-in-the-middle prompt for the text between `prefix` and `suffix`, after the tokens `before`.
///
/// # Errors
/// The model has no fill-in-the-middle tokens.
pub(crate) fn gap(served: &Served, before: &[u32], prefix: &str, suffix: &str) -> Result<Vec<u32>, ApiError> {
    let Some(fim) = served.fim else {
        return Err(ApiError::unsupported("suffix", "the model has no fill-in-the-middle tokens"));
    };
    let mut ids = before.to_vec();
    if let Some(bos) = served.tokenizer.encode("", true).ok().and_then(|ids| ids.first().copied()) {
        ids.insert(0, bos);
    }
    ids.push(fim.prefix);
    ids.extend(served.encode_text(prefix)?);
    ids.push(fim.suffix);
    ids.extend(served.encode_text(suffix)?);
    ids.push(fim.middle);
    Ok(ids)
}
