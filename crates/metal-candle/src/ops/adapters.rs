//! Low-rank updates by sequence: the sequences of one batch may have different adapters, or none.

use super::low_rank::{LowRank, LowRankTerms};
use crate::error::{Error, Result};
use std::ops::Range;

/// The low-rank updates of the sequences of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Adapters<'a> {
    /// The adapters.
    pub sets: &'a [LowRankTerms],
    /// For each sequence the index of its adapter in `sets`; `None` for the model without one.
    pub of_sequence: &'a [Option<u32>],
}

/// The low-rank updates of all tokens of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Terms<'a> {
    /// The same for each token.
    Same(Option<&'a LowRankTerms>),
    /// Those of runs of tokens, in their order and without gaps.
    ByRows(&'a [RowTerms<'a>]),
}

/// The adapter of a run of tokens.
#[derive(Debug, Clone)]
pub(crate) struct RowTerms<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) terms: Option<&'a LowRankTerms>,
}

/// The low-rank updates of one linear layer.
#[derive(Debug, Clone)]
pub(crate) enum LayerTerms<'a> {
    /// The same for each row of its input.
    Same(Option<&'a LowRank>),
    /// Those of runs of rows, in their order and without gaps.
    ByRows(Vec<(Range<usize>, Option<&'a LowRank>)>),
}

impl<'a> Terms<'a> {
    /// The adapter of all tokens, if they have the same one.
    pub(crate) fn same(self) -> Option<&'a LowRankTerms> {
        if let Self::Same(terms) = self { terms } else { None }
    }

    /// The updates of linear layer `id`.
    pub(crate) fn of_layer(self, id: usize) -> LayerTerms<'a> {
        let of_layer = |terms: Option<&'a LowRankTerms>| terms.and_then(|terms| terms.get(id));
        match self {
            Self::Same(terms) => LayerTerms::Same(of_layer(terms)),
            Self::ByRows(rows) => {
                LayerTerms::ByRows(rows.iter().map(|run| (run.rows.clone(), of_layer(run.terms))).collect())
            }
        }
    }

    /// The updates of linear layer `id` for chosen tokens.
    pub(crate) fn of_layer_for(self, id: usize, tokens: &[usize]) -> LayerTerms<'a> {
        let LayerTerms::ByRows(runs) = self.of_layer(id) else { return self.of_layer(id) };
        let of_token = |token: usize| runs.iter().find(|(rows, _)| rows.contains(&token)).and_then(|(_, term)| *term);
        LayerTerms::ByRows(tokens.iter().enumerate().map(|(row, &token)| (row..row + 1, of_token(token))).collect())
    }

    /// Whether tokens have different adapters.
    pub(crate) fn is_mixed(self) -> bool {
        matches!(self, Self::ByRows(_))
    }
}

impl<'a> Adapters<'a> {
    /// The adapters by runs of the tokens of sequences `offsets[i]..offsets[i + 1]`; neighbours with the same adapter are one run.
    ///
    /// # Errors
    /// There is another number of sequences, or no such adapter.
    pub(crate) fn rows(&self, offsets: &[usize]) -> Result<Vec<RowTerms<'a>>> {
        let sequences = offsets.len().saturating_sub(1);
        if self.of_sequence.len() != sequences {
            let found = self.of_sequence.len();
            return Err(Error::argument(
                "adapters",
                format!("expected one for each of {sequences} sequences, found {found}"),
            ));
        }
        let mut runs: Vec<(RowTerms, Option<u32>)> = Vec::new();
        for (window, index) in offsets.windows(2).zip(self.of_sequence) {
            let terms = match index {
                None => None,
                Some(index) => Some(self.sets.get(*index as usize).ok_or_else(|| {
                    Error::argument("adapters", format!("there is no adapter {index}, only {}", self.sets.len()))
                })?),
            };
            match runs.last_mut() {
                Some((run, last)) if last == index => run.rows.end = window[1],
                _ => runs.push((RowTerms { rows: window[0]..window[1], terms }, *index)),
            }
        }
        Ok(runs.into_iter().map(|(run, _)| run).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{Adapters, LowRankTerms};

    #[test]
    fn neighbours_with_the_same_adapter_are_one_run() -> crate::Result<()> {
        let sets = [LowRankTerms::new(), LowRankTerms::new()];
        let adapters = Adapters { sets: &sets, of_sequence: &[None, Some(1), Some(1), Some(0)] };
        let runs = adapters.rows(&[0, 3, 4, 9, 10])?;
        let found: Vec<_> = runs.iter().map(|run| (run.rows.clone(), run.terms.is_some())).collect();
        assert_eq!(found, [(0..3, false), (3..9, true), (9..10, true)]);
        assert!(adapters.rows(&[0, 3]).is_err());
        assert!(Adapters { sets: &sets, of_sequence: &[Some(2)] }.rows(&[0, 3]).is_err());
        Ok(())
    }
}
