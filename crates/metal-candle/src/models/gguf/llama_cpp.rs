//! What llama.cpp does not load or ignores, although a GGUF file can hold it.

use crate::models::ModelConfig;
use crate::models::description::{Description, FeedForwardSpec};
use crate::ops::rotary::RotaryScaling;
use metal_candle_kernels::Mask;

/// Architectures without a separate head.
const TIED: &[&str] = &["gemma", "gemma2", "command-r", "cohere2"];
/// Architectures without a tied head.
const UNTIED: &[&str] = &["olmo2", "stablelm"];
/// Architectures whose heads together are as wide as the embedding.
const SQUARE: &[&str] = &["qwen2", "phi3", "olmo2", "olmo", "starcoder2", "command-r", "cohere2"];
/// Architectures that may have a bias after attention.
const OUTPUT_BIAS: &[&str] = &["llama", "granite", "starcoder2", "jais2"];
/// Architectures that must have a bias after attention and in the MLP.
const ALL_BIASES: &[&str] = &["starcoder2", "jais2"];
/// Architectures whose windows are ignored.
const WITHOUT_WINDOWS: &[&str] = &["llama", "phi3", "starcoder2"];

/// One sentence for each limit of llama.cpp that concerns a model, as of October 2026.
pub(super) fn limits(name: &str, config: &ModelConfig, description: &Description) -> Vec<String> {
    let mut limits = Vec::new();
    let attention = || description.layers.iter().map(|layer| &layer.attention);
    let has_output_bias = attention().any(|attention| attention.has_output_bias);
    let has_mlp_bias = description.layers.iter().any(|layer| match &layer.feed_forward {
        FeedForwardSpec::Gated(mlp) => mlp.has_bias,
        FeedForwardSpec::Plain(mlp) => mlp.has_bias,
    });
    let is_square = attention().all(|attention| attention.heads * attention.head_dim == config.hidden_size);
    let separate = if config.tie_word_embeddings { "a tied head" } else { "a separate head" };
    let refused = [
        (separate, if config.tie_word_embeddings { UNTIED.contains(&name) } else { TIED.contains(&name) }),
        ("a bias after attention", has_output_bias && !OUTPUT_BIAS.contains(&name)),
        ("no bias after attention or in the MLP", ALL_BIASES.contains(&name) && !(has_output_bias && has_mlp_bias)),
        ("heads of another width than the embedding", !is_square && SQUARE.contains(&name)),
        (
            "an odd number of rotated elements in a head",
            description.rotary.iter().any(|table| !table.dim.is_multiple_of(2)),
        ),
        (
            "norms of q and k in fewer than 64 layers",
            name == "command-r"
                && description.layers.len() < 64
                && attention().any(|attention| attention.qk_norm.is_some()),
        ),
    ];
    for (what, _) in refused.iter().filter(|(_, is_refused)| *is_refused) {
        limits.push(format!("llama.cpp does not load `{name}` models with {what}"));
    }
    if WITHOUT_WINDOWS.contains(&name) && attention().any(|attention| matches!(attention.mask, Mask::Window(_))) {
        limits.push(format!("llama.cpp ignores attention windows of `{name}` models"));
    }
    let has_other_betas = description.rotary.iter().any(|spec| {
        matches!(spec.scaling, RotaryScaling::Yarn { beta_fast, beta_slow, .. } if (beta_fast, beta_slow) != (32.0, 1.0))
    });
    if has_other_betas {
        limits.push(format!("llama.cpp ignores `beta_fast` and `beta_slow` of YaRN in `{name}` models"));
    }
    limits
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::models::gguf::names::GgufNames;
    use serde_json::{Value, json};

    /// The limits that concern a small model of a family.
    fn limits(family: &str, more: &Value) -> Vec<String> {
        let mut config = json!({
            "model_type": family, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let config = crate::models::ModelConfig::from_json(folder.path().join("config.json")).unwrap();
        let name = GgufNames::for_config(&config).unwrap().architecture();
        super::limits(name, &config, &config.describe().unwrap())
    }

    #[test]
    fn limits_of_llama_cpp_are_named() {
        let yarn =
            json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 64});
        for (family, more, expected) in [
            ("gemma", json!({"tie_word_embeddings": false}), "a separate head"),
            ("olmo2", json!({"tie_word_embeddings": true}), "a tied head"),
            ("stablelm", json!({"tie_word_embeddings": true}), "a tied head"),
            ("qwen3", json!({"attention_bias": true}), "a bias after attention"),
            ("starcoder2", json!({"use_bias": false}), "no bias after attention or in the MLP"),
            ("jais2", json!({"mlp_bias": false}), "no bias after attention or in the MLP"),
            ("cohere2", json!({"head_dim": 32}), "heads of another width"),
            ("cohere", json!({"use_qk_norm": true}), "norms of q and k"),
            ("glm4", json!({"head_dim": 14}), "an odd number of rotated elements"),
            ("mistral", json!({"sliding_window": 8}), "ignores attention windows"),
            ("llama", json!({"rope_scaling": yarn}), "ignores `beta_fast`"),
        ] {
            let found = limits(family, &more);
            assert!(found.iter().any(|limit| limit.contains(expected)), "{family}: {found:?}");
        }
    }

    #[test]
    fn models_that_llama_cpp_computes_have_no_limits() {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
        for (family, more) in [
            ("llama", json!({"attention_bias": true, "mlp_bias": true, "head_dim": 32})),
            ("llama", json!({"rope_scaling": yarn})),
            ("mistral", json!({"sliding_window": null})),
            ("qwen2", json!({"tie_word_embeddings": true})),
            ("qwen3", json!({"head_dim": 32})),
            ("gemma", json!({"head_dim": 32})),
            ("cohere", json!({"use_qk_norm": false})),
            ("olmo2", json!({"tie_word_embeddings": false})),
            ("starcoder2", json!({"sliding_window": null})),
            ("jais2", json!({"head_dim": 32, "tie_word_embeddings": true})),
            ("stablelm", json!({"use_qkv_bias": true})),
        ] {
            assert_eq!(limits(family, &more), [""; 0], "{family} {more}");
        }
    }
}
