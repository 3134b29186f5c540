//! Stores the low-rank updates of a scheduler's adapters, by id.

use super::request::AdapterId;
use crate::error::{Error, Result};
use crate::ops::LowRankUpdates;

#[derive(Debug, Default)]
pub(super) struct AdapterSet {
    ids: Vec<AdapterId>,
    /// The low-rank updates, in the order of `ids`.
    terms: Vec<LowRankUpdates>,
    num_added: u64,
}

impl AdapterSet {
    pub(super) fn add(&mut self, terms: LowRankUpdates) -> AdapterId {
        let id = AdapterId(self.num_added);
        self.num_added += 1;
        self.ids.push(id);
        self.terms.push(terms);
        id
    }

    /// # Errors
    /// There is no such adapter.
    pub(super) fn remove(&mut self, adapter: AdapterId) -> Result<()> {
        let index = self.index(adapter)?;
        self.ids.remove(index);
        self.terms.remove(index);
        Ok(())
    }

    /// The index of an adapter in [`Self::terms`].
    ///
    /// # Errors
    /// There is no such adapter.
    pub(super) fn index(&self, adapter: AdapterId) -> Result<usize> {
        let index = self.ids.iter().position(|id| *id == adapter);
        index
            .ok_or_else(|| Error::argument("adapter", format!("adapter {adapter} was never added or has been removed")))
    }

    /// The low-rank updates of all adapters.
    pub(super) fn terms(&self) -> &[LowRankUpdates] {
        &self.terms
    }

    /// The low-rank updates of a sequence's adapter, if it has one.
    ///
    /// # Errors
    /// There is no such adapter.
    pub(super) fn of(&self, adapter: Option<AdapterId>) -> Result<Option<&LowRankUpdates>> {
        adapter.map(|adapter| Ok(&self.terms[self.index(adapter)?])).transpose()
    }
}
