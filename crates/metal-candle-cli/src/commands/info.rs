//! `info`: shows the device, the features of this build, and a model's sizes and memory.

use crate::error::UserError;
use crate::model_source::{ModelArguments, ModelSource};
use crate::output::{Output, bytes, grouped};
use anyhow::Result;
use candle_core::DType;
use clap::Args;
use metal_candle::files::GgufFile;
use metal_candle::inference::KVCacheType;
use metal_candle::models::{KVCacheConfig, SafetensorsFile, TensorEntry};
use metal_candle::{Device, Model, ModelConfig};
use serde_json::json;
use std::fmt::Write;

/// Flags of `info`.
#[derive(Debug, Clone, Args)]
pub(crate) struct InfoArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
}

pub(crate) fn run(flags: &InfoArguments, output: Output) -> Result<()> {
    if flags.model.quantize.is_some() {
        return Err(UserError::new("`info` does not quantize: use `quantize` to write a quantized file").into());
    }
    let device = flags.model.device.open(output)?;
    let source = ModelSource::find(&flags.model.model, output)?;
    let config = source.config()?;
    let (files, missing) = if source.gguf().is_some() { Default::default() } else { source.weights()? };
    let weights = if let Some(file) = source.gguf() {
        format!("{} in a GGUF file: {}", bytes(file.num_bytes() as u64), file.types().join(", "))
    } else if !missing.is_empty() {
        format!("missing: `{}`", missing.join("`, `"))
    } else if files.is_empty() {
        "missing: config.json only".to_owned()
    } else {
        let size: usize = files.iter().flat_map(SafetensorsFile::entries).map(TensorEntry::num_bytes).sum();
        let quantization = config.quantization().map_or_else(String::new, |quantization| format!(": {quantization}"));
        format!(
            "{} in {} file{}{quantization}",
            bytes(size as u64),
            files.len(),
            if files.len() == 1 { "" } else { "s" }
        )
    };
    let parts = parts(&config);
    let dtypes = match flags.model.dtype {
        Some(dtype) => vec![dtype.dtype()],
        None => vec![DType::F32, DType::BF16],
    };
    if output.json {
        let memory: serde_json::Map<_, _> =
            dtypes.iter().map(|&dtype| (dtype.as_str().to_owned(), json!(config.num_bytes(dtype)))).collect();
        Output::print_json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": Some(env!("METAL_CANDLE_COMMIT")).filter(|commit| !commit.is_empty()),
            "device": device.name(),
            "device_name": device.description(),
            "memory": { "total_bytes": device.total_memory(), "free_bytes": device.memory().map(|memory| memory.free) },
            "driver": driver(device),
            "devices": devices(),
            "features": features(),
            "cpu": {
                "architecture": std::env::consts::ARCH,
                "instruction_sets": instruction_sets(),
                "kernels": Device::cpu_levels()?,
                "threads": threads(),
            },
            "model": {
                "name": source.name,
                "model_type": config.model_type,
                "num_parameters": config.num_parameters(),
                "parameters": parts.iter().map(|(name, count)| ((*name).to_owned(), json!(count))).collect::<serde_json::Map<_, _>>(),
                "weight_files": weight_files(&source, &files),
                "weights_are_complete": missing.is_empty() && (!files.is_empty() || source.gguf().is_some()),
                "weight_bytes": memory,
                "quantization": config.quantization(),
                "kv_cache_bytes_per_token": cache_bytes(&config, 1, KVCacheType::F32),
                "kv_cache_bytes_per_token_by_type": cache_types(&config).map(|kind| (kind.name().to_owned(), json!(cache_bytes(&config, 1, kind)))).collect::<serde_json::Map<_, _>>(),
                "num_hidden_layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "head_dim": config.head_dim,
                "vocab_size": config.vocab_size,
                "max_position_embeddings": config.max_position_embeddings,
            },
        }))?;
        return Ok(());
    }
    Output::print(text(device, &source, &config, &weights, &parts, &dtypes)?)?;
    Ok(())
}

fn weight_files(source: &ModelSource, files: &[SafetensorsFile]) -> Vec<String> {
    let gguf = source.gguf().map(GgufFile::path);
    let paths = gguf.into_iter().chain(files.iter().map(SafetensorsFile::path));
    paths.map(|path| path.to_string_lossy().into_owned()).collect()
}

fn text(
    device: Device,
    source: &ModelSource,
    config: &ModelConfig,
    weights: &str,
    parts: &[(&str, usize)],
    dtypes: &[DType],
) -> Result<String> {
    let mut text = String::new();
    let commit = env!("METAL_CANDLE_COMMIT");
    let commit = if commit.is_empty() { String::new() } else { format!(", commit {commit}") };
    writeln!(text, "metal-candle {}{commit}", env!("CARGO_PKG_VERSION"))?;
    let name = device.description().map_or_else(String::new, |name| format!(": {name}"));
    writeln!(text, "device       {device}{name} (available: {})", devices().join(", "))?;
    if let Some(total) = device.total_memory() {
        let free = device.memory().map_or_else(String::new, |memory| format!(", {} free", bytes(memory.free as u64)));
        let what = if device.is_metal() { " recommended working set" } else { "" };
        writeln!(text, "memory       {}{what}{free}", bytes(total as u64))?;
    }
    if let Some(driver) = driver(device) {
        writeln!(text, "driver       {driver}")?;
    }
    writeln!(text, "features     {}", if features().is_empty() { "none".into() } else { features().join(", ") })?;
    writeln!(text, "cpu          {}, {} threads: {}", std::env::consts::ARCH, threads(), instruction_sets().join(" "))?;
    writeln!(text, "kernels      {}", Device::cpu_levels()?.join(", "))?;
    writeln!(text)?;
    writeln!(
        text,
        "model        {} ({}), {} parameters",
        source.name,
        config.model_type,
        grouped(config.num_parameters() as u64)
    )?;
    writeln!(
        text,
        "             {} blocks, hidden {}, intermediate {}, {} heads of {} ({} for keys and values)",
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.head_dim,
        config.num_key_value_heads,
    )?;
    writeln!(
        text,
        "             vocabulary {}{}, context {} tokens",
        grouped(config.vocab_size as u64),
        if config.tie_word_embeddings { " (head tied to the embedding)" } else { "" },
        grouped(config.max_position_embeddings as u64),
    )?;
    writeln!(text, "             weights {weights}")?;
    writeln!(text)?;
    write!(text, "{:<22}{:>16}", "", "parameters")?;
    for dtype in dtypes {
        write!(text, "{:>12}", dtype.as_str())?;
    }
    writeln!(text)?;
    let total = ("total", parts.iter().map(|part| part.1).sum());
    for (name, count) in parts.iter().chain([&total]) {
        write!(text, "{name:<22}{:>16}", grouped(*count as u64))?;
        for dtype in dtypes {
            write!(text, "{:>12}", bytes((count * dtype.size_in_bytes()) as u64))?;
        }
        writeln!(text)?;
    }
    writeln!(text)?;
    write!(text, "{:<22}{:>16}", "", "")?;
    for kind in cache_types(config) {
        write!(text, "{:>12}", kind.name())?;
    }
    writeln!(text)?;
    for tokens in [1024, config.max_position_embeddings] {
        write!(text, "{:<22}{:>16}", "key/value cache", format!("{} tokens", grouped(tokens as u64)))?;
        for kind in cache_types(config) {
            write!(text, "{:>12}", bytes(cache_bytes(config, tokens, kind) as u64))?;
        }
        writeln!(text)?;
        if config.max_position_embeddings == 1024 {
            break;
        }
    }
    Ok(text)
}

/// The number of parameters by kind.
fn parts(config: &ModelConfig) -> Vec<(&'static str, usize)> {
    let mut parts = [("embedding", 0), ("attention", 0), ("mlp", 0), ("norms", 0), ("head", 0)];
    for (name, shape) in Model::parameter_shapes(config) {
        let part = match name.as_str() {
            name if name.contains("norm") => 3,
            name if name.contains("self_attn") => 1,
            name if name.contains("mlp") => 2,
            name if name.starts_with("lm_head") => 4,
            _ => 0,
        };
        parts[part].1 += shape.iter().product::<usize>();
    }
    parts.into_iter().filter(|part| part.1 > 0).collect()
}

/// The types that the model's KV cache supports on the CPU.
fn cache_types(config: &ModelConfig) -> impl Iterator<Item = KVCacheType> {
    KVCacheType::ALL.into_iter().filter(|kind| kind.check_head_dim(config.head_dim).is_ok())
}

fn cache_bytes(config: &ModelConfig, tokens: usize, kind: KVCacheType) -> usize {
    let cache = KVCacheConfig {
        max_seq_len: tokens,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: 1,
    };
    cache.num_bytes(kind)
}

fn devices() -> Vec<&'static str> {
    let found = [Device::metal(), Device::cuda(0), Ok(Device::CPU)];
    found.iter().flatten().map(Device::name).collect()
}

/// The driver of the accelerator: the version of NVIDIA's kernel module, or of macOS.
fn driver(device: Device) -> Option<String> {
    if device.is_cuda() {
        let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
        let version =
            text.lines().next()?.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        return version.map(|version| format!("NVIDIA {version}"));
    }
    if device.is_metal() {
        let output = std::process::Command::new("sw_vers").arg("-productVersion").output().ok()?;
        return Some(format!("macOS {}", String::from_utf8(output.stdout).ok()?.trim()));
    }
    None
}

fn features() -> Vec<&'static str> {
    env!("METAL_CANDLE_FEATURES").split(", ").filter(|name| !name.is_empty()).collect()
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The instruction sets of the CPU that the kernels use.
fn instruction_sets() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! look_for {
            ($($name:tt),*) => {
                $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })*
            };
        }
        look_for!(
            "sse4.2",
            "avx",
            "f16c",
            "fma",
            "avx2",
            "avx512f",
            "avx512bw",
            "avx512vl",
            "avx512vnni",
            "avx512bf16",
            "avx512fp16"
        );
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! look_for {
            ($($name:tt),*) => {
                $(if std::arch::is_aarch64_feature_detected!($name) { found.push($name); })*
            };
        }
        look_for!("neon", "fp16", "dotprod", "i8mm", "bf16", "sve");
    }
    if found.is_empty() {
        found.push("baseline");
    }
    found
}
