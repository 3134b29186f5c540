//! Splits batches into micro-batches that fit in memory.

use super::config::Options;
use super::distributed::Group;
use crate::data::Dataset;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::models::{Batch, Model, Targets, Trainable};

/// The micro-batches of a batch: samples in order, with at most `most` tokens or one sample each.
pub(super) fn micro_batches(dataset: &Dataset, batch: &[usize], most: Option<usize>) -> Vec<Vec<usize>> {
    let Some(most) = most else { return vec![batch.to_vec()] };
    let (mut parts, mut tokens): (Vec<Vec<usize>>, usize) = (Vec::new(), 0);
    for &index in batch {
        let length = dataset.samples[index].ids.len();
        match parts.last_mut() {
            Some(part) if tokens + length <= most => {
                part.push(index);
                tokens += length;
            }
            _ => {
                parts.push(vec![index]);
                tokens = length;
            }
        }
    }
    parts
}

/// The size of micro-batches and the number of checkpointed blocks, which shrink when memory runs out.
#[derive(Debug)]
pub(super) struct MicroBatching {
    pub(super) micro_batch_tokens: Option<usize>,
    pub(super) checkpointed_blocks: usize,
    /// Memory of the process before the first step, in bytes.
    resting: Option<usize>,
}

impl MicroBatching {
    /// The settings of the options. Call this when everything but the steps is in memory.
    pub(super) fn new(options: &Options, device: Device) -> Self {
        Self {
            micro_batch_tokens: options.micro_batch_tokens,
            checkpointed_blocks: options.checkpointed_blocks,
            resting: device.memory().map(|memory| memory.used),
        }
    }

    /// Adopts the smallest micro-batch of any rank, so that all ranks shrink at once.
    pub(super) fn agree(&mut self, group: &Group) -> Result<()> {
        let tokens = self.micro_batch_tokens.map_or(f64::INFINITY, |tokens| tokens as f64);
        let all = group.gather_numbers(&[tokens, self.checkpointed_blocks as f64])?;
        let numbers = |index: usize| all.iter().filter_map(move |numbers| numbers.get(index).copied());
        let least = numbers(0).fold(f64::INFINITY, f64::min);
        self.micro_batch_tokens = least.is_finite().then_some(least as usize);
        self.checkpointed_blocks = numbers(1).fold(0.0, f64::max) as usize;
        Ok(())
    }

    /// Returns an error for a batch that does not fit the free memory, before the operating system ends the process.
    pub(super) fn check(&self, model: &Model, batch: &Batch, targets: &Targets, trainable: Trainable) -> Result<()> {
        #[cfg(test)]
        if tests::is_to_fail() {
            return Err(Error::OutOfMemory("requested by the test".into()));
        }
        let Some((memory, resting)) = model.device().memory().zip(self.resting) else { return Ok(()) };
        let trained = targets.weights.iter().filter(|&&weight| weight != 0.0).count();
        let needed = model.step_memory(batch.num_tokens(), trained, trainable, self.checkpointed_blocks)?.peak;
        // memory that earlier steps freed may still count as used
        let left = (memory.used + memory.free).saturating_sub(resting);
        if needed > left {
            let message =
                format!("a batch of {} tokens needs {needed} bytes, {left} bytes are free", batch.num_tokens());
            return Err(Error::OutOfMemory(message));
        }
        Ok(())
    }

    /// Shrinks the micro-batches of these batches: to half the tokens while one has several samples, then by checkpointing
    /// every block. Returns whether anything could shrink.
    pub(super) fn shrink(&mut self, model: &Model, dataset: &Dataset, batches: &[Vec<usize>]) -> bool {
        let parts = || batches.iter().flat_map(|batch| micro_batches(dataset, batch, self.micro_batch_tokens));
        let tokens_of = |part: &Vec<usize>| part.iter().map(|&index| dataset.samples[index].ids.len()).sum::<usize>();
        if parts().any(|part| part.len() > 1) {
            let largest = parts().map(|part| tokens_of(&part)).max().unwrap_or(0);
            self.micro_batch_tokens = Some((largest / 2).max(1));
            return true;
        }
        let blocks = model.config().num_hidden_layers;
        let is_possible = self.checkpointed_blocks < blocks;
        self.checkpointed_blocks = blocks;
        is_possible
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::adapters::LoRAAdapter;
    use crate::data::{Dataset, Sample};
    use crate::training::{Group, Trainer, TrainingConfig, TrainingEvent, TrainingWarning};
    use crate::{Device, Error, Model, ModelConfig};
    use std::cell::Cell;
    use std::ops::ControlFlow;
    use std::sync::{Arc, Mutex};

    thread_local! {
        /// The number of checks that pass first, and the number of checks that fail after them.
        static FAILURES: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
    }

    pub(super) fn is_to_fail() -> bool {
        let (passing, failing) = FAILURES.get();
        FAILURES.set((passing.saturating_sub(1), if passing == 0 { failing.saturating_sub(1) } else { failing }));
        passing == 0 && failing > 0
    }

    fn trainer() -> Trainer {
        let config = r#"{"model_type": "qwen2", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true,
            "max_position_embeddings": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "initializer_range": 0.2}"#;
        let model = Model::initialize(ModelConfig::from_json_str(config).unwrap(), 1, Device::CPU).unwrap();
        Trainer::new(LoRAAdapter::builder(&model).build().unwrap(), TrainingConfig::default()).unwrap()
    }

    fn dataset() -> Dataset {
        let sample = |number: u32| Sample {
            ids: (0..20).map(|i| (number * 7 + i * 3) % 50).collect(),
            trained: vec![true; 20],
            source: None,
        };
        Dataset::from_samples((0..8).map(sample).collect())
    }

    #[test]
    fn a_step_is_repeated_with_smaller_micro_batches_when_memory_runs_out() {
        let expected = trainer().with_batch_tokens(80).train(&dataset()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let warnings = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&warnings);
        let trainer = trainer().with_batch_tokens(80).with_run_folder(folder.path()).with_callback(move |event| {
            if let TrainingEvent::Warning { step, warning: warning @ TrainingWarning::OutOfMemory { .. } } = event {
                seen.lock().unwrap().push((*step, warning.clone()));
            }
            ControlFlow::Continue(())
        });
        // the second step fails with micro-batches of 80 and of 40 tokens, then with 20 and no checkpointed blocks
        FAILURES.set((1, 3));
        let metrics = trainer.train(&dataset()).unwrap();
        assert_eq!(metrics.num_steps, 2);
        for (found, expected) in metrics.steps.iter().zip(&expected.steps) {
            assert!((found.loss - expected.loss).abs() < 1e-5, "{} {}", found.loss, expected.loss);
            assert_eq!(found.tokens, expected.tokens);
        }
        let found: Vec<_> = warnings
            .lock()
            .unwrap()
            .iter()
            .map(|(step, warning)| match warning {
                TrainingWarning::OutOfMemory { micro_batch_tokens, checkpointed_blocks, .. } => {
                    (*step, *micro_batch_tokens, *checkpointed_blocks)
                }
                _ => (0, None, 0),
            })
            .collect();
        assert_eq!(found, [(1, Some(40), 0), (1, Some(20), 0), (1, Some(20), 3)]);
        assert!(folder.path().join("checkpoints/step-000001").is_dir(), "the state before the failed step is saved");
    }

    #[test]
    fn all_ranks_shrink_micro_batches_when_one_runs_out_of_memory() {
        let expected = trainer().with_batch_tokens(80).train(&dataset()).unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let train = |rank: usize| {
            // the second step of one rank fails with its 40 tokens at once
            FAILURES.set((1, rank));
            let portions = Arc::new(Mutex::new(Vec::new()));
            let seen = Arc::clone(&portions);
            let trainer = trainer().with_batch_tokens(80).with_group(Group::connect(rank, 2, &address, "").unwrap());
            let trainer = trainer.with_callback(move |event| {
                if let TrainingEvent::Warning {
                    warning: TrainingWarning::OutOfMemory { micro_batch_tokens, .. }, ..
                } = event
                {
                    seen.lock().unwrap().push(*micro_batch_tokens);
                }
                ControlFlow::Continue(())
            });
            let metrics = trainer.train(&dataset()).unwrap();
            assert_eq!(*portions.lock().unwrap(), [Some(20)], "rank {rank}");
            metrics
        };
        let both = std::thread::scope(|scope| {
            let other = scope.spawn(|| train(1));
            [train(0), other.join().unwrap()]
        });
        for metrics in both {
            for (found, expected) in metrics.steps.iter().zip(&expected.steps) {
                assert!((found.loss - expected.loss).abs() < 1e-5, "{} {}", found.loss, expected.loss);
            }
        }
    }

    #[test]
    fn a_run_that_cannot_shrink_further_returns_an_error() {
        FAILURES.set((0, 100));
        let failed = trainer().train(&dataset());
        FAILURES.set((0, 0));
        assert!(matches!(failed, Err(Error::OutOfMemory(_))), "{failed:?}");
    }
}
