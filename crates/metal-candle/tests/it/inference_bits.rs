//! On the CPU the bits of a token do not depend on how its text is cut into passes, so that caches and drafts change nothing.

use super::inference_generator::{
    VOCAB, adapter, argument, assert_close, config, drawn, greedy, ids, logits_of, model_of,
};
use super::inference_scheduler::Collected;
use candle_core::{DType, Tensor};
use metal_candle::inference::{
    KVCache, KVCacheConfig, Piece, Request, Scheduler, SchedulerConfig, SequenceId, prompt_log_probabilities,
};
use metal_candle::models::{Batch, MatmulPrecision, Model, Quantization, QuantizationMixture, Rows};
use metal_candle::ops::LowRankUpdates;
use metal_candle::{Device, ModelConfig};

/// The bits of the logits of each token of a text that is computed in parts of these sizes, in turn.
pub(super) fn bits(model: &Model, terms: Option<&LowRankUpdates>, text: &[u32], sizes: &[usize]) -> Vec<Vec<u32>> {
    let config = model.config();
    let sizes_of_cache = KVCacheConfig {
        max_seq_len: text.len(),
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: 1,
    };
    // the type that the scheduler stores
    let dtype = if model.dtype() == DType::F32 { DType::F32 } else { DType::F16 };
    let mut cache = KVCache::with_dtype(sizes_of_cache, &model.device(), dtype).unwrap();
    let mut found = Vec::new();
    for &size in sizes.iter().cycle() {
        let start = found.len();
        if start == text.len() {
            break;
        }
        let mut batch = Batch::new();
        batch.push(&text[start..text.len().min(start + size)], start, 0);
        let logits = model.forward(&batch, terms, Some(&mut cache), Rows::All).unwrap();
        for row in logits.to_vec2::<f32>().unwrap() {
            found.push(row.into_iter().map(f32::to_bits).collect());
        }
    }
    found
}

/// Compares the bits of whole prompts, of chunks, of drafts and of single tokens.
pub(super) fn check(name: &str, model: &Model, terms: Option<&LowRankUpdates>, text: &[u32]) {
    let whole = bits(model, terms, text, &[text.len()]);
    for sizes in [&[1][..], &[5], &[3, 1, 9], &[64], &[130, 2, 1]] {
        let found = bits(model, terms, text, sizes);
        let differs = (0..text.len()).find(|&token| found[token] != whole[token]);
        assert_eq!(differs, None, "{name}: token in parts of {sizes:?}");
    }
}

/// Widths that quantized blocks and the tiles of matrix units fill, and a remainder.
fn wide_config() -> ModelConfig {
    let mut config = config();
    (config.hidden_size, config.intermediate_size) = (256, 768);
    (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (4, 2, 64);
    config
}

#[test]
fn the_parts_of_a_text_do_not_change_its_bits() {
    let text = ids(300);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for config in [config(), wide_config()] {
            let model = model_of(config, dtype);
            check(&format!("{dtype:?}"), &model, None, &text);
            check(&format!("{dtype:?} with an adapter"), &model, Some(&adapter(&model, 1)), &text);
        }
    }
    for mixture in ["q8_0", "q4_k_m"] {
        check(mixture, &quantized(mixture), None, &text);
    }
    let rounded = model_of(wide_config(), DType::BF16).with_matmul_precision(MatmulPrecision::Bf16).unwrap();
    check("rounded activations", &rounded, None, &text);
    check("rounded activations with an adapter", &rounded, Some(&adapter(&rounded, 1)), &text);
}

#[test]
fn rounded_activations_are_close_where_the_processor_multiplies_bf16() {
    let exact = model_of(wide_config(), DType::BF16);
    let rounded = exact.with_matmul_precision(MatmulPrecision::Bf16).unwrap();
    assert_eq!(rounded.matmul_precision(), MatmulPrecision::Bf16);
    let [exact_logits, logits] = [&exact, &rounded].map(|model| logits_of(model, &ids(40)));
    let largest = exact_logits.iter().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
    let difference = exact_logits.iter().zip(&logits).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(difference < 0.03 * largest, "{difference} of {largest}");
    assert_eq!(difference > 0.0, Device::multiplies_bf16());
    // the gate of the precision: back to f32, and refused without bf16 weights
    let again = rounded.with_matmul_precision(MatmulPrecision::F32).unwrap();
    assert_eq!(logits_of(&again, &ids(40)), exact_logits);
    for (model, kind) in [(model_of(wide_config(), DType::F32), "f32"), (quantized("q8_0"), "q8_0")] {
        let error = model.with_matmul_precision(MatmulPrecision::Bf16).unwrap_err();
        let (name, message) = argument(&error);
        assert_eq!(name, "matmul_precision");
        assert!(message.contains(&format!("found {kind}")), "{message}");
    }
}

pub(super) fn quantized(mixture: &str) -> Model {
    let quantization = Quantization::from(QuantizationMixture::from_name(mixture).unwrap());
    model_of(wide_config(), DType::F32).quantize(&quantization, |_| {}).unwrap()
}

/// Tokens and bits of log-probabilities, and the number of tokens that were not computed.
fn outcome(pieces: &[Piece]) -> (Vec<(u32, u32)>, usize) {
    let choices = pieces.iter().map(|piece| (piece.token, piece.log_probability.to_bits())).collect();
    (choices, pieces.last().unwrap().finish.as_ref().unwrap().reused_tokens)
}

fn run(scheduler: &mut Scheduler, request: Request) -> (Vec<(u32, u32)>, usize) {
    let id = scheduler.admit(request).unwrap()[0];
    outcome(&Collected::run(scheduler).pieces[&id])
}

fn alone(model: &Model, request: Request) -> Vec<(u32, u32)> {
    run(&mut Scheduler::new(model.clone()), request).0
}

/// Half-precision weights have products, and a cache, of their own.
#[test]
fn a_batch_has_the_bits_of_each_alone_in_every_type() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let model = model_of(config(), dtype);
        let request = |i: usize| Request::new(ids(1 + 5 * i), greedy(6)).with_num_top_log_probabilities(VOCAB);
        let run = |indices: std::ops::Range<usize>| {
            let mut scheduler = Scheduler::new(model.clone());
            let all: Vec<_> = indices.map(|i| scheduler.admit(request(i)).unwrap()[0]).collect();
            let found = Collected::run(&mut scheduler);
            all.into_iter().map(|id| found.bits(id)).collect::<Vec<_>>()
        };
        for (i, together) in run(0..9).into_iter().enumerate() {
            assert!(together == run(i..i + 1)[0], "{dtype:?}: sequence {i}");
        }
    }
}

#[test]
fn a_cached_prefix_does_not_change_the_bits_of_an_answer() {
    let models = [model_of(config(), DType::F32), model_of(config(), DType::BF16), quantized("q4_k_m")];
    for (index, model) in models.into_iter().enumerate() {
        let config = SchedulerConfig { max_sequences: 3, prefill_chunk: 24, step_tokens: 40, kv_cache: None };
        let mut scheduler = Scheduler::with_config(model.clone(), config).unwrap();
        let (answer, reused) = run(&mut scheduler, Request::new(ids(70), drawn(20, 4)).with_prefix_key(1));
        assert_eq!(reused, 0);
        // the next turn, whose prefix was computed in chunks and by decode steps
        let answer = answer.into_iter().map(|(token, _)| token);
        let turn: Vec<u32> = ids(70).into_iter().chain(answer).chain([5, 6, 7]).collect();
        let request = |text: &[u32]| Request::new(text, drawn(10, 5));
        let expected = [&turn[..], &turn[..85]].map(|text| alone(&model, request(text)));
        let found = run(&mut scheduler, request(&turn).with_prefix_key(1));
        assert_eq!(found, (expected[0].clone(), 89), "model {index}");
        // another branch
        let found = run(&mut scheduler, request(&turn[..85]).with_prefix_key(1));
        assert_eq!(found, (expected[1].clone(), 84), "model {index}");
    }
}

#[test]
fn prefixes_are_shared_by_key_and_adapter_only() {
    let model = model_of(config(), DType::F32);
    let mut scheduler = Scheduler::new(model.clone());
    scheduler.reserve(4, 64).unwrap();
    let adapter = scheduler.add_adapter(&adapter(&model, 1)).unwrap();
    let mut reused = |key: Option<u128>, adapter, prompt: &[u32]| {
        let mut request = Request::new(prompt, greedy(3)).with_adapter(adapter);
        request.prefix_key = key;
        let id = scheduler.admit(request).unwrap()[0];
        let found = Collected::run(&mut scheduler);
        assert_eq!(found.tokens(id).len(), 3);
        found.pieces[&id].last().unwrap().finish.as_ref().unwrap().reused_tokens
    };
    assert_eq!(reused(Some(1), None, &ids(20)), 0);
    assert_eq!(reused(Some(2), None, &ids(20)), 0);
    assert_eq!(reused(None, None, &ids(20)), 0);
    assert_eq!(reused(Some(1), Some(adapter), &ids(20)), 0);
    // all but the last token, whose logits are needed
    assert_eq!(reused(Some(1), None, &ids(20)), 19);
    assert_eq!(reused(Some(1), Some(adapter), &ids(12)), 11);
    assert_eq!(reused(Some(1), None, &ids(40)), 20);
    assert_eq!(reused(None, None, &ids(20)), 0);
}

#[test]
fn a_prefix_is_copied_from_a_sequence_that_runs() {
    let model = model_of(config(), DType::F32);
    let mut scheduler = Scheduler::new(model.clone());
    let adapter = scheduler.add_adapter(&adapter(&model, 1)).unwrap();
    let first = scheduler.admit(Request::new(ids(60), greedy(30)).with_prefix_key(1)).unwrap()[0];
    let mut pieces: Vec<Piece> = Vec::new();
    while pieces.len() < 5 {
        pieces.extend(scheduler.step().unwrap().into_iter().map(|event| event.result.unwrap()));
    }
    let text: Vec<u32> = ids(60).into_iter().chain(pieces.iter().map(|piece| piece.token)).chain([9]).collect();
    let request = |text: &[u32]| Request::new(text, drawn(8, 2));
    let requests = [
        request(&text).with_prefix_key(1),
        request(&text[..30]).with_prefix_key(1),
        request(&text).with_prefix_key(2),
        request(&text).with_prefix_key(1).with_adapter(Some(adapter)),
        request(&text),
    ];
    let all: Vec<SequenceId> = requests.into_iter().map(|request| scheduler.admit(request).unwrap()[0]).collect();
    let mut found = Collected::run(&mut scheduler).pieces;
    pieces.extend(found.remove(&first).unwrap());
    assert_eq!(outcome(&pieces), (alone(&model, Request::new(ids(60), greedy(30))), 0));
    let found: Vec<_> = all.iter().map(|id| outcome(&found[id])).collect();
    // the last token of the sequence that runs is not in the cache yet
    assert_eq!(found.iter().map(|(_, reused)| *reused).collect::<Vec<_>>(), [64, 29, 0, 0, 0]);
    assert_eq!(found[0].0, alone(&model, request(&text)));
    assert_eq!(found[1].0, alone(&model, request(&text[..30])));
    assert_ne!(found[3].0, found[0].0);
}

#[test]
fn a_short_common_prefix_leaves_a_long_text_in_the_cache() {
    let mut scheduler = Scheduler::new(model_of(config(), DType::F32));
    scheduler.reserve(3, 200).unwrap();
    let mut reused = |text: Vec<u32>| run(&mut scheduler, Request::new(text, greedy(2)).with_prefix_key(1)).1;
    let branch = |last: u32| ids(20).into_iter().chain((0..60).map(|i| (i * 7 + last) % 400)).collect::<Vec<u32>>();
    assert_eq!([reused(ids(100)), reused(branch(1)), reused(branch(2))], [0, 20, 20]);
    assert_eq!(reused(ids(100)), 99);
    // without an empty slot the text that was used longest ago goes
    assert_eq!([reused(branch(3)), reused(ids(100)), reused(branch(1))], [20, 99, 20]);
}

#[test]
fn scores_of_a_text_are_those_of_its_generation() {
    let models = [model_of(config(), DType::F32), model_of(config(), DType::BF16), quantized("q8_0")];
    for (index, model) in models.iter().enumerate() {
        for terms in [None, Some(adapter(model, 3))] {
            let mut scheduler = Scheduler::new(model.clone());
            let id = terms.as_ref().map(|terms| scheduler.add_adapter(terms).unwrap());
            let request = Request::new(ids(600), drawn(9, 5)).with_num_top_log_probabilities(3).with_adapter(id);
            let id = scheduler.admit(request).unwrap()[0];
            let pieces = Collected::run(&mut scheduler).pieces.remove(&id).unwrap();
            let text: Vec<u32> = ids(600).into_iter().chain(pieces.iter().map(|piece| piece.token)).collect();
            let scores = prompt_log_probabilities(model, terms.as_ref(), &text, 3, None).unwrap();
            assert_eq!(scores.len(), 608);
            for (score, piece) in scores[599..].iter().zip(&pieces) {
                assert_eq!(score.0.to_bits(), piece.log_probability.to_bits(), "model {index}");
                assert_eq!(score.1, piece.top_log_probabilities, "model {index}");
            }
        }
    }
    let model = &models[0];
    let logits = model.forward(&Batch::single(&ids(20)), None, None, Rows::All).unwrap();
    let norms = logits.log_sum_exp(1).unwrap().unsqueeze(1).unwrap();
    let expected = logits.broadcast_sub(&norms).unwrap().to_vec2::<f32>().unwrap();
    let scores = prompt_log_probabilities(model, None, &ids(20), 0, None).unwrap();
    let expected: Vec<f32> = ids(20)[1..].iter().zip(expected).map(|(&id, row)| row[id as usize]).collect();
    assert_close(&scores.iter().map(|score| score.0).collect::<Vec<_>>(), &expected);
    assert!(scores.iter().all(|score| score.1.is_empty()));
    assert!(prompt_log_probabilities(model, None, &[7], 2, None).unwrap().is_empty());
    assert!(prompt_log_probabilities(model, None, &[], 2, None).unwrap().is_empty());
    for (ids, num_top, name) in [
        (ids(2049), 0, "prompt"),
        (vec![1, VOCAB as u32], 0, "prompt"),
        (ids(2), VOCAB + 1, "num_top_log_probabilities"),
    ] {
        assert_eq!(argument(&prompt_log_probabilities(model, None, &ids, num_top, None).unwrap_err()).0, name);
    }
}

#[test]
fn hidden_states_are_what_the_head_takes() {
    let mut untied = config();
    untied.tie_word_embeddings = false;
    let model = model_of(untied, DType::F32);
    let head = crate::golden::parameters_of(&model).into_iter().find(|(name, _)| name == "lm_head.weight").unwrap().1;
    let texts = [ids(9), ids(30), ids(4)];
    let batch = Batch::from_sequences(&texts);
    let terms = adapter(&model, 2);
    let hidden = model.hidden_states(&batch, None, None, Rows::All).unwrap();
    let logits = model.forward(&batch, None, None, Rows::All).unwrap();
    assert!(crate::golden::max_difference(&hidden.matmul(&head.t().unwrap()).unwrap(), &logits) < 1e-4);
    // a text has the bits that it has alone
    let values = |hidden: &Tensor| hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let together = model.hidden_states(&batch, Some(&terms), None, Rows::Last).unwrap();
    assert_eq!(together.dims(), [3, model.config().hidden_size]);
    for (index, text) in texts.iter().enumerate() {
        let alone = model.hidden_states(&Batch::single(text), Some(&terms), None, Rows::Last).unwrap();
        assert_eq!(values(&alone), values(&together.get(index).unwrap()), "text {index}");
    }
}
