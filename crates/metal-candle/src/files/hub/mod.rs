//! Downloads models from the Hugging Face Hub into the cache folder that it shares with other programs.
//!
//! The crate `hf-hub` defines the names and paths of the cache. This module does the transfer itself: `hf-hub` 0.4.3 appends
//! the whole file to a partial one if a server ignores the requested range, and cannot resume from a partial file that is
//! already complete. Its version 1 adds an asynchronous runtime and about two hundred crates.

mod name;
mod transfer;

use super::read::read_text;
use super::shards::shard_names;
use super::write::write_atomically;
use crate::error::{Error, Result};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use transfer::{Failure, Transfer, create_parent, plain_name};

pub use name::HubName;
pub use transfer::DownloadProgress;

/// A client of a Hub, with its cache folder.
#[derive(Debug, Clone)]
pub struct Hub {
    endpoint: String,
    cache_dir: PathBuf,
    token: Option<String>,
    offline: bool,
}

/// The files besides the weights, and whether they are required.
const FILES: [(&str, bool); 9] = [
    ("config.json", true),
    ("generation_config.json", false),
    ("tokenizer.json", false),
    ("tokenizer_config.json", false),
    ("chat_template.jinja", false),
    ("special_tokens_map.json", false),
    ("added_tokens.json", false),
    ("vocab.json", false),
    ("merges.txt", false),
];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Largest accepted size of the access token file, in bytes.
const MAX_TOKEN_BYTES: u64 = 64 << 10;

impl Hub {
    /// A client of the Hub at `endpoint`, with the cache in `cache_dir` and no token.
    pub fn new(endpoint: impl Into<String>, cache_dir: impl Into<PathBuf>) -> Self {
        let endpoint = endpoint.into().trim_end_matches('/').to_owned();
        Self { endpoint, cache_dir: cache_dir.into(), token: None, offline: false }
    }

    /// A client configured by environment variables, like Hugging Face's own programs.
    ///
    /// `HF_ENDPOINT` is its address. The cache is `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else in `huggingface` in the
    /// user's cache folder. The token is `HF_TOKEN`, else the text of the file `HF_TOKEN_PATH`, else of `token` in
    /// `HF_HOME`. With `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` set to 1 nothing is downloaded. `HUGGING_FACE_HUB_TOKEN`
    /// is an older name of `HF_TOKEN`. `~` and `$NAME` in paths are expanded.
    ///
    /// # Errors
    /// There is no home folder for the cache.
    pub fn from_env() -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let path = |name: &str| {
            variable(name).map(|value| expand(&value, std::env::home_dir().as_deref(), |name| std::env::var(name).ok()))
        };
        let home = path("HF_HOME").or_else(|| {
            let cache = path("XDG_CACHE_HOME");
            cache.or_else(|| Some(std::env::home_dir()?.join(".cache"))).map(|cache| cache.join("huggingface"))
        });
        let cache_dir = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or_else(|| Error::Hub("there is no home folder; set `HF_HOME` to a folder for downloads".into()))?;
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
        let token = variable("HF_TOKEN")
            .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| read_text(token_file?, MAX_TOKEN_BYTES).ok());
        let offline = variable("HF_HUB_OFFLINE")
            .or_else(|| variable("TRANSFORMERS_OFFLINE"))
            .is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Ok(Self { offline, ..Self::new(endpoint, cache_dir).with_token(token) })
    }

    /// Sends `token` with each request to the Hub (not to the hosts it redirects to).
    #[must_use]
    pub fn with_token(mut self, token: Option<String>) -> Self {
        self.token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        self
    }

    /// Uses only the cache and downloads nothing.
    #[must_use]
    pub fn with_offline(mut self, offline: bool) -> Self {
        self.offline = offline;
        self
    }

    /// Downloads the files of a model that are not in the cache, and returns the model's folder.
    ///
    /// The files are the configuration, the tokenizer's files, the chat template and the safetensors weights. An interrupted
    /// download, of this process or an earlier one, is resumed. Without a connection, the cached files are used if they are
    /// complete.
    ///
    /// # Errors
    /// The Hub is unreachable, has no such model, or the token has no access to it; the model has no safetensors weights; or
    /// the cache cannot be written.
    pub fn fetch_model(&self, name: &HubName, on_progress: &mut dyn FnMut(DownloadProgress)) -> Result<PathBuf> {
        let repo = Repo::with_revision(name.repository().into(), RepoType::Model, name.revision().into());
        let cached_model =
            CachedModel { folder: self.cache_dir.join(repo.folder_name()), cache_dir: self.cache_dir.clone(), repo };
        if let Some(folder) = cached_model.cached().filter(|_| self.offline || is_commit(name.revision())) {
            return Ok(folder);
        }
        if self.offline {
            return Err(Error::Hub(format!(
                "`{name}` is missing or incomplete in `{}`, and `HF_HUB_OFFLINE` forbids downloads",
                self.cache_dir.display()
            )));
        }
        if !self.endpoint.starts_with("http://") && !self.endpoint.starts_with("https://") {
            let message = format!("expected an address that starts with `https://`, found `{}`", self.endpoint);
            return Err(Error::argument("HF_ENDPOINT", message));
        }
        match self.download(name, &cached_model, on_progress) {
            Err(Failure::Unreachable(message) | Failure::BrokeOff(message)) => {
                cached_model.cached().ok_or(Error::Hub(message))
            }
            Err(Failure::Final(error)) => Err(error),
            Ok(folder) => Ok(folder),
        }
    }

    fn download(
        &self,
        name: &HubName,
        cached_model: &CachedModel,
        on_progress: &mut dyn FnMut(DownloadProgress),
    ) -> std::result::Result<PathBuf, Failure> {
        let transfer = Transfer::new(&self.endpoint, self.token.as_deref(), name, cached_model.folder.clone());
        // the first response names the commit; requesting the other files by commit makes them consistent
        let first = transfer.fetch(name.revision(), FILES[0].0, on_progress)?;
        let Some(first) = first else {
            return Err(Error::Hub(format!("`{name}` has no `config.json`, so it is not a supported model")).into());
        };
        let commit = first.commit.unwrap_or_else(|| plain_name(name.revision()));
        let snapshot = cached_model.folder.join("snapshots").join(&commit);
        let revision = if is_commit(&commit) { commit.as_str() } else { name.revision() };
        link(&first.blob, &snapshot, FILES[0].0)?;

        let mut get = |file: &str| -> std::result::Result<bool, Failure> {
            let missing = cached_model.folder.join(".no_exist").join(&commit).join(file);
            if snapshot.join(file).exists() {
                return Ok(true);
            }
            if missing.exists() {
                return Ok(false);
            }
            match transfer.fetch(revision, file, on_progress)? {
                Some(fetched) => link(&fetched.blob, &snapshot, file)?,
                None if is_commit(&commit) => {
                    create_parent(&missing)?;
                    write_atomically(&missing, |_| Ok(()))?;
                    return Ok(false);
                }
                None => return Ok(false),
            }
            Ok(true)
        };
        for (file, required) in &FILES[1..] {
            if !get(file)? && *required {
                return Err(Error::Hub(format!("`{name}` has no `{file}`")).into());
            }
        }
        if !get(WEIGHTS)? {
            if !get(INDEX)? {
                return Err(Error::Hub(format!("`{name}` has neither `{WEIGHTS}` nor `{INDEX}`")).into());
            }
            for shard in shards(&snapshot.join(INDEX))? {
                if !get(&shard)? {
                    return Err(Error::Hub(format!("`{name}` has no `{shard}`, which its `{INDEX}` names")).into());
                }
            }
        }
        if commit != name.revision() {
            cached_model.write_ref(&commit)?;
        }
        Ok(snapshot)
    }
}

/// Expands `~`, `$NAME` and `${NAME}` in a path like a shell; unknown names are unchanged.
fn expand(value: &str, home: Option<&Path>, variable: impl Fn(&str) -> Option<String>) -> PathBuf {
    let mut text = value.to_owned();
    if let (Some(rest), Some(home)) = (value.strip_prefix('~'), home.and_then(Path::to_str))
        && (rest.is_empty() || rest.starts_with('/'))
    {
        text = format!("{home}{rest}");
    }
    let mut expanded = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let in_braces = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
        let (name, used) = if let Some((name, _)) = in_braces {
            (name, name.len() + 2)
        } else {
            let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
            (&after[..end], end)
        };
        match variable(name).filter(|_| !name.is_empty()) {
            Some(value) => expanded.push_str(&value),
            None => expanded.push_str(&rest[at..=at + used]),
        }
        rest = &after[used..];
    }
    expanded.push_str(rest);
    expanded.into()
}

/// The location of a model's files in the cache.
struct CachedModel {
    folder: PathBuf,
    cache_dir: PathBuf,
    repo: Repo,
}

impl CachedModel {
    /// The snapshot of the revision, if it is complete.
    fn cached(&self) -> Option<PathBuf> {
        let by_commit = self.folder.join("snapshots").join(self.repo.revision());
        let snapshot = if is_commit(self.repo.revision()) && by_commit.exists() {
            by_commit
        } else {
            let config = Cache::new(self.cache_dir.clone()).repo(self.repo.clone()).get(FILES[0].0)?;
            config.parent()?.to_path_buf()
        };
        let complete = snapshot.join(FILES[0].0).exists()
            && (snapshot.join(WEIGHTS).exists()
                || shards(&snapshot.join(INDEX))
                    .is_ok_and(|names| names.iter().all(|name| snapshot.join(name).exists())));
        complete.then_some(snapshot)
    }

    /// Records the commit of the revision.
    fn write_ref(&self, commit: &str) -> Result<()> {
        let cache = Cache::new(self.cache_dir.clone()).repo(self.repo.clone());
        cache.create_ref(commit).map_err(|e| Error::write(self.folder.join("refs").join(self.repo.revision()), e))
    }
}

/// Whether `revision` is a full commit hash, which is immutable.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| c.is_ascii_hexdigit())
}

/// The files in an index of shards, each of which must be a safetensors file in the same folder.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let names = shard_names(index)?;
    match names.iter().find(|name| **name != plain_name(name) || !name.ends_with(".safetensors")) {
        Some(name) => Err(Error::format(
            index,
            format!("expected the name of a safetensors file in the same folder, found `{name}`"),
        )),
        None => Ok(names),
    }
}

/// Links `snapshot/file` to `blob`.
fn link(blob: &Path, snapshot: &Path, file: &str) -> Result<()> {
    let target = snapshot.join(file);
    create_parent(&target)?;
    // `exists` is false for a dangling link, which would make the creation fail
    if std::fs::symlink_metadata(&target).is_ok() {
        std::fs::remove_file(&target).map_err(|e| Error::write(&target, e))?;
    }
    let blob_name = blob.file_name().unwrap_or_default();
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(Path::new("../../blobs").join(blob_name), &target);
    #[cfg(not(unix))]
    let linked = std::fs::hard_link(blob, &target).or_else(|_| std::fs::copy(blob, &target).map(|_| ()));
    #[cfg(not(unix))]
    let _ = blob_name;
    match linked {
        // another process created it
        Err(_) if target.exists() => Ok(()),
        linked => linked.map_err(|e| Error::write(&target, e)),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn paths_are_expanded() {
        let variable = |name: &str| (name == "A").then(|| "x".to_owned());
        let expand =
            |value| super::expand(value, Some(std::path::Path::new("/home/u")), variable).display().to_string();
        assert_eq!(expand("~/a/$A-${A}/$B/${C}/~$"), "/home/u/a/x-x/$B/${C}/~$");
        assert_eq!([expand("~"), expand("~v/a"), expand("$A")], ["/home/u", "~v/a", "x"]);
    }
}
