//! Decodes one token per sequence on devices with kernels for it, and owns the buffers of these steps.

use super::request::AdapterId;
use crate::error::{Error, Result};
use crate::models::{Decoded, Decoding, DecodingRow, KVCache, Model};
use crate::ops::adapters::BatchUpdates;
use candle_core::Tensor;

/// Buffers by adapter. They are only valid while the cache does not move in memory.
#[derive(Debug, Default)]
pub(super) struct DeviceDecoding {
    buffers: Vec<(Held, Option<Decoding>)>,
}

/// The adapters that buffers can be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Same(Option<AdapterId>),
    /// Any adapters, which may differ by row.
    ByRow,
}

/// The result of a row.
pub(super) enum DeviceToken {
    Sampled(Decoded),
    /// Non-finite logits. Sampling from them returns the error.
    Broken(Tensor),
}

impl DeviceDecoding {
    /// Frees all buffers.
    pub(super) fn clear(&mut self) {
        self.buffers.clear();
    }

    /// Frees the buffers of adapters that are not in use.
    pub(super) fn retain(&mut self, is_in_use: impl Fn(Option<AdapterId>) -> bool) {
        self.buffers.retain(|(held, _)| match held {
            Held::Same(adapter) => is_in_use(*adapter),
            Held::ByRow => true,
        });
    }

    /// Frees the buffers that refer to an adapter, or may do so.
    pub(super) fn forget(&mut self, adapter: AdapterId) {
        self.buffers.retain(|(held, _)| ![Held::Same(Some(adapter)), Held::ByRow].contains(held));
    }

    /// Decodes rows with the same adapter, whose id is given, or with different ones; `None` if the device has no kernels
    /// for them.
    pub(super) fn decode(
        &mut self,
        model: &Model,
        cache: &mut KVCache,
        (adapter, updates): (Option<AdapterId>, BatchUpdates),
        rows: &[DecodingRow],
    ) -> Result<Option<Vec<DeviceToken>>> {
        let longest = rows.iter().map(|row| row.position + 1).max().unwrap_or(0);
        if longest > cache.config().max_seq_len || !model.can_decode(rows.len(), updates, cache) {
            return Ok(None);
        }
        let held = if model.decodes_by_row(rows.len(), updates) { Held::ByRow } else { Held::Same(adapter) };
        let index = self.buffers.iter().position(|(other, _)| *other == held).unwrap_or(self.buffers.len());
        if index == self.buffers.len() {
            self.buffers.push((held, None));
        }
        let decoding = &mut self.buffers[index].1;
        let all = model.decode(decoding, rows, updates, cache).inspect_err(|_| *decoding = None)?;
        let token = |(row, decoded): (usize, Decoded)| {
            if decoded.log_probability.is_finite() {
                return Ok(DeviceToken::Sampled(decoded));
            }
            let decoding = decoding.as_ref().ok_or(Error::Stopped)?;
            Ok(DeviceToken::Broken(decoding.logits().get(row)?))
        };
        all.into_iter().enumerate().map(token).collect::<Result<_>>().map(Some)
    }
}
