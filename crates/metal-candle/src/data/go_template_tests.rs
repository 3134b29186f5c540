//! Tests of [`super::go_template`] and [`super::modelfile`] with a small interpreter of Go templates.

#![allow(clippy::unwrap_used)]

use super::go_template::GoTemplate;
use super::{ChatTemplate, Message, Tokenizer};
use serde_json::{Map, json};
use std::iter::Peekable;
use std::path::Path;
use std::vec::IntoIter;

/// Text, or the content of `{{ }}`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Action(String),
}

fn parts(source: &str) -> Vec<Part> {
    let (mut parts, mut rest) = (Vec::new(), source);
    while let Some((text, after)) = rest.split_once("{{") {
        let (action, after) = after.split_once("}}").unwrap();
        let (text, action) = match action.strip_prefix("- ") {
            Some(action) => (text.trim_end(), action),
            None => (text, action),
        };
        parts.push(Part::Text(text.to_string()));
        parts.push(Part::Action(action.trim().to_string()));
        rest = after;
    }
    parts.push(Part::Text(rest.to_string()));
    parts
}

/// The variables of actions.
struct Scope<'a> {
    system: &'a str,
    messages: &'a [Message],
    index: usize,
}

impl Scope<'_> {
    fn is_true(&self, condition: &str) -> bool {
        let role = self.messages.get(self.index).map_or("", Message::role);
        let is_last = self.index + 1 == self.messages.len();
        match condition {
            "true" => true,
            ".System" => !self.system.is_empty(),
            "eq .Role \"user\"" => role == "user",
            "eq .Role \"assistant\"" => role == "assistant",
            "not $last" => !is_last,
            "and $last (ne .Role \"assistant\")" => is_last && role != "assistant",
            "or (not $.System) (gt $i 1)" => self.system.is_empty() || self.index > 1,
            other => unreachable!("{other}"),
        }
    }

    /// Renders up to the `else` or `end` of the block, and returns it.
    fn block(&self, parts: &mut Peekable<IntoIter<Part>>, is_on: bool, out: &mut String) -> String {
        while let Some(part) = parts.next() {
            match part {
                Part::Text(text) => out.push_str(if is_on { &text } else { "" }),
                Part::Action(action) if action == "end" || action.starts_with("else") => return action,
                Part::Action(action) => self.action(&action, parts, is_on, out),
            }
        }
        String::new()
    }

    fn action(&self, action: &str, parts: &mut Peekable<IntoIter<Part>>, is_on: bool, out: &mut String) {
        if let Some(condition) = action.strip_prefix("if ") {
            let mut is_open = is_on;
            let mut condition = Some(condition.to_string());
            loop {
                let is_taken = is_open && condition.as_deref().is_none_or(|condition| self.is_true(condition));
                let end = self.block(parts, is_taken, out);
                is_open &= !is_taken;
                match end.strip_prefix("else") {
                    Some(rest) => condition = rest.strip_prefix(" if ").map(str::to_string),
                    None => return,
                }
            }
        }
        if action == "range $i, $_ := .Messages" {
            let body = parts.clone();
            for index in 0..self.messages.len() {
                Scope { index, ..*self }.block(&mut body.clone(), is_on, out);
            }
            self.block(parts, false, &mut String::new());
            return;
        }
        let text = match action {
            "$last := eq (len (slice $.Messages $i)) 1" => return,
            ".System" => self.system.to_string(),
            ".Content" => self.messages[self.index].text(),
            quoted => serde_json::from_str(quoted).unwrap(),
        };
        out.push_str(if is_on { &text } else { "" });
    }
}

fn run(source: &str, messages: &[Message]) -> String {
    let system = messages.iter().find(|message| message.role() == "system").map(Message::text).unwrap_or_default();
    let mut out = String::new();
    let mut parts = parts(source).into_iter().peekable();
    Scope { system: &system, messages, index: 0 }.block(&mut parts, true, &mut out);
    out
}

/// Converts a template, checks that both render the same conversations, and returns the Go template.
fn check(source: &str, has_system: bool) -> String {
    let template = ChatTemplate::new(source).unwrap().with_variable("bos_token", &"<s>".into());
    let made = GoTemplate::of(&template, Some("<s>")).unwrap();
    assert_eq!(made.has_system(), has_system);
    let go = made.source();
    for num_turns in 1..5 {
        for system in [false, true] {
            let mut messages = Vec::new();
            messages.extend((system && has_system).then(|| Message::system("Be {{ brief }}.")));
            for turn in 0..num_turns {
                messages.push(Message::user(format!("question {turn}\n\n\"}}")));
                messages.extend((turn + 1 < num_turns).then(|| Message::assistant(format!("answer {turn}"))));
            }
            let expected = template.render(&messages, None, true, &Map::new()).unwrap();
            assert_eq!(run(&go, &messages), expected.strip_prefix("<s>").unwrap_or(&expected), "{go}");
        }
    }
    go
}

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn turns_become_fixed_texts_around_messages() {
    let expected = "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}{{ end }}\n\
        {{- range $i, $_ := .Messages }}\n{{- $last := eq (len (slice $.Messages $i)) 1 }}\n\
        {{- if eq .Role \"user\" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n\
        {{ else if eq .Role \"assistant\" }}<|im_start|>assistant\n{{ .Content }}{{ if not $last }}<|im_end|>\n{{ end }}{{ end }}\n\
        {{- if and $last (ne .Role \"assistant\") }}<|im_start|>assistant\n{{ end }}\n{{- end }}";
    assert_eq!(check(CHATML, true), expected);
}

#[test]
fn a_default_system_message_is_the_else_branch() {
    let default = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}";
    let go = check(&format!("{{{{ bos_token }}}}{default}{CHATML}"), true);
    assert!(go.contains("{{ else }}<|im_start|>system\nYou help.<|im_end|>\n{{ end }}"), "{go}");
}

#[test]
fn a_system_message_may_be_part_of_the_first_question() {
    let joined = "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}\
        {% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}\
        {% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]{% set ns.system = '' %}\
        {% else %} {{ m.content }}</s>{% endif %}{% endfor %}";
    let go = check(joined, true);
    assert!(go.contains("{{ if or (not $.System) (gt $i 1) }}[INST] {{ end }}"), "{go}");
}

#[test]
fn other_forms_of_turns_are_found() {
    // no system messages, and text that is syntax of Go templates or Modelfiles
    let strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}\
        {{ '{{ \"\"\" }}' }}{% for m in messages %}{{ '{' + m.role + '}\\\\\n' + m.content + '\"\n' }}{% endfor %}{{ '{assistant}\\\\\n' }}";
    let go = check(strict, false);
    assert!(!go.contains("\"\"\""), "{go}");
    // the generation prompt differs from the header of earlier answers
    check(&CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"), true);
    // the last turn has another end
    check(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if loop.last %}\n{% else %};{% endif %}{% endfor %}[assistant]",
        true,
    );
}

#[test]
fn irregular_templates_are_refused() {
    let refusal = |source: &str| GoTemplate::of(&ChatTemplate::new(source).unwrap(), None).unwrap_err();
    assert!(refusal(&format!("{{{{ strftime_now('%d') }}}}{CHATML}")).contains("the date"));
    let last_system = "{% for m in messages %}{% if m.role != 'system' %}{% if loop.last and messages[0].role == 'system' %}\
        {{ messages[0].content }}{% endif %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}";
    let message = refusal(last_system);
    assert!(message.contains("a conversation with 2 questions and a system message"), "{message}");
    assert!(refusal("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}").contains("a message"));
    assert!(refusal("{{ raise_exception('never') }}").contains("never"));
}

#[test]
fn a_modelfile_names_the_file_the_template_stop_strings_and_sampling() {
    let tokenizer = Tokenizer::from_folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/nano")).unwrap();
    let template = Some(ChatTemplate::new(CHATML).unwrap());
    let sampling = json!({"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "other": 1});
    let file = tokenizer.clone().with_chat_template(template).modelfile("model.gguf", &sampling);
    assert_eq!(file.refused, None);
    assert!(file.text.starts_with("FROM ./model.gguf\n\n#"), "{}", file.text);
    let (_, rest) = file.text.split_once("\nTEMPLATE \"\"\"").unwrap();
    let (go, rest) = rest.split_once("\"\"\"\n\n").unwrap();
    assert_eq!(run(go, &[Message::user("a")]), "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
    let stops = "PARAMETER stop \"<|im_end|>\"\n";
    let expected = "PARAMETER temperature 0.7\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.05\n";
    assert!(rest.starts_with(stops) && rest.ends_with(expected), "{rest}");

    let file =
        tokenizer.clone().with_chat_template(None).modelfile("model.gguf", &json!({"do_sample": false, "top_k": 20}));
    assert_eq!(file.refused.as_deref(), Some("the model has no chat template"));
    assert!(
        !file.text.contains("\nTEMPLATE") && file.text.contains("# No TEMPLATE: the model has no chat template.\n")
    );
    assert!(file.text.ends_with("PARAMETER temperature 0\n"), "{}", file.text);
    let broken = ChatTemplate::new("{{ raise_exception('two\nlines') }}").unwrap();
    let file = tokenizer.with_chat_template(Some(broken)).modelfile("model.gguf", &json!(null));
    assert!(file.text.lines().all(|line| line.is_empty() || line.starts_with(['#', 'F', 'P'])), "{}", file.text);
}
