//! Writes prefixes to their folder on a thread, and removes the least recently used files.

use crate::error::{Error, Result};
use crate::files::{Access, KeyedFile, is_temporary, write_tensor};
use candle_core::Tensor;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

/// The files of prefixes. The key is the scope and the token ids; the contents are the tensors of
/// [`KVCache::read_slot`](crate::models::KVCache::read_slot).
pub(super) const FILES: KeyedFile = KeyedFile { magic: b"metal-candle prefix 1\n", access: Access::Private };

/// The end of the name of a file.
const ENDING: &str = ".prefix";
/// The number of hexadecimal digits of the scope and of the ids in the name of a file.
const SCOPE_DIGITS: usize = 32;
const IDS_DIGITS: usize = 16;

/// Maximum number of prefixes in memory that wait to be written. Further ones are dropped.
const MAX_WAITING: usize = 2;
/// A temporary file that is older belongs to a process that was killed.
const MAX_TEMPORARY_AGE: Duration = Duration::from_hours(1);

/// The name of the file of a prefix, from the digests of its scope and its ids.
pub(super) fn file_name(scope: &[u8; 32], ids: &[u8; 32]) -> String {
    format!("{}-{}{ENDING}", name_start(scope), &hex(ids)[..IDS_DIGITS])
}

/// The start of the names of all files of a scope.
pub(super) fn name_start(scope: &[u8; 32]) -> String {
    hex(scope)[..SCOPE_DIGITS].to_owned()
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Whether this is the name of a file of a prefix.
pub(super) fn is_file_name(name: &str) -> bool {
    let is_hex = |text: &str, len: usize| text.len() == len && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let digits = name.strip_suffix(ENDING).and_then(|name| name.split_once('-'));
    digits.is_some_and(|(scope, ids)| is_hex(scope, SCOPE_DIGITS) && is_hex(ids, IDS_DIGITS))
}

/// A prefix to write.
#[derive(Debug)]
pub(super) struct Save {
    pub(super) name: String,
    pub(super) key: Vec<u8>,
    pub(super) tensors: Vec<Tensor>,
    /// The names of files whose texts are the beginning of this one.
    pub(super) replaced: Vec<String>,
}

enum Command {
    Save(Save),
    /// Sends a message when all previous commands have been executed.
    Finish(SyncSender<()>),
}

/// The thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct PrefixWriter {
    commands: Option<SyncSender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl PrefixWriter {
    /// Starts the thread. Files of `folder` have at most `max_bytes` together.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(folder: PathBuf, max_bytes: u64) -> Result<Self> {
        let (commands, receiver) = sync_channel(MAX_WAITING);
        let thread =
            std::thread::Builder::new().name("prefixes".into()).spawn(move || run(&receiver, &folder, max_bytes));
        let thread = thread.map_err(|error| Error::Device(format!("cannot start a thread: {error}")))?;
        Ok(Self { commands: Some(commands), thread: Some(thread) })
    }

    /// Queues a prefix; returns false if too many wait. With `waits`, waits for its turn instead.
    pub(super) fn save(&self, save: Save, waits: bool) -> bool {
        let Some(commands) = &self.commands else { return false };
        if waits { commands.send(Command::Save(save)).is_ok() } else { commands.try_send(Command::Save(save)).is_ok() }
    }

    /// Waits until all queued prefixes are written.
    pub(super) fn finish(&self) {
        let Some(commands) = &self.commands else { return };
        let (sender, receiver) = sync_channel(1);
        if commands.send(Command::Finish(sender)).is_ok() {
            // an error means that the thread has ended
            let _ = receiver.recv();
        }
    }
}

impl Drop for PrefixWriter {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn run(commands: &Receiver<Command>, folder: &Path, max_bytes: u64) {
    while let Ok(command) = commands.recv() {
        match command {
            Command::Save(save) => {
                if let Err(error) = write(folder, max_bytes, &save) {
                    tracing::warn!("a prefix was not saved: {error}");
                }
            }
            Command::Finish(sender) => drop(sender.send(())),
        }
    }
}

fn write(folder: &Path, max_bytes: u64, save: &Save) -> Result<()> {
    let contents = save.tensors.iter().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum();
    remove_oldest(folder, max_bytes.saturating_sub(FILES.num_bytes(save.key.len(), contents) as u64))?;
    let path = folder.join(&save.name);
    FILES.save(&path, &save.key, |file| {
        let mut tensors = save.tensors.iter();
        tensors.try_for_each(|tensor| write_tensor(file, tensor)?.map_err(|error| Error::write(&path, error)))
    })?;
    for name in &save.replaced {
        // another process may have removed it
        drop(fs::remove_file(folder.join(name)));
    }
    Ok(())
}

/// Removes temporary files of killed processes, and the least recently used prefixes until the others have at most
/// `max_bytes`. Other files are not touched.
fn remove_oldest(folder: &Path, max_bytes: u64) -> Result<()> {
    let failed = |error| Error::read(folder, error);
    let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // another process may have removed it
        let Some((metadata, modified)) =
            entry.metadata().ok().and_then(|found| Some((found.clone(), found.modified().ok()?)))
        else {
            continue;
        };
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if is_file_name(&name) && metadata.is_file() {
            files.push((modified, metadata.len(), entry.path()));
        } else if is_temporary(&name)
            && name.contains(ENDING)
            && modified.elapsed().is_ok_and(|age| age > MAX_TEMPORARY_AGE)
        {
            drop(fs::remove_file(entry.path()));
        }
    }
    files.sort();
    let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
    for (_, size, path) in files {
        if total <= max_bytes {
            break;
        }
        drop(fs::remove_file(path));
        total -= size;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_the_least_recently_used_prefixes_and_stale_temporaries_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let name = |number: u8| file_name(&[7; 32], &[number; 32]);
        let add = |name: &str, size: usize, seconds: u64| {
            let path = folder.path().join(name);
            fs::write(&path, vec![0; size]).unwrap();
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        };
        for number in 0..5 {
            add(&name(number), 100, 10 - u64::from(number));
        }
        let stale = format!(".{}.12-3.tmp", name(9));
        assert!(is_temporary(&stale));
        add(&stale, 100, 1);
        fs::write(folder.path().join(format!(".{}.12-4.tmp", name(9))), "now").unwrap();
        for other in ["notes.txt", "x.prefix", ".other.12-3.tmp"] {
            add(other, 1000, 1);
        }
        remove_oldest(folder.path(), 250).unwrap();
        let mut found: Vec<String> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        let mut expected = vec![format!(".{}.12-4.tmp", name(9)), ".other.12-3.tmp".into(), name(0), name(1)];
        expected.extend(["notes.txt".into(), "x.prefix".into()]);
        expected.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn names_have_one_form() {
        let name = file_name(&[0xab; 32], &[0xcd; 32]);
        assert!(is_file_name(&name) && name.starts_with(&name_start(&[0xab; 32])), "{name}");
        for other in
            [".prefix", "a-b.prefix", &name[1..], &format!("{name}x"), &name.replace('a', "g"), "\u{f6}-\u{f6}.prefix"]
        {
            assert!(!is_file_name(other), "{other}");
        }
    }
}
