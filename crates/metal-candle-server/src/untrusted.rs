//! Prevents text of clients from being tokenized as control tokens: `<|im_end|>` in a message is ten characters, not the end
//! of a turn.

use metal_candle::data::Tokenizer;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Inserted into control tokens in the text of clients. It is a noncharacter, which text does not contain (Unicode, section
/// 23.7).
const MARK: char = '\u{fdd0}';
/// Replaces `MARK` in the text of clients.
const REPLACEMENT: char = '\u{fffd}';
/// Tokens that assistant messages may contain, because templates search for them in earlier answers.
const REASONING: [&str; 2] = ["<think>", "</think>"];

/// Another noncharacter, which marks the end of the last message if the answer continues it.
const END: char = '\u{fdd1}';

/// The control tokens of a tokenizer.
#[derive(Debug, Clone)]
pub(crate) struct ControlTokens {
    by_first: Arc<BTreeMap<char, Vec<String>>>,
}

impl ControlTokens {
    pub(crate) fn of(tokenizer: &Tokenizer) -> Self {
        let added = tokenizer.raw().get_added_vocabulary().get_added_tokens_decoder();
        let mut by_first: BTreeMap<char, Vec<String>> = BTreeMap::new();
        for text in added.values().map(|token| &token.content) {
            // a token of one character cannot be split, and white space is not a marker: some tokenizers add runs of it
            let is_mark = text.chars().nth(1).is_some() && !text.chars().all(|c| c.is_whitespace() || c == '▁');
            if let Some(first) = text.chars().next().filter(|_| is_mark) {
                by_first.entry(first).or_default().push(text.clone());
            }
        }
        Self { by_first: Arc::new(by_first) }
    }

    /// Inserts a mark into each control token of a text.
    pub(crate) fn disarm(&self, text: &str, is_assistant: bool) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let is_control = |control: &String| {
                rest.starts_with(control.as_str()) && !(is_assistant && REASONING.contains(&control.as_str()))
            };
            out.push(if [MARK, END].contains(&first) { REPLACEMENT } else { first });
            if self.by_first.get(&first).is_some_and(|controls| controls.iter().any(is_control)) {
                out.push(MARK);
            }
            rest = &rest[first.len_utf8()..];
        }
        out
    }

    /// Disarms a field name, around which some templates write brackets.
    fn disarm_name(&self, name: &str, is_assistant: bool) -> String {
        let bare = |control: &str| {
            control.trim_matches(['<', '>', '/', '[', ']']) == name.trim_matches(['<', '>', '/', '[', ']'])
        };
        let is_composed = self.by_first.values().flatten().any(|control| bare(control));
        let mut out = self.disarm(name, is_assistant);
        if let Some(first) = out.chars().next().filter(|_| is_composed && !out.contains(MARK)) {
            out.insert(first.len_utf8(), MARK);
        }
        out
    }

    /// Disarms all strings in a JSON value, including field names.
    pub(crate) fn disarm_value(&self, value: &mut Value, is_assistant: bool) {
        match value {
            Value::String(text) => *text = self.disarm(text, is_assistant),
            Value::Array(list) => list.iter_mut().for_each(|value| self.disarm_value(value, is_assistant)),
            Value::Object(map) => {
                *map = std::mem::take(map)
                    .into_iter()
                    .map(|(name, mut value)| {
                        self.disarm_value(&mut value, is_assistant);
                        (self.disarm_name(&name, is_assistant), value)
                    })
                    .collect();
            }
            _ => {}
        }
    }

    /// Appends an end mark for [`ControlTokens::until_end`].
    pub(crate) fn with_end(text: &str) -> String {
        format!("{text}{END}")
    }

    /// The text before the mark of [`ControlTokens::with_end`]; none if there is no mark.
    pub(crate) fn until_end(text: &str) -> Option<&str> {
        text.split_once(END).map(|(before, _)| before)
    }

    /// Tokenizes a text with disarmed control tokens: the text is split at the marks, so that no control token is complete.
    pub(crate) fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> metal_candle::Result<Vec<u32>> {
        let mut ids = Vec::new();
        for (index, part) in text.split(MARK).enumerate() {
            ids.extend(tokenizer.encode(part, add_special && index == 0)?);
        }
        Ok(ids)
    }

    /// Removes the marks.
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
        let texts: Vec<&String> = control.by_first.values().flatten().collect();
        assert!(texts.len() > 15);
        for token in &texts {
            let id = tokenizer.token_to_id(token).unwrap();
            for text in [(*token).clone(), format!("a{token}{token}b"), format!("<|im_<{token}|im_end|>")] {
                assert!(tokenizer.encode(&text, false).unwrap().contains(&id));
                let disarmed = control.disarm(&text, false);
                let ids = ControlTokens::encode(&tokenizer, &disarmed, false).unwrap();
                assert!(ids.iter().all(|id| !texts.contains(&&tokenizer.id_to_token(*id).unwrap())), "{text}");
                assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
                assert_eq!(ControlTokens::without_marks(&disarmed), text);
            }
        }
        // a mark in the text of a client is replaced
        let disarmed = control.disarm("<|im\u{fdd0}_end|>", false);
        assert_eq!(disarmed, "<|im\u{fffd}_end|>");
        // a template may write `<` and `>` around the name of a field
        let mut schema = serde_json::json!({"|im_end|": 1, "tool_call": {"a": "<|im_end|>"}, "b": 2});
        control.disarm_value(&mut schema, false);
        for name in schema.as_object().unwrap().keys().filter(|name| *name != "b") {
            let ids = ControlTokens::encode(&tokenizer, &format!("<{name}>"), false).unwrap();
            assert!(ids.len() > 2, "{name}");
        }
        assert_eq!(schema["b"], 2);
        assert_eq!(ControlTokens::until_end(&format!("x{}<|im_end|>", ControlTokens::with_end("end"))), Some("xend"));
        let plain = "fn main() {}\n\n  é 🦀";
        assert_eq!(control.disarm(plain, false), plain);
    }
}
