//! The token that ends an assistant's turn, read off what the chat template writes.

use super::{Message, Tokenizer};
use serde_json::Map;

/// Text of a turn that no template writes by itself.
const PROBE: &str = "\u{E0F7}0\u{E0F8}";

impl Tokenizer {
    /// The special token that the chat template writes after an assistant's text; `None` if there is no template, or the
    /// template ends the turn by plain text.
    ///
    /// A model that was trained on the template ends its answers with this token, whatever `eos_token_id` its
    /// `config.json` names.
    pub fn end_of_turn_id(&self) -> Option<u32> {
        let template = self.chat_template()?;
        let turn = || vec![Message::user("a"), Message::assistant(PROBE)];
        // a template that writes nothing after the last turn ends it by the header of the next one
        let with_next = || [turn(), vec![Message::user("a")]].concat();
        let with_system = |turns: Vec<Message>| [vec![Message::system("a")], turns].concat();
        let conversations = [turn(), with_system(turn()), with_next(), with_system(with_next())];
        conversations.iter().find_map(|messages| {
            let text = template.render(messages, None, false, &Map::new()).ok()?;
            let (_, after) = text.rsplit_once(PROBE)?;
            self.first_special_token(after)
        })
    }

    fn first_special_token(&self, text: &str) -> Option<u32> {
        let ids = self.encode(text, false).ok()?;
        ids.into_iter().find(|&id| self.is_special(id))
    }
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
        // nothing but the next header ends the turn
        assert_eq!(end_of(&turns("<|im_start|>{{ m.role }}\n{{ m.content }}\n")).as_deref(), Some("<|im_start|>"));
        // the template refuses a conversation without a system message
        let strict =
            format!("{{% if messages[0].role != 'system' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{chatml}");
        assert_eq!(end_of(&strict).as_deref(), Some("<|im_end|>"));
        assert_eq!(end_of(&turns("{{ m.role }}: {{ m.content }}\n")), None);
    }
}
