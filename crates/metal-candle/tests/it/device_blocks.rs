//! Tests quantized weights on each device: decode steps, prefill and gradients, with every block format.

use crate::decoding_steps::terms;
use candle_core::{DType, Tensor};
use metal_candle::inference::{GenerationConfig, Generator, SamplingConfig};
use metal_candle::models::{Batch, LossOptions, Model, Quantization, QuantizationMixture, Rows, Targets, Trainable};
use metal_candle::ops::{BlockFormat, LowRankUpdates};
use metal_candle::{Device, ModelConfig};
use serde_json::json;

on_each_device! {
    steps_read_blocks_of_every_format,
    formats_differ_within_a_layer,
    gradients_are_those_of_the_values,
    half_precision_activations_are_close,
    steps_count_what_they_dequantize,
}

/// A model whose rows are one or two blocks of 256 weights.
fn model(keys: &serde_json::Value) -> Model {
    let mut config = json!({
        "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 96,
        "max_position_embeddings": 512, "initializer_range": 0.09, "tie_word_embeddings": false, "eos_token_id": null,
        "pad_token_id": null, "bos_token_id": null
    });
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let config = ModelConfig::from_json_str(&config.to_string()).unwrap();
    Model::repeated_pattern(config, 5, DType::F32, Device::CPU).unwrap()
}

/// A quantized model on `device`, and its dequantized values on the CPU.
fn both(model: &Model, quantization: &Quantization, dtype: DType, device: Device) -> [Model; 2] {
    let quantized = model.quantize(quantization, |_| ()).unwrap();
    let values = quantized.to_dtype(DType::F32).unwrap();
    let there = quantized.to_device(device, dtype).unwrap();
    let count = |model: &Model| model.parameters().iter().filter(|(_, weight)| weight.block_format().is_some()).count();
    assert!(count(&there) >= 9 && count(&there) == count(&quantized) && count(&values) == 0);
    for ((name, own), (_, expected)) in there.parameters().iter().zip(values.parameters()) {
        if own.block_format().is_some() && dtype == DType::F32 {
            let (found, expected) = (all(&own.tensor().unwrap()), all(&expected.tensor().unwrap()));
            let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
            let is_close =
                found.iter().zip(&expected).all(|(found, expected)| (found - expected).abs() <= 1e-6 * largest);
            assert!(is_close && found.len() == expected.len(), "{name}, {:?}", own.block_format());
        }
    }
    [there, values]
}

fn all(tensor: &Tensor) -> Vec<f32> {
    tensor.to_device(&candle_core::Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn all_as(format: BlockFormat) -> Quantization {
    let kind = metal_candle::files::GgufType::Blocks(format);
    Quantization::from(QuantizationMixture::from_name("q8_0").unwrap()).with_type(".*", kind).unwrap()
}

fn mixed() -> Quantization {
    use BlockFormat as F;
    let mut quantization = Quantization::from(QuantizationMixture::from_name("q4_k_m").unwrap());
    for (pattern, format) in [
        ("q_proj", F::Q4K),
        ("k_proj", F::Q6K),
        ("v_proj", F::Q8_0),
        ("o_proj", F::IQ4XS),
        ("gate_proj", F::Q5K),
        ("up_proj", F::Q4_0),
        ("down_proj", F::Q6K),
        ("lm_head", F::Q3K),
    ] {
        quantization = quantization.with_type(pattern, metal_candle::files::GgufType::Blocks(format)).unwrap();
    }
    quantization
}

/// Compares the log-probabilities of generated tokens, and the logits of their prompts, with those of the dequantized
/// values.
#[track_caller]
fn check(what: &str, [own, values]: &[Model; 2], rank: usize, rows: usize, tolerance: f32) {
    let prompts: Vec<Vec<u32>> =
        (0..rows).map(|i| (0..21 + i).map(|j| ((i * 7 + j * 3) % 90) as u32).collect()).collect();
    let [on_device, on_cpu] = [own, values].map(|model| (rank > 0).then(|| terms(model, rank, 0.2)));
    let config =
        GenerationConfig { ignore_eos: true, sampling: SamplingConfig::greedy(), ..GenerationConfig::default() };
    let mut generator = Generator::new(own.clone());
    generator.set_adapter(on_device.clone());
    let configs = vec![config.with_max_tokens(4); rows];
    for (found, prompt) in generator.generate_batch(prompts.clone(), &configs).unwrap().iter().zip(&prompts) {
        let sequence = [&prompt[..], &found.tokens].concat();
        let expected = log_probabilities(values, &sequence, on_cpu.as_ref());
        for (i, (&token, found)) in found.tokens.iter().zip(&found.log_probabilities).enumerate() {
            let expected = expected[prompt.len() + i - 1][token as usize];
            assert!((found - expected).abs() < tolerance, "{what}, token {i} of {rows}: {found}, not {expected}");
        }
    }
    let found = log_probabilities(own, &prompts[0], on_device.as_ref());
    let expected = log_probabilities(values, &prompts[0], on_cpu.as_ref());
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        assert!((found - expected).abs() < tolerance, "{what}, a prompt: {found}, not {expected}");
    }
}

fn log_probabilities(model: &Model, ids: &[u32], terms: Option<&LowRankUpdates>) -> Vec<Vec<f32>> {
    let logits = model.forward(&Batch::single(ids), terms, None, Rows::All).unwrap();
    let mut rows: Vec<Vec<f32>> = logits.to_dtype(DType::F32).unwrap().to_vec2().unwrap();
    for row in &mut rows {
        let largest = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f32 = row.iter().map(|logit| (logit - largest).exp()).sum();
        for logit in row {
            *logit -= largest + sum.ln();
        }
    }
    rows
}

/// On the CPU, inference rounds activations to 8 bits.
fn tolerance(device: Device) -> f32 {
    if device.is_cpu() { 0.3 } else { 2e-3 }
}

fn steps_read_blocks_of_every_format(device: Device) {
    let model = model(&json!({}));
    for format in BlockFormat::WRITABLE {
        let both = both(&model, &all_as(format), DType::F32, device);
        check(format.name(), &both, 0, 1, tolerance(device));
    }
}

fn formats_differ_within_a_layer(device: Device) {
    for keys in [json!({}), json!({"model_type": "phi3", "head_dim": null}), json!({"tie_word_embeddings": true})] {
        let both = both(&model(&keys), &mixed(), DType::F32, device);
        for (rows, rank) in [(1, 0), (1, 5), (3, 64), (9, 1), (20, 3)] {
            check(&keys.to_string(), &both, rank, rows, tolerance(device));
        }
    }
}

fn gradients_are_those_of_the_values(device: Device) {
    let ids: Vec<u32> = (0..70).map(|i| i * 11 % 90).collect();
    let batch = Batch::single(&ids);
    let targets = Targets { ids: [&ids[1..], &ids[..1]].concat(), weights: vec![1.0; ids.len()] };
    for (what, quantization) in
        [("mixed", mixed()), ("q4_k", all_as(BlockFormat::Q4K)), ("mxfp4", all_as(BlockFormat::MXFP4))]
    {
        let run = |model: &Model| {
            let terms = terms(model, 4, 0.2);
            let options = LossOptions::default();
            let (losses, gradients) =
                model.loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), options).unwrap();
            (losses.rows, gradients.iter().map(all).collect::<Vec<_>>())
        };
        let [own, values] = both(&model(&json!({})), &quantization, DType::F32, device);
        let ((found, gradients), (expected, of_values)) = (run(&own), run(&values));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4, "{what}: {found} {expected}");
        }
        assert!(gradients.len() > 10 && gradients.len() == of_values.len());
        for (found, expected) in gradients.iter().zip(&of_values) {
            let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= 1e-5 * largest, "{what}: {found} {expected} of {largest}");
            }
        }
    }
}

fn half_precision_activations_are_close(device: Device) {
    let of_f16 = if device.is_cpu() { tolerance(device) } else { 0.1 };
    for (dtype, tolerance) in [(DType::BF16, 0.3), (DType::F16, of_f16)] {
        let both = both(&model(&json!({})), &mixed(), dtype, device);
        for (rows, rank) in [(1, 0), (2, 8), (20, 0)] {
            check(dtype.as_str(), &both, rank, rows, tolerance);
        }
    }
}

fn steps_count_what_they_dequantize(device: Device) {
    let [own, values] = both(&model(&json!({})), &mixed(), DType::F32, device);
    let [own, dense] = [own, values.to_device(device, DType::F32).unwrap()].map(|model| {
        let terms = terms(&model, 4, 0.2);
        model.step_memory(70, 70, Trainable::low_rank(&terms), 0).unwrap().peak
    });
    // the largest matrices, as f32
    let dequantized = if device.is_cpu() { 0 } else { 512 * 256 * 4 };
    assert_eq!(own, dense + dequantized);
}
