//! Tests decode steps, which have their own kernels on accelerators: with every kind of layer, with and without an
//! adapter, for few and for many sequences, short and long.

use super::inference_scheduler::Collected;
use candle_core::{DType, Tensor};
use metal_candle::inference::{GenerationConfig, Generator, Request, SamplingConfig, Scheduler};
use metal_candle::models::{Batch, Model, Role, Rows};
use metal_candle::ops::LowRankUpdates;
use metal_candle::training::{LoRAAdapter, TargetModule};
use metal_candle::{Device, ModelConfig};
use serde_json::{Value, json};

on_each_device! {
    steps_of_every_kind_match_the_cpu,
    long_sequences_match_the_cpu,
    many_sequences_match_the_cpu,
    half_precision_and_wide_layers_match_the_cpu,
    rows_with_different_adapters_match_the_cpu,
}

/// Keys of models that support decode steps, with the feature that each of them adds.
fn kinds() -> Vec<(&'static str, Value)> {
    vec![
        ("biases", json!({"model_type": "qwen2"})),
        ("norms of q and k", json!({"model_type": "qwen3", "head_dim": 16})),
        (
            "scaled positions",
            json!({"model_type": "llama", "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}}),
        ),
        ("windows", json!({"model_type": "mistral", "sliding_window": 24, "head_dim": 16})),
        (
            "queries scaled by position",
            json!({"model_type": "ministral3", "head_dim": 16, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.3}}),
        ),
        ("layers without positions", json!({"model_type": "smollm3", "no_rope_layers": [1, 0]})),
        (
            "multipliers",
            json!({"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
            "attention_multiplier": 0.1, "logits_scaling": 2.0}),
        ),
        ("norms with an offset, GELU", json!({"model_type": "gemma", "head_dim": 24, "num_key_value_heads": 2})),
        (
            "norms around parts, caps, windows",
            json!({"model_type": "gemma2", "head_dim": 16, "sliding_window": 24,
            "query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
        ),
        (
            "two rotary tables",
            json!({"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 12}),
        ),
        ("norms after parts, norms of all of q and k", json!({"model_type": "olmo2"})),
        ("fused projections", json!({"model_type": "phi3"})),
        ("neighbours rotated in half of a head", json!({"model_type": "glm4", "head_dim": 16})),
        (
            "a fused MLP",
            json!({"model_type": "granitemoehybrid", "num_local_experts": 0, "mamba_n_heads": 4,
            "shared_intermediate_size": 96, "layer_types": ["attention", "attention"]}),
        ),
    ]
}

/// A model with these keys, whose norm weights are not 1.
fn model(keys: &Value, dtype: DType, device: Device) -> Model {
    let mut config = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 2048, "initializer_range": 0.18,
        "tie_word_embeddings": false, "eos_token_id": null, "pad_token_id": null, "bos_token_id": null
    });
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let config = ModelConfig::from_json_str(&config.to_string()).unwrap();
    let specs = config.parameter_specs().unwrap();
    let model = Model::repeated_pattern(config, 3, dtype, device).unwrap();
    let norms = specs.into_iter().filter_map(|spec| {
        let Role::Norm { is_offset } = spec.role else { return None };
        let count: usize = spec.shape.iter().product();
        let neutral = if is_offset { 0.0 } else { 1.0 };
        let values: Vec<f32> = (0..count).map(|i| neutral + ((i * 29 % 17) as f32 / 17.0 - 0.4)).collect();
        Some((spec.name, Tensor::from_vec(values, spec.shape, &device.candle()).unwrap()))
    });
    model.with_parameters(norms.collect()).unwrap()
}

/// An adapter of all linear layers, with values between `-range / 2` and `range / 2`.
pub(crate) fn terms(model: &Model, rank: usize, range: f32) -> LowRankUpdates {
    let adapter = LoRAAdapter::builder(model).with_rank(rank).with_alpha(8.0);
    let adapter = adapter.with_target_modules([TargetModule::AllLinear]).build().unwrap();
    let count = adapter.num_parameters();
    let values: Vec<f32> = (0..count).map(|i| ((i * 37 % 101) as f32 / 101.0 - 0.5) * range).collect();
    let parameters = Tensor::from_vec(values, adapter.parameters().shape(), &model.device().candle()).unwrap();
    adapter.with_parameters(parameters).unwrap().low_rank_updates().unwrap()
}

/// The tokens of a sequence whose log-probabilities differ from those of the model on the CPU for the same tokens.
fn wrong(
    (cpu, updates): (&Model, Option<&LowRankUpdates>),
    prompt: &[u32],
    tokens: &[u32],
    log_probabilities: &[f32],
    tolerance: f32,
) -> Vec<String> {
    let sequence = [prompt, tokens].concat();
    let logits = cpu.forward(&Batch::single(&sequence), updates, None, Rows::All).unwrap();
    let logits: Vec<Vec<f32>> = logits.to_dtype(DType::F32).unwrap().to_vec2().unwrap();
    let mut wrong = Vec::new();
    for (i, (&token, found)) in tokens.iter().zip(log_probabilities).enumerate() {
        let logits = &logits[prompt.len() + i - 1];
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f32 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        let expected = logits[token as usize] - largest - sum.ln();
        let is_close = (found - expected).abs() < tolerance;
        wrong.extend((!is_close).then(|| format!("token {i}: {found}, not {expected}")));
    }
    wrong
}

/// Compares the log-probabilities of the tokens that `model` generates with those of the model on the CPU for the same
/// tokens.
fn failures(what: &str, [model, cpu]: [&Model; 2], rank: usize, prompts: &[Vec<u32>], tolerance: f32) -> Vec<String> {
    let greedy =
        GenerationConfig { ignore_eos: true, sampling: SamplingConfig::greedy(), ..GenerationConfig::default() };
    let mut generator = Generator::new(model.clone());
    let [on_device, on_cpu] = [model, cpu].map(|model| (rank > 0).then(|| terms(model, rank, 0.4)));
    generator.set_adapter(on_device);
    let configs = vec![greedy.with_max_tokens(5); prompts.len()];
    let all = generator.generate_batch(prompts.to_vec(), &configs).unwrap();
    let mut failures = Vec::new();
    for (row, (found, prompt)) in all.iter().zip(prompts).enumerate() {
        let wrong = wrong((cpu, on_cpu.as_ref()), prompt, &found.tokens, &found.log_probabilities, tolerance);
        let what = format!("{what}, rank {rank}, row {row} of {}", prompts.len());
        failures.extend(wrong.into_iter().map(|wrong| format!("{what}, {wrong}")));
    }
    failures
}

/// Sequences with three adapters and without one, of which some end earlier. Then an adapter is replaced by another one.
fn rows_with_different_adapters_match_the_cpu(device: Device) {
    let mut failures = Vec::new();
    let half = (("half precision", json!({"model_type": "qwen3", "head_dim": 16})), DType::BF16, 4e-1);
    let all = kinds().into_iter().map(|kind| (kind, DType::F32, 2e-3)).chain([half]);
    for ((what, keys), dtype, tolerance) in all {
        let (own, cpu) = (model(&keys, dtype, device), model(&keys, dtype, Device::CPU));
        let sizes = [(16, 0.4), (5, 0.6), (64, 0.2), (8, 0.5)];
        let [of_own, of_cpu] = [&own, &cpu].map(|model| sizes.map(|(rank, range)| terms(model, rank, range)));
        let mut scheduler = Scheduler::new(own);
        let mut ids = [0, 1, 2].map(|index| scheduler.add_adapter(&of_own[index]).unwrap());
        let mut adapters = [0, 1, 2];
        for rows in [13, 3] {
            let prompts = prompts(rows, 11);
            let mut sequences = Vec::new();
            for (row, prompt) in prompts.iter().enumerate() {
                let adapter = (row % 4 < 3).then_some(row % 4);
                let config = GenerationConfig { ignore_eos: true, ..GenerationConfig::default() };
                let config = config.with_sampling(SamplingConfig::greedy()).with_max_tokens(3 + row);
                let request = Request::new(prompt.clone(), config).with_adapter(adapter.map(|index| ids[index]));
                sequences.push((adapter.map(|index| &of_cpu[adapters[index]]), scheduler.admit(request).unwrap()[0]));
            }
            let found = Collected::run(&mut scheduler);
            for (row, ((updates, id), prompt)) in sequences.into_iter().zip(&prompts).enumerate() {
                let pieces = &found.pieces[&id];
                assert_eq!(pieces.len(), 3 + row, "{what}");
                let tokens: Vec<u32> = pieces.iter().map(|piece| piece.token).collect();
                let log_probabilities: Vec<f32> = pieces.iter().map(|piece| piece.log_probability).collect();
                let wrong = wrong((&cpu, updates), prompt, &tokens, &log_probabilities, tolerance);
                failures.extend(wrong.into_iter().map(|wrong| format!("{what}, row {row} of {rows}, {wrong}")));
            }
            scheduler.remove_adapter(ids[1]).unwrap();
            ids[1] = scheduler.add_adapter(&of_own[3]).unwrap();
            adapters[1] = 3;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn prompts(rows: usize, len: usize) -> Vec<Vec<u32>> {
    let prompt = |i: usize| (0..len + i).map(|j| ((i * 7 + j * 3) % 60) as u32).collect();
    (0..rows).map(prompt).collect()
}

fn steps_of_every_kind_match_the_cpu(device: Device) {
    let mut found = Vec::new();
    for (what, keys) in kinds() {
        let (own, cpu) = (model(&keys, DType::F32, device), model(&keys, DType::F32, Device::CPU));
        for (rows, rank) in [(1, 0), (1, 5), (3, 64), (9, 1)] {
            found.extend(failures(what, [&own, &cpu], rank, &prompts(rows, 37), 2e-3));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The keys of long sequences are divided among thread groups, which combine their results.
fn long_sequences_match_the_cpu(device: Device) {
    let mut found = Vec::new();
    let wide = json!({"model_type": "qwen3", "head_dim": 256});
    for (what, keys) in kinds().into_iter().take(4).chain([("heads of 256", wide)]) {
        let (own, cpu) = (model(&keys, DType::F32, device), model(&keys, DType::F32, Device::CPU));
        for (rows, rank) in [(1, 4), (2, 0)] {
            found.extend(failures(what, [&own, &cpu], rank, &prompts(rows, 1300), 2e-3));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// With many sequences, a thread group has all heads that read the same keys; with many heads, these keys are divided
/// too.
fn many_sequences_match_the_cpu(device: Device) {
    let rows = if device.is_cuda() { 66 } else { 17 };
    let mut found = Vec::new();
    for (what, heads, len, rows) in [("two heads", 4, 40, rows), ("four heads", 8, 530, rows / 2)] {
        let keys = json!({"model_type": "qwen3", "head_dim": 16, "num_attention_heads": heads});
        let (own, cpu) = (model(&keys, DType::F32, device), model(&keys, DType::F32, Device::CPU));
        found.extend(failures(what, [&own, &cpu], 3, &prompts(rows, len), 2e-3));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Half-precision types have other group sizes, and rows of more than 1,024 weights do not fit in registers.
fn half_precision_and_wide_layers_match_the_cpu(device: Device) {
    let mut found = Vec::new();
    let small = |head_dim: usize| json!({"model_type": "qwen3", "head_dim": head_dim, "initializer_range": 0.1});
    let wide = json!({
        "model_type": "gemma2", "head_dim": 96, "hidden_size": 1280, "initializer_range": 0.04, "num_attention_heads": 2,
        "num_key_value_heads": 1, "sliding_window": 1100, "query_pre_attn_scalar": 96
    });
    for (what, keys, dtype, tolerance, len, rows) in [
        ("heads of 64 in bf16", small(64), DType::BF16, 3e-1, 60, 4),
        ("heads of 80 in f16", small(80), DType::F16, 6e-2, 60, 4),
        ("wide layers and windows of several parts", wide, DType::F32, 5e-3, 1200, 1),
    ] {
        let (own, cpu) = (model(&keys, dtype, device), model(&keys, dtype, Device::CPU));
        found.extend(failures(what, [&own, &cpu], 3, &prompts(rows, len), tolerance));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}
