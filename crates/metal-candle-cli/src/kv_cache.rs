//! The flag that names the type of the KV cache.

use clap::Args;
use metal_candle::Error;
use metal_candle::inference::KVCacheType;

/// The flag of the KV cache.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct CacheArguments {
    /// Store keys and values as `f32`, `f16`, `bf16`, `q8_0` or `q4_0`; the last two need heads of a multiple of 32 and the
    /// CPU [default: f32 for f32 and GGUF weights, else f16; on a GPU the type of the weights, which has no other].
    #[arg(long, value_name = "TYPE", value_parser = parse_type, help_heading = "Model")]
    pub(crate) kv_cache: Option<KVCacheType>,
}

/// The type with this name.
pub(crate) fn parse_type(text: &str) -> Result<KVCacheType, String> {
    text.parse().map_err(|error| match error {
        Error::Argument { message, .. } => message,
        other => other.to_string(),
    })
}
