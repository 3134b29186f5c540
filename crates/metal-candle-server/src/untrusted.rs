//! Keeps text of clients from being read as control tokens: `<|im_end|>` in a message is nine characters, not the end of
//! a turn.

use metal_candle::data::Tokenizer;
use serde_json::Value;
use std::sync::Arc;

/// Put inside a control token that a client spelled. It is a noncharacter, which text does not hold (Unicode, section 23.7).
const MARK: char = '\u{fdd0}';
/// What takes the place of `MARK` in the text of clients.
const REPLACEMENT: char = '\u{fffd}';
/// Tokens that assistants' messages may hold: templates look for them in the text of earlier answers.
const REASONING: [&str; 2] = ["<think>", "</think>"];

/// The control tokens of a tokenizer.
#[derive(Debug, Clone)]
pub(crate) struct ControlTokens {
    /// Longest first.
    texts: Arc<Vec<String>>,
}

impl ControlTokens {
    pub(crate) fn of(tokenizer: &Tokenizer) -> Self {
        let added = tokenizer.raw().get_added_vocabulary().get_added_tokens_decoder();
        let texts = added.values().map(|token| token.content.clone());
        // a token of one character cannot be cut in two, and is no mark
        let mut texts: Vec<String> = texts.filter(|text| text.chars().nth(1).is_some()).collect();
        texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
        Self { texts: Arc::new(texts) }
    }

    /// The text with a mark inside each control token.
    pub(crate) fn disarm(&self, text: &str, is_assistant: bool) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let is_control = |control: &&String| {
                rest.starts_with(control.as_str()) && !(is_assistant && REASONING.contains(&control.as_str()))
            };
            out.push(if first == MARK { REPLACEMENT } else { first });
            if self.texts.iter().any(|control| is_control(&control)) {
                out.push(MARK);
            }
            rest = &rest[first.len_utf8()..];
        }
        out
    }

    /// Disarms all strings in a JSON value, names of fields included.
    pub(crate) fn disarm_value(&self, value: &mut Value, is_assistant: bool) {
        match value {
            Value::String(text) => *text = self.disarm(text, is_assistant),
            Value::Array(list) => list.iter_mut().for_each(|value| self.disarm_value(value, is_assistant)),
            Value::Object(map) => {
                *map = std::mem::take(map)
                    .into_iter()
                    .map(|(name, mut value)| {
                        self.disarm_value(&mut value, is_assistant);
                        (self.disarm(&name, is_assistant), value)
                    })
                    .collect();
            }
            _ => {}
        }
    }

    /// The tokens of a text that may hold disarmed control tokens: it is cut at the marks, so that none is whole.
    pub(crate) fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> metal_candle::Result<Vec<u32>> {
        let mut ids = Vec::new();
        for (index, part) in text.split(MARK).enumerate() {
            ids.extend(tokenizer.encode(part, add_special && index == 0)?);
        }
        Ok(ids)
    }

    /// The text without marks.
    pub(crate) fn without_marks(text: &str) -> String {
        text.replace(MARK, "")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn nano() -> Tokenizer {
        Tokenizer::from_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano")).unwrap()
    }

    #[test]
    fn control_tokens_in_text_are_text() {
        let tokenizer = nano();
        let control = ControlTokens::of(&tokenizer);
        assert!(control.texts.len() > 15);
        for token in control.texts.iter() {
            let id = tokenizer.token_to_id(token).unwrap();
            for text in [token.clone(), format!("a{token}{token}b"), format!("<|im_<{token}|im_end|>")] {
                assert!(tokenizer.encode(&text, false).unwrap().contains(&id));
                let disarmed = control.disarm(&text, false);
                let ids = ControlTokens::encode(&tokenizer, &disarmed, false).unwrap();
                assert!(ids.iter().all(|id| !control.texts.contains(&tokenizer.id_to_token(*id).unwrap())), "{text}");
                assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
                assert_eq!(ControlTokens::without_marks(&disarmed), text);
            }
        }
        // a mark in the text of a client is none
        let disarmed = control.disarm("<|im\u{fdd0}_end|>", false);
        assert_eq!(disarmed, "<|im\u{fffd}_end|>");
        let plain = "fn main() {}\n\n  é 🦀";
        assert_eq!(control.disarm(plain, false), plain);
    }
}
