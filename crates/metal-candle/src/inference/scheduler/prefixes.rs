//! Keeps prefixes in a folder.

use super::Scheduler;
use crate::error::{Error, Result};
use crate::inference::prefix_folder::PrefixStorage;

impl Scheduler {
    /// Saves long prefixes (at least 256 tokens) in a folder when their slot of the cache is overwritten, and reads them when
    /// a request with the same key and adapter needs them. The files of another model, adapter, key, type of the cache,
    /// processor or version of this crate are not used, so on the CPU answers do not change.
    ///
    /// All weights are read once, to compute their digest. A thread writes the files.
    ///
    /// # Errors
    /// The folder cannot be created or other users may access it; the model is not on the CPU, or its keys depend on the length
    /// of the text (longrope); or an adapter was added before.
    pub fn with_prefix_storage(mut self, storage: &PrefixStorage) -> Result<Self> {
        if !self.adapters.terms().is_empty() {
            return Err(Error::argument(
                "prefix_cache",
                "expected no adapter yet; set the storage before adapters are added",
            ));
        }
        self.slots.open_folder(storage, &self.model)?;
        Ok(self)
    }

    /// Saves the prefixes in all free slots to the folder of [`Scheduler::with_prefix_storage`], and waits until they are
    /// written. Without a folder nothing happens.
    pub fn save_prefixes(&mut self) {
        self.slots.save_prefixes();
    }

    /// The number of tokens whose keys and values were read from the folder since the last call.
    pub fn take_num_stored_tokens(&mut self) -> usize {
        self.slots.take_num_read()
    }
}
