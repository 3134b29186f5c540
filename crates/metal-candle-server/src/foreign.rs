//! Refuses fields that change an answer elsewhere and that a route does not read, so that no client relies on them in vain.
//!
//! The names are those of OpenAI, Anthropic, llama.cpp, vLLM, `SGLang`, mlx-lm, TGI, Ollama and Mistral, and of this server's
//! other routes. `openapi.json` lists them, and the fields that each route reads.

use crate::document::reads;
use crate::error::ApiError;
use serde_json::{Map, Value};

/// The values of a field that have no effect, besides `null`.
#[derive(Debug, Clone, Copy)]
enum Neutral {
    /// None.
    Nothing,
    /// `false`, and empty texts, lists and objects.
    Off,
    /// `true`.
    On,
    /// This number, and `false`.
    Number(f64),
    /// -1, and the value of a token limit that the route reads.
    Limit,
}

use Neutral::{Limit, Nothing, Number, Off, On};

/// The token limits of the routes.
const LIMITS: [&str; 4] = ["max_completion_tokens", "max_output_tokens", "max_tokens", "n_predict"];

/// Fields that change the prompt or select another model.
const OF_PROMPTS: [(&str, Neutral); 33] = [
    ("adapters", Off),
    ("add_special_tokens", On),
    ("audio", Off),
    ("chat_template", Off),
    ("container", Off),
    ("context_management", Off),
    ("conversation", Off),
    ("documents", Off),
    ("function_call", Off),
    ("functions", Off),
    ("image_data", Off),
    ("images", Off),
    ("input", Off),
    ("input_extra", Off),
    ("input_ids", Off),
    ("input_prefix", Off),
    ("input_suffix", Off),
    ("instructions", Off),
    ("lora", Off),
    ("lora_path", Off),
    ("mcp_servers", Off),
    ("messages", Off),
    ("multimodal_data", Off),
    ("previous_response_id", Off),
    ("prompt", Off),
    ("prompt_embeds", Off),
    ("raw", Off),
    ("role_mapping", Off),
    ("suffix", Off),
    ("system", Off),
    ("template", Off),
    ("tools", Off),
    ("truncate_prompt_tokens", Number(-1.0)),
];

/// Fields that change the answer to a prompt.
const OF_ANSWERS: [(&str, Neutral); 77] = [
    ("allowed_token_ids", Off),
    ("background", Off),
    ("bad_words", Off),
    ("ban_eos_token", Off),
    ("banned_strings", Off),
    ("banned_tokens", Off),
    ("custom_logit_processor", Off),
    ("do_sample", On),
    ("dry_multiplier", Number(0.0)),
    ("dynatemp_range", Number(0.0)),
    ("early_stopping", Off),
    ("ebnf", Off),
    ("echo", Off),
    ("format", Off),
    ("grammar_lazy", Off),
    ("guidance_scale", Number(1.0)),
    ("guided_whitespace_pattern", Off),
    ("include_reasoning", On),
    ("include_stop_str_in_output", Off),
    ("json_mode", Off),
    ("length_penalty", Number(1.0)),
    ("logits_processors", Off),
    ("logprobs", Off),
    ("max_completion_tokens", Limit),
    ("max_length", Limit),
    ("max_new_tokens", Limit),
    ("max_output_tokens", Limit),
    ("max_tokens", Limit),
    ("min_keep", Number(0.0)),
    ("min_new_tokens", Number(0.0)),
    ("mirostat", Number(0.0)),
    ("modalities", Off),
    ("moderation", Off),
    ("n", Number(1.0)),
    ("n_cmpl", Number(1.0)),
    ("n_predict", Limit),
    ("n_probs", Number(0.0)),
    ("negative_prompt", Off),
    ("no_repeat_ngram_size", Number(0.0)),
    ("no_stop_trim", Off),
    ("num_beams", Number(1.0)),
    ("num_predict", Limit),
    ("num_return_sequences", Number(1.0)),
    ("options", Off),
    ("output_config", Off),
    ("output_format", Off),
    ("prompt_logprobs", Number(0.0)),
    ("random_seed", Nothing),
    ("reasoning", Off),
    ("reasoning_budget", Number(-1.0)),
    ("regex", Off),
    ("repetition_context_size", Nothing),
    ("repetition_penalty_range", Number(0.0)),
    ("response_format", Off),
    ("return_hidden_states", Off),
    ("return_token_ids", Off),
    ("return_tokens_as_token_ids", Off),
    ("safe_prompt", Off),
    ("sampling_params", Off),
    ("session_params", Off),
    ("smoothing_factor", Number(0.0)),
    ("stop_regex", Off),
    ("stop_sequences", Off),
    ("t_max_predict_ms", Number(-1.0)),
    ("text", Off),
    ("tfs_z", Number(1.0)),
    ("thinking", Off),
    ("thinking_budget_tokens", Number(-1.0)),
    ("top_a", Number(0.0)),
    ("top_logprobs", Number(0.0)),
    ("top_n_sigma", Number(-1.0)),
    ("typ_p", Number(1.0)),
    ("typical", Number(1.0)),
    ("typical_p", Number(1.0)),
    ("use_beam_search", Off),
    ("web_search_options", Nothing),
    ("xtc_probability", Number(0.0)),
];

/// Checks the body of a request to the route at `path`. Only routes that generate, or count or show prompts, are checked.
///
/// # Errors
/// A known field has an effect, and the route does not read it.
pub(crate) fn refuse(path: &str, body: &Map<String, Value>) -> Result<(), ApiError> {
    if !reads(path, "temperature") {
        return Ok(());
    }
    // a request to count or show a prompt may be a whole request for an answer
    let of_answers: &[_] = if reads(path, "stream") { &OF_ANSWERS } else { &[] };
    let is_limit = |value: &Value| LIMITS.iter().any(|name| reads(path, name) && body.get(*name) == Some(value));
    let has_effect = |(name, neutral): &&(&str, Neutral)| match body.get(*name) {
        None | Some(Value::Null) => false,
        Some(value) if reads(path, name) || neutral.includes(value) => false,
        Some(value) => !(matches!(neutral, Limit) && is_limit(value)),
    };
    match OF_PROMPTS.iter().chain(of_answers).find(has_effect) {
        Some((name, _)) => Err(ApiError::unsupported(*name, format!("`{name}` is not supported by `{path}`"))),
        None => Ok(()),
    }
}

impl Neutral {
    fn includes(self, value: &Value) -> bool {
        match (self, value) {
            (Off | Number(_), Value::Bool(false)) | (On, Value::Bool(true)) => true,
            (Off, Value::String(text)) => text.is_empty(),
            (Off, Value::Array(list)) => list.is_empty(),
            (Off, Value::Object(map)) => map.is_empty(),
            (Number(neutral), value) => value.as_f64() == Some(neutral),
            (Limit, value) => value.as_i64() == Some(-1),
            _ => false,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeSet;

    #[test]
    fn known_fields_that_a_route_does_not_read_are_refused() {
        let refused = |path: &str, name: &str, value: Value| {
            let body = json!({name: value});
            refuse(path, body.as_object().unwrap()).err().map(|error| error.param.unwrap())
        };
        let (chat, text, native) = ("/v1/chat/completions", "/v1/completions", "/completion");
        for (path, name, value) in [
            (chat, "lora", json!([{"id": 0}])),
            (text, "lora", json!([{"id": 0}])),
            (text, "max_completion_tokens", json!(5)),
            (text, "messages", json!([{"role": "user", "content": "a"}])),
            (text, "tools", json!([{}])),
            (chat, "system", json!("a")),
            (chat, "web_search_options", json!({})),
            (chat, "regex", json!("a")),
            (chat, "include_reasoning", json!(false)),
            (chat, "truncate_prompt_tokens", json!(5)),
            ("/v1/messages", "n", json!(2)),
            ("/v1/responses", "max_tokens", json!(5)),
            ("/v1/responses/input_tokens", "conversation", json!("a")),
            ("/apply-template", "chat_template", json!("a")),
            (native, "logprobs", json!(true)),
            (native, "typical_p", json!(0.5)),
            // not the number, but not off either
            (native, "n_probs", json!("a")),
        ] {
            assert_eq!(refused(path, name, value.clone()).as_deref(), Some(name), "{path} {name} {value}");
            assert_eq!(refused(path, name, Value::Null), None, "{path} {name}");
        }
        for (path, name, value) in [
            (native, "lora", json!([{"id": 0}])),
            (chat, "n", json!(2)),
            ("/v1/messages", "n", json!(1)),
            (chat, "n_probs", json!(0.0)),
            (chat, "functions", json!([])),
            (chat, "include_reasoning", json!(true)),
            ("/apply-template", "max_tokens", json!(5)),
            ("/tokenize", "messages", json!("a")),
            (chat, "unknown", json!("a")),
        ] {
            assert_eq!(refused(path, name, value.clone()), None, "{path} {name} {value}");
        }
        let both = |limit: i64| json!({"max_new_tokens": 5, "max_tokens": limit});
        assert!(refuse(text, both(5).as_object().unwrap()).is_ok());
        assert!(refuse(text, both(6).as_object().unwrap()).is_err());
    }

    #[test]
    fn the_document_lists_the_names() {
        let document: Value = serde_json::from_str(crate::document::DOCUMENT).unwrap();
        let listed = |key: &str| -> BTreeSet<String> { serde_json::from_value(document["info"][key].clone()).unwrap() };
        let names = |table: &[(&str, Neutral)]| table.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(listed("x-refused-of-prompts"), names(&OF_PROMPTS));
        assert_eq!(listed("x-refused-of-answers"), names(&OF_ANSWERS));
        assert!(OF_PROMPTS.is_sorted_by_key(|(name, _)| name) && OF_ANSWERS.is_sorted_by_key(|(name, _)| name));
    }
}
