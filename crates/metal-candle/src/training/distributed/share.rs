//! Divides the samples of a step among the ranks.

use crate::data::Dataset;

/// The batches of each rank: the samples of a step, divided so that tokens are balanced, in batches no larger than the
/// largest of `batches`. A single rank gets `batches` unchanged.
pub(in crate::training) fn divide(dataset: &Dataset, batches: &[Vec<usize>], num_ranks: usize) -> Vec<Vec<Vec<usize>>> {
    if num_ranks == 1 {
        return vec![batches.to_vec()];
    }
    let length = |index: usize| dataset.samples[index].ids.len();
    let tokens = |batch: &[usize]| batch.iter().map(|&index| length(index)).sum::<usize>();
    let most = batches.iter().map(|batch| tokens(batch)).max().unwrap_or(0).max(1);
    let into_batches = |share: Vec<usize>| {
        let mut count = tokens(&share).div_ceil(most);
        loop {
            let made = balance(&share, count, length);
            if made.iter().all(|batch| batch.len() < 2 || tokens(batch) <= most) {
                return made.into_iter().filter(|batch| !batch.is_empty()).collect();
            }
            count += 1;
        }
    };
    balance(&batches.concat(), num_ranks, length).into_iter().map(into_batches).collect()
}

/// Divides items into `count` parts: the longest first, each into the shortest part so far. Items of a part stay in
/// order.
fn balance(items: &[usize], count: usize, length: impl Fn(usize) -> usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(length(items[index])));
    let mut parts = vec![(0, Vec::new()); count];
    for index in order {
        if let Some((total, indices)) = parts.iter_mut().min_by_key(|(total, _)| *total) {
            *total += length(items[index]);
            indices.push(index);
        }
    }
    let in_order = |mut indices: Vec<usize>| {
        indices.sort_unstable();
        indices.into_iter().map(|index| items[index]).collect()
    };
    parts.into_iter().map(|(_, indices)| in_order(indices)).collect()
}

#[cfg(test)]
mod tests {
    use super::divide;
    use crate::data::{Dataset, Sample};
    use crate::training::samples::count_tokens;

    fn dataset(lengths: &[usize]) -> Dataset {
        let sample = |&length: &usize| Sample { ids: vec![1; length], trained: vec![true; length], source: None };
        Dataset::from_samples(lengths.iter().map(sample).collect())
    }

    #[test]
    fn tokens_are_balanced_and_batches_stay_small() {
        let dataset = dataset(&[9, 1, 4, 4, 2, 6, 3, 3]);
        let batches = [vec![0, 1, 2], vec![7, 6, 5, 4], vec![3]];
        assert_eq!(count_tokens(&dataset, batches.iter().flatten()), (32, 24));
        assert_eq!(divide(&dataset, &batches, 1), [batches.to_vec()]);
        for num_ranks in 2..12 {
            let shares = divide(&dataset, &batches, num_ranks);
            assert_eq!(shares.len(), num_ranks);
            let mut all: Vec<usize> = shares.iter().flatten().flatten().copied().collect();
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7], "{num_ranks} ranks");
            let tokens = |batches: &[Vec<usize>]| count_tokens(&dataset, batches.iter().flatten()).0;
            assert!(shares.iter().flatten().all(|batch| tokens(std::slice::from_ref(batch)) <= 14));
            if num_ranks == 2 {
                assert_eq!([tokens(&shares[0]), tokens(&shares[1])], [16, 16]);
                assert_eq!(shares[0].len(), 2, "16 tokens in batches of at most 14");
            }
            assert!(num_ranks < 9 || shares.iter().any(Vec::is_empty), "more ranks than samples");
        }
    }
}
