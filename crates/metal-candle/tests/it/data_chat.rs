//! Chat templates against transformers, and their limits.

use metal_candle::Error;
use metal_candle::data::{ChatTemplate, Message, Tokenizer};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

pub(crate) fn template(name: &str) -> ChatTemplate {
    let source = std::fs::read_to_string(golden().join(format!("chat/{name}.jinja"))).unwrap();
    ChatTemplate::new(source)
        .unwrap()
        .with_variable("eos_token", &json!("<|im_end|>"))
        .with_variable("pad_token", &json!("<|endoftext|>"))
}

fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
    ChatTemplate::new(source)?.render(messages, None, false, &Map::new())
}

fn error_of(source: &str) -> String {
    match render(source, &[Message::user("hello")]) {
        Err(Error::Template(message)) => message,
        other => panic!("expected a template error, found {other:?}"),
    }
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let cases: Value = serde_json::from_slice(&std::fs::read(golden().join("chat/cases.json")).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_folder(golden().join("tokenizer")).unwrap();
    let (mut num_equal, mut num_refused, mut num_encoded, mut wrong) = (0, 0, 0, Vec::new());
    for case in cases["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let template_name = case["template"].as_str().unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let rendered = template(template_name).render(
            &messages,
            case["tools"].as_array().map(Vec::as_slice),
            case["add_generation_prompt"].as_bool().unwrap(),
            case["variables"].as_object().unwrap(),
        );
        match (case["expected"].as_str(), rendered) {
            (Some(expected), Ok(text)) if expected == text => {
                num_equal += 1;
                if let Some(ids) = case["ids"].as_array() {
                    let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
                    assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{name}");
                    num_encoded += 1;
                }
            }
            (None, Err(Error::Template(_))) => num_refused += 1,
            (expected, found) => wrong.push(format!("{template_name}: {name}\n{expected:?}\n{found:?}")),
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n\n"));
    assert!(num_equal > 100 && num_refused > 0 && num_encoded > 0, "{num_equal} {num_refused} {num_encoded}");
}

#[test]
fn json_is_written_as_python_writes_it() {
    let messages = [Message::user("").with("v", json!({"b": [1, 2.0, true, null], "a": "é<&'\"\n", "e": {}, "f": []}))];
    let text = |filter: &str| render(&format!("{{{{ messages[0].v | {filter} }}}}"), &messages).unwrap();
    assert_eq!(text("tojson"), r#"{"b": [1, 2.0, true, null], "a": "é<&'\"\n", "e": {}, "f": []}"#);
    assert_eq!(
        text("tojson(ensure_ascii=true, sort_keys=true)"),
        r#"{"a": "\u00e9<&'\"\n", "b": [1, 2.0, true, null], "e": {}, "f": []}"#
    );
    assert_eq!(text("tojson(separators=(',', ':'))"), r#"{"b":[1,2.0,true,null],"a":"é<&'\"\n","e":{},"f":[]}"#);
    assert_eq!(
        text("tojson(indent=2)"),
        "{\n  \"b\": [\n    1,\n    2.0,\n    true,\n    null\n  ],\n  \"a\": \"é<&'\\\"\\n\",\n  \"e\": {},\n  \"f\": []\n}"
    );
}

#[test]
fn values_print_as_in_python() {
    let messages = [Message::user("x").with("items", json!({"items": 1, "get": [true, null]}))];
    let text = |source: &str| render(source, &messages).unwrap();
    assert_eq!(text("{{ true }} {{ none }} {{ 1e20 }} {{ 2.50 }} {{ missing }}|"), "True None 1e+20 2.5 |");
    assert_eq!(text("{{ messages[0]['items'] }}"), "{'items': 1, 'get': [True, None]}");
    assert_eq!(
        text("{% for k, v in messages[0]['items'].items() %}{{ k }}={{ v }};{% endfor %}"),
        "items=1;get=[True, None];"
    );
    assert_eq!(text("{{ messages[0].get('content') }}{{ messages[0].get('nothing', 'z') }}"), "xz");
    assert_eq!(text("{{ 'a-b-c'.rsplit('-', 1) }}{{ 'abc'.removeprefix('a') }}"), "['a-b', 'c']bc");
}

#[test]
fn generation_marks_leave_no_trace() {
    let source = "{% for m in messages %}\n{%- generation -%}\n <{{ m.content }}>\n{%- endgeneration %}\n{% endfor %}";
    assert_eq!(render(source, &[Message::user("a"), Message::assistant("b")]).unwrap(), "<a><b>");
}

#[test]
fn strftime_now_asks_the_given_clock() {
    let template = ChatTemplate::new("{{ strftime_now('%d %b %Y') }}").unwrap();
    let template = template.with_clock(|| SystemTime::UNIX_EPOCH + Duration::from_hours(478_332));
    assert_eq!(template.render(&[], None, false, &Map::new()).unwrap(), "26 Jul 2024");
}

#[test]
fn a_message_keeps_its_keys_and_order() {
    let text = r#"{"x":1,"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":"{\"b\":1,\"a\":2}"}}],"reasoning_content":"r"}"#;
    let message: Message = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&message).unwrap(), text);
    let message = message.normalized().unwrap();
    assert_eq!(message.tool_calls()[0]["function"]["arguments"].to_string(), r#"{"b":1,"a":2}"#);
    let parts = Message::user("").with("content", json!([{"type": "text", "text": "a"}, "b"]));
    assert_eq!(parts.normalized().unwrap().get("content"), Some(&json!("ab")));
    let image = Message::user("").with("content", json!([{"type": "image", "url": "u"}]));
    assert_eq!(image.normalized().unwrap_err(), "a content part of type `image` is not supported, only `text` is");
    for (wrong, message) in [
        (r#"{"content":"a"}"#, "the message has no key `role`"),
        (r#"{"role":1}"#, "`role` must be a string, found a number"),
        (r#"{"role":"user","content":5}"#, "`content` must be a string, null or a list of parts, found a number"),
        (r#"{"role":"user","tool_calls":{}}"#, "`tool_calls` must be a list of objects, found an object"),
    ] {
        assert_eq!(serde_json::from_str::<Message>(wrong).unwrap_err().to_string(), message);
    }
}

#[test]
fn tool_use_is_chosen_among_named_templates() {
    let config = json!({
        "chat_template": [{"name": "default", "template": "plain {{ eos_token }}"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}],
        "eos_token": {"content": "</s>", "special": true},
    });
    let template = ChatTemplate::from_tokenizer_config(&config).unwrap().unwrap();
    assert_eq!(template.render(&[], None, false, &Map::new()).unwrap(), "plain </s>");
    assert_eq!(template.render(&[], Some(&[json!({})]), false, &Map::new()).unwrap(), "tools 1");
    assert!(ChatTemplate::from_tokenizer_config(&json!({"eos_token": "x"})).unwrap().is_none());
    for wrong in [json!({"chat_template": 5}), json!({"chat_template": [{"name": "a"}]}), json!({"chat_template": []})]
    {
        assert!(matches!(ChatTemplate::from_tokenizer_config(&wrong), Err(Error::Template(_))), "{wrong}");
    }
}

#[test]
fn a_jinja_file_comes_before_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    assert!(ChatTemplate::from_folder(folder.path()).unwrap().is_none());
    write("tokenizer_config.json", r#"{"chat_template": "from the configuration", "bos_token": "<s>"}"#);
    let text = || ChatTemplate::from_folder(folder.path()).unwrap().unwrap().render(&[], None, false, &Map::new());
    assert_eq!(text().unwrap(), "from the configuration");
    write("chat_template.jinja", "from the file {{ bos_token }}\n");
    assert_eq!(text().unwrap(), "from the file <s>");
    write("tokenizer_config.json", "{");
    assert!(matches!(text_error(folder.path()), Error::Format { .. }));
}

fn text_error(folder: &Path) -> Error {
    ChatTemplate::from_folder(folder).unwrap_err()
}

#[test]
fn errors_name_the_line() {
    assert_eq!(error_of("a\n{{ raise_exception('no ' ~ messages[0].role) }}"), "line 2: no user");
    assert!(error_of("a\n\n{{ messages[0].nothing.more }}").starts_with("line 3: "));
    assert!(error_of("{% for %}").starts_with("line 1: "));
    assert!(error_of("\n{{ x | nofilter }}").contains("nofilter"));
}

#[test]
fn templates_cannot_reach_other_files() {
    for source in
        ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'base.html' %}", "{{ open('x') }}"]
    {
        let message = error_of(source);
        assert!(message.contains("line 1"), "{source}: {message}");
    }
    assert!(error_of("{% include 'default' %}").contains("recurs"));
}

#[test]
fn work_output_and_memory_are_bounded() {
    let budget = "the template exceeds its limit of steps and memory";
    let long = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}";
    assert!(error_of(long).contains(budget));
    assert!(error_of("{% for i in range(10**9) %}{% endfor %}").contains("too many elements"));
    let too_long = "longer than 16777216 bytes";
    assert!(error_of("{{ 'abcdefgh' * 2200000 }}").contains(too_long), "{}", error_of("{{ 'abcdefgh' * 2200000 }}"));
    assert!(error_of("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}").contains(too_long));
    assert!(error_of("{{ 'abcdefgh' * 400000000 }}").contains(budget));
    let doubling = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}";
    assert!(error_of(doubling).contains(budget));
    assert!(error_of("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}").contains("recursion"));
    assert!(error_of(&"{{".repeat(10)).contains("line 1"));
    assert!(error_of(&format!("{{{{ {}1{} }}}}", "(".repeat(10_000), ")".repeat(10_000))).contains("line 1"));
}

#[test]
fn namespaces_hold_no_namespaces() {
    for value in ["n", "[n]", "{'a': [n]}", "namespace()", "[n] | select", "[1] if false else n"] {
        let message = error_of(&format!("{{% set n = namespace(x=1) %}}\n{{%- set n.x = {value} -%}}\n{{{{ n }}}}"));
        assert!(message.starts_with("line 2: a namespace cannot contain a namespace"), "{value}: {message}");
    }
    let message = error_of("{% set n = namespace() %}{% for i in range(200) %}{% set n.x = [n.x] %}{% endfor %}");
    assert_eq!(message, "line 1: a namespace cannot contain a value of more than 100 levels");
    let source = "{% set n = namespace(a=[], b='%}') %}{% for i in range(3) %}{% set n.a = n.a + [i] %}{% set n.b = n.b ~ '%}' if i else 'x' -%} {% endfor %}{% set n.c %}d{{ 1 }}{% endset %}{{ n.a }}{{ n.b }}{{ n.c }}";
    assert_eq!(render(source, &[]).unwrap(), "[0, 1, 2]x%}%}d1");
}

#[test]
fn values_nested_without_end_do_no_harm() {
    let deep = format!("{}n.x{}", "[".repeat(100), "]".repeat(100));
    for (value, rounds) in [("[n.x]", 100_000), (deep.as_str(), 100_000), (deep.as_str(), 3_500), ("[n.x]", 60_000)] {
        let nest = format!(
            "{{% set n = namespace(x=[]) %}}{{% for i in range({rounds}) %}}{{% set n.x = {value} %}}{{% endfor %}}"
        );
        for end in ["", "{{ n.x | tojson }}", "{{ n.x }}", "{{ n.x | string | length }}", "{{ n.x == [n.x] }}"] {
            // a test's thread has a stack of 2 MiB; any outcome but an abort is fine
            let _ = render(&format!("{nest}{end}"), &[]);
        }
    }
    let nested = format!("{}{}", "[".repeat(100), "]".repeat(100));
    for rounds in [10, 20, 30, 1000] {
        let unrolled = format!("{{% set x = {} %}}", nested.replace("[]", "[x]")).repeat(rounds);
        let _ = render(&format!("{{% set x = 1 %}}{unrolled}{{{{ x }}}}"), &[]);
    }
}

#[test]
fn expressions_equal_those_of_jinja2() {
    let text = std::fs::read_to_string(golden().join("chat/expressions.json")).unwrap();
    let cases: Vec<(String, Option<String>)> = serde_json::from_str(&text).unwrap();
    let variables = json!({"f": 1e-7, "big": 1e20, "l": [1e16, 2.0, null, true, "it's"], "d": {"a": 0.1, "b": [false]}, "s": "a-b c"});
    let mut wrong = Vec::new();
    for (source, expected) in &cases {
        let template = ChatTemplate::new(source.as_str());
        let found = template.and_then(|template| template.render(&[], None, false, variables.as_object().unwrap()));
        match (expected, found) {
            (Some(expected), Ok(found)) if *expected == found => {}
            (None, Err(_)) => {}
            (expected, found) => wrong.push(format!("{source}\n  {expected:?}\n  {found:?}")),
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn deep_sources_and_large_results_are_refused() {
    let chains = ["-", "+", "not ", "~", "a if a else ", "a and ", "1 % "];
    for chain in chains {
        let _ = error_of(&format!("{{{{ {}1 }}}}", chain.repeat(20_000)));
    }
    assert!(error_of(&format!("{{{{ 1{} }}}}", "+1".repeat(32_000))).contains("operators"));
    assert!(error_of(&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(20_000))).contains("elif"));
    for source in
        ["('a' * 9000000).split('a')", "'a'.ljust(10**9)", "('a' * 9000000) | list", "'%99999d' % 1 * 1000000"]
    {
        let message = error_of(&format!("{{{{ {source} }}}}"));
        assert!(message.contains("limit") || message.contains("longer"), "{source}: {message}");
    }
}

#[test]
fn content_that_is_null_is_none_and_other_null_keys_are_absent() {
    let messages = json!([{"role": "assistant", "content": null, "name": null, "reasoning": "r"}]);
    let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
    let source = "{{ messages[0].content is none }} {{ messages[0].name is defined }} {{ messages[0].thinking }} {{ messages[0].reasoning_content }}";
    assert_eq!(render(source, &messages).unwrap(), "True False r r");
}

#[test]
fn long_conversations_have_budget() {
    let source = "{% for m in messages %}{% set ns = namespace(n=0) %}{% for c in m.content %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }};{% endfor %}";
    assert_eq!(render(source, &[Message::user("x".repeat(100_000))]).unwrap(), "100000;");
    let many: Vec<Message> = (0..800).map(|_| Message::user("hello there")).collect();
    assert_eq!(render(source, &many).unwrap().len(), 800 * 3);
    // the question before each message is looked for from the first message on
    let source = "{% for m in messages %}{% set ns = namespace(i=0) %}{% for n in messages[:loop.index0] %}{% if n.role == 'user' and n.content %}{% set ns.i = loop.index %}{% endif %}{% endfor %}{{ ns.i }};{% endfor %}";
    assert!(render(source, &many).unwrap().ends_with("798;799;"));
}

#[test]
fn a_panic_of_the_engine_is_an_error() {
    let messages: Vec<Message> = serde_json::from_value(serde_json::json!([{"role": "user", "content": "a"}])).unwrap();
    let render = |source: &str| ChatTemplate::new(source)?.render(&messages, None, false, &serde_json::Map::new());
    // overflows inside the engine
    for number in ["-9223372036854775808", "-9223372036854775807 - 1"] {
        let _ = render(&format!("{{% for m in messages[::{number}] %}}{{{{ m.content }}}}{{% endfor %}}"));
        let _ = render(&format!("{{{{ ({number}) // -1 }}}}{{{{ ({number}) % -1 }}}}{{{{ -({number}) }}}}"));
    }
    assert_eq!(render("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}").unwrap(), "a");
}
