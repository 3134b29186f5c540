//! Sequences that arrive, leave, are cancelled and preempted at random sample what each samples alone.

use super::inference_generator::{drawn, greedy, ids};
use super::inference_scheduler::{ADAPTERS, Collected, SMALL, Script, small};
use super::inference_speculation::EAGER;
use metal_candle::inference::{GenerationConfig, Request, Scheduler, SequenceId, sample_seed};
use proptest::prelude::*;

/// One request of the property test.
#[derive(Debug, Clone)]
struct Arrival {
    step: usize,
    prompt: Vec<u32>,
    config: GenerationConfig,
    num_samples: usize,
    adapter: Option<usize>,
    num_top: usize,
    is_masked: bool,
    is_drafted: bool,
    /// The step in which its first sample is cancelled.
    cancelled: Option<usize>,
    /// The step in which its last sample is preempted.
    preempted: Option<usize>,
}

impl Arrival {
    fn request(&self, scheduler: &mut Scheduler, config: GenerationConfig) -> Request {
        let adapter = self.adapter.map(|index| scheduler.add_adapter(&ADAPTERS[index]).unwrap());
        let request = Request::new(self.prompt.clone(), config)
            .with_adapter(adapter)
            .with_num_top_log_probabilities(self.num_top)
            .with_prefix_key(1);
        if self.is_masked { request.with_mask(Script::new(&[&[1, 2, 3, 4], &[5, 6]])) } else { request }
    }
}

fn arrival() -> impl Strategy<Value = Arrival> {
    // prompts with common prefixes
    let prompt = (0usize..20, proptest::collection::vec(0u32..480, 1..12));
    let prompt = prompt.prop_map(|(count, rest)| ids(count).into_iter().chain(rest).collect::<Vec<u32>>());
    let config = (1usize..8, proptest::option::of(0u64..100))
        .prop_map(|(max_tokens, seed)| seed.map_or(greedy(max_tokens), |seed| drawn(max_tokens, seed)));
    let flags = (proptest::bool::weighted(0.2), proptest::bool::ANY);
    let rest = (1usize..4, proptest::option::of(0usize..2), 0usize..3, flags);
    let events = (proptest::option::weighted(0.2, 0usize..20), proptest::option::weighted(0.4, 0usize..20));
    (0usize..12, prompt, config, rest, events).prop_map(|(step, prompt, config, rest, (cancelled, preempted))| {
        let (num_samples, adapter, num_top, (is_masked, is_drafted)) = rest;
        Arrival { step, prompt, config, num_samples, adapter, num_top, is_masked, is_drafted, cancelled, preempted }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_equals_itself_alone(arrivals in proptest::collection::vec(arrival(), 1..8)) {
        let mut scheduler = small();
        let mut found = Collected::default();
        let mut admitted: Vec<Vec<SequenceId>> = vec![Vec::new(); arrivals.len()];
        for step in 0.. {
            for (index, arrival) in arrivals.iter().enumerate() {
                if arrival.step == step {
                    let request = arrival.request(&mut scheduler, arrival.config.clone());
                    let request = if arrival.is_drafted { request.with_speculation(EAGER) } else { request };
                    admitted[index] = scheduler.admit(request.with_num_samples(arrival.num_samples)).unwrap();
                }
                if let (Some(&first), true) = (admitted[index].first(), arrival.cancelled == Some(step)) {
                    // it may have ended
                    let _ = scheduler.cancel(first);
                }
                if let (Some(&last), Some(preempted)) = (admitted[index].last(), arrival.preempted) {
                    // as above; its siblings are resumed with it
                    if step == preempted {
                        let _ = scheduler.preempt(last);
                    } else if step == preempted + 3 {
                        for &id in &admitted[index] {
                            let _ = scheduler.set_paused(id, false);
                        }
                    }
                }
            }
            if step >= 20 && scheduler.is_idle() {
                break;
            }
            found.step(&mut scheduler);
            prop_assert!(scheduler.num_running() <= SMALL.max_sequences);
        }
        prop_assert!(found.errors.is_empty());
        for (arrival, samples) in arrivals.iter().zip(&admitted) {
            for (index, &id) in samples.iter().enumerate() {
                let mut config = arrival.config.clone();
                config.sampling.seed = config.sampling.seed.map(|seed| sample_seed(seed, index));
                let mut single = small();
                let request = arrival.request(&mut single, config);
                let wanted_id = single.admit(request).unwrap()[0];
                let wanted = Collected::run(&mut single);
                let (tokens, wanted_tokens) = (found.tokens(id), wanted.tokens(wanted_id));
                let is_cut = index == 0 && arrival.cancelled.is_some();
                prop_assert!(is_cut || tokens.len() == wanted_tokens.len());
                prop_assert_eq!(&tokens[..], &wanted_tokens[..tokens.len()]);
                prop_assert_eq!(found.bits(id), &wanted.bits(wanted_id)[..tokens.len()]);
            }
        }
    }
}
