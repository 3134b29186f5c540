//! Loads, replaces and unloads the adapters of a server. Names point to immutable generations.

use crate::error::{ApiError, without_paths};
use crate::ids::unix_time;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::models::Model;
use metal_candle::ops::LowRankUpdates;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Longest name of an adapter. Names of fine-tuned adapters have several parts.
const MAX_NAME: usize = 256;

/// One immutable generation of an adapter.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) name: String,
    /// The id of the generation, which the server never reuses.
    pub(crate) generation: u64,
    pub(crate) terms: LowRankUpdates,
    pub(crate) rank: usize,
    pub(crate) method: &'static str,
    pub(crate) bytes: usize,
    /// The path below the root that it was loaded from, or the job that trained it.
    pub(crate) source: String,
    pub(crate) created: u64,
    is_retired: AtomicBool,
    in_flight: AtomicUsize,
}

impl Adapter {
    /// The number of jobs that use it.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a job that uses it, until the returned value is dropped.
    pub(crate) fn use_in_job(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// Whether it was unloaded or replaced.
    pub(crate) fn is_retired(&self) -> bool {
        self.is_retired.load(Ordering::Relaxed)
    }
}

/// A job that uses an adapter.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Adapter>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The adapters by name.
#[derive(Debug)]
pub(crate) struct Adapters {
    model: Model,
    /// The folder that adapters may be loaded from.
    root: Option<PathBuf>,
    limit: usize,
    /// The names of the model itself.
    reserved: [String; 2],
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    by_name: BTreeMap<String, Arc<Adapter>>,
    last_generation: u64,
}

impl Adapters {
    pub(crate) fn new(model: Model, name: &str, root: Option<PathBuf>, limit: usize) -> Self {
        let reserved = [name.to_owned(), "default".to_owned()];
        Self { model, root, limit, reserved, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_name(&self, name: &str) -> Result<(), ApiError> {
        if self.reserved.iter().any(|reserved| reserved == name) {
            return Err(ApiError::conflict(format!("`{name}` is a name of the model")).with_param("name"));
        }
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte);
        if (1..=MAX_NAME).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(is_good) {
            return Ok(());
        }
        let message = format!("expected 1 to {MAX_NAME} letters, digits, `.`, `_`, `-` and `:`, not starting with `.`");
        Err(ApiError::field("name", format!("`name`: {message}")))
    }

    /// The current generation of an adapter.
    pub(crate) fn get(&self, name: &str) -> Option<Arc<Adapter>> {
        self.state().by_name.get(name).cloned()
    }

    /// The current generations, by name.
    pub(crate) fn list(&self) -> Vec<Arc<Adapter>> {
        self.state().by_name.values().cloned().collect()
    }

    /// Loads an adapter from a path below the root. See [`Self::insert`].
    ///
    /// # Errors
    /// The path is not below the root, or contains no adapter of this model.
    pub(crate) fn load_below_root(&self, name: &str, path: &str, replaces: Replaces) -> Result<Arc<Adapter>, ApiError> {
        let Some(root) = &self.root else {
            return Err(ApiError::forbidden(
                "loading adapters is disabled: the server was started without --adapter-root",
            ));
        };
        self.check_name(name)?;
        let wrong = |message: &str| ApiError::field("path", format!("`path`: {message}"));
        let relative = Path::new(path);
        let is_plain = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
        if path.is_empty() || path.contains('\0') || !relative.components().all(is_plain) {
            return Err(wrong("expected a path below the adapter folder, without `..`"));
        }
        // links may point outside
        let full = adapter_folder(&root.join(relative));
        let full = full.canonicalize().map_err(|_| wrong("there is no such file or folder"))?;
        let root = root.canonicalize().map_err(ApiError::server)?;
        if !full.starts_with(&root) {
            return Err(wrong("expected a path below the adapter folder"));
        }
        self.load_folder(name, &full, path, replaces)
    }

    /// Loads an adapter from a file or folder. See [`Self::insert`].
    ///
    /// # Errors
    /// The path contains no adapter of this model.
    pub(crate) fn load(
        &self,
        name: &str,
        path: &Path,
        source: &str,
        replaces: Replaces,
    ) -> Result<Arc<Adapter>, ApiError> {
        self.load_folder(name, &adapter_folder(path), source, replaces)
    }

    fn load_folder(&self, name: &str, path: &Path, source: &str, replaces: Replaces) -> Result<Arc<Adapter>, ApiError> {
        self.check_name(name)?;
        let loaded = LoRAAdapter::load(&self.model, path).map_err(|error| {
            // the message may contain paths, which clients must not see
            tracing::warn!("adapter `{name}`: {error}");
            ApiError::field(
                "path",
                format!("`{source}` contains no adapter of this model: {}", without_paths(&error.to_string())),
            )
        })?;
        self.insert(name, &loaded, source, replaces)
    }

    /// Registers an adapter under a name as a new generation. Running requests keep theirs.
    ///
    /// # Errors
    /// The adapter replaces modules, the name is taken, or there are too many adapters.
    pub(crate) fn insert(
        &self,
        name: &str,
        adapter: &LoRAAdapter,
        source: &str,
        replaces: Replaces,
    ) -> Result<Arc<Adapter>, ApiError> {
        self.check_name(name)?;
        if !adapter.saved_parameters().is_empty() {
            let message = format!(
                "adapter `{name}` replaces modules of the model, which other adapters share; merge it with `metal-candle fuse` and \
                serve the result"
            );
            return Err(ApiError::unsupported("path", message));
        }
        let plain = adapter.without_start().map_err(ApiError::server)?;
        // computed here, not by the thread that owns the model
        let updates = plain.low_rank_updates().and_then(|updates| self.model.with_cached_factors(&updates));
        let updates = updates.map_err(ApiError::server)?;
        let mut state = self.state();
        let current = state.by_name.get(name).map(|adapter| adapter.generation);
        match (current, replaces) {
            (Some(found), Replaces::Generation(expected)) if found != expected => {
                let message = format!("adapter `{name}`: expected generation {expected}, found {found}");
                return Err(ApiError::conflict(message).with_param("expected_generation"));
            }
            (None, Replaces::Generation(_)) => {
                let message = format!("there is no adapter `{name}` to replace");
                return Err(ApiError::conflict(message).with_param("expected_generation"));
            }
            (Some(_), Replaces::Nothing) => {
                let message = format!("there is an adapter `{name}` already; set `replace` to replace it");
                return Err(ApiError::conflict(message).with_param("name"));
            }
            _ => {}
        }
        if current.is_none() && state.by_name.len() >= self.limit {
            let message = format!("expected at most {} adapters; unload one first", self.limit);
            return Err(ApiError::conflict(message).with_param("name"));
        }
        state.last_generation += 1;
        let method = match (adapter.use_dora(), adapter.use_rslora()) {
            (true, _) => "dora",
            (false, true) => "rslora",
            (false, false) => "lora",
        };
        let made = Arc::new(Adapter {
            name: name.to_owned(),
            generation: state.last_generation,
            terms: updates,
            rank: adapter.rank(),
            method,
            bytes: plain.num_parameters() * size_of::<f32>(),
            source: source.to_owned(),
            created: unix_time(),
            is_retired: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
        });
        if let Some(old) = state.by_name.insert(name.to_owned(), Arc::clone(&made)) {
            old.is_retired.store(true, Ordering::Relaxed);
        }
        Ok(made)
    }

    /// Unloads an adapter. Running requests keep it until they end.
    pub(crate) fn remove(&self, name: &str) -> Option<Arc<Adapter>> {
        let removed = self.state().by_name.remove(name)?;
        removed.is_retired.store(true, Ordering::Relaxed);
        Some(removed)
    }
}

/// Which existing adapter a new one may replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replaces {
    Nothing,
    Any,
    /// Only this generation.
    Generation(u64),
}

/// The adapter in a run folder, or the path itself.
fn adapter_folder(path: &Path) -> PathBuf {
    let in_run = path.join("adapter");
    if in_run.is_dir() { in_run } else { path.to_owned() }
}
