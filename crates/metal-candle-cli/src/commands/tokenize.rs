//! `tokenize` and `detokenize`: convert text to token ids and back.

use crate::error::UserError;
use crate::input::{self, MAX_INPUT_BYTES};
use crate::model_source::ModelSource;
use crate::output::Output;
use anyhow::Result;
use clap::{ArgAction, Args};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Flags of `tokenize`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TokenizeArguments {
    /// The text; `-` or no text reads standard input, without its final line break.
    #[arg(allow_hyphen_values = true)]
    pub(crate) text: Option<String>,

    /// Read the text from this file, unchanged.
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    pub(crate) file: Option<PathBuf>,

    /// Use the tokenizer of this model: a folder, `nano`, or a Hub name.
    #[arg(long, default_value = "nano")]
    pub(crate) model: String,

    /// Add the tokenizer's special tokens around the text, such as a BOS token.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true,
        default_missing_value = "true", action = ArgAction::Set)]
    pub(crate) add_special_tokens: bool,
}

/// Flags of `detokenize`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DetokenizeArguments {
    /// Token ids, separated by commas or spaces, or a JSON list; without ids, standard input is read.
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<String>,

    /// Read the ids from this file.
    #[arg(long, value_name = "FILE", conflicts_with = "ids")]
    pub(crate) file: Option<PathBuf>,

    /// Use the tokenizer of this model: a folder, `nano`, or a Hub name.
    #[arg(long, default_value = "nano")]
    pub(crate) model: String,

    /// Omit special tokens from the text.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false,
        default_missing_value = "true", action = ArgAction::Set)]
    pub(crate) skip_special_tokens: bool,
}

pub(crate) fn run(flags: &TokenizeArguments, output: Output) -> Result<()> {
    let text = match (&flags.text, &flags.file) {
        (_, Some(path)) => input::read_text(path, MAX_INPUT_BYTES)?,
        (Some(text), None) if text != "-" => text.clone(),
        _ => input::without_line_end(input::read_text(Path::new("-"), MAX_INPUT_BYTES)?),
    };
    let tokenizer = ModelSource::find(&flags.model, output)?.tokenizer()?;
    let ids = tokenizer.encode(&text, flags.add_special_tokens)?;
    if output.json {
        let tokens: Vec<_> = ids.iter().map(|&id| tokenizer.id_to_token(id)).collect();
        Output::print_json(&json!({ "ids": ids, "tokens": tokens }))?;
    } else {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        Output::print(ids.join(" ") + "\n")?;
    }
    Ok(())
}

pub(crate) fn detokenize(flags: &DetokenizeArguments, output: Output) -> Result<()> {
    let text = match &flags.file {
        Some(path) => input::read_text(path, MAX_INPUT_BYTES)?,
        None if flags.ids.is_empty() => input::read_text(Path::new("-"), MAX_INPUT_BYTES)?,
        None => flags.ids.join(" "),
    };
    let ids = parse_ids(&text)?;
    let tokenizer = ModelSource::find(&flags.model, output)?.tokenizer()?;
    if let Some((index, id)) = ids.iter().enumerate().find(|(_, id)| tokenizer.id_to_token(**id).is_none()) {
        let message = format!("id {} of {}: the tokenizer has no token with id `{id}`", index + 1, ids.len());
        return Err(UserError::new(message).into());
    }
    let text = tokenizer.decode(&ids, flags.skip_special_tokens)?;
    if output.json {
        Output::print_json(&json!({ "text": text }))?;
    } else {
        Output::print(text + "\n")?;
    }
    Ok(())
}

/// Parses ids: a JSON list, the object that `tokenize --json` prints, or numbers separated by commas and spaces.
fn parse_ids(text: &str) -> Result<Vec<u32>> {
    let wrong = |found: &str| {
        let shown: String = found.chars().take(40).collect();
        UserError::new(format!("expected token ids, found `{}`", shown.escape_debug()))
    };
    let parsed = serde_json::from_str(text).ok();
    let list = match parsed {
        Some(Value::Object(mut map)) => map.remove("ids"),
        other => other,
    };
    if let Some(Value::Array(list)) = list {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        return list.iter().map(|value| id(value).ok_or_else(|| wrong(&value.to_string()).into())).collect();
    }
    let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
    words.map(|word| word.parse().map_err(|_| wrong(word).into())).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::parse_ids;

    #[test]
    fn ids_are_parsed_in_each_form() {
        for text in ["1,2,3", " 1 2\n3 ", "[1, 2, 3]", "{\"ids\": [1,2,3]}"] {
            assert_eq!(parse_ids(text).unwrap(), [1, 2, 3], "{text}");
        }
        assert_eq!(parse_ids("").unwrap(), [0_u32; 0]);
        for text in ["1,x", "[1, -2]", "{\"tokens\": []}", "4294967296"] {
            let error = parse_ids(text).unwrap_err().to_string();
            assert!(error.starts_with("expected token ids, found `"), "{text}: {error}");
        }
    }
}
