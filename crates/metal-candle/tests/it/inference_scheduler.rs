//! The scheduler: sequences that arrive, end and share slots in any order sample what each samples alone.

use super::inference_generator::{
    VOCAB, adapter, argument, assert_close, config, drawn, greedy, ids, logits_of, model_of, tokenizer,
};
use candle_core::{DType, Tensor};
use metal_candle::inference::{
    AllowedTokens, Choice, Event, FinishReason, GenerationConfig, Piece, Request, SamplingConfig, Scheduler,
    SchedulerConfig, SequenceId, TokenMask, sample_seed,
};
use metal_candle::models::Model;
use metal_candle::ops::{LowRank, LowRankUpdates, Magnitude};
use metal_candle::{Device, Error};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock, Mutex};

static MODEL: LazyLock<Model> = LazyLock::new(|| model_of(config(), DType::F32));
pub(super) static ADAPTERS: LazyLock<[LowRankUpdates; 2]> = LazyLock::new(|| [1, 2].map(|seed| adapter(&MODEL, seed)));

/// Few slots and short chunks, so that small tests have many steps.
pub(super) const SMALL: SchedulerConfig =
    SchedulerConfig { max_sequences: 4, prefill_chunk: 8, step_tokens: 12, kv_cache: None };

pub(super) fn small() -> Scheduler {
    Scheduler::with_config(MODEL.clone(), SMALL).unwrap()
}

/// The pieces of each sequence, and the errors of those that failed.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) pieces: BTreeMap<SequenceId, Vec<Piece>>,
    pub(super) errors: BTreeMap<SequenceId, Error>,
}

impl Collected {
    pub(super) fn step(&mut self, scheduler: &mut Scheduler) {
        self.add(scheduler.step().unwrap());
    }

    pub(super) fn add(&mut self, events: Vec<Event>) {
        for event in events {
            match event.result {
                Ok(piece) => self.pieces.entry(event.sequence).or_default().push(piece),
                Err(error) => assert!(self.errors.insert(event.sequence, error).is_none()),
            }
        }
    }

    pub(super) fn run(scheduler: &mut Scheduler) -> Self {
        let mut collected = Self::default();
        collected.finish(scheduler);
        collected
    }

    fn finish(&mut self, scheduler: &mut Scheduler) {
        while !scheduler.is_idle() {
            self.step(scheduler);
        }
    }

    pub(super) fn tokens(&self, id: SequenceId) -> Vec<u32> {
        self.pieces.get(&id).into_iter().flatten().map(|piece| piece.token).collect()
    }

    /// The bits of the log-probabilities of each piece.
    pub(super) fn bits(&self, id: SequenceId) -> Vec<Vec<u32>> {
        let of_piece = |piece: &Piece| {
            let top = piece.top_log_probabilities.iter().map(|choice| choice.log_probability);
            top.chain([piece.log_probability]).map(f32::to_bits).collect()
        };
        self.pieces.get(&id).into_iter().flatten().map(of_piece).collect()
    }

    fn log_probabilities(&self, id: SequenceId) -> Vec<f32> {
        self.pieces.get(&id).into_iter().flatten().map(|piece| piece.log_probability).collect()
    }
}

/// The pieces of one request that runs alone.
fn alone(request: Request) -> Vec<Piece> {
    let mut scheduler = small();
    let id = scheduler.admit(request).unwrap()[0];
    Collected::run(&mut scheduler).pieces.remove(&id).unwrap()
}

fn tokens(pieces: &[Piece]) -> Vec<u32> {
    pieces.iter().map(|piece| piece.token).collect()
}

/// Allows the tokens of a list for each position, and all after its end.
#[derive(Debug, Clone)]
pub(super) struct Script {
    allowed: Vec<Vec<u32>>,
    /// The tokens that it was called with.
    calls: Arc<Mutex<Vec<Vec<u32>>>>,
}

impl Script {
    pub(super) fn new(allowed: &[&[u32]]) -> Self {
        Self { allowed: allowed.iter().map(|ids| ids.to_vec()).collect(), calls: Arc::default() }
    }
}

impl TokenMask for Script {
    fn allow(&mut self, generated: &[u32], allowed: &mut AllowedTokens) -> metal_candle::Result<()> {
        assert!(allowed.is_empty());
        self.calls.lock().unwrap().push(generated.to_vec());
        let Some(ids) = self.allowed.get(generated.len()) else {
            allowed.insert_all();
            return Ok(());
        };
        ids.iter().try_for_each(|&id| allowed.insert(id))
    }

    fn fork(&self) -> Box<dyn TokenMask> {
        Box::new(self.clone())
    }
}

#[test]
fn a_late_sequence_joins_and_a_cancelled_one_frees_its_slot() {
    let mut scheduler = small();
    let mut found = Collected::default();
    let long = scheduler.admit(Request::new(ids(5), greedy(30))).unwrap()[0];
    let cancelled = scheduler.admit(Request::new(ids(20), drawn(30, 3))).unwrap()[0];
    for _ in 0..6 {
        found.step(&mut scheduler);
    }
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (2, 0));
    let late = scheduler.admit(Request::new(ids(9), drawn(5, 7))).unwrap()[0];
    found.step(&mut scheduler);
    let finish = scheduler.cancel(cancelled).unwrap();
    assert_eq!((finish.reason, finish.prompt_tokens), (FinishReason::Cancelled, 20));
    assert_eq!(finish.generated_tokens, found.tokens(cancelled).len());
    assert_eq!(scheduler.num_running(), 2);
    assert_eq!(argument(&scheduler.cancel(cancelled).unwrap_err()).0, "sequence");
    found.finish(&mut scheduler);
    assert_eq!(found.tokens(long), tokens(&alone(Request::new(ids(5), greedy(30)))));
    assert_eq!(found.tokens(late), tokens(&alone(Request::new(ids(9), drawn(5, 7)))));
    let whole = tokens(&alone(Request::new(ids(20), drawn(30, 3))));
    let until = found.tokens(cancelled);
    assert!(!until.is_empty() && until.len() < 30);
    assert_eq!(until, whole[..until.len()]);
    assert_eq!(argument(&scheduler.cancel(long).unwrap_err()).0, "sequence");
}

#[test]
fn a_paused_sequence_resumes_where_it_was() {
    let request = |length| Request::new(ids(length), greedy(12));
    let mut scheduler = small();
    let first = scheduler.admit(request(9).with_num_samples(2)).unwrap();
    let second = scheduler.admit(request(14)).unwrap()[0];
    let mut collected = Collected::default();
    // before the prompt is computed, one sample only
    scheduler.set_paused(first[1], true).unwrap();
    for _ in 0..4 {
        collected.step(&mut scheduler);
    }
    assert_eq!(collected.pieces[&first[1]].len(), 1);
    scheduler.set_paused(second, true).unwrap();
    let before = collected.pieces[&second].len();
    while scheduler.has_work() {
        collected.step(&mut scheduler);
    }
    assert_eq!((collected.tokens(first[0]).len(), collected.pieces[&second].len()), (12, before));
    assert!(!scheduler.is_idle());
    scheduler.set_paused(first[1], false).unwrap();
    scheduler.set_paused(second, false).unwrap();
    collected.finish(&mut scheduler);
    let expected = tokens(&alone(request(9)));
    assert_eq!((collected.tokens(first[0]), collected.tokens(first[1])), (expected.clone(), expected));
    assert_eq!(collected.tokens(second), tokens(&alone(request(14))));
    assert_eq!(argument(&scheduler.set_paused(second, true).unwrap_err()).0, "sequence");
}

#[test]
fn an_ending_token_comes_after_the_least_tokens() {
    let free = alone(Request::new(ids(6), greedy(8)));
    let ending = free[0].token;
    let config = |min| GenerationConfig { stop_ids: vec![ending], ..greedy(8).with_min_tokens(min) };
    let found = alone(Request::new(ids(6), config(0)));
    assert_eq!((found.len(), found[0].token), (1, ending));
    let found = alone(Request::new(ids(6), config(5)));
    assert!(found.len() >= 6 || found.last().unwrap().token != ending, "{found:?}");
    assert!(found.iter().take(5).all(|piece| piece.token != ending));
    // unless a mask allows nothing else
    let mask = Script::new(&[&[ending]]);
    let found = alone(Request::new(ids(6), config(5)).with_mask(mask));
    assert_eq!((found.len(), found[0].token), (1, ending));
}

#[test]
fn a_preempted_sequence_continues_with_the_same_bits() {
    let config = SchedulerConfig { max_sequences: 3, ..SMALL };
    for prefix_key in [None, Some(1)] {
        let request = |length, seed| Request { prefix_key, ..Request::new(ids(length), drawn(14, seed)) };
        let mut scheduler = Scheduler::with_config(MODEL.clone(), config).unwrap();
        let first = scheduler.admit(request(9, 1)).unwrap()[0];
        let pair = scheduler.admit(request(40, 2).with_num_samples(2)).unwrap();
        let last = scheduler.admit(request(5, 3)).unwrap()[0];
        let mut found = Collected::default();
        found.step(&mut scheduler);
        // the pair's prompt is not computed yet: both leave, and the last one runs
        assert!(found.pieces.get(&pair[0]).is_none_or(Vec::is_empty));
        scheduler.preempt(pair[1]).unwrap();
        assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (1, 1));
        for _ in 0..5 {
            found.step(&mut scheduler);
        }
        assert!(!found.pieces[&last].is_empty() && found.pieces.get(&pair[0]).is_none_or(Vec::is_empty));
        scheduler.preempt(first).unwrap();
        let before = found.pieces[&first].len();
        assert!((1..14).contains(&before));
        for id in [pair[0], pair[1]] {
            scheduler.set_paused(id, false).unwrap();
        }
        while scheduler.has_work() {
            found.step(&mut scheduler);
        }
        assert_eq!(found.pieces[&first].len(), before);
        // one that waits can be preempted again, and resumed
        scheduler.preempt(first).unwrap();
        scheduler.set_paused(first, false).unwrap();
        found.finish(&mut scheduler);
        let bits = |pieces: &[Piece]| -> Vec<_> {
            pieces.iter().map(|piece| (piece.token, piece.log_probability.to_bits())).collect()
        };
        let alone = |request: Request| {
            let mut scheduler = Scheduler::with_config(MODEL.clone(), config).unwrap();
            let ids = scheduler.admit(request).unwrap();
            let mut found = Collected::default();
            found.finish(&mut scheduler);
            ids.iter().map(|id| bits(&found.pieces[id])).collect::<Vec<_>>()
        };
        assert_eq!(bits(&found.pieces[&first]), alone(request(9, 1))[0]);
        assert_eq!(
            [bits(&found.pieces[&pair[0]]), bits(&found.pieces[&pair[1]])],
            alone(request(40, 2).with_num_samples(2))[..]
        );
        assert_eq!(bits(&found.pieces[&last]), alone(request(5, 3))[0]);
        assert_eq!(argument(&scheduler.preempt(first).unwrap_err()).0, "sequence");
    }
}

#[test]
fn ended_sequences_leave_their_slots_to_waiting_ones() {
    let config = SchedulerConfig { max_sequences: 2, ..SMALL };
    let mut scheduler = Scheduler::with_config(MODEL.clone(), config).unwrap();
    let all: Vec<SequenceId> =
        (0..7).map(|i| scheduler.admit(Request::new(ids(1 + i * 3), greedy(2 + i))).unwrap()[0]).collect();
    // waiting sequences can be cancelled too
    assert_eq!(scheduler.cancel(all[5]).unwrap().generated_tokens, 0);
    let mut found = Collected::default();
    let mut bytes = 0;
    while !scheduler.is_idle() {
        found.step(&mut scheduler);
        assert!(scheduler.num_running() <= 2);
        bytes = scheduler.cache_bytes();
    }
    let of_model = MODEL.config();
    let per_token = 2 * of_model.num_hidden_layers * of_model.num_key_value_heads * of_model.head_dim * 4;
    // two slots of the longest prompt and its answer
    assert_eq!(bytes, 2 * (19 + 8) * per_token);
    for (i, &id) in all.iter().enumerate().filter(|(i, _)| *i != 5) {
        assert_eq!(found.tokens(id), tokens(&alone(Request::new(ids(1 + i * 3), greedy(2 + i)))), "sequence {i}");
        assert_eq!(found.pieces[&id].last().unwrap().finish.as_ref().unwrap().reason, FinishReason::MaxTokens);
    }
    assert!(!found.pieces.contains_key(&all[5]));
    scheduler.clear_cache().unwrap();
    assert_eq!(scheduler.cache_bytes(), 0);
    scheduler.reserve(2, 100).unwrap();
    assert_eq!(scheduler.cache_bytes(), 2 * 100 * per_token);
    assert_eq!(argument(&scheduler.reserve(3, 100).unwrap_err()).0, "num_sequences");
    scheduler.admit(Request::new(ids(3), greedy(2))).unwrap();
    scheduler.step().unwrap();
    assert_eq!(argument(&scheduler.clear_cache().unwrap_err()).0, "cache");
}

#[test]
fn chunks_of_a_prompt_equal_the_whole_prompt() {
    let prompt = ids(61);
    let [mut chunked, mut whole] = [7, 512].map(|prefill_chunk| {
        let config = SchedulerConfig { prefill_chunk, ..SMALL };
        Scheduler::with_config(MODEL.clone(), config).unwrap()
    });
    let mut found = Collected::default();
    let id = chunked.admit(Request::new(prompt.clone(), greedy(10))).unwrap()[0];
    // nine chunks, of which only the last yields a token
    for _ in 0..8 {
        found.step(&mut chunked);
    }
    assert!(found.tokens(id).is_empty());
    found.step(&mut chunked);
    assert_eq!(found.tokens(id).len(), 1);
    found.finish(&mut chunked);
    let whole_id = whole.admit(Request::new(prompt, greedy(10))).unwrap()[0];
    let wanted = Collected::run(&mut whole);
    assert_eq!(found.tokens(id), wanted.tokens(whole_id));
    assert_close(&found.log_probabilities(id), &wanted.log_probabilities(whole_id));
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let mut scheduler = small();
    let long = scheduler.admit(Request::new(ids(200), greedy(1))).unwrap()[0];
    let short = scheduler.admit(Request::new(ids(4), greedy(1))).unwrap()[0];
    let mut found = Collected::default();
    found.step(&mut scheduler);
    found.step(&mut scheduler);
    assert_eq!((found.tokens(long).len(), found.tokens(short).len()), (0, 1));
    // chunks of two long prompts take turns: both end within a step of each other
    let mut scheduler = small();
    let both = [0, 1].map(|_| scheduler.admit(Request::new(ids(40), greedy(1))).unwrap()[0]);
    let mut found = Collected::default();
    let counts = [8, 1, 1].map(|steps| {
        (0..steps).for_each(|_| found.step(&mut scheduler));
        both.map(|id| found.tokens(id).len())
    });
    assert_eq!(counts, [[0, 0], [1, 0], [1, 1]]);
}

#[test]
fn samples_of_a_prompt_equal_runs_with_their_seeds() {
    let prompt = ids(21);
    let config = |seed| {
        let sampling = SamplingConfig::default().with_temperature(0.9).with_repetition_penalty(1.1).with_seed(seed);
        greedy(8).with_sampling(sampling)
    };
    let mut scheduler = small();
    let other = scheduler.admit(Request::new(ids(3), greedy(20))).unwrap()[0];
    let samples = scheduler.admit(Request::new(prompt.clone(), config(5)).with_num_samples(3)).unwrap();
    assert_eq!((samples.len(), scheduler.num_waiting()), (3, 4));
    let found = Collected::run(&mut scheduler);
    let mut all = Vec::new();
    for (index, &id) in samples.iter().enumerate() {
        let wanted = alone(Request::new(prompt.clone(), config(sample_seed(5, index))));
        assert_eq!(found.tokens(id), tokens(&wanted), "sample {index}");
        assert_eq!(found.log_probabilities(id)[0].to_bits(), wanted[0].log_probability.to_bits());
        let finish = found.pieces[&id].last().unwrap().finish.as_ref().unwrap();
        // the prompt is computed for the first sample only
        assert_eq!(finish.reused_tokens, if index == 0 { 0 } else { 21 });
        all.push(found.tokens(id));
    }
    all.dedup();
    assert_eq!(all.len(), 3, "the samples draw the same tokens");
    assert_eq!(found.tokens(other), tokens(&alone(Request::new(ids(3), greedy(20)))));
}

#[test]
fn any_sample_can_be_cancelled_before_its_prompt_is_computed() {
    let wanted: Vec<Vec<u32>> =
        (0..3).map(|i| tokens(&alone(Request::new(ids(30), drawn(6, sample_seed(9, i)))))).collect();
    for cancelled in 0..3 {
        for steps in [0, 2] {
            let mut scheduler = small();
            let request = Request::new(ids(30), drawn(6, 9)).with_num_samples(3).with_prefix_key(1);
            let samples = scheduler.admit(request).unwrap();
            let mut found = Collected::default();
            for _ in 0..steps {
                found.step(&mut scheduler);
            }
            assert_eq!(scheduler.cancel(samples[cancelled]).unwrap().generated_tokens, 0);
            assert!(scheduler.cancel(samples[cancelled]).is_err());
            found.finish(&mut scheduler);
            for index in (0..3).filter(|&index| index != cancelled) {
                assert_eq!(found.tokens(samples[index]), wanted[index], "sample {index}, {cancelled} cancelled");
            }
            assert!(found.tokens(samples[cancelled]).is_empty());
        }
    }
}

#[test]
fn a_mask_restricts_tokens_and_sees_those_before() {
    let mut scheduler = small();
    let plain = scheduler.admit(Request::new(ids(6), greedy(5))).unwrap()[0];
    let script = Script::new(&[&[17], &[401], &[3, 4, 5]]);
    let calls = Arc::clone(&script.calls);
    let masked = scheduler.admit(Request::new(ids(6), drawn(5, 1)).with_mask(script)).unwrap()[0];
    let forked = Request::new(ids(6), drawn(2, 1)).with_mask(Script::new(&[&[9]])).with_num_samples(2);
    let forked = scheduler.admit(forked).unwrap();
    let found = Collected::run(&mut scheduler);
    let sampled = found.tokens(masked);
    assert_eq!(sampled[..2], [17, 401]);
    assert!([3, 4, 5].contains(&sampled[2]) && sampled.len() == 5);
    assert_eq!(*calls.lock().unwrap(), (0..5).map(|n| sampled[..n].to_vec()).collect::<Vec<_>>());
    // greedy among the allowed tokens, whose log-probabilities stay those of the model
    let request = Request::new(ids(6), greedy(1)).with_mask(Script::new(&[&[100, 200, 300]]));
    let piece = &alone(request)[0];
    let logits = logits_of(&MODEL, &ids(6));
    let best = [100, 200, 300].into_iter().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    assert_eq!(piece.token as usize, best);
    assert_close(&[piece.log_probability], &[log_softmax(&logits)[best]]);
    assert!(forked.iter().all(|&id| found.tokens(id)[0] == 9 && found.tokens(id).len() == 2));
    assert_eq!(found.tokens(plain), tokens(&alone(Request::new(ids(6), greedy(5)))));
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&logit| f64::from(logit - maximum).exp()).sum();
    logits.iter().map(|&logit| (f64::from(logit - maximum) - total.ln()) as f32).collect()
}

#[test]
fn top_log_probabilities_equal_the_log_softmax() {
    let prompt = ids(12);
    let sampling = SamplingConfig::default().with_temperature(1.7).with_top_k(40).with_seed(8);
    let sampling = sampling.with_logit_bias(7, 3.0).with_presence_penalty(0.5);
    for count in [1, 5, VOCAB] {
        let config = greedy(4).with_sampling(sampling.clone());
        let pieces = alone(Request::new(prompt.clone(), config.clone()).with_num_top_log_probabilities(count));
        assert_eq!(tokens(&pieces), tokens(&alone(Request::new(prompt.clone(), config))));
        let mut all = prompt.clone();
        for piece in &pieces {
            let wanted = log_softmax(&logits_of(&MODEL, &all));
            let top = &piece.top_log_probabilities;
            assert_eq!(top.len(), count);
            let falls = |pair: &[Choice]| pair[0].log_probability >= pair[1].log_probability;
            assert!(top.windows(2).all(falls));
            let values: Vec<f32> = top.iter().map(|choice| choice.log_probability).collect();
            assert_close(&values, &top.iter().map(|choice| wanted[choice.token as usize]).collect::<Vec<_>>());
            let mut sorted = wanted.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            assert_close(&values, &sorted[..count]);
            let own = top.iter().find(|choice| choice.token == piece.token);
            assert!(own.is_none_or(|own| own.log_probability.to_bits() == piece.log_probability.to_bits()));
            all.push(piece.token);
        }
    }
    assert!(alone(Request::new(prompt, greedy(1)))[0].top_log_probabilities.is_empty());
}

#[test]
fn adapters_in_one_batch_equal_each_alone() {
    let mut scheduler = small();
    let [first, second] = ADAPTERS.each_ref().map(|terms| scheduler.add_adapter(terms).unwrap());
    let request = |adapter| Request::new(ids(15), greedy(9)).with_adapter(adapter);
    let all = [Some(second), None, Some(first)].map(|adapter| scheduler.admit(request(adapter)).unwrap()[0]);
    assert_eq!(argument(&scheduler.remove_adapter(first).unwrap_err()).0, "adapter");
    let found = Collected::run(&mut scheduler);
    for (id, terms) in all.into_iter().zip([Some(&ADAPTERS[1]), None, Some(&ADAPTERS[0])]) {
        let mut single = small();
        let adapter = terms.map(|terms| single.add_adapter(terms).unwrap());
        let wanted_id = single.admit(request(adapter)).unwrap()[0];
        let wanted = Collected::run(&mut single);
        assert_eq!(found.tokens(id), wanted.tokens(wanted_id));
        assert_close(&found.log_probabilities(id), &wanted.log_probabilities(wanted_id));
    }
    assert_ne!(found.tokens(all[0]), found.tokens(all[1]));
    assert_ne!(found.tokens(all[2]), found.tokens(all[1]));
    scheduler.remove_adapter(first).unwrap();
    for error in [scheduler.admit(request(Some(first))).unwrap_err(), scheduler.remove_adapter(first).unwrap_err()] {
        assert_eq!(argument(&error).0, "adapter");
    }
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    let mut scheduler = small().with_tokenizer(tokenizer());
    let mut other = small();
    let unknown = other.add_adapter(&ADAPTERS[0]).unwrap();
    let good = scheduler.admit(Request::new(ids(5), greedy(4))).unwrap()[0];
    let mut found = Collected::default();
    found.step(&mut scheduler);
    let bias = SamplingConfig::greedy().with_logit_bias(VOCAB as u32, 1.0);
    let refused = [
        (Request::new([], greedy(1)), "prompt"),
        (Request::new([1, VOCAB as u32], greedy(1)), "prompt"),
        (Request::new(ids(2048), greedy(1)), "prompt"),
        (Request::new([1], greedy(0)), "max_tokens"),
        (Request::new([1], greedy(1).with_sampling(bias)), "logit_bias"),
        (Request::new([1], greedy(1)).with_num_samples(0), "num_samples"),
        (Request::new([1], greedy(1)).with_num_samples(5), "num_samples"),
        (Request::new([1], greedy(1)).with_num_top_log_probabilities(VOCAB + 1), "num_top_log_probabilities"),
        (Request::new([1], greedy(1)).with_adapter(Some(unknown)), "adapter"),
    ];
    for (request, name) in refused {
        assert_eq!(argument(&scheduler.admit(request).unwrap_err()).0, name);
    }
    let stop = greedy(1).with_stop_string("x");
    assert_eq!(argument(&other.admit(Request::new([1], stop)).unwrap_err()).0, "stop_strings");
    for (name, config) in [
        ("max_sequences", SchedulerConfig { max_sequences: 0, ..SMALL }),
        ("prefill_chunk", SchedulerConfig { prefill_chunk: 0, ..SMALL }),
        ("step_tokens", SchedulerConfig { step_tokens: 0, ..SMALL }),
    ] {
        assert_eq!(argument(&Scheduler::with_config(MODEL.clone(), config).unwrap_err()).0, name);
    }
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (1, 0));
    found.finish(&mut scheduler);
    assert_eq!(found.tokens(good), tokens(&alone(Request::new(ids(5), greedy(4)))));
}

/// The model with an embedding of token 5 that is not finite.
fn broken_model() -> Model {
    let mut config = config();
    config.tie_word_embeddings = false;
    let mut tensors: HashMap<String, Tensor> =
        crate::golden::parameters_of(&model_of(config.clone(), DType::F32)).into_iter().collect();
    let embedding = tensors.get_mut("model.embed_tokens.weight").unwrap();
    let mut values: Vec<Vec<f32>> = embedding.to_vec2().unwrap();
    values[5][0] = f32::NAN;
    *embedding = Tensor::new(values, &candle_core::Device::Cpu).unwrap();
    Model::from_tensors(config, tensors, Device::CPU).unwrap()
}

#[test]
fn a_sequence_that_fails_leaves_the_others_alone() {
    let model = broken_model();
    let greedy = |n| -> GenerationConfig {
        greedy(n).with_sampling(SamplingConfig::greedy().with_logit_bias(5, f32::NEG_INFINITY))
    };
    let run = |requests: Vec<Request>| {
        let mut scheduler = Scheduler::with_config(model.clone(), SMALL).unwrap();
        let all: Vec<_> = requests.into_iter().map(|request| scheduler.admit(request).unwrap()[0]).collect();
        (all, Collected::run(&mut scheduler))
    };
    let healthy = || Request::new([1, 8, 7], greedy(10));
    let (all, found) = run(vec![
        Request::new([1, 5, 7], greedy(4)).with_prefix_key(1),
        healthy(),
        Request::new([2, 3], greedy(4)).with_mask(Script::new(&[&[6], &[]])),
        Request::new([2, 3], greedy(4)).with_mask(Script::new(&[&[VOCAB as u32]])),
    ]);
    let (single, wanted) = run(vec![healthy()]);
    assert_eq!(found.tokens(all[1]), wanted.tokens(single[0]));
    let message = |index: usize| argument(&found.errors[&all[index]]);
    assert_eq!(message(0), ("logits", "expected numbers, found NaN for token `0`"));
    assert_eq!(message(2), ("mask", "expected at least one allowed token, found none; generated so far: 1"));
    assert_eq!(found.tokens(all[2]), [6]);
    assert_eq!(message(3), ("mask", "token `502` is outside the vocabulary of 502 tokens"));
    assert_eq!(found.errors.len(), 3);
}

#[test]
fn a_step_that_fails_loses_nothing() {
    let mut scheduler = small();
    // norms of another number of rows, which no product takes
    let mut terms = LowRankUpdates::new();
    let linear = &MODEL.linears()[0];
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &candle_core::Device::Cpu).unwrap();
    let magnitude = Magnitude {
        m: zeros(&[linear.out_features]),
        weight_norms_squared: zeros(&[linear.out_features]),
        reciprocal_norms: Some(zeros(&[linear.out_features + 1])),
    };
    let term = LowRank::new(zeros(&[2, linear.in_features]), zeros(&[linear.out_features, 2]), 1.0);
    terms.insert(0, LowRank { magnitude: Some(magnitude), ..term });
    let broken = scheduler.add_adapter(&terms).unwrap();
    let good = scheduler.add_adapter(&ADAPTERS[0]).unwrap();
    let requests = |good| [Request::new(ids(10), greedy(6)), Request::new(ids(7), greedy(6)).with_adapter(Some(good))];
    let [plain, adapted] = requests(good).map(|request| scheduler.admit(request).unwrap()[0]);
    let failing = scheduler.admit(Request::new(ids(4), greedy(6)).with_adapter(Some(broken))).unwrap()[0];
    let mut found = Collected::default();
    let mut failures = 0;
    for _ in 0..4 {
        match scheduler.step() {
            Ok(events) => found.add(events),
            Err(_) => failures += 1,
        }
        assert_eq!(scheduler.num_running(), 3);
    }
    assert!(failures > 1 && found.tokens(failing).is_empty());
    scheduler.cancel(failing).unwrap();
    found.finish(&mut scheduler);
    let mut scheduler = small();
    let good = scheduler.add_adapter(&ADAPTERS[0]).unwrap();
    let wanted_ids = requests(good).map(|request| scheduler.admit(request).unwrap()[0]);
    let wanted = Collected::run(&mut scheduler);
    assert_eq!(found.tokens(plain), wanted.tokens(wanted_ids[0]));
    assert_eq!(found.tokens(adapted), wanted.tokens(wanted_ids[1]));
}
