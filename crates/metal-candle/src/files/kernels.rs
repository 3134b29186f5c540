//! Caches compiled kernels in the user's cache folder, so that only the first start on a machine compiles them.

use super::keyed_file::KeyedFile;
use super::write::{Access, create_folder};
use crate::error::Error;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;

/// The files, whose contents is the code.
const FILES: KeyedFile = KeyedFile { magic: b"metal-candle kernels 1\n", access: Access::Shared };

const MAX_FILE_BYTES: u64 = 64 << 20;

/// Maximum number of files in the folder; the oldest are removed first.
const MAX_FILES: usize = 512;

/// A folder with one file per key.
#[derive(Debug)]
pub(crate) struct KernelFolder {
    folder: PathBuf,
}

impl KernelFolder {
    /// The folder `metal-candle/kernels` in `XDG_CACHE_HOME`, else in `.cache` in the home folder. `None` if there is no home.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_user() -> Option<Self> {
        Self::within(std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from), std::env::home_dir())
    }

    fn within(cache: Option<PathBuf>, home: Option<PathBuf>) -> Option<Self> {
        // the XDG specification requires absolute paths; a relative home folder would depend on the working folder
        let absolute = |folder: &PathBuf| folder.is_absolute();
        let cache = cache.filter(absolute).or_else(|| Some(home.filter(absolute)?.join(".cache")))?;
        Some(Self { folder: cache.join("metal-candle").join("kernels") })
    }

    fn path(&self, key: &str) -> PathBuf {
        // keys with equal hashes replace each other: the file contains the whole key, which is compared
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        self.folder.join(format!("{:016x}.cubin", hasher.finish()))
    }

    /// Loads the code of a key; `None` if the file is missing, damaged, unreadable or has another key.
    pub(crate) fn load(&self, key: &str) -> Option<Vec<u8>> {
        let file = FILES.load(&self.path(key), MAX_FILE_BYTES).ok()?;
        (file.key() == key.as_bytes()).then(|| file.contents().to_vec())
    }

    /// Saves the code of a key. A failure is not an error: the next process compiles again.
    pub(crate) fn save(&self, key: &str, code: &[u8]) {
        let path = self.path(key);
        let saved = create_folder(&self.folder).and_then(|()| {
            FILES.save(&path, key.as_bytes(), |file| file.write_all(code).map_err(|error| Error::write(&path, error)))
        });
        match saved {
            Ok(()) => self.remove_oldest(),
            Err(error) => tracing::debug!("compiled kernels are not cached: {error}"),
        }
    }

    fn remove_oldest(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let mut files: Vec<_> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
            })
            .collect();
        files.sort();
        for (_, path) in files.iter().take(files.len().saturating_sub(MAX_FILES)) {
            // another process may have removed it
            drop(fs::remove_file(path));
        }
    }
}

#[cfg(feature = "cuda")]
impl metal_candle_kernels::gpu::cuda::KernelStore for KernelFolder {
    fn load(&self, key: &str) -> Option<Vec<u8>> {
        Self::load(self, key)
    }

    fn save(&self, key: &str, code: &[u8]) {
        Self::save(self, key, code);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::KernelFolder;
    use std::fs;
    use std::path::PathBuf;
    use std::time::{Duration, SystemTime};

    #[test]
    fn code_is_loaded_by_its_key_only() {
        let folder = tempfile::tempdir().unwrap();
        let kernels = KernelFolder { folder: folder.path().join("a/b") };
        assert_eq!(kernels.load("key"), None);
        kernels.save("key", b"code");
        kernels.save("other", b"");
        assert_eq!(kernels.load("key").unwrap(), b"code");
        assert_eq!(kernels.load("other").unwrap(), b"");
        // another key with the same file name
        fs::copy(kernels.path("other"), kernels.path("key")).unwrap();
        assert_eq!(kernels.load("key"), None);
        kernels.save("key", b"new");
        assert_eq!(kernels.load("key").unwrap(), b"new");
    }

    #[test]
    fn damaged_files_count_as_missing_and_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let kernels = KernelFolder { folder: folder.path().to_owned() };
        kernels.save("key", b"code");
        let path = kernels.path("key");
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(kernels.load("key"), None);
            let mut damaged = whole.clone();
            damaged[length] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert_eq!(kernels.load("key"), None);
        }
        kernels.save("key", b"code");
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn an_unwritable_folder_is_not_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let kernels = KernelFolder { folder: file.path().join("folder") };
        kernels.save("key", b"code");
        assert_eq!(kernels.load("key"), None);
    }

    #[test]
    fn the_number_of_files_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let kernels = KernelFolder { folder: folder.path().to_owned() };
        for i in 0..super::MAX_FILES + 3 {
            let file = fs::File::create(folder.path().join(format!("{i}.cubin"))).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(i as u64)).unwrap();
        }
        kernels.save("key", b"code");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), super::MAX_FILES);
        assert!(kernels.load("key").is_some());
        let exists = |i: usize| folder.path().join(format!("{i}.cubin")).exists();
        assert!(!exists(3) && exists(4), "the oldest files are removed");
    }

    #[test]
    fn the_folder_is_absolute() {
        let within = |cache: Option<&str>, home: Option<&str>| {
            KernelFolder::within(cache.map(PathBuf::from), home.map(PathBuf::from)).map(|kernels| kernels.folder)
        };
        let cache = std::env::temp_dir().join("cache");
        let home = std::env::temp_dir().join("home");
        let (cache, home) = (cache.to_str().unwrap(), home.to_str().unwrap());
        let of_cache = PathBuf::from(cache).join("metal-candle/kernels");
        let of_home = PathBuf::from(home).join(".cache/metal-candle/kernels");
        assert_eq!(within(Some(cache), Some(home)).unwrap(), of_cache);
        assert_eq!(within(Some("cache"), Some(home)).unwrap(), of_home);
        assert_eq!(within(None, Some(home)).unwrap(), of_home);
        assert_eq!(within(Some(""), Some("")), None);
        assert_eq!(within(None, None), None);
    }
}
