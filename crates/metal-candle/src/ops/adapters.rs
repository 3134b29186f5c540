//! Assigns low-rank updates to the sequences of a batch, each of which may have another adapter or none.

use super::low_rank::{LowRank, LowRankUpdates};
use crate::error::{Error, Result};
use std::ops::Range;

/// The low-rank updates of the sequences of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Adapters<'a> {
    /// The adapters.
    pub sets: &'a [LowRankUpdates],
    /// The index in `sets` of each sequence's adapter; `None` for the base model.
    pub of_sequence: &'a [Option<u32>],
}

/// The low-rank updates of all tokens of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BatchUpdates<'a> {
    /// All tokens have the same adapter.
    Same(Option<&'a LowRankUpdates>),
    /// Runs of tokens with the same adapter, in order and without gaps.
    ByRows(&'a [RowUpdates<'a>]),
}

/// A run of tokens and its adapter.
#[derive(Debug, Clone)]
pub(crate) struct RowUpdates<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) updates: Option<&'a LowRankUpdates>,
}

/// The low-rank updates of one linear layer.
#[derive(Debug, Clone)]
pub(crate) enum LayerUpdates<'a> {
    /// All rows of the input have the same update.
    Same(Option<&'a LowRank>),
    /// Runs of rows with the same update, in order and without gaps.
    ByRows(Vec<(Range<usize>, Option<&'a LowRank>)>),
}

impl<'a> BatchUpdates<'a> {
    /// The adapter, if all tokens have the same one.
    pub(crate) fn same(self) -> Option<&'a LowRankUpdates> {
        if let Self::Same(updates) = self { updates } else { None }
    }

    /// The updates of linear layer `id`.
    pub(crate) fn of_layer(self, id: usize) -> LayerUpdates<'a> {
        let of_layer = |updates: Option<&'a LowRankUpdates>| updates.and_then(|updates| updates.get(id));
        match self {
            Self::Same(updates) => LayerUpdates::Same(of_layer(updates)),
            Self::ByRows(rows) => {
                LayerUpdates::ByRows(rows.iter().map(|run| (run.rows.clone(), of_layer(run.updates))).collect())
            }
        }
    }

    /// The updates of linear layer `id` for the tokens with these indices.
    pub(crate) fn of_layer_for(self, id: usize, tokens: &[usize]) -> LayerUpdates<'a> {
        let LayerUpdates::ByRows(runs) = self.of_layer(id) else { return self.of_layer(id) };
        let of_token =
            |token: usize| runs.iter().find(|(rows, _)| rows.contains(&token)).and_then(|(_, update)| *update);
        LayerUpdates::ByRows(tokens.iter().enumerate().map(|(row, &token)| (row..row + 1, of_token(token))).collect())
    }

    /// The adapters of all runs of tokens.
    pub(crate) fn all(self) -> impl Iterator<Item = &'a LowRankUpdates> {
        let (same, by_rows) = match self {
            Self::Same(updates) => (updates, &[][..]),
            Self::ByRows(runs) => (None, runs),
        };
        same.into_iter().chain(by_rows.iter().filter_map(|run| run.updates))
    }

    /// Whether tokens have different adapters.
    pub(crate) fn is_mixed(self) -> bool {
        matches!(self, Self::ByRows(_))
    }
}

impl<'a> Adapters<'a> {
    /// The adapters of runs of tokens, where sequence `i` has the tokens `offsets[i]..offsets[i + 1]`. Adjacent
    /// sequences with the same adapter form one run.
    ///
    /// # Errors
    /// `of_sequence` does not have one entry per sequence, or an index is out of range.
    pub(crate) fn rows(&self, offsets: &[usize]) -> Result<Vec<RowUpdates<'a>>> {
        let sequences = offsets.len().saturating_sub(1);
        if self.of_sequence.len() != sequences {
            let found = self.of_sequence.len();
            return Err(Error::argument(
                "adapters",
                format!("expected one entry for each of {sequences} sequences, found {found}"),
            ));
        }
        let mut runs: Vec<(RowUpdates, Option<u32>)> = Vec::new();
        for (window, index) in offsets.windows(2).zip(self.of_sequence) {
            let updates = match index {
                None => None,
                Some(index) => Some(self.sets.get(*index as usize).ok_or_else(|| {
                    Error::argument(
                        "adapters",
                        format!("expected an index below the number of adapters, {}, found {index}", self.sets.len()),
                    )
                })?),
            };
            match runs.last_mut() {
                Some((run, last)) if last == index => run.rows.end = window[1],
                _ => runs.push((RowUpdates { rows: window[0]..window[1], updates }, *index)),
            }
        }
        Ok(runs.into_iter().map(|(run, _)| run).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{Adapters, LowRankUpdates};

    #[test]
    fn neighbours_with_the_same_adapter_are_one_run() -> crate::Result<()> {
        let sets = [LowRankUpdates::new(), LowRankUpdates::new()];
        let adapters = Adapters { sets: &sets, of_sequence: &[None, Some(1), Some(1), Some(0)] };
        let runs = adapters.rows(&[0, 3, 4, 9, 10])?;
        let found: Vec<_> = runs.iter().map(|run| (run.rows.clone(), run.updates.is_some())).collect();
        assert_eq!(found, [(0..3, false), (3..9, true), (9..10, true)]);
        assert!(adapters.rows(&[0, 3]).is_err());
        assert!(Adapters { sets: &sets, of_sequence: &[Some(2)] }.rows(&[0, 3]).is_err());
        Ok(())
    }
}
