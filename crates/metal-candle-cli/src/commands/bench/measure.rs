//! Measures this program through the public library API.

use super::memory::PeakMemory;
use super::work::Work;
use crate::error::UserError;
use anyhow::Result;
use metal_candle::data::{Dataset, Sample};
use metal_candle::inference::{GenerationConfig, Generator, KVCacheType};
use metal_candle::training::{
    AdamWConfig, LRScheduler, LoRAAdapter, TargetModule, Trainer, TrainingConfig, TrainingEvent,
};
use metal_candle::{Model, ModelConfig};
use std::ops::ControlFlow;
use std::sync::mpsc;
use std::time::Instant;

/// The number of first decode steps that are not timed.
const WARM_UP_STEPS: usize = 4;

/// Share of the free memory that training may take.
const SHARE_OF_FREE: f64 = 0.9;

/// The result of a measurement.
#[derive(Debug, Clone, Default)]
pub(super) struct Measured {
    /// The time of each repetition.
    pub(super) seconds: Vec<f64>,
    pub(super) peak_memory_bytes: Option<u64>,
    /// How the measurement differs from the requested one.
    pub(super) remark: Option<String>,
}

impl Measured {
    pub(super) fn failed(remark: String) -> Self {
        Self { remark: Some(remark), ..Self::default() }
    }

    /// The median time.
    pub(super) fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            length if length % 2 == 1 => sorted[length / 2],
            length => f64::midpoint(sorted[length / 2 - 1], sorted[length / 2]),
        }
    }
}

/// The weights of a model, in bytes.
pub(super) fn weights_bytes(model: &Model) -> usize {
    model.parameters().iter().map(|(_, weight)| weight.num_bytes()).sum()
}

/// The tokens of a prompt or sample: arbitrary, but reproducible.
fn ids(config: &ModelConfig, sequence: usize, length: usize) -> Vec<u32> {
    (0..length).map(|position| ((position * 577 + sequence * 7919 + 13) % config.vocab_size) as u32).collect()
}

/// Measures `work` on the model, with a KV cache of this type or the default of the model.
pub(super) fn measure(model: &Model, work: Work, kv_cache: Option<KVCacheType>) -> Result<Measured> {
    let memory = PeakMemory::watch(model.device());
    let (seconds, remark) = match work {
        Work::Prefill { length, repeats } => (prefill(generator(model, kv_cache)?, length, repeats)?, None),
        Work::Decode { sequences, length, steps, rank } => {
            (decode(generator(model, kv_cache)?, sequences, length, steps, rank)?, None)
        }
        Work::Train { sequences, length, rank, repeats } => train(model, sequences, length, rank, repeats)?,
    };
    Ok(Measured { seconds, peak_memory_bytes: memory.peak_bytes(), remark })
}

fn generator(model: &Model, kv_cache: Option<KVCacheType>) -> metal_candle::Result<Generator> {
    let generator = Generator::new(model.clone());
    match kv_cache {
        Some(kind) => generator.with_kv_cache(kind),
        None => Ok(generator),
    }
}

/// Times from a prompt to the first token, including reading the token from the device.
fn prefill(mut generator: Generator, length: usize, repeats: usize) -> Result<Vec<f64>> {
    let model = generator.model().clone();
    let prompt = ids(model.config(), 0, length);
    let config = GenerationConfig::default().with_max_tokens(1).with_ignore_eos(true);
    let mut seconds = Vec::with_capacity(repeats + 1);
    for _ in 0..=repeats {
        generator.clear_cache();
        model.device().synchronize()?;
        let started = Instant::now();
        generator.generate(&prompt, &config)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(seconds.split_off(1))
}

/// Times of decode steps of all sequences, including reading each token from the device.
fn decode(mut generator: Generator, sequences: usize, length: usize, steps: usize, rank: usize) -> Result<Vec<f64>> {
    let model = generator.model().clone();
    if rank > 0 {
        generator.set_adapter(Some(adapter(&model, rank)?.low_rank_updates()?));
    }
    let prompts: Vec<Vec<u32>> = (0..sequences).map(|sequence| ids(model.config(), sequence, length)).collect();
    // decoding of the first prompts overlaps prefill of the last, so all sequences continue until each has made its steps
    let most = if sequences == 1 { steps + 1 } else { model.config().max_sequence_length() };
    let config = GenerationConfig::default().with_max_tokens(most).with_ignore_eos(true);
    let mut has_begun = vec![false; sequences];
    let (mut num_waiting, mut num_pieces) = (sequences, 0);
    let mut times: Vec<Instant> = Vec::with_capacity(steps + 1);
    generator.generate_batch_with(prompts, &[config], |index, piece| {
        if num_waiting > 0 {
            num_waiting -= usize::from(!std::mem::replace(&mut has_begun[index], true));
            if num_waiting == 0 {
                times.push(Instant::now());
            }
        } else if times.len() <= steps {
            num_pieces += 1;
            if num_pieces % sequences == 0 {
                times.push(Instant::now());
            }
        }
        let is_over = times.len() > steps || (num_waiting == 0 && piece.finish.is_some());
        if is_over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let seconds: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    if seconds.len() < steps {
        let message = format!(
            "the model's context of {} tokens is too short to decode {steps} tokens of {sequences} sequences after {length}",
            model.config().max_sequence_length()
        );
        return Err(UserError::new(message).with_hint("use a smaller --context or fewer --decode-tokens").into());
    }
    let warm_up = WARM_UP_STEPS.min(steps - 1);
    Ok(seconds[warm_up..].to_vec())
}

/// An adapter of all linear layers of the blocks.
fn adapter(model: &Model, rank: usize) -> Result<LoRAAdapter> {
    let builder = LoRAAdapter::builder(model).with_rank(rank).with_alpha(2.0 * rank as f64);
    Ok(builder.with_target_modules([TargetModule::AllLinear]).build()?)
}

/// Times of training steps, and the settings that were changed to fit in memory.
fn train(
    model: &Model,
    sequences: usize,
    length: usize,
    rank: usize,
    repeats: usize,
) -> Result<(Vec<f64>, Option<String>)> {
    let steps = repeats + 1;
    let sample =
        |number: usize| Sample { ids: ids(model.config(), number, length), trained: vec![true; length], source: None };
    let data = Dataset::from_samples((0..steps * sequences).map(sample).collect());
    let adapter = adapter(model, rank)?;
    let config = TrainingConfig {
        num_epochs: 1,
        lr_scheduler: LRScheduler::constant(1e-4),
        optimizer_config: AdamWConfig::default(),
        max_grad_norm: Some(1.0),
    };
    let (sender, times) = mpsc::channel();
    let device = model.device();
    let mut trainer = Trainer::new(adapter, config)?
        .with_batch_tokens(sequences * length)
        .with_batch_samples(sequences)
        .with_max_steps(steps)
        .with_callback(move |event| {
            if let TrainingEvent::Step { .. } = event {
                // the receiver is gone only if the run has failed
                let _ = sender.send(device.synchronize().map(|()| Instant::now()));
            }
            ControlFlow::Continue(())
        });
    let mut remark = None;
    if let Some(memory) = device.memory() {
        let limit = weights_bytes(model) + (SHARE_OF_FREE * memory.free as f64) as usize;
        let plan;
        (trainer, plan) = trainer.fitted(&data, limit)?;
        if plan.micro_batch_tokens < plan.largest_batch || plan.checkpointed_blocks > 0 {
            remark = Some(format!(
                "to fit in memory: micro-batches of {} tokens, {} of {} blocks checkpointed",
                plan.micro_batch_tokens, plan.checkpointed_blocks, plan.trained_blocks
            ));
        }
    }
    trainer.train(&data)?;
    drop(trainer);
    let times: Vec<Instant> = times.into_iter().collect::<metal_candle::Result<_>>()?;
    Ok((times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect(), remark))
}

#[cfg(test)]
mod tests {
    use super::Measured;

    #[test]
    fn the_median_is_in_the_middle() {
        for (seconds, median) in [(vec![3.0, 1.0, 2.0], 2.0), (vec![4.0, 1.0, 2.0, 3.0], 2.5), (vec![5.0], 5.0)] {
            let found = Measured { seconds, ..Measured::default() }.median();
            assert!((found - median).abs() < 1e-12, "{found} is not {median}");
        }
    }
}
