//! The shapes of well-known models, for random weights.

use crate::error::UserError;
use anyhow::Result;
use candle_core::DType;
use clap::ValueEnum;
use metal_candle::ModelConfig;
use serde_json::json;

/// A model with this shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// 494 million parameters.
    #[value(name = "qwen2.5-0.5b")]
    Qwen500M,
    /// 1.54 billion parameters.
    #[value(name = "qwen2.5-1.5b")]
    Qwen1500M,
    /// 7.62 billion parameters.
    #[value(name = "qwen2.5-7b")]
    Qwen7B,
}

impl Shape {
    /// The name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qwen500M => "qwen2.5-0.5b",
            Self::Qwen1500M => "qwen2.5-1.5b",
            Self::Qwen7B => "qwen2.5-7b",
        }
    }

    /// The configuration, as in the `config.json` of the model on the Hub.
    pub(super) fn config(self) -> metal_candle::Result<ModelConfig> {
        let (hidden, intermediate, layers, heads, key_value_heads, vocabulary) = match self {
            Self::Qwen500M => (896, 4864, 24, 14, 2, 151_936),
            Self::Qwen1500M => (1536, 8960, 28, 12, 2, 151_936),
            Self::Qwen7B => (3584, 18_944, 28, 28, 4, 152_064),
        };
        let config = json!({
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "max_position_embeddings": 32_768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": self != Self::Qwen7B,
        });
        ModelConfig::from_json_str(&config.to_string())
    }

    /// Checks that random weights fit in the free memory, if it is known.
    pub(super) fn check_memory(self, dtype: DType, free: Option<usize>) -> Result<()> {
        let needed = self.config()?.num_bytes(dtype);
        let Some(free) = free.filter(|free| *free < needed) else { return Ok(()) };
        let [needed, free] = [needed, free].map(|size| crate::output::bytes(size as u64));
        let message = format!("the weights of {} need {needed}, but only {free} are free", self.name());
        Err(UserError::new(message).with_hint("use a smaller --shape").into())
    }
}

#[cfg(test)]
mod tests {
    use super::Shape;
    use candle_core::DType;

    #[test]
    fn shapes_have_the_sizes_they_are_named_after() {
        let sizes = [(Shape::Qwen500M, 494_032_768), (Shape::Qwen1500M, 1_543_714_304), (Shape::Qwen7B, 7_615_616_512)];
        for (shape, parameters) in sizes {
            assert!(shape.config().is_ok_and(|config| config.num_parameters() == parameters), "{}", shape.name());
        }
    }

    #[test]
    fn shapes_larger_than_the_free_memory_are_refused() {
        let check = |free: Option<usize>| Shape::Qwen7B.check_memory(DType::BF16, free);
        assert!(check(None).is_ok() && check(Some(15_231_233_024)).is_ok());
        let message = check(Some(15_231_233_023)).map_err(|error| error.to_string());
        let is_named = |message: &String| message.contains("the weights of qwen2.5-7b need 15.23 GB");
        assert!(message.as_ref().is_err_and(is_named), "{message:?}");
    }
}
