//! Stores the events of a job in an append-only file, and reads them from its end.

use crate::ids::{new_id, unix_time};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const BLOCK_BYTES: u64 = 64 << 10;
/// Longest event that is read.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// An event of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Event {
    pub(crate) id: String,
    created_at: u64,
    level: String,
    message: String,
    /// `message` or `metrics`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) data: Value,
}

impl Event {
    fn new(level: &str, kind: &str, message: String, data: Value) -> Self {
        let (level, kind) = (level.to_owned(), kind.to_owned());
        Self { id: new_id("ftevent-"), created_at: unix_time(), level, message, kind, data }
    }

    /// A message about the job.
    pub(crate) fn info(message: impl Into<String>, data: Value) -> Self {
        Self::new("info", "message", message.into(), data)
    }

    pub(crate) fn warning(message: impl Into<String>) -> Self {
        Self::new("warn", "message", message.into(), Value::Null)
    }

    pub(crate) fn error(message: impl Into<String>) -> Self {
        Self::new("error", "message", message.into(), Value::Null)
    }

    /// A row of metrics.
    pub(crate) fn metrics(message: String, data: Value) -> Self {
        Self::new("info", "metrics", message, data)
    }

    /// The event as OpenAI's object.
    pub(crate) fn object(&self) -> Value {
        let mut object = json!(self);
        object["object"] = "fine_tuning.job.event".into();
        object
    }
}

/// A page of the events of a job.
#[derive(Debug, Default)]
pub(crate) struct Page {
    pub(crate) events: Vec<Event>,
    pub(crate) has_more: bool,
}

/// The event file of a job.
#[derive(Debug, Clone)]
pub(crate) struct EventFile {
    path: PathBuf,
}

impl EventFile {
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self { path: folder.join("events.jsonl") }
    }

    /// Appends events. A failure is logged and does not affect the job.
    pub(crate) fn append(&self, events: &[Event]) {
        let mut text = String::new();
        for event in events {
            text.push_str(&json!(event).to_string());
            text.push('\n');
        }
        if text.is_empty() {
            return;
        }
        let written = OpenOptions::new().create(true).append(true).read(true).open(&self.path).and_then(|mut file| {
            // a killed server may have left an incomplete line
            if file.seek(SeekFrom::End(-1)).is_ok() {
                let mut last = [0];
                file.read_exact(&mut last)?;
                if last != *b"\n" {
                    text.insert(0, '\n');
                }
            }
            file.write_all(text.as_bytes())
        });
        if let Err(error) = written {
            tracing::warn!("`{}`: {error}", self.path.display());
        }
    }

    /// Returns at most `limit` events: with `is_ascending` the oldest events after `after`, otherwise the newest events before
    /// `after`. `None` if there is no event `after`.
    pub(crate) fn page(&self, after: Option<&str>, limit: usize, is_ascending: bool) -> io::Result<Option<Page>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && after.is_none() => {
                return Ok(Some(Page::default()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut lines = LinesFromEnd::new(file)?;
        let mut events_in_page: VecDeque<Event> = VecDeque::new();
        let mut has_more = false;
        // in descending order the page starts here, in ascending order it ends here
        let mut is_found = after.is_none();
        while let Some(line) = lines.next()? {
            let Ok(event) = serde_json::from_slice::<Event>(&line) else { continue };
            let is_mark = after.is_some_and(|after| after == event.id);
            if is_ascending {
                if is_mark {
                    is_found = true;
                    break;
                }
                events_in_page.push_front(event);
                if events_in_page.len() > limit {
                    events_in_page.pop_back();
                    has_more = true;
                }
            } else if is_mark {
                is_found = true;
            } else if is_found {
                if events_in_page.len() == limit {
                    has_more = true;
                    break;
                }
                events_in_page.push_back(event);
            }
        }
        Ok(is_found.then(|| Page { events: events_in_page.into(), has_more }))
    }

    /// The last step and the last evaluation in the events.
    pub(crate) fn last_metrics(&self) -> (Option<u64>, Option<u64>) {
        let (mut step, mut evaluation) = (None, None);
        let Ok(mut lines) = File::open(&self.path).and_then(LinesFromEnd::new) else { return (None, None) };
        while let (Ok(Some(line)), true) = (lines.next(), step.is_none() || evaluation.is_none()) {
            let Ok(event) = serde_json::from_slice::<Event>(&line) else { continue };
            if event.kind != "metrics" {
                continue;
            }
            let found = event.data["step"].as_u64();
            let is_evaluation = event.data.get("valid_loss").is_some();
            let last = if is_evaluation { &mut evaluation } else { &mut step };
            *last = last.or(found);
        }
        (step, evaluation)
    }
}

/// Reads the lines of a file in reverse order.
#[derive(Debug)]
struct LinesFromEnd {
    file: File,
    /// The offset of the first byte read so far.
    offset: u64,
    /// Bytes of lines that have not been returned.
    bytes: Vec<u8>,
}

impl LinesFromEnd {
    fn new(file: File) -> io::Result<Self> {
        let offset = file.metadata()?.len();
        Ok(Self { file, offset, bytes: Vec::new() })
    }

    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.bytes.iter().rposition(|&byte| byte == b'\n') {
                let line = self.bytes.split_off(end + 1);
                self.bytes.pop();
                if !line.is_empty() {
                    return Ok(Some(line));
                }
                continue;
            }
            if self.offset == 0 {
                let line = std::mem::take(&mut self.bytes);
                return Ok(Some(line).filter(|line| !line.is_empty()));
            }
            if self.bytes.len() > MAX_EVENT_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "an event is too long"));
            }
            let count = self.offset.min(BLOCK_BYTES);
            self.offset -= count;
            let mut block = vec![0; count as usize];
            self.file.seek(SeekFrom::Start(self.offset))?;
            self.file.read_exact(&mut block)?;
            block.append(&mut self.bytes);
            self.bytes = block;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_all_events_in_both_directions() {
        let folder = tempfile::tempdir().unwrap();
        let file = EventFile::in_folder(folder.path());
        assert!(file.page(None, 5, false).unwrap().unwrap().events.is_empty());
        // longer than a block, and with a line that was truncated by a kill
        let all: Vec<Event> = (0..7).map(|n| Event::info("x".repeat(20_000), json!({"n": n}))).collect();
        file.append(&all[..3]);
        OpenOptions::new().append(true).open(&file.path).unwrap().write_all(b"{\"id\": \"half").unwrap();
        file.append(&all[3..]);
        for is_ascending in [false, true] {
            let mut found: Vec<Event> = Vec::new();
            loop {
                let after = found.last().map(|event| event.id.clone());
                let page = file.page(after.as_deref(), 3, is_ascending).unwrap().unwrap();
                found.extend(page.events);
                if !page.has_more {
                    break;
                }
            }
            if !is_ascending {
                found.reverse();
            }
            assert_eq!(found, all);
        }
        assert!(file.page(Some("ftevent-other"), 3, false).unwrap().is_none());
        let row = |step: u64, name: &str| Event::metrics(String::new(), json!({"step": step, name: 1.5}));
        file.append(&[row(3, "train_loss"), row(3, "valid_loss"), row(4, "train_loss"), Event::warning("w")]);
        assert_eq!(file.last_metrics(), (Some(4), Some(3)));
    }
}
