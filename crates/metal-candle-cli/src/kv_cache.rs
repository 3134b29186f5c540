//! Defines `--kv-cache`, the flag for the type of the KV cache.

use clap::Args;
use metal_candle::Error;
use metal_candle::inference::KVCacheType;

/// The flag for the type of the KV cache.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct CacheArguments {
    /// Type of the KV cache: `f32`, `f16`, `bf16`, `q8_0` or `q4_0`. The last two require the CPU and a head size that is a
    /// multiple of 32; a GPU supports only the type of the weights [default: f32 for f32 and quantized weights, otherwise
    /// f16; on a GPU the type of the weights].
    #[arg(long, value_name = "TYPE", value_parser = parse_type, help_heading = "Model")]
    pub(crate) kv_cache: Option<KVCacheType>,
}

/// Parses the name of a type.
pub(crate) fn parse_type(text: &str) -> Result<KVCacheType, String> {
    text.parse().map_err(|error| match error {
        Error::Argument { message, .. } => message,
        other => other.to_string(),
    })
}
