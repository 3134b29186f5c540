//! Packing samples into ragged batches, and the random generator behind it.

use metal_candle::data::{PackingLimits, Random, Sample, batch_of, pack};
use proptest::prelude::*;

#[test]
fn the_generator_gives_the_published_numbers() {
    let mut random = Random::new(1_234_567);
    let numbers: Vec<u64> = (0..3).map(|_| random.next_u64()).collect();
    assert_eq!(numbers, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
}

#[test]
fn a_restored_generator_goes_on() {
    let mut random = Random::new(5);
    random.next_f32();
    let mut restored = Random::from_state(random.state());
    let next: Vec<u64> = (0..8).map(|_| random.next_u64()).collect();
    assert_eq!(next, (0..8).map(|_| restored.next_u64()).collect::<Vec<_>>());
}

#[test]
fn numbers_below_a_bound_are_even() {
    let mut random = Random::new(9);
    let mut counts = [0; 6];
    (0..60_000).for_each(|_| counts[random.below(6) as usize] += 1);
    assert!(counts.iter().all(|&count| (9_600..10_400).contains(&count)), "{counts:?}");
    assert_eq!(random.below(1), 0);
    assert_eq!(random.below(0), 0);
    let mean = (0..10_000).map(|_| f64::from(random.next_f32())).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.02, "{mean}");
}

#[test]
fn a_batch_predicts_trained_tokens_only() {
    let first = Sample { ids: vec![5, 6, 7], trained: vec![true, false, true], source: None };
    let second = Sample { ids: vec![8, 9], trained: vec![false, true], source: None };
    let (batch, targets) = batch_of(&[&first, &second]);
    assert_eq!(batch.ids(), [5, 6, 7, 8, 9]);
    assert_eq!(batch.positions(), [0, 1, 2, 0, 1]);
    assert_eq!(batch.offsets(), [0, 3, 5]);
    assert_eq!(targets.weights, [0.0, 1.0, 0.0, 1.0, 0.0]);
    assert_eq!((targets.ids[1], targets.ids[3]), (7, 9));
}

#[test]
fn limits_of_nothing_are_refused() {
    let limits = PackingLimits { max_tokens: 4, max_samples: 0 };
    assert_eq!(
        pack(&[1], limits, &mut Random::new(0)).unwrap_err().to_string(),
        "`max_samples`: expected at least 1, found 0"
    );
    assert!(pack(&[1], PackingLimits::tokens(0), &mut Random::new(0)).is_err());
}

proptest! {
    #[test]
    fn every_sample_is_packed_once_within_the_limits(
        lengths in prop::collection::vec(0usize..60, 0..200), max_tokens in 1usize..80, max_samples in 1usize..9, seed in any::<u64>(),
    ) {
        let limits = PackingLimits { max_tokens, max_samples };
        let batches = pack(&lengths, limits, &mut Random::new(seed)).unwrap();
        prop_assert_eq!(&batches, &pack(&lengths, limits, &mut Random::new(seed)).unwrap());
        let mut seen: Vec<usize> = batches.concat();
        seen.sort_unstable();
        let wanted: Vec<usize> = (0..lengths.len()).filter(|&index| lengths[index] > 0).collect();
        prop_assert_eq!(seen, wanted);
        let total = |batch: &[usize]| batch.iter().map(|&index| lengths[index]).sum::<usize>();
        for (number, batch) in batches.iter().enumerate() {
            prop_assert!(total(batch) <= max_tokens || batch.len() == 1);
            prop_assert!(batch.len() <= max_samples);
            // first fit: the first sample of a later batch had no room in this one, which only filled up since
            for later in &batches[number + 1..] {
                prop_assert!(batch.len() == max_samples || total(batch) + lengths[later[0]] > max_tokens);
            }
        }
    }
}
