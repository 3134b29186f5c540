//! Tests that parse the calls that chat templates render.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::syntax::Form;
use super::*;
use crate::grammar::walks::{COMPILER, END_IDS, TOKENIZER, VOCAB_SIZE, text, walk};
use crate::grammar::{Grammar, GrammarMask};
use metal_candle::data::Message;
use metal_candle::inference::{AllowedTokens, TokenMask as _};
use serde_json::{Map, Value, json};

const PLACE: &str = r#"{"city": "Zürich \"old\" </x>", "days": 2, "tags": ["a", {"b": null}]}"#;
const LATER: &str = r#"{"city": "", "days": 3}"#;

/// The renderings of published templates for a text and one or two calls, without the end of the turn. The first text is a
/// part of the template that identifies its form.
fn rendered() -> Vec<(&'static str, Form, String, usize)> {
    let hermes = |arguments: &str| {
        format!("<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {arguments}}}\n</tool_call>")
    };
    let pair = |arguments: &str| format!("{{\"name\": \"get_weather\", \"arguments\": {arguments}}}");
    let with_id =
        |arguments: &str, id| format!("{{\"name\": \"get_weather\", \"arguments\": {arguments}, \"id\": \"{id}\"}}");
    let xml = |city: &str, days: &str, tags: &str| {
        let tags = if tags.is_empty() { String::new() } else { format!("<parameter=tags>\n{tags}\n</parameter>\n") };
        format!(
            "<tool_call>\n<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n<parameter=days>\n{days}\n</parameter>\n{tags}</function>\n</tool_call>"
        )
    };
    let tags = "[\"a\", {\"b\": null}]";
    vec![
        // Qwen 2.5, Qwen 3, QwQ, Hermes 2 and 3, Granite 4, Bielik, MiMo
        ("<tool_call>", Form::Hermes, format!("Let me look.\n{}\n{}", hermes(PLACE), hermes(LATER)), 2),
        // Qwen3-Coder, Qwen 3.5, Nemotron 3
        (
            "<tool_call>\n<function=a>\n<parameter=b>",
            Form::Xml,
            format!("Let me look.\n\n{}\n{}", xml("Zürich \"old\" </x>", "2", tags), xml("", "3", "")),
            2,
        ),
        // Llama 3.1, 3.2, 3.3
        (
            "{\"name\": function name, \"parameters\": dictionary of argument name and its value}",
            Form::Bare,
            format!("{{\"name\": \"get_weather\", \"parameters\": {PLACE}}}"),
            1,
        ),
        // Mistral Nemo
        (
            "[TOOL_CALLS]",
            Form::MistralList,
            format!("[TOOL_CALLS][{}, {}]", with_id(PLACE, "abcdefgh1"), with_id(LATER, "abcdefgh2")),
            2,
        ),
        // Mistral Small 3.2
        (
            "[TOOL_CALLS] [CALL_ID] [ARGS]",
            Form::MistralArgs,
            format!(
                "[TOOL_CALLS]get_weather[CALL_ID]abcdefgh1[ARGS]{PLACE}[TOOL_CALLS]get_weather[CALL_ID]abcdefgh2[ARGS]{LATER}"
            ),
            2,
        ),
        // Devstral, Ministral 3
        (
            "[TOOL_CALLS] [ARGS]",
            Form::MistralArgs,
            format!("Let me look.[TOOL_CALLS]get_weather[ARGS]{PLACE}[TOOL_CALLS]get_weather[ARGS]{LATER}"),
            2,
        ),
        // Granite 3.3
        (
            "<|tool_call|> followed by a JSON list",
            Form::GraniteList,
            format!("<|tool_call|>[{}, {}]", pair(PLACE), pair(LATER)),
            2,
        ),
        // Phi-4 mini
        (
            "<|tool_call|><|/tool_call|>",
            Form::Phi,
            format!("Let me look.<|tool_call|>{}<|/tool_call|><|tool_call|>{}<|/tool_call|>", pair(PLACE), pair(LATER)),
            2,
        ),
        // Nemotron Nano 2
        (
            "<TOOLCALL>",
            Form::Nemotron,
            format!("Let me look.\n<TOOLCALL>[{}, {}]</TOOLCALL>", pair(PLACE), pair(LATER)),
            2,
        ),
    ]
}

fn tools() -> ToolRequest {
    let parameters = json!({"type": "object", "required": ["city", "days"], "additionalProperties": false, "properties": {
        "city": {"type": "string"}, "days": {"type": "integer", "minimum": 0, "maximum": 40},
        "tags": {"type": "array", "items": {"enum": ["a", "b", {"b": null}]}, "maxItems": 2}}});
    let tool = |name: &str, parameters: &Value| json!({"type": "function", "function": {"name": name, "description": "d", "parameters": parameters, "strict": true}});
    let body = json!({"tools": [tool("get_weather", &parameters), tool("get_time", &json!({"type": "object", "properties": {},
        "additionalProperties": false}))]});
    ToolRequest::from_request(&crate::fields::Fields::of_body(&body).unwrap()).unwrap().unwrap()
}

/// An answer in parts: reasoning, content, and the calls by name and arguments.
type Answer = (String, String, Vec<(String, String)>);

fn answer(deltas: Vec<Delta>) -> Answer {
    let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::new());
    for delta in deltas {
        match delta {
            Delta::Reasoning(text) => reasoning += &text,
            Delta::Content(text) => content += &text,
            Delta::CallStart { index, id, name } => {
                assert_eq!(index, calls.len());
                assert!(id.len() == 29 && id.starts_with("call_"), "{id}");
                calls.push((name, String::new()));
            }
            Delta::Arguments { index, text } => calls[index].1 += &text,
        }
    }
    (reasoning, content, calls)
}

fn parse(parser: &ToolParser, pieces: &[&str], cut: bool) -> Answer {
    let mut parser = parser.clone();
    let mut deltas: Vec<Delta> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    deltas.extend(parser.finish(cut));
    answer(deltas)
}

/// The parts of an answer, after checking that they do not depend on how the text is split.
fn parse_all_splits(parser: &ToolParser, text: &str, cut: bool) -> Answer {
    let whole = parse(parser, &[text], cut);
    for at in (1..text.len()).filter(|&at| text.is_char_boundary(at)) {
        assert_eq!(parse(parser, &[&text[..at], &text[at..]], cut), whole, "{text:?} at {at}");
    }
    let characters: Vec<String> = text.chars().map(String::from).collect();
    let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
    assert_eq!(parse(parser, &characters, cut), whole, "{text:?}");
    whole
}

fn parser(template: &str) -> (ToolParser, Form) {
    let syntax = ToolSyntax::of(template, &TOKENIZER).unwrap();
    (ToolParser::new(Some(&syntax), None, "", &tools().tools, true), syntax.form)
}

fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn calls_of_published_templates_are_parsed() {
    for (template, form, text, count) in rendered() {
        let (parser, found) = parser(template);
        assert_eq!(found, form);
        let (_, content, calls) = parse_all_splits(&parser, &text, false);
        assert_eq!(content, if text.starts_with("Let") { "Let me look." } else { "" }, "{text}");
        let expected = [PLACE, LATER];
        assert_eq!(calls.len(), count, "{text}");
        for ((name, arguments), expected) in calls.iter().zip(expected) {
            assert_eq!((name.as_str(), value(arguments)), ("get_weather", value(expected)), "{text}");
            assert!(form == Form::Xml || arguments == expected, "{arguments}");
        }
    }
}

#[test]
fn calls_of_the_built_in_template_are_parsed() {
    let template = TOKENIZER.chat_template().unwrap();
    let request = tools();
    let call = json!({"type": "function", "function": {"name": "get_weather", "arguments": value(PLACE)}});
    let user = Message::user("Weather?");
    let answer = Message::assistant("Let me look.").with("tool_calls", vec![call]);
    let render = |messages: &[Message], prompt: bool| {
        template.render(messages, request.template_tools().as_deref(), prompt, &Map::new()).unwrap()
    };
    let prompt = render(std::slice::from_ref(&user), true);
    let whole = render(&[user, answer], false);
    let written = whole.strip_prefix(&prompt).unwrap().strip_suffix("<|im_end|>\n").unwrap();
    let (parser, form) = parser(&template.sources()[0].1);
    assert_eq!(form, Form::Hermes);
    let (_, content, calls) = parse_all_splits(&parser, written, false);
    assert_eq!((content.as_str(), calls.len(), value(&calls[0].1)), ("Let me look.", 1, value(PLACE)));
}

#[test]
fn a_truncated_call_is_content() {
    for (template, _, text, _) in rendered() {
        let (parser, _) = parser(template);
        for at in (0..text.len()).filter(|&at| text.is_char_boundary(at)) {
            let (_, content, calls) = parse(&parser, &[&text[..at]], true);
            // text other than calls is content, except white space around calls and at the end
            let mut joined = content.clone();
            if calls.is_empty() {
                assert_eq!(joined, &text[..at]);
            } else {
                joined.retain(|c| !c.is_whitespace());
                let rest = text[..at].replace(char::is_whitespace, "");
                assert!(
                    rest.ends_with(joined.strip_prefix("Letmelook.").unwrap_or(&joined)),
                    "{text:?} at {at}: {content:?}"
                );
            }
        }
    }
}

#[test]
fn text_other_than_calls_is_content() {
    let hermes = "<tool_call>";
    for (template, text) in [
        (hermes, "a < b <tool_ca"),
        (hermes, "<tool_call> is a marker"),
        (hermes, "<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": }}\n</tool_call> b"),
        (hermes, "<tool_call>\n{\"arguments\": {}}\n</tool_call>"),
        (hermes, "<tool_call>{\"name\": \"a\", \"arguments\": []}</tool_call>"),
        (hermes, "<tool_call>{\"name\": \"a\", \"arguments\": {}}} </tool_call>"),
        (hermes, "  blanks \n"),
        ("[TOOL_CALLS][ARGS]", "[TOOL_CALLS] a b {"),
        ("[TOOL_CALLS][ARGS]", "[TOOL_CALLS][ARGS]{}"),
        ("[TOOL_CALLS][ARGS]", "[TOOL_CALLS]a[ARGS]b"),
        ("\"parameters\": dictionary", "{\"name\": \"Bob\", \"age\": 3} and {\"name\": \"get_time\"}"),
        ("\"parameters\": dictionary", "See {\"name\": \"get_time\", \"parameters\": {}}"),
        ("\"parameters\": dictionary", "<|python_tag|>print(1)"),
        ("<tool_call><function=<parameter=", "<tool_call>\n<function=a>\nb\n</function>\n</tool_call> c"),
        ("<tool_call><function=<parameter=", "<tool_call>\n{\"name\": \"a\"}\n</tool_call>"),
    ] {
        let (_, content, calls) = parse_all_splits(&parser(template).0, text, false);
        assert_eq!((content.as_str(), calls.len()), (text, 0));
    }
}

#[test]
fn unusual_calls_are_parsed() {
    let call = |name: &str, arguments: &str| (name.to_string(), arguments.to_string());
    for (template, text, content, expected) in [
        // the end of the answer closes a call
        ("<tool_call>", "<tool_call>{\"name\": \"a\", \"arguments\": {}}", "", vec![call("a", "{}")]),
        ("<tool_call>", "<tool_call>{\"name\": \"a\"}</tool_call> then", " then", vec![call("a", "{}")]),
        // markers inside strings
        (
            "<tool_call>",
            "<tool_call>{\"arguments\": {\"x\": \"</tool_call>\"}, \"name\": \"a\"}</tool_call>",
            "",
            vec![call("a", "{\"x\": \"</tool_call>\"}")],
        ),
        ("<tool_call>", "<tool_call> <tool_call>{\"name\": \"a\"}</tool_call>", "<tool_call>", vec![call("a", "{}")]),
        (
            "<tool_call>",
            "<tool_call>{\"name\":\"a\",\"arguments\":\"{\\\"b\\\":1}\"}</tool_call>",
            "",
            vec![call("a", "{\"b\":1}")],
        ),
        (
            "\"parameters\": dictionary",
            "<|python_tag|>{\"name\": \"x\", \"parameters\": {}}; {\"name\": \"get_time\", \"parameters\": {}}",
            "",
            vec![call("x", "{}"), call("get_time", "{}")],
        ),
        (
            "<tool_call><function=<parameter=",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\na\n</parameter>\n</tool_call>\n</parameter>\n<parameter=days>\n12\n</parameter>\n<parameter=u>\nTrue\n</parameter>\n</function>\n</tool_call>",
            "",
            vec![call("get_weather", "{\"city\":\"a\\n</parameter>\\n</tool_call>\",\"days\":12,\"u\":true}")],
        ),
    ] {
        let (_, found, calls) = parse_all_splits(&parser(template).0, text, false);
        assert_eq!((found.as_str(), calls), (content, expected), "{text}");
    }
}

#[test]
fn reasoning_comes_first() {
    let template = "<think></think><tool_call>";
    let (syntax, reasoning) =
        (ToolSyntax::of(template, &TOKENIZER).unwrap(), Reasoning::of(template, &TOKENIZER).unwrap());
    let text = "why <tool_call>\n</think>\n\nyes\n<tool_call>{\"name\": \"a\"}</tool_call>\n<tool_call>{\"name\": \"b\"}</tool_call>";
    for (prompt, text) in [("<think>\n", text.to_string()), ("", format!("<think>\n{text}"))] {
        for parallel in [true, false] {
            let parser = ToolParser::new(Some(&syntax), Some(&reasoning), prompt, &tools().tools, parallel);
            let (reasoning, content, calls) = parse_all_splits(&parser, &text, false);
            assert_eq!((reasoning.as_str(), content.as_str()), ("why <tool_call>", "yes"));
            assert_eq!(calls.len(), if parallel { 2 } else { 1 });
        }
    }
    let mut parser = ToolParser::new(None, Some(&reasoning), "", &[], true);
    assert_eq!(answer(parser.push("<tool_call>{}")), (String::new(), "<tool_call>{}".into(), vec![]));
    assert!(!parser.has_calls() && !parser.is_done());
}

#[test]
fn templates_without_a_known_form_have_no_tools() {
    for template in [
        "{{ messages }}",
        "{{ tools }} <|tool_call_begin|>",
        "<tool_call>{name}\n<arg_key>",
        "<function=x>{}</function>",
    ] {
        assert!(ToolSyntax::of(template, &TOKENIZER).is_none(), "{template}");
    }
    assert_eq!(ToolSyntax::of("{{ tools | tojson }}", &TOKENIZER).unwrap().form, Form::Hermes);
    let hermes = ToolSyntax::of("<tool_call>", &TOKENIZER).unwrap();
    assert_eq!(hermes.marker_ids().collect::<Vec<_>>(), [4088, 4089]);
}

#[test]
fn constrained_answers_are_valid_calls() {
    let mut request = tools();
    let validator = jsonschema::validator_for(&request.tools[0].parameters).unwrap();
    let thinking = Reasoning::of("<think></think>", &TOKENIZER).unwrap();
    let mut finished = 0;
    for (template, form, _, _) in rendered() {
        let syntax = ToolSyntax::of(template, &TOKENIZER).unwrap();
        for (seed, is_open) in (0..8).map(|seed| (seed, seed == 7)) {
            request.choice = ToolChoice::Required;
            request.parallel = seed < 4;
            let reasoning = Some((&thinking, is_open));
            let grammar = tools_grammar(&syntax, &request, reasoning, None).unwrap().unwrap();
            let mut mask = COMPILER.compile(&grammar).unwrap_or_else(|error| panic!("{error}: {grammar:?}"));
            let (ids, is_finished) = walk(&mut mask, seed, 300, &[4088, 4089]);
            let written = text(&ids);
            let prompt = if is_open { "<think>\n" } else { "" };
            let mut parser = ToolParser::new(Some(&syntax), Some(&thinking), prompt, &request.tools, true);
            let mut deltas = parser.push(&written);
            deltas.extend(parser.finish(!is_finished));
            let (_, content, calls) = answer(deltas);
            if is_finished {
                finished += 1;
                assert!(content.is_empty() && !calls.is_empty(), "{form:?}: {written:?}");
                assert!(request.parallel || calls.len() == 1, "{written:?}");
            }
            for (name, arguments) in calls {
                assert!(name == "get_time" || validator.is_valid(&value(&arguments)), "{form:?}: {written:?}");
            }
        }
    }
    assert!(finished > 20, "{finished}");
    // a call, or an answer in the requested format
    request.choice = ToolChoice::Auto;
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]});
    let forms = [
        Grammar::JsonSchema(schema),
        Grammar::Regex("a/b|\\/\n".into()),
        Grammar::Lark("start: tool \"-\" tool\ntool: \"x\" | \"y\"".into()),
        Grammar::Gbnf("root ::= nested\nnested ::= \"(\" nested \")\" | \"1\"".into()),
    ];
    let (mut calls, mut answers) = (0, 0);
    let all = rendered();
    for (number, seed) in (0..8 * all.len()).map(|index| (index / 8, index as u64 % 8)) {
        let (template, form, ..) = &all[number];
        let grammar = &forms[seed as usize % forms.len()];
        let syntax = ToolSyntax::of(template, &TOKENIZER).unwrap();
        let grammar = tools_grammar(&syntax, &request, None, Some(grammar)).unwrap().unwrap();
        let mut mask = COMPILER.compile(&grammar).unwrap_or_else(|error| panic!("{error}: {grammar:?}"));
        let (ids, is_finished) = walk(&mut mask, seed, 300, &[4088, 4089]);
        let written = text(&ids);
        let mut parser = ToolParser::new(Some(&syntax), None, "", &request.tools, true);
        let mut deltas = parser.push(&written);
        deltas.extend(parser.finish(!is_finished));
        let (_, content, found) = answer(deltas);
        calls += found.len();
        if is_finished && found.is_empty() {
            answers += 1;
            let is_right = match seed as usize % forms.len() {
                0 => value(&content)["n"].is_number(),
                1 => ["a/b", "/\n"].contains(&&*written),
                2 => ["x-x", "x-y", "y-x", "y-y"].contains(&&*written),
                _ => {
                    written.trim_matches(['(', ')']) == "1"
                        && written.matches('(').count() == written.matches(')').count()
                }
            };
            assert!(is_right, "{form:?}: {written:?}");
        }
    }
    assert!(calls > 5 && answers > 5, "{calls} calls, {answers} answers");
    // if calls are optional, text is allowed, too
    request.choice = ToolChoice::Auto;
    request.parallel = true;
    let syntax = ToolSyntax::of("<tool_call>", &TOKENIZER).unwrap();
    let grammar = tools_grammar(&syntax, &request, None, None).unwrap().unwrap();
    let mut calls = 0;
    for seed in 0..20 {
        let (ids, is_finished) = walk(&mut COMPILER.compile(&grammar).unwrap(), seed, 120, &[4088, 4089]);
        let parser = ToolParser::new(Some(&syntax), None, "", &request.tools, true);
        let (_, content, found) = parse(&parser, &[&text(&ids)], !is_finished);
        assert!(!is_finished || !content.contains("</tool_call>"), "{content}");
        assert!(found.iter().all(|(name, arguments)| name == "get_time" || validator.is_valid(&value(arguments))));
        calls += found.len();
    }
    assert!(calls > 0);
    for tool in &mut request.tools {
        tool.strict = false;
    }
    assert_eq!(tools_grammar(&syntax, &request, None, None).unwrap(), None);
}

/// Whether a grammar accepts a text, with the tokenizer's tokens.
fn accepts(grammar: &Grammar, text: &str) -> bool {
    let mut mask = COMPILER.compile(grammar).unwrap();
    let ids = TOKENIZER.encode(text, false).unwrap();
    let is_allowed = |at: usize, id: u32, mask: &mut GrammarMask| {
        let mut allowed = AllowedTokens::new(VOCAB_SIZE);
        mask.allow(&ids[..at], &mut allowed).unwrap();
        allowed.contains(id)
    };
    let inside = ids.iter().enumerate().all(|(at, &id)| is_allowed(at, id, &mut mask));
    inside && is_allowed(ids.len(), END_IDS[0], &mut mask)
}

#[test]
fn grammars_accept_rendered_calls() {
    let mut request = tools();
    let thinking = Reasoning::of("<think></think>", &TOKENIZER).unwrap();
    let good = ["{\"city\": \"a\", \"days\": 3}", "{\"city\":\"a\",\"days\":3,\"tags\":[]}"];
    for (template, form, text, count) in rendered() {
        let syntax = ToolSyntax::of(template, &TOKENIZER).unwrap();
        request.choice = ToolChoice::Required;
        request.parallel = true;
        let required = tools_grammar(&syntax, &request, None, None).unwrap().unwrap();
        let (open, closed) =
            [true, false].map(|is_open| tools_grammar(&syntax, &request, Some((&thinking, is_open)), None)).into();
        let (open, closed) = (open.unwrap().unwrap(), closed.unwrap().unwrap());
        request.parallel = false;
        let single = tools_grammar(&syntax, &request, None, None).unwrap().unwrap();
        let calls = text.strip_prefix("Let me look.").unwrap_or(&text).trim_start();
        // models do not generate ids of calls in a list
        let calls = calls.replace(", \"id\": \"abcdefgh1\"", "").replace(", \"id\": \"abcdefgh2\"", "");
        assert!(accepts(&required, &calls), "{form:?}: {calls}\n{required:?}");
        assert!(accepts(&open, &format!("because </thin\n</think>\n\n{calls}")), "{form:?}: {calls}");
        assert!(
            accepts(&closed, &format!("<think>\nbecause\n</think>\n\n{calls}")) && accepts(&closed, &calls),
            "{calls}"
        );
        assert!(!accepts(&open, &calls) && !accepts(&required, "Hello") && !accepts(&required, ""), "{form:?}");
        assert_eq!(accepts(&single, &calls), count == 1, "{form:?}");
        for wrong in ["days\": 300", "days\": \"3\"", "dates\": 3"] {
            let calls = calls.replace("days\": 2", wrong).replace("<parameter=days>\n2", "<parameter=days>\n300");
            assert!(!accepts(&required, &calls), "{form:?}: {calls}");
        }
        assert!(!accepts(&required, &calls.replace("get_weather", "get_wealth")));
        if form == Form::Hermes || form == Form::Bare {
            for arguments in good {
                let calls = calls.replace(PLACE, arguments);
                assert!(accepts(&required, &calls), "{calls}");
            }
            request.choice = ToolChoice::Auto;
            let auto = tools_grammar(&syntax, &request, None, None).unwrap().unwrap();
            assert!(accepts(&auto, "Hello \"you\"\n") && accepts(&auto, ""));
            assert_eq!(accepts(&auto, &text), form == Form::Bare, "one call only");
            let one = calls.split_inclusive("</tool_call>").next().unwrap();
            assert!(accepts(&auto, one) && !accepts(&auto, &one.replace("days\": 2", "days\": -1")), "{one}");
        } else {
            request.choice = ToolChoice::Auto;
            let is_token = syntax.marker_ids().next().is_some();
            assert_eq!(tools_grammar(&syntax, &request, None, None).is_ok(), is_token, "{form:?}");
        }
    }
}
