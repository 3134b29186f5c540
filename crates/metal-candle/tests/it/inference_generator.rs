//! The generator on small models of random weights.

use candle_core::{DType, Tensor};
use metal_candle::data::{Random, Tokenizer};
use metal_candle::inference::{
    FinishReason, Generation, GenerationConfig, Generator, KVCache, KVCacheConfig, Piece, Sampler, SamplingConfig,
};
use metal_candle::models::{Batch, Model, Rows};
use metal_candle::ops::{LowRank, LowRankUpdates};
use metal_candle::{Device, Error, ModelConfig};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

pub(super) const VOCAB: usize = 502;

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

pub(super) fn tokenizer() -> Tokenizer {
    Tokenizer::from_folder(golden("tokenizer")).unwrap()
}

fn tensor(random: &mut Random, shape: &[usize], deviation: f32) -> Tensor {
    let mut normal = || ((0..12).map(|_| random.next_f32()).sum::<f32>() - 6.0) * deviation;
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| normal()).collect();
    Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap()
}

/// The sizes of a golden model (7 query heads to 1 key/value head), with the vocabulary of the golden tokenizer.
pub(super) fn config() -> ModelConfig {
    let mut config = ModelConfig::from_json(golden("models/gqa-tied/config.json")).unwrap();
    config.vocab_size = VOCAB;
    config.max_position_embeddings = 2048;
    config.eos_token_ids = Vec::new();
    config
}

pub(super) fn model_of(config: ModelConfig, dtype: DType) -> Model {
    let mut random = Random::new(1);
    let tensors = Model::parameter_shapes(&config)
        .into_iter()
        .map(|(name, shape)| {
            let tensor = tensor(&mut random, &shape, 0.15);
            let tensor = if name.contains("norm") { (tensor + 1.0).unwrap() } else { tensor };
            (name, tensor.to_dtype(dtype).unwrap())
        })
        .collect();
    Model::from_tensors(config, tensors, Device::CPU).unwrap()
}

fn generator() -> Generator {
    Generator::new(model_of(config(), DType::F32)).with_tokenizer(tokenizer())
}

pub(super) fn adapter(model: &Model, seed: u64) -> LowRankUpdates {
    let mut random = Random::new(seed);
    let mut terms = LowRankUpdates::new();
    for (number, linear) in model.linears().iter().enumerate() {
        let a = tensor(&mut random, &[4, linear.in_features], 0.3);
        let b = tensor(&mut random, &[linear.out_features, 4], 0.3);
        terms.insert(number, LowRank::new(a, b, 0.5));
    }
    terms
}

pub(super) fn ids(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + 11) % 480).collect()
}

pub(super) fn greedy(max_tokens: usize) -> GenerationConfig {
    GenerationConfig::default().with_max_tokens(max_tokens)
}

pub(super) fn drawn(max_tokens: usize, seed: u64) -> GenerationConfig {
    greedy(max_tokens).with_sampling(SamplingConfig::default().with_temperature(0.9).with_seed(seed))
}

pub(super) fn logits_of(model: &Model, ids: &[u32]) -> Vec<f32> {
    let logits = model.forward(&Batch::single(ids), None, None, Rows::Last).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// Greedy tokens and their log-probabilities without any cache.
fn uncached(model: &Model, prompt: &[u32], n: usize) -> (Vec<u32>, Vec<f32>) {
    let mut all = prompt.to_vec();
    let mut log_probabilities = Vec::new();
    for _ in 0..n {
        let choice = Sampler::new(SamplingConfig::greedy()).unwrap().sample(&logits_of(model, &all)).unwrap();
        all.push(choice.token);
        log_probabilities.push(choice.log_probability);
    }
    (all.split_off(prompt.len()), log_probabilities)
}

pub(super) fn assert_close(found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(wanted) {
        assert!((found - wanted).abs() < 1e-4, "{found}, expected {wanted}");
    }
}

/// What a generation chose, without what depends on the clock.
fn choices(generation: &Generation) -> (&str, &[u32], FinishReason) {
    (&generation.text, &generation.tokens, generation.finish.reason)
}

pub(super) fn argument(error: &Error) -> (&str, &str) {
    let Error::Argument { name, message } = error else { panic!("{error}") };
    (name, message)
}

#[test]
fn cached_tokens_and_probabilities_equal_uncached_ones() {
    let model = model_of(config(), DType::F32);
    // one token, a few, and more than go through the model at once
    for length in [1, 2, 7, 600] {
        let prompt = ids(length);
        let generation = Generator::new(model.clone()).generate(&prompt, &greedy(20)).unwrap();
        let (tokens, log_probabilities) = uncached(&model, &prompt, 20);
        assert_eq!(generation.tokens, tokens, "prompt of {length}");
        assert_close(&generation.log_probabilities, &log_probabilities);
        assert_eq!(generation.text, "");
        assert_eq!(generation.finish.reason, FinishReason::MaxTokens);
        assert_eq!(generation.finish.prompt_tokens, length);
        assert_eq!(generation.finish.generated_tokens, 20);
        assert!(generation.finish.prompt_tokens_per_second > 0.0);
        assert!(generation.finish.decode_tokens_per_second > 0.0);
    }
}

#[test]
fn the_cache_grows_beyond_its_first_room() {
    let model = model_of(config(), DType::F32);
    let mut generator = Generator::new(model.clone());
    let generation = generator.generate(ids(3), &greedy(400)).unwrap();
    let (tokens, _) = uncached(&model, &ids(3), 5);
    assert_eq!(generation.tokens[..5], tokens);
    // the last tokens, computed after the cache had grown, are those of a pass without a cache
    let all: Vec<u32> = ids(3).into_iter().chain(generation.tokens[..398].iter().copied()).collect();
    let (tokens, log_probabilities) = uncached(&model, &all, 2);
    assert_eq!(generation.tokens[398..], tokens);
    assert_close(&generation.log_probabilities[398..], &log_probabilities);
}

#[test]
fn a_grown_cache_keeps_every_slot() {
    let model = model_of(config(), DType::F32);
    let sizes = KVCacheConfig {
        max_seq_len: 6,
        num_layers: model.config().num_hidden_layers,
        num_heads: model.config().num_key_value_heads,
        head_dim: model.config().head_dim,
        batch_size: 3,
    };
    let mut cache = KVCache::new(sizes, &Device::CPU).unwrap();
    let sequences = [ids(6), ids(2), ids(4)];
    model.forward(&Batch::from_sequences(&sequences), None, Some(&mut cache), Rows::Last).unwrap();
    cache.reserve(9).unwrap();
    cache.reserve(5).unwrap();
    assert_eq!(cache.config().max_seq_len, 9);
    let mut batch = Batch::new();
    for (slot, sequence) in sequences.iter().enumerate() {
        batch.push(&[5], sequence.len(), slot);
    }
    let logits = model.forward(&batch, None, Some(&mut cache), Rows::Last).unwrap();
    for (slot, sequence) in sequences.iter().enumerate() {
        let whole: Vec<u32> = sequence.iter().copied().chain([5]).collect();
        assert_close(&logits.get(slot).unwrap().to_vec1().unwrap(), &logits_of(&model, &whole));
    }
}

#[test]
fn half_precision_weights_have_a_half_precision_cache() {
    let config = config();
    // keys and values of one head of width 8 in 3 blocks, room for the prompt and 10 tokens
    let elements = 2 * config.num_hidden_layers * config.head_dim * config.num_key_value_heads * (4 + 10);
    for (dtype, size) in [(DType::F32, 4), (DType::F16, 2), (DType::BF16, 2)] {
        let model = model_of(config.clone(), dtype);
        let mut generator = Generator::new(model.clone());
        let generation = generator.generate(ids(4), &greedy(10)).unwrap();
        assert_eq!(generator.cache_bytes(), elements * size);
        assert_eq!(generation.tokens[0], uncached(&model, &ids(4), 1).0[0]);
        generator.clear_cache();
        assert_eq!(generator.cache_bytes(), 0);
    }
}

#[test]
fn text_goes_in_and_comes_out_whole() {
    let mut generator = generator();
    let tokenizer = tokenizer();
    let generation = generator.generate("fn main() {", &drawn(60, 3)).unwrap();
    assert_eq!(generation.finish.prompt_tokens, tokenizer.encode("fn main() {", true).unwrap().len());
    assert_eq!(generation.text, tokenizer.decode(&generation.tokens, true).unwrap());
    assert!(!generation.text.is_empty());
    let error = Generator::new(generator.model().clone()).generate("text", &greedy(1)).unwrap_err();
    assert_eq!(argument(&error).0, "prompt");
}

#[test]
fn a_seed_repeats_the_text() {
    let mut generator = generator();
    let mut text = |seed| generator.generate("let", &drawn(30, seed)).unwrap().text;
    let first = text(1);
    assert_eq!(text(1), first);
    assert_ne!(text(2), first);
}

#[test]
fn stop_strings_end_the_text_wherever_tokens_end() {
    let mut generator = generator();
    let whole = generator.generate("fn", &drawn(40, 5)).unwrap();
    let characters: Vec<(usize, char)> = whole.text.char_indices().collect();
    let mut straddling = 0;
    for start in 0..characters.len() - 3 {
        let stop: String = characters[start..start + 3].iter().map(|(_, c)| c).collect();
        let found = generator.generate("fn", &drawn(40, 5).with_stop_string(&stop)).unwrap();
        let end = whole.text.find(&stop).unwrap();
        assert_eq!(found.text, whole.text[..end], "{stop:?}");
        assert_eq!(found.finish.reason, FinishReason::StopString);
        assert_eq!(found.tokens[..], whole.tokens[..found.tokens.len()]);
        assert_eq!(found.finish.generated_tokens, found.tokens.len());
        let tokenizer = generator.tokenizer().unwrap();
        let parts: Vec<String> = found.tokens.iter().map(|&id| tokenizer.decode(&[id], true).unwrap()).collect();
        straddling += usize::from(parts.iter().all(|part| !part.contains(&stop)));
    }
    assert!(straddling > 5, "{straddling} stop strings straddle tokens");
    let absent = generator.generate("fn", &drawn(40, 5).with_stop_string("no such text")).unwrap();
    assert_eq!(choices(&absent), choices(&whole));
}

#[test]
fn end_of_text_tokens_end_it_unless_ignored() {
    let plain = generator().generate("fn", &greedy(8)).unwrap();
    let end = plain.tokens.iter().position(|id| *id != plain.tokens[0]).unwrap_or(0);
    let mut config = config();
    config.eos_token_ids = vec![501, plain.tokens[end]];
    let mut generator = Generator::new(model_of(config, DType::F32)).with_tokenizer(tokenizer());
    let ended = generator.generate("fn", &greedy(8)).unwrap();
    assert_eq!(ended.finish.reason, FinishReason::EndOfText);
    assert_eq!(ended.tokens, plain.tokens[..=end]);
    assert_eq!(ended.finish.generated_tokens, end + 1);
    assert_eq!(ended.text, tokenizer().decode(&plain.tokens[..end], true).unwrap());
    let ignored = generator.generate("fn", &greedy(8).with_ignore_eos(true)).unwrap();
    assert_eq!(choices(&ignored), choices(&plain));
    let stopped = generator.generate("fn", &greedy(8).with_ignore_eos(true).with_stop_id(plain.tokens[end])).unwrap();
    assert_eq!(choices(&stopped), choices(&ended));
}

#[test]
fn the_context_is_a_limit() {
    let mut config = config();
    config.max_position_embeddings = 16;
    let mut generator = Generator::new(model_of(config, DType::F32));
    let generation = generator.generate(ids(10), &greedy(100)).unwrap();
    assert_eq!(generation.finish.reason, FinishReason::Length);
    assert_eq!(generation.tokens.len(), 6);
    assert_eq!(generator.generate(ids(15), &greedy(1)).unwrap().finish.reason, FinishReason::MaxTokens);
    let error = generator.generate(ids(16), &greedy(1)).unwrap_err();
    let wanted = "expected at most 15 tokens, one less than the model's context of 16, found 16";
    assert_eq!(argument(&error), ("prompt", wanted));
}

#[test]
fn bad_requests_are_refused() {
    let mut generator = Generator::new(model_of(config(), DType::F32));
    let mut name = |prompt: Vec<u32>, config: GenerationConfig| {
        let error = generator.generate(prompt, &config).unwrap_err();
        argument(&error).0.to_string()
    };
    assert_eq!(name(vec![], greedy(1)), "prompt");
    assert_eq!(name(vec![1, VOCAB as u32], greedy(1)), "prompt");
    assert_eq!(name(vec![1], greedy(0)), "max_tokens");
    assert_eq!(name(vec![1], greedy(1).with_stop_string("")), "stop_strings");
    assert_eq!(name(vec![1], greedy(1).with_stop_string("x")), "stop_strings");
    assert_eq!(name(vec![1], greedy(1).with_sampling(SamplingConfig::default().with_top_p(2.0))), "top_p");
    // more than any memory: the cache is not made for what may never come
    assert_eq!(generator.generate(vec![1], &greedy(usize::MAX).with_stop_id(0)).unwrap().finish.prompt_tokens, 1);
}

#[test]
fn numbers_that_are_not_finite_end_it_and_leave_no_trace() {
    let mut config = config();
    config.tie_word_embeddings = false;
    let whole = model_of(config.clone(), DType::F32);
    let mut tensors: HashMap<String, Tensor> = crate::golden::parameters_of(&whole).into_iter().collect();
    let embedding = tensors.get_mut("model.embed_tokens.weight").unwrap();
    let mut values: Vec<Vec<f32>> = embedding.to_vec2().unwrap();
    values[5][0] = f32::NAN;
    *embedding = Tensor::new(values, &candle_core::Device::Cpu).unwrap();
    let mut generator = Generator::new(Model::from_tensors(config, tensors, Device::CPU).unwrap());
    let without = |id| greedy(4).with_sampling(SamplingConfig::greedy().with_logit_bias(id, f32::NEG_INFINITY));
    let mut pieces = generator.stream([1, 5, 7], &greedy(4)).unwrap();
    let error = pieces.next().unwrap().unwrap_err();
    assert_eq!(argument(&error), ("logits", "expected numbers, found NaN for token `0`"));
    assert!(pieces.next().is_none());
    let generation = generator.generate([1, 8, 7], &without(5)).unwrap();
    assert_eq!(generation.finish.reused_tokens, 0);
    let unharmed = Generator::new(whole).generate([1, 8, 7], &without(5)).unwrap();
    assert_eq!(generation.tokens, unharmed.tokens);
}

/// Everything of a piece but what depends on the clock.
fn without_clock(piece: &Piece) -> (String, u32, f32, Option<FinishReason>) {
    (piece.text.clone(), piece.token, piece.log_probability, piece.finish.as_ref().map(|finish| finish.reason))
}

#[test]
fn callback_and_iterator_give_the_same_pieces() {
    let mut generator = generator();
    let config = drawn(40, 9).with_stop_string("}");
    let mut by_callback = Vec::new();
    let generation = generator
        .generate_with("fn f", &config, |piece| {
            by_callback.push(without_clock(piece));
            ControlFlow::Continue(())
        })
        .unwrap();
    let by_iterator: Vec<_> =
        generator.stream("fn f", &config).unwrap().map(|piece| without_clock(&piece.unwrap())).collect();
    assert_eq!(by_callback, by_iterator);
    assert_eq!(by_callback.len(), generation.tokens.len());
    assert_eq!(by_callback.iter().map(|piece| piece.0.as_str()).collect::<String>(), generation.text);
    let (last, rest) = by_callback.split_last().unwrap();
    assert!(last.3.is_some() && rest.iter().all(|piece| piece.3.is_none()));
}

#[test]
fn the_last_piece_tells_speed_and_memory() {
    let mut generator = generator();
    let last = generator.stream("fn", &greedy(5)).unwrap().last().unwrap().unwrap();
    let finish = last.finish.unwrap();
    assert!(finish.prompt_tokens_per_second > 0.0 && finish.decode_tokens_per_second > 0.0);
    if cfg!(target_os = "linux") {
        assert!(finish.peak_memory_bytes.unwrap() > 1 << 20);
    }
}

#[test]
fn breaking_and_dropping_cancel() {
    let mut generator = generator();
    let whole = generator.generate(ids(5), &greedy(30)).unwrap();
    let mut calls = 0;
    let broken = generator
        .generate_with(ids(5), &greedy(30), |_| {
            calls += 1;
            if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!((calls, broken.finish.reason), (3, FinishReason::Cancelled));
    assert_eq!(broken.tokens, whole.tokens[..3]);
    assert_eq!(generator.stream(ids(5), &greedy(30)).unwrap().take(4).count(), 4);
    // the prompt and the tokens fed back until then are kept, the last of four was not
    let longer: Vec<u32> = ids(5).into_iter().chain(whole.tokens[..10].iter().copied()).collect();
    let next = generator.generate(&longer, &greedy(20)).unwrap();
    assert_eq!(next.finish.reused_tokens, 8);
    assert_eq!(next.tokens, whole.tokens[10..]);
}

#[test]
fn a_common_beginning_is_not_computed_again() {
    let model = model_of(config(), DType::F32);
    let mut generator = Generator::new(model.clone());
    let first = generator.generate(ids(50), &greedy(10)).unwrap();
    assert_eq!(first.finish.reused_tokens, 0);
    // the next turn of a conversation
    let turn: Vec<u32> = ids(50).into_iter().chain(first.tokens.iter().copied()).chain([1, 2, 3]).collect();
    let second = generator.generate(&turn, &greedy(10)).unwrap();
    assert_eq!(second.finish.reused_tokens, 59);
    assert_eq!(second.tokens, uncached(&model, &turn, 10).0);
    // the same prompt again: only its last token
    assert_eq!(generator.generate(&turn, &greedy(3)).unwrap().finish.reused_tokens, turn.len() - 1);
    // another branch
    let branch: Vec<u32> = turn[..30].iter().copied().chain([400, 401]).collect();
    let third = generator.generate(&branch, &greedy(10)).unwrap();
    assert_eq!(third.finish.reused_tokens, 30);
    assert_eq!(third.tokens, uncached(&model, &branch, 10).0);
    assert_eq!(generator.clone().generate(&branch, &greedy(1)).unwrap().finish.reused_tokens, 0);
}

#[test]
fn adapters_are_swapped_with_what_they_computed() {
    let model = model_of(config(), DType::F32);
    let mut generator = Generator::new(model.clone());
    let plain = generator.generate(ids(20), &greedy(12)).unwrap();
    let mut found = Vec::new();
    for seed in [1, 2] {
        let terms = adapter(&model, seed);
        let fresh = Generator::new(model.clone()).with_adapter(terms.clone()).generate(ids(20), &greedy(12)).unwrap();
        generator.set_adapter(Some(terms));
        let swapped = generator.generate(ids(20), &greedy(12)).unwrap();
        assert_eq!(swapped.finish.reused_tokens, 0);
        assert_eq!(swapped.tokens, fresh.tokens);
        assert_eq!(swapped.log_probabilities, fresh.log_probabilities);
        found.push(swapped.log_probabilities);
    }
    assert_ne!(found[0], found[1]);
    assert_ne!(found[0], plain.log_probabilities);
    generator.set_adapter(None);
    let again = generator.generate(ids(20), &greedy(12)).unwrap();
    assert_eq!(again.finish.reused_tokens, 0);
    assert_eq!(again.tokens, plain.tokens);
    assert_close(&again.log_probabilities, &plain.log_probabilities);
}

#[test]
fn a_batch_equals_one_by_one() {
    let mut generator = generator();
    // more prompts than run at a time, of lengths from 1 to beyond what goes through the model at once
    let prompts: Vec<Vec<u32>> = (0..40).map(|i| ids(if i == 7 { 700 } else { 1 + i * 5 % 23 })).collect();
    let configs: Vec<GenerationConfig> = (0..prompts.len())
        .map(|i| {
            let config = if i % 3 == 0 { drawn(4 + i % 9, i as u64) } else { greedy(4 + i % 9) };
            if i % 4 == 1 { config.with_stop_string("a") } else { config }
        })
        .collect();
    let together = generator.generate_batch(prompts.clone(), &configs).unwrap();
    for ((prompt, config), found) in prompts.iter().zip(&configs).zip(&together) {
        let wanted = generator.generate(prompt, config).unwrap();
        assert_eq!(choices(found), choices(&wanted));
        assert_close(&found.log_probabilities, &wanted.log_probabilities);
        assert_eq!(found.finish.prompt_tokens, prompt.len());
    }
    let one_config = generator.generate_batch(["a", "fn main"], &[greedy(5)]).unwrap();
    assert_eq!(choices(&one_config[1]), choices(&generator.generate("fn main", &greedy(5)).unwrap()));
}

#[test]
fn pieces_of_a_batch_are_told_and_one_prompt_can_be_cancelled() {
    let mut generator = generator();
    let prompts: Vec<Vec<u32>> = vec![ids(5), ids(9), ids(3)];
    let alone: Vec<Vec<u32>> =
        prompts.iter().map(|prompt| generator.generate(prompt, &greedy(6)).unwrap().tokens).collect();
    let mut received = vec![Vec::new(); 3];
    let together = generator
        .generate_batch_with(prompts, &[greedy(6)], |index, piece| {
            received[index].push(piece.token);
            if index == 1 && received[1].len() == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    for (index, wanted) in [(0, &alone[0][..]), (1, &alone[1][..2]), (2, &alone[2][..])] {
        assert_eq!(received[index], wanted);
        assert_eq!(together[index].tokens, wanted);
    }
    assert_eq!(together[1].finish.reason, FinishReason::Cancelled);
    assert_eq!((together[0].finish.generated_tokens, together[1].finish.generated_tokens), (alone[0].len(), 2));
}

#[test]
fn a_bad_prompt_of_a_batch_is_named() {
    let mut generator = generator();
    let error = generator.generate_batch([ids(3), vec![]], &[greedy(1)]).unwrap_err();
    assert_eq!(argument(&error).0, "prompts[1]");
    let error = generator.generate_batch([ids(3), ids(4)], &[greedy(1), greedy(1), greedy(1)]).unwrap_err();
    assert_eq!(argument(&error).0, "configs");
    assert_eq!(generator.generate_batch(Vec::<Vec<u32>>::new(), &[greedy(1)]).unwrap(), []);
}

#[cfg(feature = "async")]
mod asynchronous {
    use super::*;
    use futures_core::Stream;
    use metal_candle::inference::PieceStream;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::task::{Context, Poll, Wake, Waker};

    struct Unpark(std::thread::Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    fn next(stream: &mut PieceStream) -> Option<Piece> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        loop {
            match Pin::new(&mut *stream).poll_next(&mut Context::from_waker(&waker)) {
                Poll::Ready(piece) => return piece.map(Result::unwrap),
                Poll::Pending => std::thread::park(),
            }
        }
    }

    #[test]
    fn the_stream_gives_the_pieces_of_the_iterator() {
        let mut generator = generator();
        let config = drawn(50, 9);
        let wanted: Vec<_> =
            generator.stream("fn f", &config).unwrap().map(|piece| without_clock(&piece.unwrap())).collect();
        let mut stream = generator.into_stream("fn f", &config).unwrap();
        let mut found = Vec::new();
        while let Some(piece) = next(&mut stream) {
            found.push(without_clock(&piece));
        }
        assert_eq!(found, wanted);
        assert_eq!(next(&mut stream), None);
        let mut generator = stream.into_generator().unwrap();
        let again = generator.generate("fn f", &config).unwrap();
        assert_eq!(again.tokens.len(), wanted.len());
        assert_eq!(again.finish.reused_tokens, again.finish.prompt_tokens - 1);
    }

    #[test]
    fn a_slow_reader_holds_the_generation_back_and_dropping_ends_it() {
        let config = drawn(1500, 9);
        let mut stream = generator().into_stream(ids(4), &config).unwrap();
        let first = next(&mut stream).unwrap();
        // time enough for hundreds of tokens
        std::thread::sleep(std::time::Duration::from_millis(300));
        let mut generator = stream.into_generator().unwrap();
        let whole = generator.clone().generate(ids(4), &drawn(40, 9)).unwrap();
        assert_eq!(first.token, whole.tokens[0]);
        let all: Vec<u32> = ids(4).into_iter().chain(whole.tokens).collect();
        let computed = generator.generate(&all, &greedy(1)).unwrap().finish.reused_tokens;
        assert!((4..4 + 20).contains(&computed), "{computed} tokens were computed for a reader of one");
        drop(generator.into_stream(ids(4), &config).unwrap());
    }
}
