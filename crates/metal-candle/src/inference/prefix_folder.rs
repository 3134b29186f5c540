//! Finds, reads and saves prefixes of the KV cache in a folder, so that they survive their slots and a restart.

use super::prefix_writer::{FILES, PrefixWriter, Save, file_name, is_file_name, name_start};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::{Digest, create_private_folder};
use crate::models::{KVCacheConfig, KVCacheType, Model};
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The least number of tokens for which a file is written or read. A shorter prefix is recomputed.
pub(super) const MIN_TOKENS: usize = 256;

/// A folder that was changed within this time may change again without another time of modification.
const SETTLED: Duration = Duration::from_secs(1);

/// A folder for prefixes that leave the KV cache of a [`Scheduler`](super::Scheduler).
///
/// A file contains the token ids of a prompt and its answer, and their keys and values. On Unix, only the user of the
/// process may read folder and files. Whoever can write files there can change answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixStorage {
    /// The folder, which is created if it is missing. Several processes may use it.
    pub folder: PathBuf,
    /// Maximum size of all files in bytes. The least recently used files are removed.
    pub max_bytes: u64,
}

/// Identifies everything but the text that determines keys and values: a SHA-256. Only prefixes with equal scopes are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scope([u8; 32]);

impl Scope {
    /// The key of the file of a text: the scope and the ids.
    fn key(&self, ids: &[u32]) -> Vec<u8> {
        self.0.into_iter().chain(ids.iter().flat_map(|id| id.to_le_bytes())).collect()
    }

    /// The ids in a key; `None` if it is not a key of this scope.
    fn ids(&self, key: &[u8]) -> Option<Vec<u32>> {
        let (ids, rest) = key.strip_prefix(&self.0)?.as_chunks();
        rest.is_empty().then(|| ids.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    fn file_name(&self, ids: &[u32]) -> String {
        let mut digest = Digest::new("ids");
        for id in ids {
            digest.add_raw(&id.to_le_bytes());
        }
        file_name(&self.0, &digest.finish())
    }
}

/// A prefix in a file.
#[derive(Debug)]
pub(super) struct Found {
    name: String,
    ids: Vec<u32>,
    /// The number of its first tokens that the text shares.
    pub(super) shared: usize,
}

/// The files in a folder.
#[derive(Debug)]
pub(super) struct PrefixFolder {
    storage: PrefixStorage,
    /// The digest of the model and of the program.
    origin: [u8; 32],
    kind: KVCacheType,
    config: KVCacheConfig,
    /// The names of the files, and the token ids of those that have been read.
    files: BTreeMap<String, Option<Vec<u32>>>,
    /// When the folder was modified before the last scan, if it has not changed since.
    scanned: Option<SystemTime>,
    writer: PrefixWriter,
}

impl PrefixFolder {
    /// Opens a folder for a cache of this type. `config` has the longest possible sequence.
    ///
    /// # Errors
    /// The folder cannot be created or other users may access it; the model is not on the CPU, or its keys depend on the length
    /// of the text; or a file of its weights was overwritten.
    pub(super) fn open(
        storage: &PrefixStorage,
        model: &Model,
        kind: KVCacheType,
        config: KVCacheConfig,
    ) -> Result<Self> {
        if !model.device().is_cpu() {
            let device = model.device().name();
            let message =
                format!("expected a model on the CPU, found one on {device}; use the CPU, or no folder for prefixes");
            return Err(Error::argument("prefix_cache", message));
        }
        if model.rotary_limit().is_some() {
            let message =
                "the keys of this model depend on the length of the text (longrope), so they cannot be reused";
            return Err(Error::argument("prefix_cache", message));
        }
        create_private_folder(&storage.folder)?;
        let mut digest = Digest::new("prefix 1");
        digest.add(&model.digest()?);
        digest.add(kind.name().as_bytes());
        // other kernels may round differently
        digest.add(env!("CARGO_PKG_VERSION").as_bytes());
        digest.add(std::env::consts::ARCH.as_bytes());
        digest.add(Device::cpu_levels()?.join(" ").as_bytes());
        digest.add(Device::CPU.description().unwrap_or_default().as_bytes());
        Ok(Self {
            writer: PrefixWriter::start(storage.folder.clone(), storage.max_bytes)?,
            storage: storage.clone(),
            origin: digest.finish(),
            kind,
            config,
            files: BTreeMap::new(),
            scanned: None,
        })
    }

    /// The scope of sequences with this prefix key and the adapter with this digest.
    pub(super) fn scope(&self, key: u128, adapter: Option<&[u8; 32]>) -> Scope {
        let mut digest = Digest::new("scope");
        digest.add(&self.origin);
        digest.add(&key.to_le_bytes());
        digest.add(adapter.map_or(&[], |adapter| adapter));
        Scope(digest.finish())
    }

    /// The file that shares the most first tokens with a text.
    pub(super) fn find(&mut self, scope: &Scope, ids: &[u32]) -> Option<Found> {
        self.refresh();
        let start = name_start(&scope.0);
        let names: Vec<String> = self
            .files
            .range(start.clone()..)
            .map(|(name, _)| name.clone())
            .take_while(|name| name.starts_with(&start))
            .collect();
        let mut best: Option<Found> = None;
        for name in names {
            let Some(held) = self.ids(scope, &name) else { continue };
            let shared = num_common(held, ids);
            if best.as_ref().is_none_or(|best| shared > best.shared) {
                best = Some(Found { name, ids: held.to_vec(), shared });
            }
        }
        best
    }

    /// The ids of a file; `None` if it is damaged or has been removed.
    fn ids(&mut self, scope: &Scope, name: &str) -> Option<&[u32]> {
        if self.files.get(name)?.is_none() {
            let path = self.storage.folder.join(name);
            let max_bytes = scope.key(&[]).len() + self.config.max_seq_len * size_of::<u32>();
            let ids = FILES.load_key(&path, max_bytes).and_then(|key| scope.ids(&key).ok_or_else(|| other_key(&path)));
            match ids {
                Ok(ids) => drop(self.files.insert(name.to_owned(), Some(ids))),
                Err(error) => self.discard(name, &error),
            }
        }
        self.files.get(name)?.as_deref()
    }

    /// Reads the keys and values of a prefix, as [`KVCache::read_slot`](crate::models::KVCache::read_slot) returns them; `None` if
    /// the file is damaged or has been removed.
    pub(super) fn load(&mut self, scope: &Scope, found: &Found) -> Option<Vec<Tensor>> {
        let path = self.storage.folder.join(&found.name);
        match self.read(&path, scope, &found.ids) {
            Ok(tensors) => {
                // a failure only means that the file is removed earlier
                drop(File::options().write(true).open(path).and_then(|file| file.set_modified(SystemTime::now())));
                Some(tensors)
            }
            Err(error) => {
                self.discard(&found.name, &error);
                None
            }
        }
    }

    fn read(&self, path: &Path, scope: &Scope, ids: &[u32]) -> Result<Vec<Tensor>> {
        let key = scope.key(ids);
        let (size, shape) = (self.num_bytes(ids.len()), self.shape(ids.len()));
        let file = FILES.load(path, FILES.num_bytes(key.len(), size) as u64)?;
        if file.key() != key {
            return Err(other_key(path));
        }
        if file.contents().len() != size {
            let message = format!("expected {size} bytes of keys and values, found {}", file.contents().len());
            return Err(Error::format(path, message));
        }
        let tensors = file.contents().chunks_exact((size / (2 * self.config.num_layers)).max(1));
        let tensor = |bytes| Tensor::from_raw_buffer(bytes, self.kind.dtype(), &shape, &candle_core::Device::Cpu);
        Ok(tensors.map(tensor).collect::<candle_core::Result<_>>()?)
    }

    /// Whether a text has enough tokens that no file has, and fits in the folder.
    pub(super) fn lacks(&mut self, scope: &Scope, ids: &[u32]) -> bool {
        let size = FILES.num_bytes(scope.key(ids).len(), self.num_bytes(ids.len()));
        let shared = self.find(scope, ids).map_or(0, |found| found.shared);
        ids.len() >= shared + MIN_TOKENS && size as u64 <= self.storage.max_bytes
    }

    /// Queues a prefix for the thread that writes it. If too many wait, it is dropped, unless `waits`.
    pub(super) fn save(&mut self, scope: &Scope, ids: &[u32], tensors: Vec<Tensor>, waits: bool) {
        let is_start = |held: &Option<Vec<u32>>| held.as_ref().is_some_and(|held| ids.starts_with(held));
        let start = name_start(&scope.0);
        let replaced = self.files.iter().filter(|(name, held)| name.starts_with(&start) && is_start(held));
        let replaced = replaced.map(|(name, _)| name.clone()).collect();
        let name = scope.file_name(ids);
        if self.writer.save(Save { name: name.clone(), key: scope.key(ids), tensors, replaced }, waits) {
            // until the next scan, so that it is not saved twice
            self.files.insert(name, Some(ids.to_vec()));
        } else {
            tracing::debug!("a prefix was not saved because others are being written");
        }
    }

    /// Waits until all queued prefixes are written.
    pub(super) fn finish(&self) {
        self.writer.finish();
    }

    /// The bytes of the keys and values of a text.
    fn num_bytes(&self, num_tokens: usize) -> usize {
        KVCacheConfig { batch_size: 1, max_seq_len: num_tokens, ..self.config }.num_bytes(self.kind)
    }

    /// The shape of the keys and of the values of a layer.
    fn shape(&self, num_tokens: usize) -> [usize; 3] {
        [self.config.num_heads, num_tokens, self.kind.row_len(self.config.head_dim)]
    }

    /// Forgets a file, and removes it unless it cannot be read.
    fn discard(&mut self, name: &str, error: &Error) {
        self.files.remove(name);
        match error {
            // another process removed it
            Error::Read { source, .. } if source.kind() == ErrorKind::NotFound => {}
            Error::Read { source, .. } if source.kind() != ErrorKind::UnexpectedEof => {
                tracing::warn!("a saved prefix is not used: {error}");
            }
            _ => {
                tracing::warn!("a saved prefix is not used and is removed: {error}");
                drop(fs::remove_file(self.storage.folder.join(name)));
            }
        }
    }

    /// Lists the files again if the folder has changed.
    fn refresh(&mut self) {
        let modified = fs::metadata(&self.storage.folder).and_then(|found| found.modified()).ok();
        if modified.is_some() && modified == self.scanned {
            return;
        }
        self.scanned = modified.filter(|modified| modified.elapsed().is_ok_and(|age| age > SETTLED));
        let Ok(entries) = fs::read_dir(&self.storage.folder) else { return };
        // opening a pipe would block
        let files =
            entries.filter_map(|entry| entry.ok().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())));
        let names = files.filter_map(|entry| entry.file_name().into_string().ok());
        let mut known = std::mem::take(&mut self.files);
        let with_ids = |name: String| {
            let ids = known.remove(&name).flatten();
            (name, ids)
        };
        self.files = names.filter(|name| is_file_name(name)).map(with_ids).collect();
    }
}

/// The length of the common prefix of two texts.
pub(super) fn num_common(left: &[u32], right: &[u32]) -> usize {
    left.iter().zip(right).take_while(|(left, right)| left == right).count()
}

fn other_key(path: &Path) -> Error {
    Error::format(path, "expected the key that its name has, found another")
}
