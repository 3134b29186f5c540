//! Selects the rows of a batch whose results are computed.

use crate::error::{Error, Result};
use candle_core::Tensor;

/// The rows of a batch whose logits or hidden states are requested.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// The rows of all tokens.
    All,
    /// The row of the last token of each sequence.
    Last,
    /// The rows of the tokens with these indices.
    Of(&'a [usize]),
}

/// The rows of `x: [tokens, width]` with these indices.
pub(super) fn gather_rows(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let count = x.dim(0)?;
    if let Some(row) = rows.iter().find(|&&row| row >= count) {
        return Err(Error::argument(
            "rows",
            format!("expected row indices below the number of tokens, {count}, found {row}"),
        ));
    }
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
}
