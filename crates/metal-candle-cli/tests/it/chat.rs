//! `chat` with lines from a pipe.

use crate::fixture::Fixture;
use metal_candle::ModelLoader;
use metal_candle::data::Tokenizer;
use metal_candle::inference::{GenerationConfig, Generator};

const WORDS: [&str; 7] = ["chat", "--model", "model", "--temperature", "0", "--max-tokens", "8"];

#[test]
fn each_line_is_a_turn_that_knows_the_earlier_ones() {
    let fixture = Fixture::new();
    let ran = fixture.run_with(&[&WORDS[..], &["--json"]].concat(), "hello\n\nand now?\n");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let turns: Vec<serde_json::Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(turns.len(), 2);
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    let tokenizer = Tokenizer::from_folder(fixture.path("model")).unwrap();
    let mut generator = Generator::new(model).with_tokenizer(tokenizer.clone());
    let config = GenerationConfig::default().with_max_tokens(8);
    let template = tokenizer.chat_template().unwrap();
    let mut messages = vec![metal_candle::data::Message::user("hello")];
    for turn in &turns {
        let text = template.render(&messages, None, true, &serde_json::Map::new()).unwrap();
        let wanted = generator.generate(tokenizer.encode(&text, false).unwrap(), &config).unwrap();
        assert_eq!(turn["text"], wanted.text);
        messages.push(metal_candle::data::Message::assistant(wanted.text));
        messages.push(metal_candle::data::Message::user("and now?"));
    }
}

#[test]
fn commands_work_in_a_pipe() {
    let fixture = Fixture::new();
    let lines = "/system be brief\nhello\n/save talk.jsonl\n/tokens\n/set temperature 0.2\n/set\n/clear\n/load talk.jsonl\n\
                 /help\n/quit\nnot read\n";
    let ran = fixture.run_with(&WORDS, lines);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let row: serde_json::Value = serde_json::from_str(&fixture.text("talk.jsonl")).unwrap();
    let roles: Vec<_> = row["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant"]);
    for text in ["of 512 tokens", "temperature 0.2", "loaded 3 messages", "/retry"] {
        assert!(ran.stderr.contains(text), "{text} is not in\n{}", ran.stderr);
    }
    // the saved conversation is a row to train on
    fixture.ok("data check talk.jsonl --model model");
    let ran = fixture.run_with(&WORDS, "/sing\n");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("no command `/sing`"), "{}", ran.stderr);
}
