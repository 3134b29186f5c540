//! Changes CPU tensors in place.

use crate::error::Result;
use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Tensor};
use std::cell::Cell;

/// Changes the elements of a u8 tensor on the CPU.
pub(super) fn change_bytes(
    tensor: &Tensor,
    change: impl FnOnce(&mut [u8]) -> candle_core::Result<()>,
) -> candle_core::Result<()> {
    tensor.inplace_op1(&Change(Cell::new(Some(change))))
}

/// Changes the elements of an f32 tensor on the CPU, given those of another tensor.
pub(super) fn change_with(
    tensor: &Tensor,
    other: &Tensor,
    change: impl FnOnce(&mut [f32], &[f32]) -> candle_core::Result<()>,
) -> Result<()> {
    Ok(tensor.inplace_op2(other, &Change(Cell::new(Some(change))))?)
}

/// A change that is applied once.
struct Change<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [u8]) -> candle_core::Result<()>> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "change of bytes"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets(), self.0.take()) {
            (CpuStorage::U8(values), Some((start, end)), Some(change)) => change(&mut values[start..end]),
            _ => candle_core::bail!("expected a contiguous u8 tensor"),
        }
    }
}

impl<F: FnOnce(&mut [f32], &[f32]) -> candle_core::Result<()>> InplaceOp2 for Change<F> {
    fn name(&self) -> &'static str {
        "change"
    }

    fn cpu_fwd(
        &self,
        storage: &mut CpuStorage,
        layout: &Layout,
        other: &CpuStorage,
        other_layout: &Layout,
    ) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets(), self.0.take()) {
            (CpuStorage::F32(values), Some((start, end)), Some(change)) => {
                change(&mut values[start..end], part(other, other_layout)?)
            }
            _ => candle_core::bail!("expected a contiguous f32 tensor"),
        }
    }
}

/// The elements of a contiguous f32 tensor.
pub(super) fn part<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => candle_core::bail!("expected a contiguous f32 tensor"),
    }
}
