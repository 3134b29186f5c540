//! The sampling flags, with defaults from the model's generation configuration.

use crate::numbers::whole_number;
use clap::Args;
use metal_candle::ModelConfig;
use metal_candle::data::Tokenizer;
use metal_candle::inference::{GenerationConfig, SamplingConfig};

/// The sampling flags.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArguments {
    /// Maximum number of tokens in an answer.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_tokens: usize,

    /// Sampling temperature; 0 always selects the most likely token [default: the model's, else 0].
    #[arg(long)]
    pub(crate) temperature: Option<f64>,

    /// Sample from this number of most likely tokens; 0 for all [default: the model's, else 0].
    #[arg(long)]
    pub(crate) top_k: Option<usize>,

    /// Sample from the most likely tokens with this total probability [default: the model's, else 1].
    #[arg(long)]
    pub(crate) top_p: Option<f64>,

    /// Exclude tokens less likely than this share of the highest probability [default: 0].
    #[arg(long)]
    pub(crate) min_p: Option<f64>,

    /// Divide the logits of tokens that already occurred by this; 1 has no effect [default: the model's, else 1].
    #[arg(long)]
    pub(crate) repetition_penalty: Option<f64>,

    /// Subtract this from the logits of generated tokens [default: 0].
    #[arg(long)]
    pub(crate) presence_penalty: Option<f64>,

    /// Subtract this times their count from the logits of generated tokens [default: 0].
    #[arg(long)]
    pub(crate) frequency_penalty: Option<f64>,

    /// Seed of sampling; the same seed generates the same text.
    #[arg(long, default_value_t = 0, value_parser = whole_number::<u64>)]
    pub(crate) seed: u64,

    /// Stop before this text; may be given more than once.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

/// The generation configuration from the flags and the model's defaults.
pub(crate) fn generation_config(flags: &SamplingArguments, model: &ModelConfig) -> GenerationConfig {
    let mut sampling = SamplingConfig::from(&model.generation).with_seed(flags.seed);
    sampling.temperature = flags.temperature.unwrap_or(sampling.temperature);
    sampling.top_k = flags.top_k.unwrap_or(sampling.top_k);
    sampling.top_p = flags.top_p.unwrap_or(sampling.top_p);
    sampling.min_p = flags.min_p.unwrap_or(sampling.min_p);
    sampling.repetition_penalty = flags.repetition_penalty.unwrap_or(sampling.repetition_penalty);
    sampling.presence_penalty = flags.presence_penalty.unwrap_or(sampling.presence_penalty);
    sampling.frequency_penalty = flags.frequency_penalty.unwrap_or(sampling.frequency_penalty);
    let mut config = GenerationConfig::default().with_max_tokens(flags.max_tokens).with_sampling(sampling);
    config.stop_strings.clone_from(&flags.stop);
    config
}

/// Adds the end-of-turn token of the chat template to the end tokens, because a base model's own list lacks it.
pub(crate) fn with_end_of_turn(config: GenerationConfig, tokenizer: Option<&Tokenizer>) -> GenerationConfig {
    match tokenizer.and_then(Tokenizer::end_of_turn_id) {
        Some(id) => config.with_stop_id(id),
        None => config,
    }
}
