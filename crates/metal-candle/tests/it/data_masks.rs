//! Which tokens of a row are trained.

use crate::data_chat::template;
use crate::data_tokenizer::TOKENIZER;
use metal_candle::data::{ChatTemplate, Dataset, DatasetOptions, Sample, Tokenizer, TrainedTurns, highlight};
use metal_candle::{Error, Result};
use serde_json::{Value, json};

fn read(tokenizer: &Tokenizer, options: &DatasetOptions, rows: &[Value]) -> Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    Dataset::from_file(&path, tokenizer, options)
}

fn with_template(name: &str) -> Tokenizer {
    TOKENIZER.clone().with_chat_template(Some(template(name)))
}

fn with_source(source: &str) -> Tokenizer {
    let template = ChatTemplate::new(source).unwrap().with_variable("eos_token", &json!("<|im_end|>"));
    TOKENIZER.clone().with_chat_template(Some(template))
}

/// The sample of a row, checked against the tokens of its text.
fn sample(tokenizer: &Tokenizer, options: &DatasetOptions, row: Value) -> Sample {
    read(tokenizer, options, &[row]).unwrap().samples.remove(0)
}

/// The trained parts of a row.
fn trained(tokenizer: &Tokenizer, options: &DatasetOptions, row: Value) -> Vec<String> {
    let sample = sample(tokenizer, options, row);
    let spans = highlight(&sample, tokenizer).unwrap();
    let text: String = spans.iter().map(|span| span.text.as_str()).collect();
    assert_eq!(text, tokenizer.decode(&sample.ids, false).unwrap());
    spans.into_iter().filter(|span| span.trained).map(|span| span.text).collect()
}

fn problem(tokenizer: &Tokenizer, options: &DatasetOptions, row: Value) -> String {
    match read(tokenizer, options, &[row]) {
        Err(Error::Data { problems }) => problems[0].message.clone(),
        other => panic!("expected a problem, found {other:?}"),
    }
}

fn all() -> DatasetOptions {
    DatasetOptions::default()
}

fn last() -> DatasetOptions {
    DatasetOptions { trained_turns: TrainedTurns::Last, ..all() }
}

fn dialogue() -> Value {
    json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "in words 🦀?"},
        {"role": "assistant", "content": "four 🦀\n"},
    ]})
}

#[test]
fn every_token_of_a_short_chat() {
    let tokenizer = with_template("qwen2.5");
    let row = json!({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]});
    let sample = sample(&tokenizer, &all(), row);
    let text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n";
    assert_eq!(sample.ids, tokenizer.encode(text, false).unwrap());
    let tokens = sample.ids.len();
    // `A`, `<|im_end|>` and the newline after it are the last three
    assert_eq!(tokenizer.decode(&sample.ids[tokens - 3..], false).unwrap(), "A<|im_end|>\n");
    let wanted: Vec<bool> = (0..tokens).map(|index| index == tokens - 3 || index == tokens - 2).collect();
    assert_eq!(sample.trained, wanted);
    assert_eq!(sample.num_trained(), 2);
}

#[test]
fn all_turns_or_the_last_or_those_marked() {
    // one of the two writes a text as it is, the other without white space around it
    for (name, four) in [("qwen2.5", "four 🦀\n<|im_end|>"), ("chatml", "four 🦀<|im_end|>")] {
        let tokenizer = with_template(name);
        assert_eq!(trained(&tokenizer, &all(), dialogue()), ["4<|im_end|>", four], "{name}");
        assert_eq!(trained(&tokenizer, &last(), dialogue()), [four], "{name}");
        let mut row = dialogue();
        row["messages"][4]["train"] = json!(false);
        assert_eq!(trained(&tokenizer, &all(), row.clone()), ["4<|im_end|>"], "{name}");
        row["messages"][2]["train"] = json!(true);
        assert_eq!(trained(&tokenizer, &last(), row.clone()), ["4<|im_end|>"], "{name}");
        row["messages"][2]["train"] = json!(false);
        assert_eq!(problem(&tokenizer, &all(), row), "no assistant message is trained");
        let mut row = dialogue();
        row["messages"][2]["weight"] = json!(0);
        assert_eq!(trained(&tokenizer, &all(), row), [four], "{name}");
    }
}

#[test]
fn without_masks_everything_is_trained() {
    let options = DatasetOptions { mask_prompt: false, ..all() };
    let sample = sample(&with_template("qwen2.5"), &options, dialogue());
    assert!(sample.trained.iter().all(|&trained| trained));
}

#[test]
fn tool_calls_are_trained_and_answers_of_tools_are_not() {
    let call = |arguments: Value| {
        json!({"messages": [
            {"role": "user", "content": "weather in Oslo and Rome?"},
            {"role": "assistant", "content": "Looking.", "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": arguments}},
                {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]},
            {"role": "tool", "content": "rain"},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "Rain, sun."},
        ], "tools": [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]})
    };
    for name in ["qwen2.5", "thinking"] {
        let tokenizer = with_template(name);
        let parts = trained(&tokenizer, &all(), call(json!({"city": "Oslo"})));
        assert_eq!(parts.len(), 2, "{name}: {parts:?}");
        assert!(
            parts[0].contains("Looking.") && parts[0].contains(r#"{"name": "weather", "arguments": {"city": "Oslo"}}"#)
        );
        assert!(parts[0].ends_with("</tool_call><|im_end|>") && parts[0].contains("Rome"), "{parts:?}");
        assert!(parts[1].ends_with("Rain, sun.<|im_end|>") && !parts.concat().contains("tool_response"), "{parts:?}");
        // arguments as the text of an object come to the same
        assert_eq!(trained(&tokenizer, &all(), call(json!(r#"{"city":"Oslo"}"#))), parts);
    }
}

#[test]
fn reasoning_is_trained_where_the_template_keeps_it() {
    let tokenizer = with_template("thinking");
    let row = json!({"messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nuno"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "dos", "reasoning_content": "second"},
    ]});
    // the reasoning of the first answer is dropped, for a question follows; in a prefix of the conversation it is not
    let parts = trained(&tokenizer, &all(), row);
    assert_eq!(parts, ["uno<|im_end|>", "<think>\nsecond\n</think>\n\ndos<|im_end|>"]);
    let plain = json!({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "uno"}]});
    assert_eq!(trained(&tokenizer, &all(), plain), ["<think>\n\n</think>\n\nuno<|im_end|>"]);
    // a call of a tool whose reasoning is dropped once the next question comes
    let row = json!({"messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "reasoning_content": "ask", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "reasoning_content": "tell", "content": "uno"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "dos"},
    ]});
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call><|im_end|>";
    assert_eq!(trained(&tokenizer, &all(), row), [call, "uno<|im_end|>", "<think>\n\n</think>\n\ndos<|im_end|>"]);
}

#[test]
fn templates_of_other_shapes() {
    // no generation prompt at all
    let tokenizer =
        with_source("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}");
    assert_eq!(trained(&tokenizer, &all(), dialogue()), ["4<|im_end|>", "four 🦀\n<|im_end|>"]);
    // marks that are no special tokens, and text that is trimmed
    let tokenizer = with_source(
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    );
    assert_eq!(trained(&tokenizer, &all(), dialogue()), [" 4<|im_end|>", " four 🦀<|im_end|>"]);
    // a template that only shows the last answer
    let tokenizer = with_source("{{ messages[-1].content }}{{ eos_token }}");
    let message = "the chat template omits the text of message 3, which is trained";
    assert_eq!(problem(&tokenizer, &all(), dialogue()), message);
    let message = "every token is trained, because the chat template writes nothing before the answer";
    assert_eq!(problem(&tokenizer, &last(), dialogue()), message);
    // a template that refuses
    let tokenizer = with_source("{{ raise_exception('no system') }}");
    assert_eq!(problem(&tokenizer, &all(), dialogue()), "chat template: line 1: no system");
}

#[test]
fn completions_with_and_without_a_template() {
    let row = json!({"prompt": "fn add", "completion": "(a: i32)"});
    assert_eq!(trained(&with_template("qwen2.5"), &all(), row.clone()), ["(a: i32)<|im_end|>"]);
    let plain = TOKENIZER.clone().with_chat_template(None);
    let sample = sample(&plain, &all(), row.clone());
    assert_eq!(plain.decode(&sample.ids, false).unwrap(), "fn add(a: i32)<|im_end|>");
    assert_eq!(trained(&plain, &all(), row.clone()), ["(a: i32)<|im_end|>"]);
    let options = DatasetOptions { mask_prompt: false, ..all() };
    assert_eq!(trained(&plain, &options, row), ["fn add(a: i32)<|im_end|>"]);
    // a token over the edge is not trained
    let whole = plain.encode("    fn", false).unwrap();
    assert!(whole.len() < plain.encode("  ", false).unwrap().len() + plain.encode("  fn", false).unwrap().len());
    let parts = trained(&plain, &all(), json!({"prompt": "  ", "completion": "  fn"}));
    assert_eq!(parts, [" fn<|im_end|>"]);
    let row = json!({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "d"}]});
    assert_eq!(trained(&with_template("qwen2.5"), &all(), row), ["d<|im_end|>"]);
}

#[test]
fn texts_are_trained_whole_and_end_once() {
    let sample = sample(&TOKENIZER, &all(), json!({"text": "fn main"}));
    assert_eq!(TOKENIZER.decode(&sample.ids, false).unwrap(), "fn main<|im_end|>");
    assert!(sample.trained.iter().all(|&trained| trained));
    let ended = read(&TOKENIZER, &all(), &[json!({"text": "fn main<|im_end|>"})]).unwrap();
    assert_eq!(ended.samples[0].ids, sample.ids);
}

#[test]
fn alpaca_and_sharegpt_are_conversations() {
    let tokenizer = with_template("qwen2.5");
    let row = json!({"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["a", "b"]], "text": "unused"});
    let alpaca = sample(&tokenizer, &all(), row.clone());
    let text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nAdd\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n";
    assert_eq!(tokenizer.decode(&alpaca.ids, false).unwrap(), text);
    assert_eq!(trained(&tokenizer, &all(), row), ["b<|im_end|>", "3<|im_end|>"]);
    let row = json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "Add\n1 2"}, {"from": "model", "value": "3"}], "system": "S"});
    let sharegpt = sample(&tokenizer, &all(), row);
    assert_eq!((&sharegpt.ids, &sharegpt.trained), (&alpaca.ids, &alpaca.trained));
    let row = json!({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"}, {"from": "observation", "value": "o"}, {"from": "gpt", "value": "b"}], "tools": "[{\"name\": \"f\"}]"});
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call><|im_end|>";
    let parts = trained(&tokenizer, &all(), row);
    assert!(parts.len() == 2 && parts[0].ends_with(call), "{parts:?}");
    assert_eq!(parts[1], "b<|im_end|>");
}

#[test]
fn rows_that_are_too_long() {
    let tokenizer = with_template("qwen2.5");
    let tokens = sample(&tokenizer, &all(), dialogue()).ids.len();
    let fits = DatasetOptions { max_tokens: Some(tokens), ..all() };
    assert_eq!(sample(&tokenizer, &fits, dialogue()).ids.len(), tokens);
    let short = DatasetOptions { max_tokens: Some(tokens - 4), ..all() };
    let message = format!("expected at most {} tokens, found {tokens}", tokens - 4);
    assert_eq!(problem(&tokenizer, &short, dialogue()), message);
    let cut = DatasetOptions { truncate: true, ..short };
    let sample = sample(&tokenizer, &cut, dialogue());
    assert_eq!((sample.ids.len(), sample.trained.len()), (tokens - 4, tokens - 4));
    let tiny = DatasetOptions { max_tokens: Some(5), truncate: true, ..all() };
    assert_eq!(problem(&tokenizer, &tiny, dialogue()), "no token of the first 5 is trained");
}

#[test]
fn reasoning_is_found_under_each_of_its_names() {
    // as in transformers, whose templates read the first two
    for read in ["reasoning_content", "thinking"] {
        let tokenizer = with_source(
            &"{% for m in messages %}[{{ m.role }}]{% if m.NAME is defined %}<think>{{ m.NAME }}</think>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
                .replace("NAME", read),
        );
        for written in ["reasoning_content", "thinking", "reasoning"] {
            let row = json!({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", written: "two and two"}]});
            assert_eq!(trained(&tokenizer, &all(), row), ["<think>two and two</think>4<|im_end|>"], "{read} {written}");
        }
    }
}

#[test]
fn older_calls_of_functions_are_calls_of_tools() {
    let tokenizer = with_template("qwen2.5");
    let parameters = json!({"type": "object", "properties": {"which": {"type": "string"}}});
    let function = json!({"name": "open", "description": "d", "parameters": parameters});
    let older = json!({"messages": [
        {"role": "user", "content": "Open"},
        {"role": "assistant", "content": null, "function_call": {"name": "open", "arguments": "{\"which\": \"front\"}"}},
        {"role": "function", "name": "open", "content": "opened"},
        {"role": "assistant", "content": "Done."},
    ], "functions": [function]});
    let newer = json!({"messages": [
        {"role": "user", "content": "Open"},
        {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "open", "arguments": "{\"which\": \"front\"}"}}]},
        {"role": "tool", "name": "open", "content": "opened"},
        {"role": "assistant", "content": "Done."},
    ], "tools": [{"type": "function", "function": function}]});
    let parts = trained(&tokenizer, &all(), older.clone());
    assert!(parts[0].contains(r#"{"name": "open", "arguments": {"which": "front"}}"#), "{parts:?}");
    let (older_sample, newer_sample) = (sample(&tokenizer, &all(), older.clone()), sample(&tokenizer, &all(), newer));
    assert_eq!((older_sample.ids, older_sample.trained), (newer_sample.ids, newer_sample.trained));
    let mut both = older;
    both["messages"][1]["tool_calls"] = json!([{"function": {"name": "f", "arguments": {}}}]);
    assert!(problem(&tokenizer, &all(), both).contains("both `tool_calls` and `function_call`"));
}

#[test]
fn keys_that_say_what_is_trained() {
    let tokenizer = with_template("chatml");
    for (key, value) in
        [("trainable", json!(false)), ("loss_mask", json!(0)), ("loss", json!(false)), ("masked", json!(true))]
    {
        let mut row = dialogue();
        row["messages"][2][key] = value.clone();
        assert_eq!(trained(&tokenizer, &all(), row), ["four 🦀<|im_end|>"], "{key}");
        let mut row = dialogue();
        row[key] = value;
        assert!(problem(&tokenizer, &all(), row).contains(key));
    }
    let mut row = dialogue();
    row["messages"][2]["train_detail"] = json!([]);
    assert!(problem(&tokenizer, &all(), row).contains("`train_detail` of a message is not supported"));
    let row = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "refusal": "no"}]});
    assert!(problem(&tokenizer, &all(), row).contains("text at `refusal`"));
}

#[test]
fn variables_of_templates_and_rows_reach_the_template() {
    let source = "{% for m in messages %}[{{ mood }}]{{ m.content }}{{ eos_token }}{% endfor %}";
    let row = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let text = |tokenizer: &Tokenizer, row: &Value| {
        tokenizer.decode(&sample(tokenizer, &all(), row.clone()).ids, false).unwrap()
    };
    let plain = with_source(source);
    assert_eq!(text(&plain, &row), "[]a<|im_end|>[]b<|im_end|>");
    let template = plain.chat_template().unwrap().clone().with_variable("mood", &json!("calm"));
    let calm = plain.with_chat_template(Some(template));
    assert_eq!(text(&calm, &row), "[calm]a<|im_end|>[calm]b<|im_end|>");
    let mut own = row.clone();
    own["chat_template_kwargs"] = json!({"mood": "bright"});
    assert_eq!(text(&calm, &own), "[bright]a<|im_end|>[bright]b<|im_end|>");
    own["chat_template_kwargs"] = json!({"messages": []});
    assert!(problem(&calm, &all(), own).contains("cannot set `messages`"));
}

#[test]
fn results_of_tools_within_a_turn_are_not_trained() {
    let tokenizer = with_source(
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}[call {{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% if m.tool_calls and not loop.last and loop.nextitem.role == 'tool' %}[result {{ loop.nextitem.content }}]{% endif %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    );
    let row = json!({"messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "It is warm.", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"what": "sky"}}}]},
        {"role": "tool", "name": "look", "content": "MEASURED 31"},
        {"role": "assistant", "content": "More?"},
    ]});
    let parts = trained(&tokenizer, &all(), row);
    assert_eq!(parts.concat(), "[call look {\"what\": \"sky\"}]It is warm.<|im_end|>More?<|im_end|>");
    assert_eq!(parts.len(), 3, "{parts:?}");
}

#[test]
fn marks_of_the_template_are_what_is_trained() {
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}Sure: {% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    // as `return_assistant_tokens_mask` of transformers has it: without the end token, which is not marked
    let tokenizer = with_source(source);
    assert_eq!(trained(&tokenizer, &last(), dialogue()).concat().trim(), "four 🦀");
    // marks that mark nothing
    let tokenizer = with_source(&source.replace("'assistant' %}Sure: ", "'other' %}Sure: "));
    assert_eq!(trained(&tokenizer, &last(), dialogue()), ["four 🦀\n<|im_end|>"]);
}

#[test]
fn templates_that_require_ids_of_calls() {
    let tokenizer = with_source(
        "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.revindex0 < 4 %}[TOOLS]{{ tools | tojson }}{% endif %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[CALLS]{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids of length 9') }}{% endif %}{{ c.function | tojson }}, {{ c.id }}{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}[RESULT]{{ m.content }}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids of length 9') }}{% endif %}{{ m.tool_call_id }}[/RESULT]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    );
    let row = json!({"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": {"b": "c"}}}]},
        {"role": "tool", "tool_call_id": "x", "content": "d"},
        {"role": "assistant", "content": "e"},
        // tools are written before the last question, so no beginning is rendered alike
        {"role": "user", "content": "g"},
        {"role": "assistant", "content": "h"},
    ], "tools": [{"type": "function", "function": {"name": "f"}}]});
    let call = "[CALLS]{\"name\": \"f\", \"arguments\": {\"b\": \"c\"}}, call00000<|im_end|>";
    let parts = trained(&tokenizer, &all(), row);
    assert_eq!(parts, [call, "e<|im_end|>", "h<|im_end|>"]);
}

#[test]
fn long_conversations_take_linear_time() {
    let tokenizer = with_template("thinking");
    let turns = |count: usize| {
        let pair = |index: usize| {
            [
                json!({"role": "user", "content": format!("q{index}")}),
                json!({"role": "assistant", "content": format!("a{index}")}),
            ]
        };
        json!({"messages": (0..count).flat_map(pair).collect::<Vec<_>>()})
    };
    let start = std::time::Instant::now();
    let parts = trained(&tokenizer, &all(), turns(300));
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    assert_eq!(parts.len(), 300);
    assert_eq!((parts[0].as_str(), parts[298].as_str()), ("a0<|im_end|>", "a298<|im_end|>"));
    assert_eq!(parts[299], "<think>\n\n</think>\n\na299<|im_end|>");
}

#[test]
fn answers_of_which_the_template_writes_a_part_or_nothing() {
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}CALLS{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}";
    let call = json!([{"type": "function", "function": {"name": "look", "arguments": {"what": 7.5}}}]);
    let row = |content: &str, calls: &serde_json::Value| {
        json!({"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": content, "tool_calls": calls},
        ]})
    };
    // numbers only
    let writes = "{% for c in m.tool_calls %}{{ c.function.arguments.what }}{% endfor %}";
    let tokenizer = with_source(&source.replace("CALLS", writes));
    assert_eq!(trained(&tokenizer, &all(), row("", &call)), ["7.5<|im_end|>"]);
    // nothing of the calls
    let tokenizer = with_source(&source.replace("CALLS", "{{ m.content }}"));
    let message = "the chat template omits the tool calls of message 2, which is trained";
    assert_eq!(problem(&tokenizer, &all(), row("", &call)), message);
    assert_eq!(trained(&tokenizer, &all(), row("b", &call)), ["b<|im_end|>"]);
}

#[test]
fn turns_that_later_messages_change_are_found_to_their_end() {
    let tokenizer = with_source(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thinking and loop.last %}({{ m.thinking }}){% endif %}{% for c in m.tool_calls or [] %}[call {{ c.function.arguments | tojson }}]{% endfor %}{{ m.content }}{% if loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    );
    let call = json!([{"type": "function", "function": {"name": "look", "arguments": {"what": "sky", "days": 3}}}]);
    let row = json!({"messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": call},
        {"role": "tool", "content": "31"},
        {"role": "assistant", "content": " "},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Warm."},
    ]});
    let parts = trained(&tokenizer, &all(), row.clone());
    assert_eq!(parts, ["[call {\"what\": \"sky\", \"days\": 3}]<|im_end|>", "Warm.<|endoftext|>"]);

    // a call that no special token ends
    let tokenizer = with_source(
        "{% for m in messages %}{% if m.role == 'tool' %}<tool>{{ m.content }}</tool>{% else %}<|im_start|>{{ m.role }}\n{% if m.thinking and loop.last %}({{ m.thinking }}){% endif %}{% for c in m.tool_calls or [] %}[call {{ c.function.arguments | tojson }}]/call;{% else %}{{ m.content }}<|im_end|>{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    );
    assert_eq!(
        trained(&tokenizer, &all(), row).concat(),
        "[call {\"what\": \"sky\", \"days\": 3}]/call; <|im_end|>Warm.<|im_end|>"
    );
}
