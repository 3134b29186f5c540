//! Tests the element types of the KV cache: bits, rounding errors, memory and refusals.

use super::inference_generator::{argument, config, drawn, greedy, ids, model_of};
use super::inference_scheduler::Collected;
use candle_core::{DType, Tensor};
use metal_candle::inference::{
    Generator, KVCache, KVCacheConfig, KVCacheType, Request, Scheduler, SchedulerConfig, Speculation,
    prompt_log_probabilities,
};
use metal_candle::models::{Batch, Model, Quantization, QuantizationMixture, Rows};
use metal_candle::{Device, Error, ModelConfig};
use serde_json::json;
use std::collections::HashMap;

/// Models with grouped heads of one, two and three blocks, with windows and soft caps.
pub(super) fn models() -> Vec<(&'static str, Model)> {
    let model = |keys: serde_json::Value| {
        let mut config = json!({
            "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 502, "max_position_embeddings": 2048,
            "initializer_range": 0.15, "tie_word_embeddings": true, "eos_token_id": null, "pad_token_id": null,
            "bos_token_id": null
        });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let config = ModelConfig::from_json_str(&config.to_string()).unwrap();
        Model::repeated_pattern(config, 3, DType::F32, Device::CPU).unwrap()
    };
    let quantization = Quantization::from(QuantizationMixture::from_name("q8_0").unwrap());
    let llama = model(json!({"model_type": "llama", "head_dim": 64}));
    vec![
        ("quantized weights", llama.quantize(&quantization, |_| {}).unwrap()),
        ("llama", llama),
        (
            "windows and caps",
            model(json!({"model_type": "gemma2", "sliding_window": 150, "query_pre_attn_scalar": 12,
                "attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0})),
        ),
        ("norms of q and k", model(json!({"model_type": "qwen3", "head_dim": 96}))),
    ]
}

fn cache(model: &Model, kind: KVCacheType, num_slots: usize, num_tokens: usize) -> metal_candle::Result<KVCache> {
    let config = model.config();
    let sizes = KVCacheConfig {
        max_seq_len: num_tokens,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: num_slots,
    };
    KVCache::with_type(sizes, &Device::CPU, kind)
}

fn step(model: &Model, cache: &mut KVCache, ids: &[u32], slot: usize) -> Vec<Vec<f32>> {
    let mut batch = Batch::new();
    batch.push(ids, cache.len(slot), slot);
    model.forward(&batch, None, Some(cache), Rows::All).unwrap().to_vec2().unwrap()
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
}

fn scheduler(model: &Model, kind: KVCacheType) -> Scheduler {
    let config = SchedulerConfig { max_sequences: 4, prefill_chunk: 24, step_tokens: 40, kv_cache: Some(kind) };
    Scheduler::with_config(model.clone(), config).unwrap()
}

#[test]
fn splitting_a_text_does_not_change_its_bits_in_any_type() {
    let text = ids(300);
    for (name, model) in models() {
        for kind in KVCacheType::ALL {
            let whole = bits(&step(&model, &mut cache(&model, kind, 1, 300).unwrap(), &text, 0));
            for sizes in [&[1][..], &[5], &[3, 1, 9], &[64], &[130, 2, 1]] {
                let mut cache = cache(&model, kind, 1, 300).unwrap();
                let mut found = Vec::new();
                for &size in sizes.iter().cycle() {
                    let rest = &text[found.len()..];
                    found.extend(bits(&step(&model, &mut cache, &rest[..size.min(rest.len())], 0)));
                    if found.len() == text.len() {
                        break;
                    }
                }
                let differs = (0..text.len()).find(|&token| found[token] != whole[token]);
                assert_eq!(differs, None, "{name}, {kind}: token in parts of {sizes:?}");
            }
        }
    }
}

#[test]
fn copied_and_grown_slots_have_the_same_bits_in_any_type() {
    let (_, model) = models().swap_remove(1);
    for kind in KVCacheType::ALL {
        let mut cache = cache(&model, kind, 3, 100).unwrap();
        step(&model, &mut cache, &ids(100), 2);
        cache.copy_prefix(2, 0, 70).unwrap();
        cache.reserve(130).unwrap();
        cache.reserve_slots(5).unwrap();
        cache.copy_slot(2, 4).unwrap();
        assert_eq!([0, 1, 2, 3, 4].map(|slot| cache.len(slot)), [70, 0, 100, 0, 100]);
        let expected = bits(&step(&model, &mut cache, &ids(130)[100..], 2));
        let copied = bits(&step(&model, &mut cache, &ids(130)[70..], 0));
        assert!(copied[30..] == expected[..], "{kind}");
        assert!(bits(&step(&model, &mut cache, &ids(130)[100..], 4)) == expected, "{kind}");
    }
}

#[test]
fn a_sequence_has_the_bits_that_it_has_alone_and_with_a_cached_prefix() {
    for (name, model) in models() {
        for kind in KVCacheType::ALL {
            let request =
                |i: usize| Request::new(ids(1 + 13 * i), drawn(8, i as u64)).with_num_top_log_probabilities(9);
            let run = |indices: std::ops::Range<usize>| {
                let mut scheduler = scheduler(&model, kind);
                let all: Vec<_> = indices.map(|i| scheduler.admit(request(i)).unwrap()[0]).collect();
                let found = Collected::run(&mut scheduler);
                all.into_iter().map(|id| found.bits(id)).collect::<Vec<_>>()
            };
            for (i, together) in run(0..6).into_iter().enumerate() {
                assert!(together == run(i..i + 1)[0], "{name}, {kind}: sequence {i}");
            }

            let turns = [ids(60), ids(90), ids(75)];
            let mut shared = scheduler(&model, kind);
            for (turn, reused) in turns.iter().zip([0, 60, 74]) {
                let request = || Request::new(&turn[..], drawn(6, 1));
                let answer = |scheduler: &mut Scheduler, request| {
                    let id = scheduler.admit(request).unwrap()[0];
                    let pieces = Collected::run(scheduler).pieces.remove(&id).unwrap();
                    let reused = pieces.last().unwrap().finish.as_ref().unwrap().reused_tokens;
                    let bits = |piece: &metal_candle::inference::Piece| (piece.token, piece.log_probability.to_bits());
                    (pieces.iter().map(bits).collect::<Vec<_>>(), reused)
                };
                let (found, count) = answer(&mut shared, request().with_prefix_key(1));
                assert_eq!(count, reused, "{name}, {kind}");
                assert_eq!(found, answer(&mut scheduler(&model, kind), request()).0, "{name}, {kind}");
            }
        }
    }
}

/// The error of the logits relative to their size, by type: at most these values, and at least a tenth, which proves
/// that the type is used. With quantized weights, rounding activations to 8 bits amplifies any difference.
#[test]
fn each_type_has_its_rounding_error() {
    let text = ids(200);
    let mut wrong = Vec::new();
    for (name, model) in models().split_off(1) {
        let logits = |kind| step(&model, &mut cache(&model, kind, 1, 200).unwrap(), &text, 0).concat();
        let exact = logits(KVCacheType::F32);
        let size = exact.iter().map(|value| f64::from(value * value)).sum::<f64>().sqrt();
        for (kind, most) in [
            (KVCacheType::F16, 1e-3),
            (KVCacheType::BF16, 9e-3),
            (KVCacheType::Q8_0, 2.8e-2),
            (KVCacheType::Q4_0, 4.3e-1),
        ] {
            let squares = logits(kind).iter().zip(&exact).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>();
            let error = squares.sqrt() / size;
            if error > most || error < most / 10.0 {
                wrong.push(format!("{name}, {kind}: {error:.2e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn memory_follows_the_type() {
    let config = KVCacheConfig { max_seq_len: 2048, num_layers: 24, num_heads: 2, head_dim: 64, batch_size: 3 };
    let elements = 2 * 2048 * 24 * 2 * 64 * 3;
    let sizes = [4 * elements, 2 * elements, 2 * elements, elements / 32 * 34, elements / 32 * 18];
    assert_eq!(KVCacheType::ALL.map(|kind| config.num_bytes(kind)), sizes);
    let (_, model) = models().swap_remove(1);
    for kind in KVCacheType::ALL {
        let mut scheduler = scheduler(&model, kind);
        scheduler.reserve(3, 50).unwrap();
        assert_eq!(scheduler.cache_bytes(), scheduler.config().cache_bytes(&model, 3, 50));
        assert_eq!(scheduler.cache_bytes(), cache(&model, kind, 3, 50).unwrap().num_bytes());
        let mut generator = Generator::new(model.clone()).with_kv_cache(kind).unwrap();
        generator.generate(ids(4), &greedy(6)).unwrap();
        // a clone has its own cache, of the same type
        let mut clone = generator.clone();
        clone.generate(ids(4), &greedy(6)).unwrap();
        let expected = cache(&model, kind, 1, 10).unwrap().num_bytes();
        assert_eq!([generator.cache_bytes(), clone.cache_bytes()], [expected; 2], "{kind}");
    }
}

#[test]
fn the_default_is_f32_where_any_weight_is_quantized() {
    let mut models = models();
    let (plain, quantized) = (models.swap_remove(1).1, models.swap_remove(0).1);
    let half = plain.to_dtype(DType::BF16).unwrap();
    // the first parameter is f16
    let mixture = Quantization::from(QuantizationMixture::from_name("q8_0").unwrap());
    let mixture = mixture.with_type("embed_tokens", metal_candle::files::GgufType::F16).unwrap();
    let mixed = plain.quantize(&mixture, |_| {}).unwrap();
    assert_eq!(mixed.parameters()[0].1.dtype(), DType::F16);
    for (model, kind) in [
        (&plain, KVCacheType::F32),
        (&half, KVCacheType::F16),
        (&quantized, KVCacheType::F32),
        (&mixed, KVCacheType::F32),
    ] {
        let mut generator = Generator::new(model.clone());
        generator.generate(ids(4), &greedy(6)).unwrap();
        assert_eq!(generator.cache_bytes(), cache(model, kind, 1, 10).unwrap().num_bytes(), "{kind}");
    }
}

#[test]
fn scores_and_drafts_use_the_type() {
    let (_, model) = models().swap_remove(1);
    let score = |kind| prompt_log_probabilities(&model, None, &ids(40), 0, kind).unwrap();
    assert_eq!(score(None), score(Some(KVCacheType::F32)));
    assert_ne!(score(None), score(Some(KVCacheType::Q4_0)));
    for kind in KVCacheType::ALL {
        let mut plain = scheduler(&model, kind);
        let mut drafting = scheduler(&model, kind).with_draft_model(model.clone()).unwrap();
        let request = || Request::new(ids(40), greedy(20));
        let id = plain.admit(request()).unwrap()[0];
        let expected = Collected::run(&mut plain).bits(id);
        let drafted = request().with_speculation(Speculation::DraftModel { max_tokens: 4 });
        let id = drafting.admit(drafted).unwrap()[0];
        let found = Collected::run(&mut drafting);
        assert!(found.bits(id) == expected, "{kind}");
        assert!(found.pieces[&id].last().unwrap().finish.as_ref().unwrap().accepted_draft_tokens > 10, "{kind}");
        // the scores equal those of generation
        let text: Vec<u32> = ids(40).into_iter().chain(found.tokens(id)).collect();
        let scores = prompt_log_probabilities(&model, None, &text, 0, Some(kind)).unwrap();
        let bits: Vec<u32> = scores[39..].iter().map(|score| score.0.to_bits()).collect();
        let generated = found.pieces[&id].iter().map(|piece| piece.log_probability.to_bits());
        assert_eq!(bits, generated.collect::<Vec<_>>(), "{kind}");
    }
}

#[test]
fn a_sequence_whose_keys_are_not_finite_fails_alone() {
    let (_, whole) = models().swap_remove(1);
    let mut tensors: HashMap<String, Tensor> = crate::golden::parameters_of(&whole).into_iter().collect();
    let embedding = tensors.get_mut("model.embed_tokens.weight").unwrap();
    let mut values: Vec<Vec<f32>> = embedding.to_vec2().unwrap();
    values[500][3] = f32::NAN;
    // the head is not tied to the embedding, so only this token is affected
    let head = embedding.clone();
    *embedding = Tensor::new(values, &candle_core::Device::Cpu).unwrap();
    tensors.insert("lm_head.weight".into(), head);
    let mut config = whole.config().clone();
    config.tie_word_embeddings = false;
    let model = Model::from_tensors(config, tensors, Device::CPU).unwrap();
    for kind in KVCacheType::ALL {
        let mut scheduler = scheduler(&model, kind);
        let good = scheduler.admit(Request::new(ids(30), greedy(8))).unwrap()[0];
        let bad = scheduler.admit(Request::new([1, 500, 7], greedy(8))).unwrap()[0];
        let (mut tokens, mut errors) = (Vec::new(), Vec::new());
        while !scheduler.is_idle() {
            for event in scheduler.step().unwrap() {
                match event.result {
                    Ok(piece) => tokens.push((event.sequence, piece.token)),
                    Err(error) => errors.push((event.sequence, argument(&error).0.to_owned())),
                }
            }
        }
        assert_eq!(errors, [(bad, "logits".to_owned())], "{kind}");
        let expected = Generator::new(whole.clone()).with_kv_cache(kind).unwrap();
        let expected = expected.clone().generate(ids(30), &greedy(8)).unwrap().tokens;
        assert_eq!(tokens, expected.into_iter().map(|token| (good, token)).collect::<Vec<_>>(), "{kind}");
    }
}

#[test]
fn unsupported_types_are_refused_by_name() {
    // heads of 8
    let narrow = model_of(config(), DType::F32);
    let (_, wide) = models().swap_remove(1);
    for kind in [KVCacheType::Q8_0, KVCacheType::Q4_0] {
        let config = SchedulerConfig { kv_cache: Some(kind), ..SchedulerConfig::of(&narrow) };
        let errors: [Error; 4] = [
            cache(&narrow, kind, 1, 8).unwrap_err(),
            Scheduler::with_config(narrow.clone(), config).unwrap_err(),
            Generator::new(narrow.clone()).with_kv_cache(kind).unwrap_err(),
            prompt_log_probabilities(&narrow, None, &ids(3), 0, Some(kind)).unwrap_err(),
        ];
        let expected = format!("expected a head width that is a multiple of 32 for `{kind}`, found 8; use `f16`");
        for error in &errors {
            assert_eq!(argument(error), ("kv_cache", expected.as_str()));
        }
        let error = scheduler(&wide, kind).with_draft_model(narrow.clone()).unwrap_err();
        assert_eq!(argument(&error), ("kv_cache", format!("the draft model: {expected}").as_str()));
    }
    let error = "q8_1".parse::<KVCacheType>().unwrap_err();
    let expected = "expected one of `f32`, `f16`, `bf16`, `q8_0`, `q4_0`, found `q8_1`";
    assert_eq!(argument(&error), ("kv_cache", expected));
    assert!(KVCacheType::ALL.iter().all(|kind| kind.name().parse::<KVCacheType>().unwrap() == *kind));
    let wrong = KVCache::with_dtype(*cache(&wide, KVCacheType::F32, 1, 1).unwrap().config(), &Device::CPU, DType::U8);
    assert_eq!(argument(&wrong.unwrap_err()).0, "dtype");
}
