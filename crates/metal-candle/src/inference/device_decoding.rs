//! Decodes one token per sequence on devices with kernels for it, and owns the buffers of these steps.

use super::request::AdapterId;
use crate::error::{Error, Result};
use crate::models::{Decoded, Decoding, DecodingRow, KVCache, Model};
use crate::ops::LowRankUpdates;
use candle_core::Tensor;

/// Buffers by adapter. They are only valid while the cache does not move in memory.
#[derive(Debug, Default)]
pub(super) struct DeviceDecoding {
    buffers: Vec<(Option<AdapterId>, Option<Decoding>)>,
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
        self.buffers.retain(|(adapter, _)| is_in_use(*adapter));
    }

    /// Decodes rows with the same adapter; `None` if the device has no kernels for them.
    pub(super) fn decode(
        &mut self,
        model: &Model,
        cache: &mut KVCache,
        (adapter, terms): (Option<AdapterId>, Option<&LowRankUpdates>),
        rows: &[DecodingRow],
    ) -> Result<Option<Vec<DeviceToken>>> {
        let longest = rows.iter().map(|row| row.position + 1).max().unwrap_or(0);
        if longest > cache.config().max_seq_len || !model.can_decode(rows.len(), terms, cache) {
            return Ok(None);
        }
        let index = self.buffers.iter().position(|(held, _)| *held == adapter).unwrap_or(self.buffers.len());
        if index == self.buffers.len() {
            self.buffers.push((adapter, None));
        }
        let decoding = &mut self.buffers[index].1;
        let all = model.decode(decoding, rows, terms, cache).inspect_err(|_| *decoding = None)?;
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
