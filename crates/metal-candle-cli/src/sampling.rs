//! How tokens are chosen: the flags over the model's own advice.

use crate::args::SamplingArguments;
use metal_candle::ModelConfig;
use metal_candle::data::Tokenizer;
use metal_candle::inference::{GenerationConfig, SamplingConfig};

/// The configuration of a generation by the flags and, where they say nothing, the model's makers.
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

/// The configuration with the token that ends a turn of the chat template as an end: a base model's own list does not have it.
pub(crate) fn with_end_of_turn(config: GenerationConfig, tokenizer: Option<&Tokenizer>) -> GenerationConfig {
    match tokenizer.and_then(Tokenizer::end_of_turn_id) {
        Some(id) => config.with_stop_id(id),
        None => config,
    }
}
