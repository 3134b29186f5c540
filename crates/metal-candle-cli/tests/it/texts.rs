//! `template`, `tokenize`, `detokenize`, many prompts, and templates that flags and runs name.

use crate::fixture::Fixture;
use metal_candle::data::Tokenizer;
use serde_json::{Value, json};

/// A template whose turns end by a token that the model's configuration does not name.
const OTHER: &str = "{% for m in messages %}{{ m.role }}{{ mark }}:{{ m.content }}<|endoftext|>{% endfor %}\
    {% if tools %}[{{ tools[0].name }}]{% endif %}{% if add_generation_prompt %}assistant{{ mark }}:{% endif %}";

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The text of the tokens that are trained.
fn trained(fixture: &Fixture, row: &Value) -> String {
    let tokenizer = Tokenizer::from_folder(fixture.path("model")).unwrap();
    let (ids, trained) = (row["ids"].as_array().unwrap(), row["trained"].as_array().unwrap());
    assert_eq!(ids.len(), trained.len());
    let ids = ids.iter().zip(trained).filter(|(_, trained)| trained.as_bool().unwrap());
    let ids: Vec<u32> = ids.map(|(id, _)| u32::try_from(id.as_u64().unwrap()).unwrap()).collect();
    tokenizer.decode(&ids, false).unwrap()
}

#[test]
fn template_prints_text_ids_and_trained_tokens() {
    let fixture = Fixture::new();
    let chat = r#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]"#;
    std::fs::write(fixture.path("chat.json"), chat).unwrap();
    let row = fixture.ok("template chat.json --model model --json").json();
    assert_eq!(row["text"], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n");
    assert_eq!(trained(&fixture, &row), "yes<|im_end|>");
    // from standard input, with a generation prompt that is not trained
    let words = ["template", "--model", "model", "--add-generation-prompt", "--json"];
    let row = fixture.run_with(&words, chat).json();
    assert!(row["text"].as_str().unwrap().ends_with("<|im_end|>\n<|im_start|>assistant\n"), "{row}");
    assert_eq!(trained(&fixture, &row), "yes<|im_end|>");
    let text = fixture.ok("template chat.json --model model").stdout;
    assert!(text.contains("⟦yes<|im_end|>⟧\n\n[17 tokens, 3 trained]"), "{text}");
}

#[test]
fn rows_bring_their_own_template_tools_and_variables() {
    let fixture = Fixture::new();
    std::fs::write(fixture.path("other.jinja"), OTHER).unwrap();
    std::fs::write(fixture.path("tools.json"), r#"[{"name": "clock"}]"#).unwrap();
    let messages = json!([{"role": "user", "content": "hi"}]);
    let rows = [
        json!({"messages": messages, "chat_template": "{{ eos_token }}{{ messages[0].content }}"}),
        json!({"messages": messages, "add_generation_prompt": true}),
        json!({"messages": 5}),
        json!({"messages": messages, "chat_template_kwargs": {"mark": "!"}, "tools": [{"name": "own"}]}),
    ];
    std::fs::write(fixture.path("rows.jsonl"), rows.map(|row| format!("{row}\n")).concat()).unwrap();
    let words =
        "template rows.jsonl --model model --chat-template other.jinja --template-var mark=? --tools tools.json --json";
    let ran = fixture.run(words);
    assert_eq!(ran.code, 1, "one row is not a conversation");
    let rows = lines(&ran.stdout);
    assert_eq!(rows[0]["text"], "<|im_end|>hi");
    assert_eq!(rows[1]["text"], "user?:hi<|endoftext|>[clock]assistant?:");
    assert!(rows[2]["line"] == 3 && rows[2]["error"].as_str().unwrap().contains("messages"), "{}", rows[2]);
    assert_eq!(rows[3]["text"], "user!:hi<|endoftext|>[own]");
    let text = |flag: &str| {
        let words =
            format!("template one.json --model model --chat-template other.jinja --template-var mark={flag} --json");
        fixture.ok(&words).json()["text"].as_str().unwrap().to_owned()
    };
    std::fs::write(fixture.path("one.json"), "[{\"role\": \"user\", \"content\": \"hi\"}]").unwrap();
    let shown = ["False", "false", "None", "[1.0]", "1e-7", "text"].map(text);
    let expected = ["False", "False", "None", "[1.0]", "1e-07", "text"];
    assert_eq!(shown, expected.map(|value| format!("user{value}:hi<|endoftext|>")));
    for (flag, wrong) in [
        ("mark", "NAME=VALUE"),
        ("messages=1", "set by the program"),
        ("a-b=1", "letters"),
        ("mark=[1,2", "is not JSON"),
        ("mark=99999999999999999999", "64 bits"),
    ] {
        let ran = fixture.run(&format!("template rows.jsonl --model model --template-var {flag}"));
        assert!(ran.code == 1 && ran.stderr.contains(wrong), "{flag}: {}", ran.stderr);
    }
}

#[test]
fn tokens_of_a_text_and_back() {
    let fixture = Fixture::new();
    let json = fixture.run_with(&["tokenize", "fn main", "--model", "model", "--json"], "").json();
    assert_eq!(json["tokens"], json!(["fn", "Ġmain"]));
    let ids = fixture.run_with(&["tokenize", "--model", "model"], "fn main<|im_end|>\n").stdout;
    assert_eq!(fixture.run_with(&["detokenize", "--model", "model"], &ids).stdout, "fn main<|im_end|>\n");
    let words = format!("detokenize --model model --skip-special-tokens --json {ids}");
    assert_eq!(fixture.ok(&words).json()["text"], "fn main");
    let ran = fixture.run("detokenize --model model 1,4096000");
    assert!(
        ran.code == 1 && ran.stderr.contains("id 2 of 2: the tokenizer has no token with id `4096000`"),
        "{}",
        ran.stderr
    );
}

#[test]
fn many_prompts_are_answered_in_their_order() {
    let fixture = Fixture::new();
    let rows = "{\"prompt\": \"fn\"}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"let\"}]}\n";
    std::fs::write(fixture.path("prompts.jsonl"), rows).unwrap();
    let words = "--model model --temperature 0 --max-tokens 6 --json";
    let answers = lines(&fixture.ok(&format!("generate --prompts prompts.jsonl {words}")).stdout);
    assert_eq!(answers.len(), 2);
    for (answer, prompt) in answers.iter().zip(["fn", "let"]) {
        let alone = fixture.ok(&format!("generate --prompt {prompt} {words}")).json();
        assert_eq!((&answer["tokens"], &answer["prompt_ids"]), (&alone["tokens"], &alone["prompt_ids"]));
        assert_eq!(alone["prompt_ids"].as_array().unwrap().len(), alone["prompt_tokens"].as_u64().unwrap() as usize);
    }
    // lists of parts are joined as in training
    let parts = "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"le\"}, {\"type\": \"text\", \"text\": \"t\"}]}]}";
    std::fs::write(fixture.path("parts.jsonl"), parts).unwrap();
    let answer = lines(&fixture.ok(&format!("generate --prompts parts.jsonl {words}")).stdout);
    assert_eq!(answer[0]["prompt_ids"], answers[1]["prompt_ids"]);
    std::fs::write(fixture.path("bad.jsonl"), "{\"prompt\": \"fn\"}\n{\"text\": 1}\n").unwrap();
    let ran = fixture.run(&format!("generate --prompts bad.jsonl {words}"));
    assert!(ran.code == 1 && ran.stderr.contains("bad.jsonl:2: expected `prompt` or `messages`"), "{}", ran.stderr);
}

#[test]
fn a_run_remembers_its_template_and_fuse_writes_its_end_token() {
    let fixture = Fixture::new();
    std::fs::write(fixture.path("other.jinja"), OTHER).unwrap();
    fixture.ok(
        "train --model model --data data --output run --steps 2 --test-samples 0 --chat-template other.jinja --template-var mark=?",
    );
    // the run has a copy
    std::fs::remove_file(fixture.path("other.jinja")).unwrap();
    let words = "generate --model model --prompt hi --max-tokens 1 --json";
    let prompt = |adapter: &str| {
        let ids = fixture.ok(&format!("{words} --adapter {adapter}")).json()["prompt_ids"].to_string();
        fixture.run_with(&["detokenize", "--model", "model"], &ids).stdout
    };
    assert_eq!(prompt("run"), "user?:hi<|endoftext|>assistant?:\n");
    assert_eq!(prompt("run/adapter"), prompt("run"));
    fixture.ok("fuse --model model --adapter run --output merged");
    for name in ["config.json", "generation_config.json"] {
        let config: Value = serde_json::from_str(&fixture.text(&format!("merged/{name}"))).unwrap();
        assert_eq!(config["eos_token_id"], json!([4076, 4074]), "{name}");
    }
    assert_eq!(fixture.text("merged/chat_template.jinja"), OTHER);
}
