//! Keeps a run in step with the other ranks of its group.

use super::Run;
use crate::data::Random;
use crate::error::Result;
use crate::training::distributed::{Group, divide};
use crate::training::epoch::Indices;
use crate::training::trained::Trained;
use serde_json::Value;

impl<T: Trained> Run<'_, T> {
    /// The rank of this process; rank 0 writes the files.
    pub(super) fn rank(&self) -> usize {
        self.options.group.as_ref().map_or(0, Group::rank)
    }

    /// Checks that all ranks train with the same settings and data, from the same step.
    pub(super) fn agree(&mut self) -> Result<()> {
        let Some(group) = &self.options.group else { return Ok(()) };
        let device = self.start.run_model().device();
        let settings = Value::Object(self.settings.clone()).to_string();
        group.check_same("device", device.name())?;
        let digest = format!("{:08x}", crc32c::crc32c(settings.as_bytes()));
        group.check_same("digest of settings and data", &digest)?;
        group.check_same("step to resume from", &self.progress.step.to_string())?;
        self.micro_batching.agree(group)?;
        group.prepare(device)?;
        self.check_parameters()
    }

    /// Checks that the parameters are equal on all ranks.
    pub(super) fn check_parameters(&self) -> Result<()> {
        let Some(group) = &self.options.group else { return Ok(()) };
        let values = self.optimizer.parameters()?.to_vec1::<f32>()?;
        let mut sum = 0;
        for chunk in values.chunks(1 << 14) {
            let bytes: Vec<u8> = chunk.iter().flat_map(|value| value.to_le_bytes()).collect();
            sum = crc32c::crc32c_append(sum, &bytes);
        }
        group.check_same("digest of parameters", &format!("{sum:08x}"))
    }

    /// Whether a callback of any rank stopped the run.
    pub(super) fn stops(&self) -> Result<bool> {
        self.options.group.as_ref().map_or(Ok(self.is_stopped), |group| group.any(self.is_stopped))
    }

    /// The batches of each rank in a step.
    pub(super) fn shares(&self, batches: &[Indices]) -> Vec<Vec<Indices>> {
        divide(self.dataset, batches, self.options.group.as_ref().map_or(1, Group::num_ranks))
    }

    /// The generator of this step's seeds. Each rank draws one number per step, for any number of batches, so that one
    /// saved state is valid for all ranks.
    pub(super) fn seeds(&mut self) -> Random {
        match &self.options.group {
            None => self.progress.dropout.clone(),
            Some(group) => Random::new(self.progress.dropout.next_u64().wrapping_add(group.rank() as u64)),
        }
    }
}
