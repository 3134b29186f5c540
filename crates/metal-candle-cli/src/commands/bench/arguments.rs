//! The flags of `bench` and their defaults.

use super::peer::PeerKind;
use super::shape::Shape;
use super::work::{Part, Work};
use crate::error::UserError;
use crate::kv_cache::CacheArguments;
use crate::matmul_precision::PrecisionArguments;
use crate::output::Output;
use crate::values::{DeviceKind, MixtureName, WeightType};
use anyhow::Result;
use clap::Args;
use metal_candle::inference::Generator;
use metal_candle::{Device, ModelConfig};

/// Flags of `bench`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArguments {
    /// The model: a folder, a safetensors or GGUF file, `nano` (built in), or a Hub name [default: nano on the CPU,
    /// otherwise random weights with the shape of qwen2.5-0.5b].
    #[arg(long, conflicts_with = "shape", help_heading = "Model")]
    pub(super) model: Option<String>,

    /// Use random weights with this shape instead of a model; no file is needed.
    #[arg(long, value_enum, help_heading = "Model")]
    pub(super) shape: Option<Shape>,

    /// The type of the weights [default: as in the file; bf16 for random weights].
    #[arg(long, value_enum, help_heading = "Model")]
    pub(super) dtype: Option<WeightType>,

    /// Quantize the weights while loading to a type such as `q4_k_m`.
    #[arg(long, value_name = "TYPE", help_heading = "Model")]
    pub(super) quantize: Option<MixtureName>,

    #[command(flatten)]
    pub(super) cache: CacheArguments,

    #[command(flatten)]
    pub(super) precision: PrecisionArguments,

    /// Where to run: `auto`, `cpu`, `metal`, `cuda` or `cuda:N`.
    #[arg(long, value_name = "DEVICE", default_value = "auto", help_heading = "Model")]
    pub(super) device: DeviceKind,

    /// Lengths of prompts, in tokens [default: 512,4096; on the CPU 512].
    #[arg(long, value_delimiter = ',', value_name = "TOKENS,...", help_heading = "Work")]
    prefill: Vec<usize>,

    /// Numbers of sequences in a decode batch [default: 1,32; on the CPU 1,8].
    #[arg(long, value_delimiter = ',', value_name = "COUNT,...", help_heading = "Work")]
    decode_batch: Vec<usize>,

    /// Tokens of each sequence before decoding [default: 512; on the CPU 128].
    #[arg(long, value_name = "TOKENS", help_heading = "Work")]
    context: Option<usize>,

    /// Decode steps [default: 256; on the CPU 64].
    #[arg(long, value_name = "COUNT", help_heading = "Work")]
    decode_tokens: Option<usize>,

    /// Rank of an adapter of all linear layers during decoding; 0 for none.
    #[arg(long, value_name = "RANK", default_value_t = 0, help_heading = "Work")]
    decode_rank: usize,

    /// Number of sequences in a training step, and their length in tokens [default: 8x1024; on the CPU 4x256].
    #[arg(long, value_name = "COUNTxTOKENS", value_parser = parse_batch, help_heading = "Work")]
    train_batch: Option<(usize, usize)>,

    /// Rank of the trained adapter, on all linear layers of the blocks.
    #[arg(long, default_value_t = 16, help_heading = "Work")]
    rank: usize,

    /// Number of timed prompts of each length, and of timed training steps [default: 5; on the CPU 3].
    #[arg(long, value_name = "COUNT", help_heading = "Work")]
    repeats: Option<usize>,

    /// Measurements to skip.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART,...", help_heading = "Work")]
    skip: Vec<Part>,

    /// Compare with another program, alternating, with the same model, weights and lengths.
    #[arg(long, value_enum, help_heading = "Comparison")]
    pub(super) against: Option<PeerKind>,

    /// Run transformers at its best: static cache, compiled passes, adapters in the type of the weights, fused optimizer,
    /// and Liger's kernels if installed. Compilation takes minutes and is not counted.
    #[arg(long, requires = "against", help_heading = "Comparison")]
    pub(super) best: bool,

    /// The Python interpreter with that program.
    #[arg(long, value_name = "PROGRAM", default_value = "python3", help_heading = "Comparison")]
    pub(super) python: String,
}

/// The default sizes.
struct Defaults {
    prefill: &'static [usize],
    decode_batch: &'static [usize],
    context: usize,
    decode_tokens: usize,
    train_batch: (usize, usize),
    repeats: usize,
}

const ON_CPU: Defaults = Defaults {
    prefill: &[512],
    decode_batch: &[1, 8],
    context: 128,
    decode_tokens: 64,
    train_batch: (4, 256),
    repeats: 3,
};

const ON_ACCELERATOR: Defaults = Defaults {
    prefill: &[512, 4096],
    decode_batch: &[1, 32],
    context: 512,
    decode_tokens: 256,
    train_batch: (8, 1024),
    repeats: 5,
};

impl BenchArguments {
    /// The measurements of this model.
    pub(super) fn works(&self, config: &ModelConfig, device: Device, output: Output) -> Result<Vec<Work>> {
        let defaults = if device.is_cpu() { &ON_CPU } else { &ON_ACCELERATOR };
        let most = config.max_position_embeddings;
        let within = |flag: &str, size: usize, limit: usize| {
            if (1..=limit).contains(&size) {
                return Ok(size);
            }
            Err(UserError::new(format!("`--{flag}`: expected 1 to {limit}, found {size}")))
        };
        let repeats = within("repeats", self.repeats.unwrap_or(defaults.repeats), 1000)?;
        let mut works = Vec::new();
        if !self.skip.contains(&Part::Prefill) {
            let mut lengths = self.prefill.clone();
            if lengths.is_empty() {
                lengths = defaults.prefill.to_vec();
                lengths.retain(|length| *length < most);
                if lengths.len() < defaults.prefill.len() {
                    output.note(format_args!("longer prompts do not fit the model's context of {most} tokens"));
                }
            }
            for length in lengths {
                let length = within("prefill", length, most - 1)?;
                works.push(Work::Prefill { length, repeats });
            }
        }
        if !self.skip.contains(&Part::Decode) {
            let steps = within("decode-tokens", self.decode_tokens.unwrap_or(defaults.decode_tokens), most - 1)?;
            let length = within("context", self.context.unwrap_or(defaults.context), most - steps)?;
            let batches = if self.decode_batch.is_empty() { defaults.decode_batch } else { &self.decode_batch };
            for &sequences in batches {
                let sequences = within("decode-batch", sequences, Generator::MAX_BATCH_SIZE)?;
                let rank = match self.decode_rank {
                    0 => 0,
                    rank => within("decode-rank", rank, config.hidden_size)?,
                };
                works.push(Work::Decode { sequences, length, steps, rank });
            }
        }
        if !self.skip.contains(&Part::Train) {
            let (sequences, length) = self.train_batch.unwrap_or(defaults.train_batch);
            let sequences = within("train-batch", sequences, 1 << 16)?;
            let length = within("train-batch", length, most)?;
            let rank = within("rank", self.rank, config.hidden_size)?;
            works.push(Work::Train { sequences, length, rank, repeats });
        }
        Ok(works)
    }
}

/// `8x1024`.
fn parse_batch(text: &str) -> Result<(usize, usize), String> {
    let sizes = text.split_once('x').and_then(|(count, length)| Some((count.parse().ok()?, length.parse().ok()?)));
    sizes.ok_or_else(|| "expected sequences x tokens of each, such as `8x1024`".to_owned())
}
