//! Finds the token that ends an assistant's turn by rendering the chat template.

use super::{ChatTemplate, Message, Tokenizer};
use serde_json::Map;

/// The text of a turn, which no template contains.
const PROBE: &str = "\u{E0F7}0\u{E0F8}";
/// The text of a question.
const QUESTION: &str = "\u{E0F7}1\u{E0F8}";

impl Tokenizer {
    /// The special token that the chat template writes after an assistant's text; `None` if there is no template, or if it
    /// ends turns with plain text.
    ///
    /// A model that was trained on the template ends its answers with this token, even if `eos_token_id` in its `config.json`
    /// differs.
    pub fn end_of_turn_id(&self) -> Option<u32> {
        let end = turn_end(self.chat_template()?, &self.special_tokens());
        self.token_to_id(&end.last.or(end.middle).or(end.header)?)
    }
}

/// The special tokens that end a turn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TurnEnd {
    /// After the last answer.
    pub last: Option<String>,
    /// After an answer before other messages, if it differs.
    pub middle: Option<String>,
    /// The first token of the next message, if there is no token after an answer.
    pub header: Option<String>,
}

/// Finds the end-of-turn tokens of a template: the last special token that it writes after an answer in both cases, with and
/// without a following message, else the first token in each case. `special_tokens` are sorted by descending length.
pub(super) fn turn_end(template: &ChatTemplate, special_tokens: &[String]) -> TurnEnd {
    let turn = [Message::user(QUESTION), Message::assistant(PROBE)];
    let next = [Message::user(QUESTION)];
    let around = |messages: &[Message]| {
        let text = template.render(messages, None, false, &Map::new()).ok()?;
        text.rsplit_once(PROBE).map(|(before, after)| (before.to_string(), after.to_string()))
    };
    let system = [Message::system("a")];
    let found = [&[][..], &system[..]].into_iter().find_map(|before| {
        let (header, last) = around(&[before, &turn[..]].concat())?;
        let middle = around(&[before, &turn[..], &next[..]].concat()).map_or_else(|| last.clone(), |(_, after)| after);
        let (last_tokens, middle_tokens) = (tokens_in(&last, special_tokens), tokens_in(&middle, special_tokens));
        // some templates always write the header of an answer, which starts like the header of other messages
        let is_end = |&(at, token): &(usize, &str)| {
            let rest = &last[at + token.len()..];
            let next = tokens_in(rest, special_tokens).first().map_or(rest.len(), |(at, token)| at + token.len());
            rest[..next].trim().is_empty() || !header.contains(&last[at..at + token.len() + next])
        };
        let same = last_tokens.iter().zip(&middle_tokens).take_while(|(a, b)| a == b);
        let mut same: Vec<(usize, &str)> = same.map(|(token, _)| *token).collect();
        if same.len() > 1 && same.last().is_some_and(|token| !is_end(token)) {
            same.pop();
        }
        let text = |token: Option<(usize, &str)>| token.map(|(_, token)| token.to_string());
        let end = match text(same.last().copied()) {
            Some(token) => TurnEnd { last: Some(token), ..TurnEnd::default() },
            None if last_tokens.is_empty() => {
                // tokens that also occur before the first question are its header
                let part = |text: &str| tokens_in(text.split(QUESTION).next().unwrap_or_default(), special_tokens);
                let (first, between) = (part(&header), part(&middle));
                let same = first.iter().rev().zip(between.iter().rev()).take_while(|((_, a), (_, b))| a == b).count();
                match text(between[..between.len() - same].last().copied()) {
                    None => TurnEnd { header: text(middle_tokens.first().copied()), ..TurnEnd::default() },
                    middle => TurnEnd { middle, ..TurnEnd::default() },
                }
            }
            None => {
                let (last, middle) = (text(last_tokens.first().copied()), text(middle_tokens.first().copied()));
                TurnEnd { last, middle, header: None }
            }
        };
        Some(end).filter(|end| *end != TurnEnd::default())
    });
    found.unwrap_or_default()
}

/// The special tokens in a text and their offsets.
pub(super) fn tokens_in<'t>(text: &str, special_tokens: &'t [String]) -> Vec<(usize, &'t str)> {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        let token = special_tokens.iter().find(|token| rest.starts_with(token.as_str()));
        found.extend(token.map(|token| (at, token.as_str())));
        at += token.map_or_else(|| rest.chars().next().map_or(1, char::len_utf8), String::len);
    }
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::data::{ChatTemplate, Tokenizer};
    use std::path::Path;

    fn end_of(template: &str) -> Option<String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/nano");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let template = ChatTemplate::new(template).unwrap().with_variable("eos_token", &"<|endoftext|>".into());
        let tokenizer = tokenizer.with_chat_template(Some(template));
        tokenizer.end_of_turn_id().map(|id| tokenizer.id_to_token(id).unwrap())
    }

    #[test]
    fn the_end_is_the_first_special_token_after_the_text() {
        let turns = |turn: &str| format!("{{% for m in messages %}}{turn}{{% endfor %}}");
        let chatml = turns("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n");
        assert_eq!(end_of(&chatml).as_deref(), Some("<|im_end|>"));
        assert_eq!(end_of(&turns("{{ m.content }} {{ eos_token }}")).as_deref(), Some("<|endoftext|>"));
        // only the next header ends the turn
        assert_eq!(end_of(&turns("<|im_start|>{{ m.role }}\n{{ m.content }}\n")).as_deref(), Some("<|im_start|>"));
        // the template refuses a conversation without a system message
        let strict =
            format!("{{% if messages[0].role != 'system' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{chatml}");
        assert_eq!(end_of(&strict).as_deref(), Some("<|im_end|>"));
        assert_eq!(end_of(&turns("{{ m.role }}: {{ m.content }}\n")), None);
        // the last turn has no end token
        let open =
            "{% for m in messages %}<|im_start|>{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}";
        assert_eq!(end_of(open).as_deref(), Some("<|im_end|>"));
        // several tokens end each turn, and another token ends the conversation
        let several = turns("{{ m.role }}: {{ m.content }}<|endoftext|><|im_end|>\n") + "<|im_start|>";
        assert_eq!(end_of(&several).as_deref(), Some("<|im_end|>"));
        // the header of an answer is always written
        let open = chatml.clone() + "<|im_start|>assistant\n";
        assert_eq!(end_of(&open).as_deref(), Some("<|im_end|>"));
    }
}
