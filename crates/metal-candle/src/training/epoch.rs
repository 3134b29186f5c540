//! Packs the samples of an epoch into the batches of its steps.

use super::config::Options;
use crate::data::{Dataset, PackingLimits, Random, pack};
use crate::error::{Error, Result};

/// The indices of the samples of a batch.
pub(super) type Indices = Vec<usize>;

/// The batches of each step of an epoch.
pub(super) fn plan_epoch(options: &Options, dataset: &Dataset, order: &mut Random) -> Result<Vec<Vec<Indices>>> {
    let batches = if let Some(batches) = &options.batches {
        let is_known = |&index: &usize| index < dataset.len();
        if batches.is_empty() || !batches.iter().all(|batch| !batch.is_empty() && batch.iter().all(is_known)) {
            let message = format!("each batch needs sample indices below {}", dataset.len());
            return Err(Error::argument("batches", message));
        }
        batches.clone()
    } else {
        let limits = PackingLimits { max_tokens: options.batch_tokens, max_samples: options.batch_samples };
        pack(&dataset.lengths(), limits, order)?
    };
    if batches.is_empty() {
        return Err(Error::argument("dataset", "has no sample"));
    }
    Ok(batches.chunks(options.gradient_accumulation.max(1)).map(<[_]>::to_vec).collect())
}
