//! Reads the recommended sampling settings of `generation_config.json`. An invalid value is a note, never an error.

use crate::files::{JsonObject, describe};
use serde_json::Value;
use std::path::Path;

/// Recommended sampling settings of `generation_config.json`; `None` where it has no valid value.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct GenerationDefaults {
    /// Whether tokens are sampled (`true`) or the most likely one is used (`false`).
    pub do_sample: Option<bool>,
    /// Divisor of the logits.
    pub temperature: Option<f64>,
    /// The number of most likely tokens to sample from; 0 for all.
    pub top_k: Option<usize>,
    /// The cumulative probability of the tokens to sample from, 0 to 1.
    pub top_p: Option<f64>,
    /// The minimum probability of a token, relative to the most likely one.
    pub min_p: Option<f64>,
    /// Divisor of the logits of tokens that have occurred.
    pub repetition_penalty: Option<f64>,
}

/// The settings of a `generation_config.json`, and notes about invalid ones.
#[derive(Debug, Default, PartialEq)]
pub(super) struct GenerationConfigFile {
    pub defaults: GenerationDefaults,
    /// The ids of the end-of-sequence tokens, if the file has any valid ones.
    pub eos_token_ids: Option<Vec<u32>>,
    /// One line for each value that is ignored or converted, with file and key.
    pub notes: Vec<String>,
}

impl GenerationConfigFile {
    /// Reads the file `path`; returns the default if it does not exist. Ids of at least `vocab_size` are ignored.
    pub(super) fn read(path: &Path, vocab_size: usize) -> Self {
        if !path.exists() {
            return Self::default();
        }
        match JsonObject::read(path) {
            Ok(object) => Reader { object, vocab_size, notes: Vec::new() }.generation_config(),
            Err(error) => Self { notes: vec![format!("{error}; the file is ignored")], ..Self::default() },
        }
    }
}

struct Reader {
    object: JsonObject,
    vocab_size: usize,
    notes: Vec<String>,
}

impl Reader {
    fn generation_config(mut self) -> GenerationConfigFile {
        let defaults = GenerationDefaults {
            do_sample: self.flag("do_sample"),
            temperature: self.number("temperature", "a number of at least 0", |number| number >= 0.0),
            top_k: self
                .number("top_k", "a whole number of at least 0", |number| is_whole(number, 1e15))
                .map(|number| number as usize),
            top_p: self.number("top_p", "a number from 0 to 1", |number| number > 0.0 && number <= 1.0),
            min_p: self.number("min_p", "a number from 0 to 1", |number| (0.0..=1.0).contains(&number)),
            repetition_penalty: self.number("repetition_penalty", "a number above 0", |number| number > 0.0),
        };
        let eos_token_ids = self.token_ids("eos_token_id");
        GenerationConfigFile { defaults, eos_token_ids, notes: self.notes }
    }

    /// The number at `key`, which may be a string.
    fn number(&mut self, key: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Option<f64> {
        let value = self.object.get(key)?.clone();
        let number = number_of(&value).filter(|number| number.is_finite() && fits(*number));
        let is_plain = match &value {
            Value::Number(written) => key != "top_k" || !written.is_f64(),
            _ => false,
        };
        match number {
            Some(number) if !is_plain => self.note(key, expected, &value, &format!("{number} is used")),
            Some(_) => {}
            None => self.note(key, expected, &value, "it is ignored"),
        }
        number
    }

    fn flag(&mut self, key: &str) -> Option<bool> {
        let value = self.object.get(key)?.clone();
        if let Value::Bool(flag) = value {
            return Some(flag);
        }
        let flag = match &value {
            Value::String(text) if text.trim().eq_ignore_ascii_case("true") => Some(true),
            Value::String(text) if text.trim().eq_ignore_ascii_case("false") => Some(false),
            other => number_of(other).and_then(|number| match number {
                0.0 => Some(false),
                1.0 => Some(true),
                _ => None,
            }),
        };
        let used = flag.map_or_else(|| "it is ignored".to_string(), |flag| format!("`{flag}` is used"));
        self.note(key, "`true` or `false`", &value, &used);
        flag
    }

    /// The valid token ids at `key`; `None` if there are none.
    fn token_ids(&mut self, key: &str) -> Option<Vec<u32>> {
        let value = self.object.get(key)?.clone();
        let values = match &value {
            Value::Array(list) => list.clone(),
            other => vec![other.clone()],
        };
        let mut ids = Vec::new();
        let mut odd = None;
        for value in &values {
            let id = number_of(value).filter(|&number| is_whole(number, self.vocab_size as f64 - 1.0));
            ids.extend(id.map(|id| id as u32));
            if id.is_none() || !value.is_u64() {
                odd = odd.or(Some((value, id.is_some())));
            }
        }
        let expected = format!("token ids below the vocabulary size {}", self.vocab_size);
        if let Some((value, is_used)) = odd {
            let used = if is_used { "it is used as a whole number" } else { "it is ignored" };
            self.note(key, &expected, value, used);
        }
        ids.dedup();
        (!ids.is_empty()).then_some(ids)
    }

    fn note(&mut self, key: &str, expected: &str, found: &Value, used: &str) {
        let path = self.object.path().display();
        self.notes.push(format!("`{path}`: `{key}`: expected {expected}, found {}; {used}", describe(found)));
    }
}

/// The number in a value or in its string.
fn number_of(value: &Value) -> Option<f64> {
    match value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    }
}

fn is_whole(number: f64, most: f64) -> bool {
    number >= 0.0 && number <= most && number.fract() == 0.0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{GenerationConfigFile, GenerationDefaults};

    fn read(text: &str) -> GenerationConfigFile {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("generation_config.json");
        std::fs::write(&path, text).unwrap();
        GenerationConfigFile::read(&path, 100)
    }

    #[test]
    fn values_of_other_types_are_converted() {
        let generation_config = read(
            r#"{"top_k": 50.0, "temperature": "0.7", "do_sample": "True", "top_p": 1, "eos_token_id": [1, 2.0, "3"]}"#,
        );
        let expected = GenerationDefaults {
            do_sample: Some(true),
            temperature: Some(0.7),
            top_k: Some(50),
            top_p: Some(1.0),
            ..GenerationDefaults::default()
        };
        assert_eq!(generation_config.defaults, expected);
        assert_eq!(generation_config.eos_token_ids, Some(vec![1, 2, 3]));
        assert_eq!(generation_config.notes.len(), 4, "{:?}", generation_config.notes);
        assert!(
            generation_config.notes[1].contains("generation_config.json`: `temperature`: expected"),
            "{:?}",
            generation_config.notes
        );
        let plain = read(r#"{"top_k": 0, "temperature": 0.5, "do_sample": false, "eos_token_id": 99, "top_p": null}"#);
        assert_eq!((plain.notes.len(), plain.eos_token_ids), (0, Some(vec![99])));
    }

    #[test]
    fn invalid_values_are_ignored_with_a_note() {
        for (key, value) in [
            ("top_k", "-1"),
            ("top_k", "1.5"),
            ("top_k", "1e300"),
            ("top_k", "[50]"),
            ("temperature", "-0.1"),
            ("temperature", "\"warm\""),
            ("temperature", "\"nan\""),
            ("temperature", "{}"),
            ("top_p", "1.5"),
            ("top_p", "0"),
            ("min_p", "-1"),
            ("repetition_penalty", "0"),
            ("repetition_penalty", "true"),
            ("do_sample", "2"),
            ("do_sample", "[]"),
            ("eos_token_id", "-1"),
            ("eos_token_id", "100"),
            ("eos_token_id", "\"<|im_end|>\""),
            ("eos_token_id", "[[1]]"),
        ] {
            let generation_config = read(&format!("{{\"{key}\": {value}}}"));
            assert_eq!(generation_config.defaults, GenerationDefaults::default(), "{key} {value}");
            assert_eq!(generation_config.eos_token_ids, None, "{key} {value}");
            assert!(
                generation_config.notes.len() == 1 && generation_config.notes[0].contains(key),
                "{key} {value}: {:?}",
                generation_config.notes
            );
        }
        for text in ["", " ", "[]", "null", "{", "{\"temperature\": NaN}", "\u{feff}"] {
            let generation_config = read(text);
            assert_eq!(
                (generation_config.defaults, generation_config.notes.len()),
                (GenerationDefaults::default(), 1),
                "{text}"
            );
        }
        // the valid ids of a list are used
        assert_eq!(read(r#"{"eos_token_id": [5, -1, 7]}"#).eos_token_ids, Some(vec![5, 7]));
    }
}
