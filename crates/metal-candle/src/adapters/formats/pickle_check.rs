//! Refuses pickles that would exhaust the stack or memory of candle's reader.
//!
//! candle builds nested objects, drops them recursively and copies an object for each use of the memo, so a few bytes
//! can create objects of any depth and size. This module walks the opcodes and tracks only depth and size.

use crate::error::{Error, Result};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Maximum size of a pickle, in bytes; an adapter has about 200 per tensor.
const MAX_PICKLE_BYTES: u64 = 4 << 20;
/// Maximum depth of nested objects.
const MAX_DEPTH: usize = 64;
/// Maximum number of objects, including copies for the memo.
const MAX_OBJECTS: usize = 4_000_000;

/// Checks each pickle in the zip file `path`.
pub(super) fn check_pickles(path: &Path) -> Result<()> {
    let wrong = |what: String| Error::format(path, format!("expected the zip file of `torch.save`: {what}"));
    let file = File::open(path).map_err(|source| Error::read(path, source))?;
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|error| wrong(error.to_string()))?;
    for index in 0..archive.len() {
        let entry = archive.by_index(index).map_err(|error| wrong(error.to_string()))?;
        // candle reads entries with these names
        let name = entry.name().map_err(|error| wrong(error.to_string()))?.into_owned();
        if !name.ends_with("data.pkl") {
            continue;
        }
        let mut bytes = Vec::new();
        entry.take(MAX_PICKLE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| wrong(error.to_string()))?;
        if bytes.len() as u64 > MAX_PICKLE_BYTES {
            return Err(wrong(format!("`{name}` has more than {MAX_PICKLE_BYTES} bytes")));
        }
        Walk::default().run(&bytes).map_err(|what| wrong(format!("`{name}` {what}")))?;
    }
    Ok(())
}

/// The depth of an object and its number of nested objects.
#[derive(Debug, Clone, Copy)]
struct Extent {
    depth: usize,
    objects: usize,
}

const LEAF: Extent = Extent { depth: 1, objects: 1 };

/// The stack of a pickle machine; `None` is a mark.
#[derive(Debug, Default)]
struct Walk {
    stack: Vec<Option<Extent>>,
    memo: HashMap<u32, Extent>,
    copied: usize,
}

impl Walk {
    fn run(&mut self, bytes: &[u8]) -> std::result::Result<(), &'static str> {
        const TRUNCATED: &str = "is truncated";
        let mut rest = bytes;
        let mut take = |count: usize| -> std::result::Result<&[u8], &'static str> {
            let (taken, left) = rest.split_at_checked(count).ok_or(TRUNCATED)?;
            rest = left;
            Ok(taken)
        };
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0_u32, |word, byte| (word << 8) | u32::from(*byte));
        loop {
            match take(1)?[0] {
                b'.' => return Ok(()),
                0x80 => drop(take(1)?),
                b'c' => {
                    for _ in 0..2 {
                        while take(1)?[0] != b'\n' {}
                    }
                    self.push(LEAF)?;
                }
                b'K' => self.push_after(take(1)?)?,
                b'M' => self.push_after(take(2)?)?,
                b'J' => self.push_after(take(4)?)?,
                b'G' => self.push_after(take(8)?)?,
                0x8a => {
                    let count = usize::from(take(1)?[0]);
                    self.push_after(take(count)?)?;
                }
                b'X' => {
                    let count = word(take(4)?) as usize;
                    self.push_after(take(count)?)?;
                }
                b'N' | b')' | b']' | b'}' | b'd' | 0x88 | 0x89 => self.push(LEAF)?,
                b'(' => self.stack.push(None),
                b't' => self.join_marked(LEAF)?,
                b'e' | b'u' => {
                    let inner = self.marked()?;
                    self.add_to_last(inner)?;
                }
                b'Q' | 0x85 => self.join(1)?,
                b'R' | b'b' | 0x81 | 0x86 => self.join(2)?,
                0x87 => self.join(3)?,
                b'a' => {
                    let inner = self.pop()?;
                    self.add_to_last(inner)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.add_to_last(both(value, key))?;
                }
                b'q' => self.remember(word(take(1)?))?,
                b'r' => self.remember(word(take(4)?))?,
                b'h' => self.recall(word(take(1)?))?,
                b'j' => self.recall(word(take(4)?))?,
                _ => return Err("contains something other than tensors by name"),
            }
        }
    }

    fn push(&mut self, extent: Extent) -> std::result::Result<(), &'static str> {
        if extent.depth > MAX_DEPTH {
            return Err("is nested too deeply");
        }
        if extent.objects > MAX_OBJECTS {
            return Err("contains too many objects");
        }
        self.stack.push(Some(extent));
        Ok(())
    }

    fn push_after(&mut self, _argument: &[u8]) -> std::result::Result<(), &'static str> {
        self.push(LEAF)
    }

    fn pop(&mut self) -> std::result::Result<Extent, &'static str> {
        self.stack.pop().flatten().ok_or("pops an object from an empty stack")
    }

    /// Pops the objects above the last mark, and the mark.
    fn marked(&mut self) -> std::result::Result<Extent, &'static str> {
        let mut inner = Extent { depth: 0, objects: 0 };
        loop {
            match self.stack.pop() {
                None => return Err("pops a mark that was not pushed"),
                Some(None) => return Ok(inner),
                Some(Some(extent)) => inner = both(inner, extent),
            }
        }
    }

    fn join_marked(&mut self, around: Extent) -> std::result::Result<(), &'static str> {
        let inner = self.marked()?;
        self.push(within(around, inner))
    }

    /// Replaces the last `count` objects by one object of them.
    fn join(&mut self, count: usize) -> std::result::Result<(), &'static str> {
        let mut inner = self.pop()?;
        for _ in 1..count {
            inner = both(inner, self.pop()?);
        }
        self.push(within(LEAF, inner))
    }

    fn add_to_last(&mut self, inner: Extent) -> std::result::Result<(), &'static str> {
        let last = self.pop()?;
        self.push(within(last, inner))
    }

    fn remember(&mut self, id: u32) -> std::result::Result<(), &'static str> {
        let extent = self.pop()?;
        self.count_copy(extent)?;
        self.memo.insert(id, extent);
        self.push(extent)
    }

    fn recall(&mut self, id: u32) -> std::result::Result<(), &'static str> {
        let extent = *self.memo.get(&id).ok_or("reads an object that is not in the memo")?;
        self.count_copy(extent)?;
        self.push(extent)
    }

    fn count_copy(&mut self, extent: Extent) -> std::result::Result<(), &'static str> {
        self.copied = self.copied.saturating_add(extent.objects);
        if self.copied > MAX_OBJECTS { Err("copies too many objects") } else { Ok(()) }
    }
}

/// The extent of two adjacent objects.
fn both(left: Extent, right: Extent) -> Extent {
    Extent { depth: left.depth.max(right.depth), objects: left.objects.saturating_add(right.objects) }
}

/// The extent of an object that contains another.
fn within(outer: Extent, inner: Extent) -> Extent {
    Extent { depth: outer.depth.max(inner.depth + 1), objects: outer.objects.saturating_add(inner.objects) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Walk;

    #[test]
    fn pickles_that_exhaust_stack_or_memory_are_refused() {
        let run = |bytes: &[u8]| Walk::default().run(bytes);
        // {"a": (1, 2.0, [None])} with memo
        run(b"\x80\x02}q\x00X\x01\x00\x00\x00a(K\x01G\0\0\0\0\0\0\0\0]Nats.").unwrap();
        let deep = [b"\x80\x02)".as_slice(), &[0x85; 1000], b"."].concat();
        assert_eq!(run(&deep), Err("is nested too deeply"));
        let deep_dictionaries = [b"}".as_slice(), &b"N}".repeat(100), &b"s".repeat(100), b"."].concat();
        assert_eq!(run(&deep_dictionaries), Err("is nested too deeply"));
        // each step doubles the object
        let doubled = [b")q\x00".as_slice(), &b"h\x00h\x00\x86q\x00".repeat(40), b"."].concat();
        assert_eq!(run(&doubled), Err("copies too many objects"));
        for wrong in [&b"X\xff\xff\xff\xffabc"[..], b"t.", b"h\x01.", b"a.", b"cos\nsystem", b"\xffx", b""] {
            assert!(run(wrong).is_err(), "{wrong:?}");
        }
    }
}
