//! Tests that generate random texts under masks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{Grammar, GrammarCompiler, GrammarError};
use metal_candle::data::Tokenizer;
use metal_candle::inference::{AllowedTokens, TokenMask};
use serde_json::{Value, json};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

pub(crate) const VOCAB_SIZE: usize = 4096 + 40;
pub(crate) const END_IDS: [u32; 2] = [4076, 4074];

pub(crate) static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano")).unwrap());
pub(crate) static COMPILER: LazyLock<GrammarCompiler> =
    LazyLock::new(|| GrammarCompiler::new(&TOKENIZER, VOCAB_SIZE, &END_IDS).unwrap());

/// A small generator of random numbers.
struct Draws(u64);

impl Draws {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// Generates up to `max` tokens; returns them, and whether the text ended.
pub(crate) fn walk(mask: &mut dyn TokenMask, seed: u64, max: usize, markers: &[u32]) -> (Vec<u32>, bool) {
    let mut draws = Draws(seed);
    let mut ids: Vec<u32> = Vec::new();
    for _ in 0..max {
        let mut allowed = AllowedTokens::new(VOCAB_SIZE);
        mask.allow(&ids, &mut allowed).unwrap_or_else(|error| panic!("{error} after {:?}", text(&ids)));
        let choices: Vec<u32> = (0..VOCAB_SIZE as u32).filter(|&id| allowed.contains(id)).collect();
        let can_end = choices.iter().any(|id| END_IDS.contains(id));
        if can_end && (choices.len() == 2 || draws.below(3) == 0) {
            return (ids, true);
        }
        let words: Vec<u32> = choices.iter().copied().filter(|id| !END_IDS.contains(id)).collect();
        let is_text = |id: u32| id < 4074 || markers.contains(&id);
        assert!(words.iter().all(|&id| is_text(id)), "a control token is allowed after {:?}", text(&ids));
        if let Some(&marker) = markers.iter().find(|id| words.contains(id)).filter(|_| draws.below(4) == 0) {
            ids.push(marker);
            continue;
        }
        // prefer closing brackets, otherwise texts grow endlessly
        let is_closing = |id: u32| TOKENIZER.token_bytes(id).is_some_and(|bytes| b"\"]}".contains(&bytes[0]));
        let closing: Vec<u32> = words.iter().copied().filter(|&id| is_closing(id)).collect();
        let from = if !closing.is_empty() && draws.below(2) == 0 { &closing } else { &words };
        ids.push(from[draws.below(from.len())]);
    }
    (ids, false)
}

pub(crate) fn text(ids: &[u32]) -> String {
    TOKENIZER.decode(ids, false).unwrap()
}

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "additionalProperties": false, "required": ["name", "address"], "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "address": {"type": "object", "required": ["city"], "additionalProperties": false, "properties": {
                "city": {"enum": ["Zürich", "東京", "a \"b\"\\c"]}, "zip": {"type": "string", "pattern": "^[0-9]{4,5}$"}}}}}),
        json!({"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 250}, "minItems": 2, "maxItems": 5}),
        json!({"type": "object", "required": ["n"], "properties": {"n": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 10},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2}}}),
        json!({"anyOf": [{"type": "object", "properties": {"kind": {"const": "a"}, "v": {"type": "boolean"}}, "required": ["kind", "v"],
            "additionalProperties": false}, {"type": "null"}, {"type": "string", "format": "date"}]}),
        json!({"type": "object", "properties": {"tree": {"$ref": "#/$defs/node"}}, "required": ["tree"], "additionalProperties": false,
            "$defs": {"node": {"type": "object", "properties": {"v": {"type": ["integer", "null"]},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}, "required": ["v", "next"],
                "additionalProperties": false}}}),
        json!({"oneOf": [{"type": "object", "properties": {"t": {"const": "x"}}, "required": ["t"], "additionalProperties": false},
            {"type": "object", "properties": {"t": {"const": "y"}}, "required": ["t"], "additionalProperties": false}]}),
        json!({"allOf": [{"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5, "minimum": -90, "maximum": 2000}}, "required": ["a"]},
            {"properties": {"b": {"const": {"x": [1, "é", null, -2.5]}}}, "required": ["b"]}]}),
        json!({"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3}),
        json!({"type": "array", "prefixItems": [{"type": "string", "pattern": "b+c"}, {"type": "boolean"}], "items": false}),
        json!({"type": "object", "patternProperties": {"^x_": {"type": "number"}}, "additionalProperties": false}),
        json!(true),
    ]
}

#[test]
fn every_finished_text_satisfies_its_schema() {
    let (mut finished, mut cut) = (0, 0);
    for schema in schemas() {
        let validator = jsonschema::validator_for(&schema).unwrap();
        let grammar = Grammar::JsonSchema(schema.clone());
        for seed in 0..12 {
            let mut mask = COMPILER.compile(&grammar).unwrap();
            let (ids, is_finished) = walk(&mut mask, seed, 160, &[]);
            let text = text(&ids);
            assert!(!text.contains("  ") || text.contains('"'), "{text:?}");
            match serde_json::from_str::<Value>(&text) {
                Ok(value) if is_finished => {
                    assert!(validator.is_valid(&value), "{schema}: {text}");
                    finished += 1;
                }
                Err(error) if !is_finished => {
                    // a truncated text may end inside a character, but is otherwise the start of a JSON value
                    let is_prefix = error.is_eof() || error.to_string().contains("number out of range");
                    assert!(is_prefix || text.contains('\u{FFFD}'), "{schema}: {error}: {text}");
                    cut += 1;
                }
                Ok(_) => cut += 1,
                Err(error) => panic!("{schema}: {error}: {text:?}"),
            }
        }
    }
    assert!(finished > 60, "{finished} finished, {cut} cut");
}

#[test]
fn a_fork_is_independent() {
    let mut mask = COMPILER.compile(&Grammar::Regex("^(?:red|green) [0-9]{2}$".into())).unwrap();
    let ids = TOKENIZER.encode("green 1", false).unwrap();
    let mut allowed = AllowedTokens::new(VOCAB_SIZE);
    mask.allow(&[], &mut allowed).unwrap();
    assert!(!allowed.contains(END_IDS[0]));
    allowed.clear();
    mask.allow(&ids, &mut allowed).unwrap();
    let mut fork = mask.fork();
    let digit = TOKENIZER.encode("7", false).unwrap()[0];
    assert!(allowed.contains(digit));
    let longer = [ids.as_slice(), &[digit]].concat();
    for _ in 0..2 {
        // the text is complete, and only end-of-text may follow
        let mut allowed = AllowedTokens::new(VOCAB_SIZE);
        fork.allow(&longer, &mut allowed).unwrap();
        let ends: Vec<u32> = (0..VOCAB_SIZE as u32).filter(|&id| allowed.contains(id)).collect();
        assert_eq!(ends, [4074, 4076]);
    }
    // the first mask did not change
    allowed.clear();
    mask.allow(&ids, &mut allowed).unwrap();
    assert!(allowed.contains(digit) && !allowed.contains(END_IDS[0]));
    let wrong = [ids.as_slice(), &TOKENIZER.encode("x", false).unwrap()].concat();
    let error = mask.allow(&wrong, &mut AllowedTokens::new(VOCAB_SIZE)).unwrap_err().to_string();
    assert_eq!(error, "`grammar`: the text is outside the grammar, or the grammar is too complex for it");
    assert!(mask.allow(&[], &mut AllowedTokens::new(VOCAB_SIZE)).is_err());
    assert!(fork.allow(&longer, &mut AllowedTokens::new(7)).is_err());
}

#[test]
fn all_kinds_of_grammars_are_followed() {
    let list = "root ::= \"(\" (root | [a-c]{1,2}) (\",\" root)? \")\"";
    let lark = "start: \"<\" word (\"-\" word)* \">\" <tool_call>?\nword: /[a-z]{2}/";
    for seed in 0..8 {
        let (ids, is_finished) = walk(&mut COMPILER.compile(&Grammar::Gbnf(list.into())).unwrap(), seed, 200, &[]);
        let written = text(&ids);
        let depth = |text: &str| text.chars().fold(0, |depth, c| depth + i32::from(c == '(') - i32::from(c == ')'));
        assert!(written.starts_with('(') && (!is_finished || depth(&written) == 0), "{written}");
        let (ids, is_finished) = walk(&mut COMPILER.compile(&Grammar::JsonObject).unwrap(), seed, 200, &[]);
        assert!(!is_finished || serde_json::from_str::<Value>(&text(&ids)).unwrap().is_object());
    }
    let mut mask = COMPILER.compile(&Grammar::Lark(lark.into())).unwrap();
    let mut ids = TOKENIZER.encode("<ab-cd>", false).unwrap();
    let mut allowed = AllowedTokens::new(VOCAB_SIZE);
    mask.allow(&ids, &mut allowed).unwrap();
    let marker = TOKENIZER.token_to_id("<tool_call>").unwrap();
    assert!(allowed.contains(marker) && allowed.contains(END_IDS[0]));
    ids.push(marker);
    allowed.clear();
    mask.allow(&ids, &mut allowed).unwrap();
    assert!(!allowed.contains(marker) && allowed.contains(END_IDS[1]));
    // the same text without the token is another text
    let mut mask = COMPILER.compile(&Grammar::Lark("start: \"<tool_call>\"".into())).unwrap();
    allowed.clear();
    mask.allow(&[], &mut allowed).unwrap();
    assert!(!allowed.contains(marker) && allowed.contains(TOKENIZER.encode("<", false).unwrap()[0]));
}

#[test]
fn errors_are_readable_for_clients() {
    let schema = Grammar::JsonSchema;
    for (grammar, message) in [
        (schema(json!({"not": {"type": "null"}})), "these keywords are not supported: `not`"),
        (schema(json!({"type": "string", "format": "emoji"})), "this `format` is not supported: `emoji`"),
        (schema(json!({"type": "text"})), "unknown `type`: `text`"),
        (
            schema(json!({"$ref": "https://example.com/a"})),
            "`$ref` must start with `#/`, found `https://example.com/a`",
        ),
        (schema(json!({"oneOf": [{"type": "integer"}, {"minimum": 3}]})), "`oneOf` is supported only"),
        (schema(json!({"type": "integer", "minimum": 3, "maximum": 2})), "no value satisfies the schema"),
        (schema(json!(false)), "no value satisfies the schema"),
        (schema(json!([1])), "expected a JSON schema as an object, found a list"),
        (schema(json!({"const": 9_007_199_254_740_993_i64})), "integers up to 2^53"),
        (
            schema(json!({"items": {"multipleOf": 12.5}, "multipleOf": 1_003})),
            "`multipleOf` is supported up to 10000, found 12.5 and 1003",
        ),
        (schema(json!({"$ref": "#"})), "the grammar matches no text"),
        (schema(json!({"type": "string", "pattern": "(?=a)b"})), "look-around"),
        (schema(json!({"description": "x".repeat(70_000)})), "expected at most 65536"),
        (Grammar::Regex("a(".into()), "unclosed group"),
        (Grammar::Regex(r"a\".into()), "ends with a backslash"),
        (Grammar::Regex(r"(a)\1".into()), "backreferences"),
        (Grammar::Regex("^$".into()), "only the empty text"),
        (Grammar::Lark("begin: \"a\"".into()), "no start rule"),
        (Grammar::Lark("start: \"a\"\nend: (".into()), "line 2"),
        (Grammar::Lark("start: <nothing>".into()), "unknown special token"),
        (Grammar::Lark(" ".into()), "the grammar is empty"),
        (Grammar::Gbnf("start ::= \"a\"".into()), "no rule `root`"),
    ] {
        let GrammarError::Invalid(error) = COMPILER.compile(&grammar).unwrap_err() else { panic!("{grammar:?}") };
        assert!(error.contains(message), "{grammar:?}: {error}");
        assert!(error.len() < 300 && !error.contains('\n') && !error.contains("llguidance"), "{error}");
    }
}

/// Peak memory of the process in MiB.
fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok()).unwrap_or(0) / 1024
}

#[test]
#[allow(clippy::too_many_lines)]
fn hostile_grammars_end_in_bounded_time() {
    // compiling threads past their deadline block others
    let compiler = GrammarCompiler::new(&TOKENIZER, VOCAB_SIZE, &END_IDS).unwrap();
    let nested = |depth: usize, open: &str, close: &str| open.repeat(depth) + "{}" + &close.repeat(depth);
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let chain = |count: usize| {
        let definitions = (0..count).map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)})));
        let mut definitions: serde_json::Map<String, Value> = definitions.collect();
        definitions.insert(format!("d{count}"), json!({"type": "null"}));
        json!({"$ref": "#/$defs/d0", "$defs": definitions})
    };
    let laughs = |count: usize| {
        let definitions = (0..count).map(|i| {
            let next = format!("#/$defs/d{}", i + 1);
            (
                format!("d{i}"),
                json!({"allOf": [{"$ref": next}, {"anyOf": [{"$ref": next}, {"$ref": next, "minLength": 1}]}]}),
            )
        });
        let mut definitions: serde_json::Map<String, Value> = definitions.collect();
        definitions.insert(format!("d{count}"), json!({"type": "string", "maxLength": 9}));
        json!({"$ref": "#/$defs/d0", "$defs": definitions})
    };
    let wide: serde_json::Map<String, Value> =
        (0..2000).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
    let rules = |count: usize, tail: &str| {
        (0..count).fold(String::from("start: r0\n"), |text, i| text + &format!("r{i}: \"a\" r{}\n", i + 1)) + tail
    };
    let terminals = |count: usize| {
        (0..count).fold(String::from("start: R0\n"), |text, i| text + &format!("R{i}: \"(\" R{} \")\"\n", i + 1))
            + &format!("R{count}: \"x\"\n")
    };
    let schema = Grammar::JsonSchema;
    let cases = [
        ("nested schema", schema(parsed(&nested(60, r#"{"items":"#, "}")))),
        ("nested anyOf", schema(parsed(&nested(40, r#"{"anyOf":[{"type":"null"},"#, "]}")))),
        ("nested const", schema(json!({"const": parsed(&nested(100, "[", "]"))}))),
        ("chain of references", schema(chain(1800))),
        ("references in references", schema(laughs(12))),
        ("reference to itself", schema(json!({"$ref": "#"}))),
        ("reference to itself with siblings", schema(json!({"$ref": "#", "type": "object"}))),
        ("wide object", schema(json!({"type": "object", "properties": wide}))),
        ("many items", schema(json!({"type": "array", "items": {"type": "string"}, "minItems": 1_000_000_000}))),
        ("at most many items", schema(json!({"type": "array", "maxItems": 100_000_000}))),
        ("long string", schema(json!({"type": "string", "minLength": 1_000_000_000}))),
        ("long pattern", schema(json!({"type": "string", "pattern": "^(a{1000}){1000}$"}))),
        ("length and pattern", schema(json!({"type": "string", "pattern": "(a|b)*a(a|b){40}", "maxLength": 5000}))),
        ("tiny multiple", schema(json!({"type": "number", "multipleOf": 1e-300}))),
        ("large multiple", schema(json!({"type": "integer", "multipleOf": 1_234_567_891}))),
        ("multiples", schema(json!({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}, {"multipleOf": 9949}]}))),
        ("larger multiple", schema(json!({"type": "integer", "multipleOf": 4_294_967_291_u64}))),
        ("medium multiple", schema(json!({"type": "integer", "multipleOf": 999_983}))),
        (
            "wide oneOf",
            schema(
                json!({"oneOf": (0..1200).map(|i| json!({"properties": {"a": {"const": i.to_string()}}})).collect::<Vec<_>>()}),
            ),
        ),
        ("wide enum", schema(json!({"enum": (0..8000).map(|i| json!(i.to_string())).collect::<Vec<_>>()}))),
        ("wide numbers", schema(json!({"enum": (0..8000).collect::<Vec<_>>()}))),
        ("8K regex", Grammar::Regex("[a-z]?".repeat(1300))),
        ("4K regex", Grammar::Regex("[a-z]?".repeat(650))),
        ("number range", schema(json!({"type": "number", "minimum": -1e308, "maximum": 1.234_567_890_123_4e308}))),
        (
            "many patterns",
            schema(
                json!({"patternProperties": (0..200).map(|i| (format!("^{i}a"), json!({}))).collect::<serde_json::Map<_, _>>()}),
            ),
        ),
        ("repeats of repeats", Grammar::Regex("((a{0,1000}){0,1000}){0,1000}".into())),
        ("exponential automaton", Grammar::Regex("(a|b)*a(a|b){200}".into())),
        ("products", Grammar::Lark("start: A\nA: /(.*a.{30})+/ & /(.*b.{31})+/ & /(.*c.{37})+/\n".into())),
        ("unicode classes", Grammar::Regex(r"(\p{L}|\p{N}|\p{S}){1,500}\w{500}".into())),
        ("long regex", Grammar::Regex("[a-z]?".repeat(8000))),
        ("long choice", Grammar::Regex((0..9000).map(|i| i.to_string()).collect::<Vec<_>>().join("|"))),
        ("nested groups", Grammar::Regex("(".repeat(20_000) + "a" + &")".repeat(20_000))),
        ("nested brackets", Grammar::Lark("start: ".to_string() + &"(".repeat(30_000))),
        ("chain of rules", Grammar::Lark(rules(990, "r990: \"x\"\n"))),
        ("chain of terminals", Grammar::Lark(terminals(990))),
        ("many rules", Grammar::Lark(rules(1001, "r1001: \"x\"\n"))),
        ("ambiguous", Grammar::Lark("start: s\ns: s s | \"a\" | s s s | \"\"\n".into())),
        ("repeated rule", Grammar::Lark("start: s{1000,2000000000}\ns: t{0,1000000}\nt: \"a\" | \"b\" t\n".into())),
        (
            "repeated gbnf",
            Grammar::Gbnf("root ::= ((((a{0,2000}){0,2000}){0,2000}){0,2000})\na ::= \"x\" a? \"y\"".into()),
        ),
        (
            "copies in gbnf",
            Grammar::Gbnf(format!("root ::= {}\na ::= \"{}\"", "a ".repeat(20_000), "x".repeat(16_000))),
        ),
        (
            "regular gbnf",
            Grammar::Gbnf(
                (0..400).fold("root ::= r0\n".into(), |t: String, i| t + &format!("r{i} ::= r{} r{}\n", i + 1, i + 1))
                    + "r400 ::= \"a\"",
            ),
        ),
    ];
    for (name, grammar) in cases {
        // a thread past its deadline may still be compiling
        let waiting = Instant::now();
        let (compiled, time) = loop {
            let start = Instant::now();
            match compiler.compile(&grammar) {
                Err(GrammarError::Busy) => assert!(waiting.elapsed() < Duration::from_mins(1), "{name}: busy"),
                compiled => break (compiled, start.elapsed()),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let result = compiled.as_ref().map_or_else(ToString::to_string, |_| "compiled".into());
        println!("{name}: {time:?}, {} MiB, {result:.90}", peak_memory());
        assert!(time < Duration::from_secs(4), "{name}: {time:?}");
        // the engine's thread has the default stack size
        if let Ok(mut mask) = compiled {
            let thread = std::thread::Builder::new().stack_size(1 << 20).spawn(move || {
                let (mut ids, mut slowest) = (Vec::new(), Duration::ZERO);
                let mut draws = Draws(7);
                for _ in 0..60 {
                    let mut allowed = AllowedTokens::new(VOCAB_SIZE);
                    let start = Instant::now();
                    let result = mask.allow(&ids, &mut allowed);
                    slowest = slowest.max(start.elapsed());
                    if let Err(error) = result {
                        println!("    {error}");
                        break;
                    }
                    let choices: Vec<u32> = (0..4074).filter(|&id| allowed.contains(id)).collect();
                    if choices.is_empty() {
                        break;
                    }
                    ids.push(choices[draws.below(choices.len())]);
                }
                println!("    {} tokens, slowest mask {slowest:?}, {} MiB", ids.len(), peak_memory());
                slowest
            });
            let slowest = thread.unwrap().join().unwrap();
            assert!(slowest < Duration::from_secs(5), "{name}: a mask took {slowest:?}");
        }
    }
}

#[test]
fn a_space_that_decoding_drops_is_not_generated() {
    let words = ["<unk>", "</s>", "\u{2581}", "\u{2581}a", "a", "b", "\u{2581}b"];
    let vocab: serde_json::Map<String, Value> = words.into_iter().zip(0..).map(|(k, v)| (k.into(), json!(v))).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "decoder": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}});
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    let compiler = GrammarCompiler::new(&Tokenizer::from_file(path).unwrap(), 8, &[1]).unwrap();
    let allowed_after = |pattern: &str, ids: &[u32]| {
        let mut allowed = AllowedTokens::new(8);
        let mut mask = compiler.compile(&Grammar::Regex(pattern.into())).unwrap();
        let result = mask.allow(ids, &mut allowed).map_err(|error| error.to_string());
        result.map(|()| (0..8).filter(|&id| allowed.contains(id)).collect::<Vec<u32>>())
    };
    assert_eq!(allowed_after(" ?a b", &[]).unwrap(), [4]);
    assert_eq!(allowed_after(" ?a b", &[4]).unwrap(), [2, 6]);
    assert_eq!(allowed_after(" ?a b", &[4, 6]).unwrap(), [1]);
    assert!(allowed_after(" a", &[]).unwrap_err().contains("no token can follow"));
}
