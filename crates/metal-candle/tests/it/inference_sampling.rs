//! Sampling against an implementation that sorts, in f64.

use candle_core::{DType, Device, Tensor};
use metal_candle::Error;
use metal_candle::inference::{Sampler, SamplingConfig, SamplingStrategy, sample_token};
use proptest::prelude::*;
use std::collections::HashMap;

/// The numbers a sampler draws, by their published definition.
struct Draws(u64);

impl Draws {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / 2f64.powi(53)
    }
}

struct Candidate {
    id: usize,
    weight: f64,
    kept: bool,
}

/// The tokens that may be chosen, with their weights, best first, and how near a limit decided (0 to 1).
fn candidates(logits: &[f32], history: &[u32], config: &SamplingConfig) -> (Vec<Candidate>, f64) {
    let mut counts = HashMap::new();
    let window = config.penalty_window.unwrap_or(usize::MAX).min(history.len());
    for id in &history[history.len() - window..] {
        *counts.entry(*id as usize).or_insert(0) += 1;
    }
    let mut adjusted: Vec<f32> = logits.to_vec();
    for (id, count) in counts {
        let logit = f64::from(logits[id]);
        let logit = if logit > 0.0 { logit / config.repetition_penalty } else { logit * config.repetition_penalty };
        adjusted[id] = (logit - config.frequency_penalty * f64::from(count) - config.presence_penalty) as f32;
    }
    for (id, bias) in &config.logit_bias {
        adjusted[*id as usize] += bias;
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| adjusted[b].partial_cmp(&adjusted[a]).unwrap().then(a.cmp(&b)));
    if config.top_k > 0 {
        order.truncate(config.top_k);
    }
    let max = f64::from(adjusted[order[0]]);
    let weight = |id: usize| ((f64::from(adjusted[id]) - max) / config.temperature).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let (mut before, mut margin) = (0.0, 1.0f64);
    let mut candidates = Vec::new();
    for id in order {
        let weight = weight(id);
        margin = margin.min((before / total - config.top_p).abs()).min((weight - config.min_p).abs());
        let kept = before < config.top_p * total && weight >= config.min_p;
        candidates.push(Candidate { id, weight: if weight >= config.min_p { weight } else { 0.0 }, kept });
        before += weight;
    }
    (candidates, margin)
}

/// What a sampler chooses, and how near another choice was.
fn reference(logits: &[f32], history: &[u32], config: &SamplingConfig, draws: &mut Draws) -> (u32, f64) {
    let (mut candidates, mut margin) = candidates(logits, history, config);
    loop {
        let mut by_id: Vec<usize> = (0..candidates.len()).collect();
        by_id.sort_by_key(|&rank| candidates[rank].id);
        let sum: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
        let target = draws.uniform() * sum;
        let mut below = 0.0;
        let mut chosen = 0;
        for rank in by_id {
            below += candidates[rank].weight;
            margin = margin.min((below - target).abs() / sum);
            if below > target {
                chosen = rank;
                break;
            }
        }
        if candidates[chosen].kept {
            return (candidates[chosen].id as u32, margin);
        }
        candidates.truncate(chosen);
    }
}

fn log_softmax(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(logits[id as usize] - max) - sum.ln()
}

fn configs() -> impl Strategy<Value = SamplingConfig> {
    let filters = (
        prop_oneof![Just(1.0), 0.2..3.0],
        prop_oneof![Just(0), 1usize..40, 40usize..700],
        prop_oneof![Just(1.0), 0.02..1.0],
        prop_oneof![Just(0.0), 0.001..0.9],
    );
    let penalties = (
        prop_oneof![Just(1.0), 0.5..2.0],
        prop_oneof![Just(0.0), -1.0..1.0],
        prop_oneof![Just(0.0), -1.0..1.0],
        prop_oneof![Just(None), (0usize..20).prop_map(Some)],
    );
    let bias = proptest::collection::btree_map(0u32..4, prop_oneof![Just(f32::NEG_INFINITY), -3.0f32..3.0], 0..3);
    (filters, penalties, bias, any::<u64>()).prop_map(|(filters, penalties, logit_bias, seed)| SamplingConfig {
        temperature: filters.0,
        top_k: filters.1,
        top_p: filters.2,
        min_p: filters.3,
        repetition_penalty: penalties.0,
        presence_penalty: penalties.1,
        frequency_penalty: penalties.2,
        penalty_window: penalties.3,
        logit_bias,
        seed: Some(seed),
    })
}

/// Logits on a coarse grid, so that many are equal.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = (-60i32..60).prop_map(|eighths| eighths as f32 / 8.0);
    prop_oneof![proptest::collection::vec(logit.clone(), 5..20), proptest::collection::vec(logit, 5..900)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn choices_equal_the_reference(logits in logits(), config in configs(), prompt in proptest::collection::vec(0u32..5, 0..30)) {
        let mut sampler = Sampler::new(config.clone()).unwrap();
        sampler.observe(&prompt);
        let mut history = prompt;
        let mut draws = Draws(config.seed.unwrap());
        for _ in 0..8 {
            let (wanted, margin) = if config.top_k == 1 {
                (candidates(&logits, &history, &config).0[0].id as u32, 1.0)
            } else {
                reference(&logits, &history, &config, &mut draws)
            };
            let choice = sampler.sample(&logits).unwrap();
            if margin < 1e-5 {
                break;
            }
            prop_assert_eq!(choice.token, wanted);
            let log_probability = log_softmax(&logits, wanted);
            prop_assert!((f64::from(choice.log_probability) - log_probability).abs() < 2e-6 * (1.0 - log_probability));
            history.push(wanted);
        }
    }

    #[test]
    fn greedy_is_the_first_largest(logits in logits()) {
        let mut sampler = Sampler::new(SamplingConfig::greedy()).unwrap();
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let wanted = logits.iter().position(|&logit| logit == largest).unwrap();
        prop_assert_eq!(sampler.sample(&logits).unwrap().token as usize, wanted);
    }
}

/// How often each token comes out in `n` draws must fit the probabilities of the reference.
#[test]
fn frequencies_follow_the_filtered_distribution() {
    let logits: Vec<f32> = (0..300).map(|i| ((i * 37 % 300) as f32 / 30.0).sin() * 3.0).collect();
    let n = 20_000;
    for config in [
        SamplingConfig::default(),
        SamplingConfig::default().with_temperature(0.5),
        SamplingConfig::default().with_top_k(7),
        SamplingConfig::default().with_top_p(0.1),
        SamplingConfig::default().with_top_p(0.6),
        SamplingConfig::default().with_min_p(0.5),
        SamplingConfig::default().with_temperature(1.5).with_top_k(50).with_top_p(0.7).with_min_p(0.2),
    ] {
        let (candidates, _) = candidates(&logits, &[], &config);
        let total: f64 = candidates.iter().filter(|c| c.kept).map(|c| c.weight).sum();
        let mut counts = vec![0.0; logits.len()];
        let mut sampler = Sampler::new(config.clone().with_seed(7)).unwrap();
        for _ in 0..n {
            counts[sampler.sample(&logits).unwrap().token as usize] += 1.0;
        }
        let (mut statistic, mut kept) = (0.0, 0.0);
        for candidate in &candidates {
            let expected = if candidate.kept { candidate.weight / total * f64::from(n) } else { 0.0 };
            let count: f64 = counts[candidate.id];
            if candidate.kept {
                statistic += (count - expected).powi(2) / expected;
                kept += 1.0;
            } else {
                assert_eq!(count, 0.0, "{config:?}: token {} is filtered out", candidate.id);
            }
        }
        // chi-squared with `kept - 1` degrees of freedom: five deviations above its mean
        let freedom: f64 = kept - 1.0;
        assert!(statistic < freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0, "{config:?}: {statistic} of {freedom}");
    }
}

#[test]
fn a_large_vocabulary_equals_the_reference() {
    let mut draws = Draws(3);
    let logits: Vec<f32> = (0..151_936).map(|_| ((draws.uniform() * 20.0) as f32).round() - 10.0).collect();
    for config in [
        SamplingConfig::default(),
        SamplingConfig::default().with_top_k(40),
        SamplingConfig::default().with_top_k(20_000).with_temperature(3.0),
        SamplingConfig::default().with_top_p(0.9).with_temperature(0.7),
    ] {
        let mut sampler = Sampler::new(config.clone().with_seed(11)).unwrap();
        let mut draws = Draws(11);
        for _ in 0..4 {
            let (wanted, margin) = reference(&logits, &[], &config, &mut draws);
            let token = sampler.sample(&logits).unwrap().token;
            assert!(token == wanted || margin < 1e-6, "{config:?}: {token}, expected {wanted}");
        }
    }
}

/// Fixed for all machines: a change of this table is a change of every seeded text.
#[test]
fn a_seed_gives_the_same_tokens_everywhere() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 100.0).collect();
    let draw = |config: SamplingConfig| -> Vec<u32> {
        let mut sampler = Sampler::new(config.with_seed(42)).unwrap();
        (0..6).map(|_| sampler.sample(&logits).unwrap().token).collect()
    };
    let mut draws = Draws(42);
    let config = SamplingConfig::default();
    let wanted: Vec<u32> = (0..6).map(|_| reference(&logits, &[], &config, &mut draws).0).collect();
    assert_eq!(draw(config.clone()), wanted);
    assert_eq!(draw(config.clone()), draw(config.clone()));
    assert_eq!(draw(config.clone()), GOLDEN);
    assert_eq!(draw(config.with_top_p(0.5).with_temperature(0.8)), GOLDEN_TOP_P);
    let other: Vec<u32> = {
        let mut sampler = Sampler::new(SamplingConfig::default().with_seed(43)).unwrap();
        (0..6).map(|_| sampler.sample(&logits).unwrap().token).collect()
    };
    assert_ne!(other, GOLDEN);
}

const GOLDEN: [u32; 6] = [746, 153, 278, 343, 34, 864];
const GOLDEN_TOP_P: [u32; 6] = [752, 152, 277, 343, 33, 864];

#[test]
fn the_penalty_window_forgets() {
    let config = SamplingConfig::greedy().with_presence_penalty(1.5).with_penalty_window(Some(2));
    let mut sampler = Sampler::new(config).unwrap();
    let logits = [3.0, 2.0, 1.9];
    // 0, then 1 as 0 has 1.5, then 2 as 1 has 0.5, then 0 again as the window holds 1 and 2
    let tokens: Vec<u32> = (0..5).map(|_| sampler.sample(&logits).unwrap().token).collect();
    assert_eq!(tokens, [0, 1, 2, 0, 1]);
}

#[test]
fn a_ban_and_a_bias_decide() {
    let logits = [3.0, 2.0, 1.0];
    let token = |config: SamplingConfig| Sampler::new(config).unwrap().sample(&logits).unwrap().token;
    assert_eq!(token(SamplingConfig::greedy().with_logit_bias(0, f32::NEG_INFINITY)), 1);
    assert_eq!(token(SamplingConfig::greedy().with_logit_bias(2, 2.5)), 2);
    let choice = Sampler::new(SamplingConfig::greedy().with_logit_bias(2, 100.0)).unwrap().sample(&logits).unwrap();
    assert!((f64::from(choice.log_probability) - log_softmax(&logits, 2)).abs() < 1e-6);
}

#[test]
fn bad_logits_are_named() {
    let mut sampler = Sampler::new(SamplingConfig::default()).unwrap();
    let message = |sampler: &mut Sampler, logits: &[f32]| sampler.sample(logits).unwrap_err().to_string();
    assert_eq!(message(&mut sampler, &[0.0, f32::NAN]), "`logits`: expected numbers, found NaN for token `1`");
    assert_eq!(
        message(&mut sampler, &[0.0, 1.0, f32::INFINITY]),
        "`logits`: expected finite numbers, found infinity for token `2`"
    );
    assert!(message(&mut sampler, &[f32::NEG_INFINITY; 3]).contains("found negative infinity for all"));
    assert!(matches!(sampler.sample(&[]), Err(Error::Shape { .. })));
    let mut sampler = Sampler::new(SamplingConfig::greedy().with_logit_bias(9, 1.0)).unwrap();
    assert_eq!(message(&mut sampler, &[0.0]), "`logit_bias`: token `9` is outside the vocabulary of 1 tokens");
}

#[test]
fn settings_out_of_range_are_named() {
    let default = SamplingConfig::default;
    for (config, name) in [
        (default().with_temperature(-0.1), "temperature"),
        (default().with_temperature(f64::NAN), "temperature"),
        (default().with_top_p(0.0), "top_p"),
        (default().with_top_p(1.1), "top_p"),
        (default().with_min_p(-0.1), "min_p"),
        (default().with_repetition_penalty(0.0), "repetition_penalty"),
        (default().with_presence_penalty(f64::INFINITY), "presence_penalty"),
        (default().with_frequency_penalty(f64::NAN), "frequency_penalty"),
        (default().with_logit_bias(1, f32::NAN), "logit_bias"),
    ] {
        let Err(Error::Argument { name: found, .. }) = Sampler::new(config) else { panic!("{name} is accepted") };
        assert_eq!(found, name);
    }
}

#[test]
fn sample_token_takes_any_float_tensor_of_one_row() {
    let values = [0.5f32, 4.0, -1.0, 4.0, 3.5];
    let logits = Tensor::new(&values, &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        let logits = logits.to_dtype(dtype).unwrap();
        assert_eq!(sample_token(&logits, &SamplingStrategy::Greedy).unwrap(), 1);
        assert_eq!(sample_token(&logits.unsqueeze(0).unwrap(), &SamplingStrategy::Greedy).unwrap(), 1);
        for _ in 0..20 {
            assert!([1, 3].contains(&sample_token(&logits, &SamplingStrategy::TopK { k: 2 }).unwrap()));
            assert!([1, 3].contains(&sample_token(&logits, &SamplingStrategy::TopP { p: 0.6 }).unwrap()));
            assert!([1, 3].contains(&sample_token(&logits, &SamplingStrategy::MinP { p: 0.9 }).unwrap()));
            let cold = SamplingStrategy::Temperature { temperature: 0.01 };
            assert!([1, 3].contains(&sample_token(&logits, &cold).unwrap()));
        }
    }
    // a view that starts inside its storage, and one with gaps
    let rows = Tensor::new(&[[9.0f32, 0.0, 1.0], [0.0, 1.0, 7.0]], &Device::Cpu).unwrap();
    assert_eq!(sample_token(&rows.narrow(0, 1, 1).unwrap(), &SamplingStrategy::Greedy).unwrap(), 2);
    let column = rows.t().unwrap().narrow(0, 2, 1).unwrap();
    assert_eq!(sample_token(&column, &SamplingStrategy::Greedy).unwrap(), 1);
    let seen: Vec<u32> =
        (0..200).map(|_| sample_token(&logits, &SamplingStrategy::Temperature { temperature: 5.0 }).unwrap()).collect();
    assert!((0..5).all(|id| seen.contains(&id)));
}

#[test]
fn sample_token_refuses_what_is_not_one_row_of_logits() {
    let rows = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(sample_token(&rows, &SamplingStrategy::Greedy), Err(Error::Shape { .. })));
    let whole = Tensor::zeros(3, DType::U32, &Device::Cpu).unwrap();
    let error = sample_token(&whole, &SamplingStrategy::Greedy).unwrap_err();
    assert_eq!(error.to_string(), "`logits`: expected a float dtype, found `u32`");
    let row = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    assert!(sample_token(&row, &SamplingStrategy::TopK { k: 0 }).unwrap_err().to_string().starts_with("`k`"));
    assert!(sample_token(&row, &SamplingStrategy::TopP { p: 0.0 }).unwrap_err().to_string().starts_with("`top_p`"));
}
