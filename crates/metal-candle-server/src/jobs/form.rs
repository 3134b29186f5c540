//! Converts jobs and checkpoints to OpenAI's objects.

use super::record::{JobRecord, JobState};
use super::run::{Row, Run};
use super::store::{CHECKPOINT, Live};
use crate::ids::unix_time;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write;

/// A job as OpenAI's object. Fields without a value are `null`, because official clients require them.
pub(crate) fn job_object(record: &JobRecord, live: Option<&Live>) -> Value {
    let status = match record.state {
        JobState::Queued if record.stats.is_none() => "validating_files",
        state => state.name(),
    };
    let hyperparameters = record.settings.hyperparameters();
    let mut extras = record.settings.extras();
    extras["adapter"] = record.adapter.as_str().into();
    extras["is_paused"] = record.is_paused.into();
    extras["step"] = live.map(|live| live.step).into();
    extras["total_steps"] = live.map(|live| live.total_steps).into();
    extras["served_step"] = live.and_then(|live| live.served_step).into();
    let fine_tuned_model = Some(&record.adapter).filter(|_| record.state == JobState::Succeeded);
    json!({
        "id": record.id,
        "object": "fine_tuning.job",
        "created_at": record.created,
        "finished_at": record.finished,
        "status": status,
        "model": record.model,
        "fine_tuned_model": fine_tuned_model,
        "organization_id": record.owner,
        "result_files": [],
        "trained_tokens": record.trained_tokens,
        "training_file": record.training_file,
        "validation_file": record.validation_file,
        "user_provided_suffix": record.suffix,
        "seed": record.seed,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "error": record.error,
        "estimated_finish": live.and_then(estimated_finish),
        "metadata": record.metadata,
        "integrations": [],
        "metal_candle": extras,
    })
}

/// The estimated finish time, from the speed of the steps so far.
fn estimated_finish(live: &Live) -> Option<u64> {
    let (first, started) = live.first?;
    let done = live.step.checked_sub(first).filter(|done| *done > 0)?;
    let seconds = started.elapsed().as_secs_f64() / done as f64 * live.total_steps.saturating_sub(live.step) as f64;
    Some(unix_time() + seconds.ceil() as u64)
}

/// The checkpoints of a job, newest first.
pub(crate) fn checkpoint_objects(record: &JobRecord, run: &Run) -> Vec<Value> {
    let steps = run.checkpoints();
    let mut metrics: BTreeMap<u64, [Option<Row>; 2]> = BTreeMap::new();
    for row in run.rows(&mut 0) {
        if steps.binary_search(&row.step).is_ok() {
            let (step, index) = (row.step, usize::from(row.is_evaluation()));
            metrics.entry(step).or_default()[index] = Some(row);
        }
    }
    let object = |&step: &u64| {
        let [training, evaluation] = metrics.remove(&step).unwrap_or_default();
        let valid_loss = evaluation.and_then(|row| row.loss);
        json!({
            "id": checkpoint_id(&record.id, step),
            "object": "fine_tuning.job.checkpoint",
            "created_at": run.checkpoint_time(step),
            "fine_tuning_job_id": record.id,
            "fine_tuned_model_checkpoint": format!("{}{CHECKPOINT}{step}", record.adapter),
            "step_number": step,
            "metrics": {
                "step": step, "train_loss": training.and_then(|row| row.loss), "valid_loss": valid_loss,
                "full_valid_loss": valid_loss,
            },
        })
    };
    steps.iter().rev().map(object).collect()
}

/// The id of a checkpoint, which is derived from job and step.
fn checkpoint_id(job: &str, step: u64) -> String {
    let digest = Sha256::digest(format!("{job}:{step}"));
    let mut id = "ftckpt-".to_owned();
    for byte in digest.iter().take(12) {
        let _ = write!(id, "{byte:02x}");
    }
    id
}
