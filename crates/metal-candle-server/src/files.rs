//! Stores the files that clients upload for fine-tuning, under generated ids, and checks their rows.

use crate::error::ApiError;
use crate::ids::{new_id, unix_time};
use metal_candle::data::{DataReport, DatasetOptions, Tokenizer};
use metal_candle::files::{MAX_SIDE_FILE_BYTES, guard, read_bounded, write_atomically};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tempfile::NamedTempFile;

/// Limits of what a client may upload.
const MAX_FILES: usize = 1000;
const MAX_ROWS: u64 = 1_000_000;
const MAX_ROW_BYTES: usize = 4 << 20;
/// Longest filename that is stored.
const MAX_FILENAME_CHARS: usize = 200;
/// Maximum number of findings that a report lists.
const MAX_FINDINGS: usize = 100;
/// The prefix of the names of unfinished uploads.
const UPLOAD: &str = ".upload-";
/// The prefix of ids.
const ID: &str = "file-";

/// Whether the rows of a file can be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FileStatus {
    /// The rows have not been checked.
    Uploaded,
    Processed,
    Error,
}

/// An error about an unusable row, or a note about a usable one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finding {
    /// `error` or `note`.
    level: String,
    /// The line, counted from 1; 0 for the whole file.
    line: usize,
    message: String,
}

/// Statistics of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileStats {
    pub(crate) rows: usize,
    pub(crate) tokens: usize,
    pub(crate) trained_tokens: usize,
    /// Tokens of the longest row.
    pub(crate) longest: usize,
}

/// A stored file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    pub(crate) id: String,
    /// The name of the key that uploaded it.
    pub(crate) owner: String,
    /// The client's file name, which is only displayed and never used as a path.
    filename: String,
    bytes: u64,
    created: u64,
    expires: Option<u64>,
    purpose: String,
    pub(crate) status: FileStatus,
    pub(crate) details: Option<String>,
    pub(crate) stats: FileStats,
    findings: Vec<Finding>,
}

impl FileRecord {
    /// The record as OpenAI's file object.
    pub(crate) fn object(&self) -> Value {
        let FileStats { rows, tokens, trained_tokens, longest } = &self.stats;
        let report = match self.status {
            FileStatus::Uploaded => Value::Null,
            _ => json!({
                "rows": rows, "tokens": tokens, "trained_tokens": trained_tokens, "longest_row": longest,
                "findings": self.findings,
            }),
        };
        json!({
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created,
            "expires_at": self.expires,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": self.status,
            "status_details": self.details,
            "report": report,
        })
    }
}

/// Limits of a store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileLimits {
    pub(crate) file_bytes: u64,
    pub(crate) total_bytes: u64,
}

/// The files of all clients. Each file is visible only to the key that uploaded it.
#[derive(Debug)]
pub(crate) struct Files {
    folder: PathBuf,
    limits: FileLimits,
    tokenizer: Tokenizer,
    options: DatasetOptions,
    state: Mutex<State>,
    /// Sends ids to the thread that checks files.
    to_check: Sender<String>,
}

#[derive(Debug, Default)]
struct State {
    by_id: BTreeMap<String, FileRecord>,
    /// Bytes of all files, including unfinished uploads.
    used: u64,
}

impl Files {
    /// Opens the store in `folder`, and starts the thread that checks files. Rows are read with these options, as in training.
    ///
    /// # Errors
    /// The folder cannot be read or written.
    pub(crate) fn open(
        folder: &Path,
        limits: FileLimits,
        tokenizer: Tokenizer,
        options: DatasetOptions,
    ) -> metal_candle::Result<Arc<Self>> {
        metal_candle::files::create_folder(folder)?;
        metal_candle::files::remove_stale_temporaries(folder)?;
        let read_error = |source| metal_candle::Error::Read { path: folder.to_path_buf(), source };
        let mut state = State::default();
        for entry in std::fs::read_dir(folder).map_err(read_error)? {
            let entry = entry.map_err(read_error)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(UPLOAD) {
                // left by a server that was killed
                let _ = std::fs::remove_file(entry.path());
            }
            let Some(id) = name.strip_suffix(".json").filter(|id| id.starts_with(ID)) else { continue };
            let record = read_bounded(entry.path(), MAX_SIDE_FILE_BYTES).ok();
            match record.and_then(|bytes| serde_json::from_slice::<FileRecord>(&bytes).ok()) {
                Some(record) if record.id == id => {
                    state.used += record.bytes;
                    state.by_id.insert(record.id.clone(), record);
                }
                _ => tracing::warn!("file `{id}` has no readable record and is ignored"),
            }
        }
        // left by a server that was killed between writing the rows and the record of a file, or while removing them
        for entry in std::fs::read_dir(folder).map_err(read_error)? {
            let name = entry.map_err(read_error)?.file_name().to_string_lossy().into_owned();
            let rows = name.strip_suffix(".jsonl").filter(|id| id.starts_with(ID));
            if rows.is_some_and(|id| !state.by_id.contains_key(id) && !folder.join(format!("{id}.json")).exists()) {
                let _ = std::fs::remove_file(folder.join(&name));
            }
        }
        let (to_check, ids) = channel::<String>();
        for record in state.by_id.values().filter(|record| record.status == FileStatus::Uploaded) {
            let _ = to_check.send(record.id.clone());
        }
        let folder = folder.to_path_buf();
        let files = Arc::new(Self { folder, limits, tokenizer, options, state: Mutex::new(state), to_check });
        let weak: Weak<Self> = Arc::downgrade(&files);
        let check = move || {
            while let Ok(id) = ids.recv() {
                let Some(files) = weak.upgrade() else { break };
                files.check(&id);
            }
        };
        let thread = std::thread::Builder::new().name("files".into()).spawn(check);
        thread.map_err(|error| metal_candle::Error::Device(format!("cannot start the thread for files: {error}")))?;
        Ok(files)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path of the rows of a file.
    pub(crate) fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.jsonl"))
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    /// A file of this owner.
    pub(crate) fn get(&self, owner: &str, id: &str) -> Option<FileRecord> {
        self.remove_expired();
        self.state().by_id.get(id).filter(|record| record.owner == owner).cloned()
    }

    /// The files of an owner, oldest first.
    pub(crate) fn list(&self, owner: &str) -> Vec<FileRecord> {
        self.remove_expired();
        let mut list: Vec<FileRecord> =
            self.state().by_id.values().filter(|record| record.owner == owner).cloned().collect();
        list.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        list
    }

    /// Removes a file of this owner; false if there is none.
    pub(crate) fn remove(&self, owner: &str, id: &str) -> bool {
        let mut state = self.state();
        let is_own = state.by_id.get(id).is_some_and(|record| record.owner == owner);
        if is_own {
            self.forget(&mut state, id);
        }
        is_own
    }

    fn forget(&self, state: &mut State, id: &str) {
        let Some(record) = state.by_id.remove(id) else { return };
        state.used = state.used.saturating_sub(record.bytes);
        for path in [self.record_path(id), self.path(id)] {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!("cannot remove `{}`: {error}", path.display());
            }
        }
    }

    fn remove_expired(&self) {
        let now = unix_time();
        let mut state = self.state();
        let is_expired = |record: &&FileRecord| record.expires.is_some_and(|time| time <= now);
        let expired: Vec<String> = state.by_id.values().filter(is_expired).map(|record| record.id.clone()).collect();
        for id in &expired {
            self.forget(&mut state, id);
        }
    }

    /// Starts an upload.
    ///
    /// # Errors
    /// There are too many files, or the folder cannot be written.
    pub(crate) fn upload(self: &Arc<Self>) -> Result<Upload, ApiError> {
        self.remove_expired();
        if self.state().by_id.len() >= MAX_FILES {
            return Err(ApiError::conflict(format!("expected at most {MAX_FILES} files; delete one first")));
        }
        let file = tempfile::Builder::new().prefix(UPLOAD).tempfile_in(&self.folder).map_err(ApiError::server)?;
        Ok(Upload { files: Arc::clone(self), file: Some(file), bytes: 0, rows: 0, row_bytes: 0 })
    }

    fn save(&self, record: &FileRecord) -> metal_candle::Result<()> {
        let text = serde_json::to_vec_pretty(record).unwrap_or_default();
        write_atomically(self.record_path(&record.id), |file| file.write_all(&text))
    }

    /// Checks the rows of a file and records the result.
    fn check(&self, id: &str) {
        if !self.state().by_id.contains_key(id) {
            return;
        }
        let checked = guard(|| DataReport::of(self.path(id), &self.tokenizer, &self.options));
        let mut state = self.state();
        // it may have been deleted in the meantime
        let Some(record) = state.by_id.get_mut(id) else { return };
        match checked {
            Ok(Ok(report)) => record.take(&report),
            Ok(Err(error)) => record.fail(&error.to_string()),
            Err(panic) => record.fail(&panic),
        }
        if let Err(error) = self.save(record) {
            tracing::warn!("file `{id}`: {error}");
        }
    }
}

impl FileRecord {
    fn take(&mut self, report: &DataReport) {
        if let Some(file) = report.files.first() {
            let (rows, tokens, trained_tokens) = (file.rows, file.tokens, file.trained_tokens);
            self.stats = FileStats { rows, tokens, trained_tokens, longest: file.lengths.max };
        }
        let problems = report.problems.iter().map(|problem| ("error", problem));
        let notes = report.notes.iter().map(|note| ("note", note));
        let finding = |(level, problem): (&str, &metal_candle::DataProblem)| Finding {
            level: level.into(),
            line: problem.line,
            message: problem.message.clone(),
        };
        self.findings = problems.chain(notes).take(MAX_FINDINGS).map(finding).collect();
        self.status = FileStatus::Processed;
        if let Some(first) = report.problems.first() {
            self.status = FileStatus::Error;
            let line = if first.line == 0 { String::new() } else { format!("line {}: ", first.line) };
            let more = match report.problems.len() {
                1 => String::new(),
                count => format!(" (and {} more)", count - 1),
            };
            self.details = Some(format!("{line}{}{more}", first.message));
        }
    }

    /// Records that the file could not be checked. The cause may contain paths, so it is only logged.
    fn fail(&mut self, cause: &str) {
        tracing::error!("file `{}`: {cause}", self.id);
        self.status = FileStatus::Error;
        self.details = Some("the file could not be checked; see the server's log for the cause".into());
    }
}

/// A file that is being uploaded; deleted on drop.
#[derive(Debug)]
pub(crate) struct Upload {
    files: Arc<Files>,
    file: Option<NamedTempFile>,
    bytes: u64,
    rows: u64,
    row_bytes: usize,
}

impl Upload {
    /// Appends bytes.
    ///
    /// # Errors
    /// The file, a row of it or all files together are too large, or the disk is full.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        let limits = self.files.limits;
        let count = bytes.len() as u64;
        if self.bytes + count > limits.file_bytes {
            return Err(ApiError::too_large(format!("the file has more than {} bytes", limits.file_bytes)));
        }
        {
            let mut state = self.files.state();
            if state.used + count > limits.total_bytes {
                let message =
                    format!("all files together are limited to {} bytes; delete one first", limits.total_bytes);
                return Err(ApiError::too_large(message));
            }
            state.used += count;
        }
        self.bytes += count;
        let mut lines = bytes.split(|&byte| byte == b'\n');
        self.row_bytes += lines.next().map_or(0, <[u8]>::len);
        let mut longest = self.row_bytes;
        for line in lines {
            self.rows += 1;
            self.row_bytes = line.len();
            longest = longest.max(self.row_bytes);
        }
        if longest > MAX_ROW_BYTES {
            let message = format!("line {} has more than {MAX_ROW_BYTES} bytes", self.rows + 1);
            return Err(ApiError::field("file", message));
        }
        if self.rows > MAX_ROWS {
            return Err(ApiError::field("file", format!("the file has more than {MAX_ROWS} lines")));
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write_all(bytes).map_err(ApiError::server)
    }

    /// Whether nothing was written.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Stores the file and queues its check.
    ///
    /// # Errors
    /// The disk is full.
    pub(crate) fn finish(
        mut self,
        owner: &str,
        filename: &str,
        purpose: &str,
        expires_after: Option<u64>,
    ) -> Result<FileRecord, ApiError> {
        let (id, created) = (new_id(ID), unix_time());
        let record = FileRecord {
            id: id.clone(),
            owner: owner.to_owned(),
            filename: filename.chars().filter(|c| !c.is_control()).take(MAX_FILENAME_CHARS).collect(),
            bytes: self.bytes,
            created,
            expires: expires_after.map(|seconds| created + seconds),
            purpose: purpose.to_owned(),
            status: FileStatus::Uploaded,
            details: None,
            stats: FileStats::default(),
            findings: Vec::new(),
        };
        let Some(file) = self.file.take() else { return Err(ApiError::server("an upload was finished twice")) };
        let stored = file.as_file().sync_data().map_err(ApiError::server).and_then(|()| {
            file.persist(self.files.path(&id)).map_err(ApiError::server)?;
            self.files.save(&record).map_err(ApiError::server)
        });
        if let Err(error) = stored {
            let _ = std::fs::remove_file(self.files.path(&id));
            return Err(error);
        }
        self.files.state().by_id.insert(id.clone(), record.clone());
        // the record now counts these bytes
        self.bytes = 0;
        let _ = self.files.to_check.send(id);
        Ok(record)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let mut state = self.files.state();
        state.used = state.used.saturating_sub(self.bytes);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::untrusted::tests::nano;
    use std::time::{Duration, Instant};

    fn checked(files: &Files, id: &str) -> FileRecord {
        let started = Instant::now();
        loop {
            let record = files.get("a", id).unwrap();
            if record.status != FileStatus::Uploaded {
                return record;
            }
            assert!(started.elapsed() < Duration::from_secs(30));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn files_are_checked_owned_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let limits = FileLimits { file_bytes: 100, total_bytes: 150 };
        let open = || Files::open(folder.path(), limits, nano(), DatasetOptions::default()).unwrap();
        let files = open();
        let store = |text: &str| {
            let mut upload = files.upload()?;
            text.as_bytes().chunks(7).try_for_each(|chunk| upload.write(chunk))?;
            upload.finish("a", "../../x\u{7}\n", "fine-tune", None)
        };
        let good = store("{\"text\": \"fn main() {}\"}\n").unwrap();
        assert_eq!((good.filename.as_str(), good.status), ("../../x", FileStatus::Uploaded));
        let good = checked(&files, &good.id);
        assert!(good.status == FileStatus::Processed && good.stats.rows == 1 && good.stats.tokens > 3);
        let bad = store("{\"text\": \"a\"}\n{\"text\": 5}\n").unwrap();
        let bad = checked(&files, &bad.id);
        assert_eq!(bad.status, FileStatus::Error);
        assert!(bad.details.as_ref().unwrap().starts_with("line 2: "), "{:?}", bad.details);
        assert!(!bad.object().to_string().contains(&*folder.path().to_string_lossy()));
        // nothing remains of a file that is too large or over the quota
        let used = files.state().used;
        assert_eq!(store(&"x".repeat(101)).unwrap_err().status, 413);
        let third = store(&"{}\n".repeat(30)).unwrap();
        checked(&files, &third.id);
        assert_eq!(store(&"y".repeat(30)).unwrap_err().status, 413);
        assert_eq!(files.state().used, used + 90);
        let names = |part: &str| {
            let names = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
            names.filter(|name| name.to_string_lossy().contains(part)).count()
        };
        assert_eq!((names(UPLOAD), names(".jsonl"), names(".json")), (0, 3, 6));
        assert!(files.get("b", &good.id).is_none() && !files.remove("b", &good.id));
        let files = open();
        assert_eq!(files.list("a").len(), 3);
        assert_eq!(files.get("a", &good.id).unwrap(), good);
        assert!(files.remove("a", &good.id) && names(&good.id) == 0);
    }
}
