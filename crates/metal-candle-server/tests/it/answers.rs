//! Answers equal those of the library, however they are asked for.

use crate::running::{Running, alone, chat, tokenizer};
use metal_candle::inference::{GenerationConfig, SamplingConfig};
use serde_json::{Value, json};
use std::sync::LazyLock;

static SERVER: LazyLock<Running> = LazyLock::new(|| Running::start(Running::small()));

fn joined(events: &[Value], index: usize, text: impl Fn(&Value) -> &Value) -> String {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    choices.filter(|choice| choice["index"] == index).filter_map(|choice| text(choice).as_str()).collect()
}

#[test]
fn many_answers_at_once_equal_the_library_alone() {
    let prompts = ["fn main() {\n", "impl Stack {\n", "/// Returns", "use std::", "let x = vec![", "é🦀 "];
    let threads: Vec<_> = (0..24)
        .map(|number| {
            std::thread::spawn(move || {
                let (prompt, seed) = (prompts[number % prompts.len()], number as u64);
                let temperature = if number % 2 == 0 { 0.0 } else { 1.0 };
                let body = json!({
                    "prompt": prompt, "max_tokens": 5 + number, "temperature": temperature, "seed": seed,
                    // the model's own advice says otherwise
                    "top_k": 0, "top_p": 1,
                    "logprobs": (number % 3 == 0).then_some(2),
                });
                let sampling = SamplingConfig::default().with_temperature(temperature).with_seed(seed);
                let config = GenerationConfig::default().with_max_tokens(5 + number).with_sampling(sampling);
                let text = if number % 4 < 2 {
                    SERVER.ok("/v1/completions", &body)["choices"][0]["text"].as_str().unwrap().to_owned()
                } else {
                    joined(&SERVER.stream("/v1/completions", &body), 0, |choice| &choice["text"])
                };
                assert_eq!(text, alone(prompt, &config), "{body}");
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_stream_of_a_chat_joins_to_the_answer() {
    let mut body = chat("Returns the number of values, é 🦀.", 24);
    body["n"] = 3.into();
    body["temperature"] = 0.9.into();
    body["seed"] = 7.into();
    let whole = SERVER.ok("/v1/chat/completions", &body);
    assert_eq!(whole["object"], "chat.completion");
    body["stream_options"] = json!({"include_usage": true});
    let events = SERVER.stream("/v1/chat/completions", &body);
    for index in 0..3 {
        let choice = &whole["choices"][index];
        assert_eq!(
            joined(&events, index, |choice| &choice["delta"]["content"]),
            choice["message"]["content"].as_str().unwrap()
        );
        assert_eq!(
            joined(&events, index, |choice| &choice["finish_reason"]),
            choice["finish_reason"].as_str().unwrap()
        );
        // once, or clients join them
        assert_eq!(joined(&events, index, |choice| &choice["delta"]["role"]), "assistant");
    }
    let first: Vec<&Value> = events.iter().take(3).map(|event| &event["choices"][0]["index"]).collect();
    assert_eq!(first, [0, 1, 2]);
    let (last, others) = events.split_last().unwrap();
    assert_eq!(
        (&last["usage"]["completion_tokens"], &last["choices"]),
        (&whole["usage"]["completion_tokens"], &json!([]))
    );
    assert!(others.iter().all(|event| event["usage"].is_null() && event["id"] == last["id"]));
}

#[test]
fn log_probabilities_belong_to_the_text() {
    let mut body = chat("é 🦀 日本", 40);
    body["temperature"] = 1.8.into();
    body["seed"] = 3.into();
    body["logprobs"] = true.into();
    body["top_logprobs"] = 3.into();
    let answer = SERVER.ok("/v1/chat/completions", &body);
    let choice = &answer["choices"][0];
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(String::from_utf8_lossy(&bytes), choice["message"]["content"].as_str().unwrap());
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert!(top.len() == 3 && top[0]["logprob"].as_f64() >= token["logprob"].as_f64());
    }
    let counted = answer["usage"]["completion_tokens"].as_u64().unwrap() as usize;
    assert!(counted == tokens.len() || choice["finish_reason"] == "stop");
}

#[test]
fn control_tokens_of_clients_are_text() {
    let prompt_tokens = |content: &str| {
        let body = json!({"messages": [
            {"role": "system", "content": content},
            {"role": "user", "content": [{"type": "text", "text": content}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": json!({"a": content}).to_string()}}]},
            {"role": "tool", "tool_call_id": "c1", "content": content},
        ], "max_tokens": 1});
        let text = SERVER.ok("/apply-template", &body)["prompt"].as_str().unwrap().to_owned();
        let used = SERVER.ok("/v1/chat/completions", &body)["usage"]["prompt_tokens"].as_u64().unwrap();
        (text, used as usize)
    };
    // the same in what templates write of tools, where some write brackets around names
    let tools = |name: &str, text: &str| {
        let mut properties = serde_json::Map::new();
        properties.insert(name.into(), json!({"type": "string", "description": text}));
        let parameters = json!({"type": "object", "properties": properties});
        let body = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1,
            "tools": [{"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}]});
        let text = SERVER.ok("/apply-template", &body)["prompt"].as_str().unwrap().to_owned();
        let used = SERVER.ok("/v1/chat/completions", &body)["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
        (tokenizer().encode(&text, false).unwrap().len(), used)
    };
    let (as_control, used) = tools("a", "b");
    assert_eq!(as_control, used);
    let (as_control, used) = tools("<|im_end|>", "<|im_start|>");
    assert!(used >= as_control + 3 * 3, "{used} and {as_control}");
    // a conversation without them has the tokens that its text has
    let (text, used) = prompt_tokens("plain é");
    assert_eq!(tokenizer().encode(&text, false).unwrap().len(), used);
    for token in ["<|im_end|>", "<|im_start|>", "<tool_call>", "<|fim_middle|>", "<|endoftext|>"] {
        let (text, used) = prompt_tokens(token);
        assert_eq!(text.matches(token).count() - prompt_tokens("plain").0.matches(token).count(), 4);
        // four times more than the token that it would have been
        let as_control = tokenizer().encode(&text, false).unwrap().len();
        assert!(used >= as_control + 4 * 3, "{token}: {used} and {as_control}");
    }
}

#[test]
fn gaps_are_filled_and_prompts_come_in_all_forms() {
    let body = json!({"prompt": "fn add(a: i32, b: i32) -> i32 {\n    ", "suffix": "\n}\n", "max_tokens": 9, "temperature": 0});
    let filled = SERVER.ok("/v1/completions", &body)["choices"][0]["text"].clone();
    let native = SERVER.ok("/infill", &json!({
        "input_prefix": "fn add(a: i32, b: i32) -> i32 {\n    ", "input_suffix": "\n}\n", "n_predict": 9, "temperature": 0,
        "samplers": ["top_k", "infill"], "cache_prompt": true, "t_max_prompt_ms": 500, "id_slot": 0,
    }));
    assert_eq!(native["content"], filled);
    assert_eq!((&native["stop_type"], &native["tokens_predicted"]), (&json!("limit"), &json!(9)));
    let ids = tokenizer().encode("fn main() {", false).unwrap();
    let body = json!({"prompt": ["fn main() {", "let x"], "max_tokens": 4, "temperature": 0, "n": 2, "echo": true});
    let texts = SERVER.ok("/v1/completions", &body);
    let texts: Vec<&str> =
        texts["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert!(
        texts.len() == 4
            && texts[0] == texts[1]
            && texts[0].starts_with("fn main() {")
            && texts[2].starts_with("let x")
    );
    let body = json!({"prompt": ids, "max_tokens": 4, "temperature": 0});
    let of_ids = SERVER.ok("/v1/completions", &body)["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(format!("fn main() {{{of_ids}"), texts[0]);
    let body = json!({"content": "é<|im_end|>", "with_pieces": true, "parse_special": false});
    let pieces = SERVER.ok("/tokenize", &body)["tokens"].clone();
    let ids: Vec<&Value> = pieces.as_array().unwrap().iter().map(|piece| &piece["id"]).collect();
    assert!(ids.len() > 4);
    assert_eq!(SERVER.ok("/detokenize", &json!({"tokens": ids}))["content"], "é<|im_end|>");
}

#[test]
fn an_answer_continues_the_last_message() {
    for text in ["end", "<", "m", "fn main() {"] {
        let body = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}],
            "continue_final_message": true});
        let prompt = SERVER.ok("/apply-template", &body)["prompt"].as_str().unwrap().to_owned();
        assert!(prompt.ends_with(&format!("<|im_start|>assistant\n{text}")), "{prompt}");
    }
    let body = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}],
        "max_tokens": 3, "temperature": 0});
    assert!(SERVER.ok("/v1/messages", &body)["usage"]["input_tokens"].as_u64() > Some(5));
}

#[test]
fn calls_without_arguments_are_shown_as_calls() {
    for function in
        [json!({"name": "f"}), json!({"name": "f", "arguments": null}), json!({"name": "f", "arguments": "{}"})]
    {
        let call = json!({"role": "assistant", "tool_calls": [{"function": function}]});
        let prompt = SERVER.ok("/apply-template", &json!({"messages": [call]}))["prompt"].clone();
        assert!(prompt.as_str().unwrap().contains("{\"name\": \"f\", \"arguments\": {}}"), "{prompt}");
    }
}

#[test]
fn calls_and_schemas_hold_in_every_format() {
    let schema = json!({"type": "object", "required": ["a", "b"],
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}}});
    let function = json!({"name": "add", "description": "Adds.", "parameters": schema});
    let holds = |arguments: &Value| {
        let number = arguments["a"].as_u64().is_some_and(|number| number < 10);
        let keys = arguments.as_object().map_or(0, serde_json::Map::len);
        assert!(number && keys == 2 && (arguments["b"] == "x" || arguments["b"] == "y"), "{arguments}");
    };
    let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let mut body = chat("Add.", 120);
    body["tools"] = json!([{"type": "function", "function": function}]);
    body["tool_choice"] = json!({"type": "function", "function": {"name": "add"}});
    let whole = SERVER.ok("/v1/chat/completions", &body)["choices"][0].clone();
    assert_eq!((&whole["finish_reason"], &whole["message"]["content"]), (&json!("tool_calls"), &Value::Null));
    let calls = whole["message"]["tool_calls"].as_array().unwrap();
    let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
    holds(&parse(arguments));
    assert!(calls.len() == 1 && calls[0]["id"].as_str().unwrap().starts_with("call_"));
    let events = SERVER.stream("/v1/chat/completions", &body);
    let function = |choice: &Value, name: &str| choice["delta"]["tool_calls"][0]["function"][name].clone();
    let streamed = |name: &str| -> String {
        let choices = events.iter().map(|event| &event["choices"][0]);
        choices.filter_map(|choice| function(choice, name).as_str().map(str::to_owned)).collect()
    };
    assert_eq!((streamed("name").as_str(), streamed("arguments").as_str()), ("add", arguments));
    assert_eq!(joined(&events, 0, |choice| &choice["finish_reason"]), "tool_calls");
    // a call that is cut is text, and says so
    body["max_tokens"] = 8.into();
    let cut = SERVER.ok("/v1/chat/completions", &body)["choices"][0].clone();
    assert!(cut["finish_reason"] == "length" && cut["message"]["tool_calls"].is_null());
    assert!(cut["message"]["content"].as_str().unwrap().contains("<tool_call>"));

    let tool = json!({"name": "add", "parameters": schema, "type": "function"});
    let body =
        json!({"input": "Add.", "tools": [tool], "tool_choice": {"type": "function", "name": "add"}, "temperature": 0});
    let response = SERVER.ok("/v1/responses", &body);
    let call = &response["output"][0];
    assert_eq!((&response["status"], &call["type"]), (&json!("completed"), &json!("function_call")));
    holds(&parse(call["arguments"].as_str().unwrap()));
    let body = json!({"messages": [{"role": "user", "content": "Add."}], "max_tokens": 120, "temperature": 0,
        "tools": [{"name": "add", "input_schema": schema}], "tool_choice": {"type": "tool", "name": "add"}});
    let message = SERVER.ok("/v1/messages", &body);
    assert_eq!((&message["stop_reason"], &message["content"][0]["name"]), (&json!("tool_use"), &json!("add")));
    holds(&message["content"][0]["input"]);

    let mut body = chat("Answer.", 120);
    body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
    let answer = SERVER.ok("/v1/chat/completions", &body)["choices"][0].clone();
    holds(&parse(answer["message"]["content"].as_str().unwrap()));
    // with tools, it is a call or an answer in the format
    body["tools"] = json!([{"type": "function", "function": {"name": "add", "parameters": schema}}]);
    body["parallel_tool_calls"] = false.into();
    for is_call in [false, true] {
        // the marker of a call
        body["logit_bias"] = if is_call { json!({"4088": 100}) } else { json!({}) };
        let answer = SERVER.ok("/v1/chat/completions", &body)["choices"][0].clone();
        assert_eq!(answer["finish_reason"], if is_call { "tool_calls" } else { "stop" });
        let message = &answer["message"];
        let text = if is_call { &message["tool_calls"][0]["function"]["arguments"] } else { &message["content"] };
        holds(&parse(text.as_str().unwrap()));
    }
    let format = json!({"type": "json_schema", "name": "s", "schema": schema});
    let body = json!({"input": "Answer.", "temperature": 0, "text": {"format": format}});
    holds(&parse(SERVER.ok("/v1/responses", &body)["output"][0]["content"][0]["text"].as_str().unwrap()));
    let body = json!({"input": "Answer.", "guided_regex": "[0-4]{3}"});
    let text = SERVER.ok("/v1/responses", &body)["output"][0]["content"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.len() == 3 && text.parse::<u32>().is_ok(), "{text}");
    let tool = |name: &str| json!({"type": "function", "name": name, "parameters": schema});
    let allowed = json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "b"}]});
    let body =
        json!({"input": "Add.", "tools": [tool("a"), tool("b")], "tool_choice": allowed, "parallel_tool_calls": false});
    assert_eq!(SERVER.ok("/v1/responses", &body)["output"][0]["name"], "b");
    // errors name the fields of the format
    for (path, body, param) in [
        ("/v1/responses", json!({"input": "a", "tools": [{"type": "function", "name": "a b"}]}), "tools[0].name"),
        ("/v1/responses", json!({"input": "a", "text": {"format": {"type": "xml"}}}), "text.format.type"),
        ("/v1/responses", json!({"input": "a", "tools": [{"type": "web_search"}]}), "tools[0].type"),
        (
            "/v1/responses",
            json!({"input": "a", "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": {}}}),
            "tool_choice.tools",
        ),
        (
            "/v1/responses",
            json!({"input": "a", "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}}),
            "tool_choice.tools[0].type",
        ),
    ] {
        assert_eq!(SERVER.refusal(path, &body).1, param);
    }
    let body = json!({"prompt": "It is ", "max_tokens": 20, "guided_regex": "[0-4]{3}", "n": 2, "seed": 1});
    for choice in SERVER.ok("/v1/completions", &body)["choices"].as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        assert!(text.len() == 3 && text.bytes().all(|byte| (b'0'..b'5').contains(&byte)), "{text}");
    }
}

#[test]
fn scores_and_embeddings_belong_to_their_texts() {
    let body = json!({"prompt": "fn main() {", "max_tokens": 0, "echo": true, "logprobs": 1});
    let choice = SERVER.ok("/v1/completions", &body)["choices"][0].clone();
    let scores = choice["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    assert!(choice["text"] == "fn main() {" && scores[0].is_null() && scores.len() > 2);
    // the score of a token is that of a generated one
    let first = json!({"prompt": "fn", "max_tokens": 1, "logprobs": 5, "temperature": 0, "logit_bias": {
        tokenizer().encode("fn main() {", false).unwrap()[1].to_string(): 100}});
    let generated = SERVER.ok("/v1/completions", &first)["choices"][0]["logprobs"]["token_logprobs"][0].clone();
    assert_eq!(generated, scores[1]);
    let embed = |input: Value, format: &str| {
        let answer = SERVER.ok("/v1/embeddings", &json!({"input": input, "encoding_format": format}));
        answer["data"].as_array().unwrap().iter().map(|one| one["embedding"].clone()).collect::<Vec<Value>>()
    };
    let two = embed(json!(["fn main() {", "struct A;"]), "float");
    assert!(two[0] != two[1] && embed(json!("struct A;"), "float")[0] == two[1]);
    let length: f64 = two[0].as_array().unwrap().iter().map(|value| value.as_f64().unwrap().powi(2)).sum();
    assert!((length - 1.0).abs() < 1e-4);
    assert!(embed(json!("struct A;"), "base64")[0].as_str().unwrap().len() > 100);
}

#[test]
fn limits_have_the_names_of_other_servers() {
    let count = |body: Value| SERVER.ok("/v1/chat/completions", &body)["usage"]["completion_tokens"].as_u64().unwrap();
    let messages = json!([{"role": "user", "content": "fn"}]);
    assert_eq!(count(json!({"messages": messages, "n_predict": 3, "ignore_eos": true})), 3);
    assert_eq!(count(json!({"messages": messages, "n_predict": 0})), 1);
    assert_eq!(count(json!({"messages": messages, "n_predict": 9, "max_tokens": 2, "ignore_eos": true})), 2);
    // the rest of the context
    let body = json!({"messages": messages, "max_tokens": -1, "ignore_eos": true, "temperature": 0});
    assert!(count(body) > 400);
    // a token that is named twice comes only after the least tokens
    let first = SERVER.ok("/v1/chat/completions", &json!({"messages": messages, "temperature": 0, "max_tokens": 1}));
    let first =
        SERVER.ok("/tokenize", &json!({"content": first["choices"][0]["message"]["content"]}))["tokens"][0].clone();
    let ends = |least: u64| {
        let body = json!({"messages": messages, "temperature": 0, "min_tokens": least, "max_tokens": 30,
            "stop_token_ids": [first, first]});
        count(body)
    };
    assert!(ends(0) == 1 && ends(9) > 9);
    let text = SERVER.ok("/v1/completions", &json!({"prompt": "fn", "n_predict": 4, "ignore_eos": true}));
    assert_eq!(text["usage"]["completion_tokens"], 4);
    let body = json!({"messages": messages, "max_tokens": 3, "min_tokens": 4});
    assert_eq!(SERVER.refusal("/v1/chat/completions", &body).1, "min_tokens");
    assert_eq!(
        SERVER.refusal("/v1/chat/completions", &json!({"messages": messages, "max_tokens": -2})).1,
        "max_tokens"
    );
}

#[test]
fn refusals_name_the_field() {
    let user = json!([{"role": "user", "content": "a"}]);
    let cases = [
        ("/v1/chat/completions", json!({}), "messages"),
        ("/v1/chat/completions", json!({"messages": []}), "messages"),
        ("/v1/chat/completions", json!({"messages": [{"role": "x", "content": "a"}]}), "messages[0].role"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        ("/v1/chat/completions", json!({"messages": user, "model": "other"}), "model"),
        ("/v1/chat/completions", json!({"messages": user, "n": 1.0}), "n"),
        ("/v1/chat/completions", json!({"messages": user, "n": 9}), "n"),
        ("/v1/chat/completions", json!({"messages": user, "stop": ["a", ""]}), "stop[1]"),
        ("/v1/chat/completions", json!({"messages": user, "logit_bias": {"x": 1}}), "logit_bias"),
        ("/v1/chat/completions", json!({"messages": user, "max_tokens": 5, "max_completion_tokens": 6}), "max_tokens"),
        ("/v1/chat/completions", json!({"messages": user, "max_tokens": 0}), "max_tokens"),
        ("/v1/chat/completions", json!({"messages": user, "top_logprobs": 2}), "top_logprobs"),
        ("/v1/chat/completions", json!({"messages": user, "functions": [{}]}), "functions"),
        ("/v1/chat/completions", json!({"messages": user, "chat_template": "x"}), "chat_template"),
        ("/v1/completions", json!({"prompt": []}), "prompt"),
        ("/v1/completions", json!({"prompt": [[1], "a", 2]}), "prompt"),
        ("/v1/completions", json!({"prompt": [999_999]}), "prompt[0]"),
        ("/v1/completions", json!({"prompt": [1], "suffix": "a"}), "suffix"),
        ("/v1/completions", json!({"prompt": "a", "best_of": 5}), "best_of"),
    ];
    for (path, body, param) in cases {
        let (_, found, message) = SERVER.refusal(path, &body);
        assert_eq!(found, param, "{body}: {message}");
        assert!(!message.is_empty());
    }
    // before the stream begins
    let long = json!({"messages": [{"role": "user", "content": "a b ".repeat(600)}], "stream": true});
    let (status, value) = SERVER.post("/v1/chat/completions", &long);
    assert_eq!(
        (status, &value["error"]["code"], &value["error"]["n_ctx"]),
        (400, &json!("context_length_exceeded"), &json!(512))
    );
    assert_eq!(SERVER.get("/v1/nothing").0, 404);
    assert_eq!(SERVER.get("/v1/completions").0, 405);
    assert_eq!(SERVER.get("/v1/models/other").0, 404);
    assert_eq!(SERVER.get("/v1/models/nano").1["id"], "nano");
}
