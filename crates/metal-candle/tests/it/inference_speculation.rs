//! Drafts: answers have the same tokens, texts and bits with and without them, in fewer steps.

use super::inference_bits::quantized;
use super::inference_generator::{VOCAB, adapter, argument, config, drawn, greedy, ids, model_of, tokenizer};
use super::inference_scheduler::{Collected, Script};
use candle_core::DType;
use metal_candle::inference::{
    Finish, FinishReason, GenerationConfig, Piece, Request, SamplingConfig, Scheduler, SchedulerConfig, Speculation,
};
use metal_candle::models::Model;

/// Drafts by any earlier token, most of which are wrong.
pub(super) const EAGER: Speculation = Speculation::Lookup { max_tokens: 3, min_ngram: 1, max_ngram: 3 };

/// Text, token, bits of log-probabilities, and the end.
type Part = (String, u32, Vec<u32>, Option<(FinishReason, usize)>);

/// What an answer is without the clock, the counts of drafts, and what the cache held.
fn answer(pieces: &[Piece]) -> Vec<Part> {
    let of_piece = |piece: &Piece| {
        let top = piece.top_log_probabilities.iter().map(|choice| choice.log_probability);
        let bits = top.chain([piece.log_probability]).map(f32::to_bits).collect();
        let finish = piece.finish.as_ref().map(|finish| (finish.reason, finish.generated_tokens));
        (piece.text.clone(), piece.token, bits, finish)
    };
    pieces.iter().map(of_piece).collect()
}

fn finish(pieces: &[Piece]) -> &Finish {
    pieces.last().unwrap().finish.as_ref().unwrap()
}

/// The pieces of each sequence of some requests, and the number of steps.
fn run(scheduler: &mut Scheduler, requests: Vec<Request>) -> (Vec<Vec<Piece>>, usize) {
    let admit = |request| scheduler.admit(request).unwrap();
    let all: Vec<_> = requests.into_iter().flat_map(admit).collect();
    let mut found = Collected::default();
    let mut steps = 0;
    while !scheduler.is_idle() {
        found.add(scheduler.step().unwrap());
        steps += 1;
    }
    (all.iter().map(|id| found.pieces.remove(id).unwrap()).collect(), steps)
}

fn new_scheduler(model: &Model) -> Scheduler {
    let config = SchedulerConfig { max_sequences: 16, prefill_chunk: 16, step_tokens: 24, kv_cache: None };
    Scheduler::with_config(model.clone(), config).unwrap().with_tokenizer(tokenizer())
}

/// Requests of every kind, with drafts or without; `predictions` are what the answers are said to be.
fn requests(scheduler: &mut Scheduler, model: &Model, predictions: Option<&[Vec<u32>]>) -> Vec<Request> {
    let adapter = scheduler.add_adapter(&adapter(model, 1)).unwrap();
    let penalties = SamplingConfig::default()
        .with_temperature(0.8)
        .with_repetition_penalty(1.2)
        .with_frequency_penalty(0.3)
        .with_top_k(30)
        .with_seed(6);
    let all = [
        Request::new(ids(9), greedy(40)),
        Request::new(ids(30), drawn(25, 1)).with_num_top_log_probabilities(5),
        Request::new(ids(12), greedy(25).with_sampling(penalties)),
        Request::new(ids(20), drawn(20, 2)).with_adapter(Some(adapter)),
        Request::new(ids(6), drawn(12, 3)).with_mask(Script::new(&[&[1, 2], &[3, 4], &[5], &[6, 7, 8]])),
        Request::new(ids(14), drawn(16, 4)).with_num_samples(3),
        Request::new(ids(1), greedy(7)),
    ];
    let speculated = |(index, request): (usize, Request)| match predictions {
        None => request,
        // some by the lookup alone
        Some(predictions) => {
            let prediction = if index % 3 == 0 { Vec::new() } else { predictions[index].clone() };
            request.with_speculation(EAGER).with_prediction(prediction)
        }
    };
    all.into_iter().enumerate().map(speculated).collect()
}

#[test]
fn drafts_do_not_change_the_bits_of_an_answer() {
    for model in [model_of(config(), DType::F32), model_of(config(), DType::BF16), quantized("q8_0")] {
        let mut scheduler = new_scheduler(&model);
        let plain = requests(&mut scheduler, &model, None);
        let (expected, _) = run(&mut scheduler, plain);
        // predictions that leave the answer and find it again
        let predict = |pieces: &Vec<Piece>| {
            let mut tokens: Vec<u32> = pieces.iter().map(|piece| piece.token).collect();
            let middle = tokens.len() / 2;
            tokens[middle] = (tokens[middle] + 1) % 480;
            tokens
        };
        let predictions: Vec<Vec<u32>> = expected.iter().map(predict).collect();
        let mut scheduler = new_scheduler(&model);
        let drafted = requests(&mut scheduler, &model, Some(&predictions));
        let (found, _) = run(&mut scheduler, drafted);
        let (mut accepted, mut rejected) = (0, 0);
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(answer(found), answer(expected), "{:?}, sequence {index}", model.dtype());
            accepted += finish(found).accepted_draft_tokens;
            rejected += finish(found).rejected_draft_tokens;
            assert_eq!((finish(expected).accepted_draft_tokens, finish(expected).rejected_draft_tokens), (0, 0));
        }
        assert!(accepted > 50 && rejected > 20, "{accepted} accepted, {rejected} rejected");
    }
}

#[test]
fn a_prediction_that_holds_saves_steps() {
    let model = model_of(config(), DType::F32);
    let request = || Request::new(ids(10), drawn(31, 7));
    let (expected, steps) = run(&mut new_scheduler(&model), vec![request()]);
    assert_eq!(steps, 31);
    let tokens: Vec<u32> = expected[0].iter().map(|piece| piece.token).collect();
    let speculation = Speculation::Lookup { max_tokens: 4, min_ngram: 3, max_ngram: 3 };
    let request = || request().with_speculation(speculation).with_prediction(&tokens[..]).with_prefix_key(1);
    let mut scheduler = new_scheduler(&model);
    let (found, steps) = run(&mut scheduler, vec![request()]);
    assert_eq!(answer(&found[0]), answer(&expected[0]));
    // one token of the prompt's step, and five of each later one
    assert_eq!((steps, finish(&found[0]).accepted_draft_tokens, finish(&found[0]).rejected_draft_tokens), (7, 24, 0));
    // what drafts left in the cache is that of the answer
    let turn: Vec<u32> = ids(10).into_iter().chain(tokens.iter().copied()).chain([1, 2]).collect();
    let turn = Request::new(turn, drawn(5, 1));
    let turn = || Request { prompt: turn.prompt.clone(), config: turn.config.clone(), ..Request::new([], greedy(1)) };
    let (expected, _) = run(&mut new_scheduler(&model), vec![turn()]);
    let (found, _) = run(&mut scheduler, vec![turn().with_prefix_key(1)]);
    assert_eq!((answer(&found[0]), finish(&found[0]).reused_tokens), (answer(&expected[0]), 40));
}

#[test]
fn an_answer_ends_inside_a_draft() {
    let model = model_of(config(), DType::F32);
    let whole = run(&mut new_scheduler(&model), vec![Request::new(ids(10), drawn(24, 7))]).0;
    let tokens: Vec<u32> = whole[0].iter().map(|piece| piece.token).collect();
    let text: String = whole[0].iter().map(|piece| piece.text.as_str()).collect();
    // some characters that no earlier piece ends with
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop_string: String = text[middle..].chars().take(4).collect();
    let config = || drawn(24, 7);
    let cases: [(GenerationConfig, FinishReason); 3] = [
        (config().with_max_tokens(8), FinishReason::MaxTokens),
        (config().with_stop_id(tokens[9]), FinishReason::EndOfText),
        (config().with_stop_string(stop_string), FinishReason::StopString),
    ];
    for (config, reason) in cases {
        let request = || Request::new(ids(10), config.clone());
        let expected = run(&mut new_scheduler(&model), vec![request()]).0;
        assert_eq!(finish(&expected[0]).reason, reason);
        let drafted = request().with_speculation(Speculation::LOOKUP).with_prediction(&tokens[..]);
        let found = run(&mut new_scheduler(&model), vec![drafted]).0;
        assert_eq!(answer(&found[0]), answer(&expected[0]), "{reason:?}");
        let finish = finish(&found[0]);
        assert!(finish.accepted_draft_tokens > 0);
        assert!(finish.rejected_draft_tokens <= 4, "{reason:?}");
    }
    // the context of the model is a limit of drafts too
    let long = ids(2040);
    let expected = run(&mut new_scheduler(&model), vec![Request::new(&long[..], greedy(50))]).0;
    let prediction: Vec<u32> = expected[0].iter().map(|piece| piece.token).chain(ids(9)).collect();
    let drafted = Request::new(&long[..], greedy(50)).with_speculation(Speculation::LOOKUP).with_prediction(prediction);
    let found = run(&mut new_scheduler(&model), vec![drafted]).0;
    assert_eq!(finish(&found[0]).reason, FinishReason::Length);
    assert_eq!(answer(&found[0]), answer(&expected[0]));
}

#[test]
fn a_draft_model_does_not_change_an_answer() {
    let model = model_of(config(), DType::F32);
    let mut scheduler = new_scheduler(&model);
    let plain = requests(&mut scheduler, &model, None);
    let (expected, _) = run(&mut scheduler, plain);
    // the model itself, whose drafts are right, and a smaller one with a shorter context
    let mut small = config();
    (small.intermediate_size, small.max_position_embeddings) = (40, 40);
    for (is_small, draft_model) in [(false, model.clone()), (true, model_of(small, DType::BF16))] {
        let mut scheduler = new_scheduler(&model).with_draft_model(draft_model).unwrap();
        // the second time with the slots of other sequences, and more samples than before
        for _ in 0..2 {
            let drafted = requests(&mut scheduler, &model, None);
            let speculation = Speculation::DraftModel { max_tokens: 4 };
            let drafted = drafted.into_iter().map(|request| request.with_speculation(speculation)).collect();
            let (found, _) = run(&mut scheduler, drafted);
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(answer(found), answer(expected), "sequence {index}, small: {is_small}");
            }
            let greedy = finish(&found[0]);
            if is_small {
                assert!(greedy.rejected_draft_tokens > 0);
            } else {
                assert_eq!(greedy.rejected_draft_tokens, 0);
                assert!(greedy.accepted_draft_tokens > 20, "{greedy:?}");
            }
        }
        assert!(scheduler.cache_bytes() > 0);
        scheduler.clear_cache().unwrap();
        assert_eq!(scheduler.cache_bytes(), 0);
    }
    // a prediction comes first
    let tokens: Vec<u32> = expected[1].iter().map(|piece| piece.token).collect();
    let request = Request::new(ids(30), drawn(25, 1)).with_num_top_log_probabilities(5).with_prediction(&tokens[..]);
    let mut other = config();
    other.intermediate_size = 40;
    let mut scheduler = new_scheduler(&model).with_draft_model(model_of(other, DType::F32)).unwrap();
    let (found, _) = run(&mut scheduler, vec![request.with_speculation(Speculation::DraftModel { max_tokens: 4 })]);
    assert_eq!(answer(&found[0]), answer(&expected[1]));
    assert_eq!((finish(&found[0]).accepted_draft_tokens, finish(&found[0]).rejected_draft_tokens), (19, 0));
}

#[test]
fn settings_of_speculation_are_checked() {
    let model = model_of(config(), DType::F32);
    let mut scheduler = new_scheduler(&model);
    for max_tokens in [0, 4, 65] {
        let request = Request::new([1], greedy(1)).with_speculation(Speculation::DraftModel { max_tokens });
        assert_eq!(argument(&scheduler.admit(request).unwrap_err()).0, "speculation");
    }
    let mut other = config();
    other.vocab_size += 1;
    let error = new_scheduler(&model).with_draft_model(model_of(other, DType::F32)).unwrap_err();
    assert_eq!(argument(&error), ("draft_model", "expected the model's vocabulary of 502 tokens, found 503"));
    for (max_tokens, min_ngram, max_ngram) in [(0, 1, 1), (65, 1, 1), (1, 0, 1), (1, 3, 2), (1, 1, 65)] {
        let speculation = Speculation::Lookup { max_tokens, min_ngram, max_ngram };
        let request = Request::new([1], greedy(1)).with_speculation(speculation);
        assert_eq!(argument(&scheduler.admit(request).unwrap_err()).0, "speculation");
    }
    let request = Request::new([1], greedy(1)).with_prediction([VOCAB as u32]);
    assert_eq!(argument(&scheduler.admit(request).unwrap_err()).0, "prediction");
}
