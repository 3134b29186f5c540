//! Renders chat templates: reads JSON lines `{template, messages, tools, variables, add_generation_prompt}` and writes one JSON
//! line `{text}` or `{error}` for each. `dev/check_templates.py` compares the texts with transformers'.

use metal_candle::data::{ChatTemplate, Message};
use serde_json::{Map, Value, json};
use std::io::BufRead;

fn render(request: &Value) -> Result<String, String> {
    let source = request["template"].as_str().ok_or("expected `template`, a string")?;
    let messages: Vec<Message> = serde_json::from_value(request["messages"].clone()).map_err(|e| e.to_string())?;
    let variables = request["variables"].as_object().cloned().unwrap_or_else(Map::new);
    let tools = request["tools"].as_array().map(Vec::as_slice);
    let add_generation_prompt = request["add_generation_prompt"].as_bool().unwrap_or(false);
    let template = ChatTemplate::new(source).map_err(|e| e.to_string())?;
    template.render(&messages, tools, add_generation_prompt, &variables).map_err(|e| e.to_string())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for line in std::io::stdin().lock().lines() {
        let answer = match render(&serde_json::from_str(&line?)?) {
            Ok(text) => json!({ "text": text }),
            Err(error) => json!({ "error": error }),
        };
        println!("{answer}");
    }
    Ok(())
}
