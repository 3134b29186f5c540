//! Maps files into memory and detects changes to them.

use crate::missing_pages::Watch;
use crate::operand::Matrix;
use half::{bf16, f16};
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// Bytes that are copied at a time.
const BYTES_COPIED: usize = 4 << 20;
const CACHE_LINE: usize = 64;

/// The type of the elements of a part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// 32-bit floats.
    F32,
    /// Half-precision floats.
    F16,
    /// bfloat16.
    BF16,
}

/// The bytes of a file, mapped read-only.
///
/// A file that is deleted or replaced by renaming stays mapped unchanged. If another process truncates or overwrites the file in
/// place, reads return zeros or the new bytes and [`MappedFile::check`] returns an error from then on, so callers must check
/// after reading and before using results. A write within the resolution of the file system's clock, some milliseconds after
/// the file was mapped, can go undetected.
#[derive(Debug)]
pub struct MappedFile {
    // dropped before the map, because its addresses may be reused afterwards
    watch: Watch,
    map: memmap2::Mmap,
    /// A copy of the bytes, in large pages if the system supports them.
    copy: OnceLock<Copied>,
    file: File,
    path: PathBuf,
    modified: Option<SystemTime>,
}

/// A copy of a file, and where it starts in its memory.
#[derive(Debug)]
struct Copied {
    memory: memmap2::Mmap,
    start: usize,
}

/// Maps `path` read-only; bytes are read on access.
///
/// # Errors
/// `path` cannot be opened, or is not a regular file.
pub fn map_file(path: impl AsRef<Path>) -> io::Result<MappedFile> {
    let path = path.as_ref();
    // check before opening, because opening a pipe would block
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = File::open(path)?;
    let modified = file.metadata()?.modified().ok();
    // SAFETY: the map is read-only and its bytes are used as numbers, for which every bit pattern is valid. `check` detects
    // changes of the file; `Watch` replaces missing pages.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(MappedFile { watch: Watch::new(&map), map, copy: OnceLock::new(), file, path: path.to_path_buf(), modified })
}

impl MappedFile {
    /// Its path when it was mapped.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies the file into memory, from which bytes are read afterwards. Pages of a file are small, which makes reading slower;
    /// the pages of the copy are large if the system supports it. The pages of the file are released as they are copied, so the
    /// two are never in memory completely. Nothing is copied if there is not enough memory, or (on Linux) while another map of
    /// the file, in this or another process, shares most of its pages.
    ///
    /// In the copy, byte `aligned` is at the start of a cache line: vector units and matrix units read aligned rows faster.
    ///
    /// # Errors
    /// The file was truncated or overwritten since it was mapped.
    pub fn make_resident(&self, aligned: usize) -> io::Result<()> {
        if self.copy.get().is_some() || self.map.is_empty() || self.is_shared() {
            return Ok(());
        }
        let start = aligned.next_multiple_of(CACHE_LINE) - aligned;
        let Ok(mut copy) = memmap2::MmapMut::map_anon(start + self.map.len()) else { return Ok(()) };
        // a failure only means that pages are small
        #[cfg(target_os = "linux")]
        drop(copy.advise(memmap2::Advice::HugePage));
        for from in (0..self.map.len()).step_by(BYTES_COPIED) {
            let range = from..self.map.len().min(from + BYTES_COPIED);
            copy[start + range.start..start + range.end].copy_from_slice(&self.map[range.clone()]);
            self.release(range);
        }
        self.check()?;
        if let Ok(memory) = copy.make_read_only() {
            // another thread may have copied the file already
            drop(self.copy.set(Copied { memory, start }));
        }
        Ok(())
    }

    /// Whether another map of the file, in this or another process, has read much of it: then the proportional share of the
    /// pages (`Pss`) is less than the number of resident pages (`Rss`).
    #[cfg(target_os = "linux")]
    fn is_shared(&self) -> bool {
        std::fs::read_to_string("/proc/self/smaps").is_ok_and(|maps| is_shared_at(self.map.as_ptr().addr(), &maps))
    }

    #[cfg(not(target_os = "linux"))]
    fn is_shared(&self) -> bool {
        false
    }

    /// The bytes, from the copy if there is one.
    fn bytes(&self) -> &[u8] {
        self.copy.get().map_or(&self.map, |copy| &copy.memory[copy.start..])
    }

    /// Checks that everything read so far was the original contents of the file.
    ///
    /// # Errors
    /// The file was truncated or overwritten since it was mapped, before it was copied.
    pub fn check(&self) -> io::Result<()> {
        let is_same = self.copy.get().is_some() || {
            let metadata = self.file.metadata()?;
            metadata.len() == self.map.len() as u64 && metadata.modified().ok() == self.modified
        };
        if is_same && !self.watch.has_lost_pages() {
            return Ok(());
        }
        let message = "the file was truncated or overwritten while it was in use: load it again, and replace files by \
                       renaming";
        Err(io::Error::new(io::ErrorKind::InvalidData, message))
    }

    /// The little-endian elements in a byte range, without a copy; none if the range is outside the file, is not aligned for the
    /// type or not a multiple of its size, or if the machine is big-endian.
    #[must_use]
    pub fn matrix(&self, range: Range<usize>, element: ElementType) -> Option<Matrix<'_>> {
        if cfg!(target_endian = "big") {
            return None;
        }
        let bytes = self.bytes().get(range)?;
        Some(match element {
            ElementType::F32 => Matrix::F32(elements(bytes)?),
            ElementType::F16 => Matrix::F16(elements(bytes)?),
            ElementType::BF16 => Matrix::BF16(elements(bytes)?),
        })
    }

    /// Releases the memory of a byte range; accessing it reads the file again.
    ///
    /// Otherwise a file that was read once counts towards the memory of the process until it is unmapped.
    pub fn release(&self, range: Range<usize>) {
        if range.start >= range.end || range.end > self.map.len() {
            return;
        }
        #[cfg(unix)]
        {
            // SAFETY: the map is shared, read-only and backed by the file, so dropped pages are read again with the
            // same bytes, and the range is inside the map.
            let advised = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.end - range.start,
                )
            };
            // a failure only costs memory
            drop(advised);
        }
    }
}

/// Whether at least half of the pages of the map at `address` have a second reader, by the text of `smaps`; false if the system
/// does not count readers.
#[cfg(any(target_os = "linux", test))]
fn is_shared_at(address: usize, smaps: &str) -> bool {
    let first = format!("{address:x}-");
    let is_count = |line: &&str| line.split_once(':').is_some_and(|(name, _)| !name.contains(['-', ' ']));
    let lines = smaps.lines().skip_while(|line| !line.starts_with(&first)).skip(1);
    let lines: Vec<&str> = lines.take_while(is_count).collect();
    let kibibytes = |name: &str| {
        let line = lines.iter().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    let (share, resident) = (kibibytes("Pss:"), kibibytes("Rss:"));
    share.zip(resident).is_some_and(|(share, resident)| share * 4 < resident * 3)
}

/// Types for which every bit pattern is a valid value.
trait Plain {}
impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}

fn elements<T: Plain>(bytes: &[u8]) -> Option<&[T]> {
    // SAFETY: every bit pattern is a value of these types.
    let (before, elements, after) = unsafe { bytes.align_to::<T>() };
    (before.is_empty() && after.is_empty()).then_some(elements)
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn aligned_elements_are_read_in_place() {
        let path = std::env::temp_dir().join(format!("metal-candle-elements-{}", std::process::id()));
        let values = [1.5_f32, -2.0, 3.25];
        std::fs::write(&path, values.map(f32::to_le_bytes).concat()).unwrap();
        let map = map_file(&path).unwrap();
        let Some(Matrix::F32(found)) = map.matrix(4..12, ElementType::F32) else { panic!("expected two elements") };
        assert_eq!(found.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), [-2.0_f32, 3.25].map(f32::to_bits));
        let Some(Matrix::BF16(found)) = map.matrix(2..4, ElementType::BF16) else { panic!("expected an element") };
        assert_eq!(found, [bf16::from_f32(1.5)]);
        assert_eq!(map.matrix(4..4, ElementType::F16).map(|matrix| matrix.len()), Some(0));
        for (range, element) in [
            (2..6, ElementType::F32),
            (0..6, ElementType::F32),
            (1..3, ElementType::F16),
            (8..16, ElementType::F32),
            (8..14, ElementType::BF16),
        ] {
            assert!(map.matrix(range.clone(), element).is_none(), "{range:?} {element:?}");
        }
        std::fs::remove_file(&path).unwrap();
    }

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("metal-candle-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_truncated_file_gives_an_error_and_no_signal() {
        let path = path("cut");
        std::fs::write(&path, vec![7; 100_000]).unwrap();
        let map = map_file(&path).unwrap();
        map.check().unwrap();
        let sum = |map: &MappedFile| map.iter().map(|byte| usize::from(*byte)).sum::<usize>();
        assert_eq!(sum(&map), 700_000);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(10).unwrap();
        assert_eq!(map.check().unwrap_err().kind(), io::ErrorKind::InvalidData);
        // without the watch, this would end the process
        assert!(sum(&map) < 700_000);
        assert!(map.watch.has_lost_pages());
        // with its original length, the file still has other bytes
        file.set_len(100_000).unwrap();
        assert!(map.check().is_err());
        let again = map_file(&path).unwrap();
        assert_eq!(again.len(), 100_000);
        assert!(!again.watch.has_lost_pages());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn an_overwritten_file_gives_an_error_and_a_replaced_file_does_not() {
        let (path, other) = (path("old"), path("new"));
        std::fs::write(&path, [1; 5000]).unwrap();
        let past = SystemTime::now() - std::time::Duration::from_mins(1);
        File::options().write(true).open(&path).unwrap().set_modified(past).unwrap();
        let map = map_file(&path).unwrap();
        std::fs::write(&other, [2; 5000]).unwrap();
        std::fs::rename(&other, &path).unwrap();
        map.check().unwrap();
        assert_eq!(map[..], [1; 5000]);
        let map = map_file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        map.check().unwrap();
        std::fs::write(&path, [1; 5000]).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(past).unwrap();
        let map = map_file(&path).unwrap();
        map.check().unwrap();
        io::Write::write_all(&mut File::options().write(true).open(&path).unwrap(), &[3; 100]).unwrap();
        assert!(map.check().unwrap_err().to_string().contains("overwritten"));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_copy_has_the_bytes_of_the_file_and_does_not_need_it() {
        let path = path("resident");
        let bytes: Vec<u8> = (0..2 * BYTES_COPIED + 77).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let (copied, cut) = (map_file(&path).unwrap(), map_file(&path).unwrap());
        copied.make_resident(1001).unwrap();
        assert!(copied.copy.get().is_some());
        assert!(copied[1001..].as_ptr().addr().is_multiple_of(CACHE_LINE));
        File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
        assert!(copied[..] == bytes[..]);
        copied.check().unwrap();
        assert_eq!(cut.make_resident(0).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(cut.copy.get().is_none() && cut.check().is_err());
        std::fs::write(&path, b"").unwrap();
        map_file(&path).unwrap().make_resident(0).unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_file_that_another_map_reads_is_not_copied() {
        let path = path("shared");
        std::fs::write(&path, vec![7; 400_000]).unwrap();
        let (map, other) = (map_file(&path).unwrap(), map_file(&path).unwrap());
        let sum = |map: &MappedFile| map.iter().map(|byte| usize::from(*byte)).sum::<usize>();
        assert_eq!(sum(&map) + sum(&other), 5_600_000);
        // some systems do not count the readers of a page
        let is_shared = map.is_shared();
        map.make_resident(0).unwrap();
        assert_eq!(map.copy.get().is_none(), is_shared);
        drop(other);
        map.make_resident(0).unwrap();
        assert!(map.copy.get().is_some());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_map_is_shared_if_half_of_its_pages_have_a_second_reader() {
        let smaps = |counts: &str| {
            format!(
                "7f00-7f40 r--s 00000000 fe:00 12 /a: b\nSize: 8 kB\nRss: 8 kB\nPss: 1 kB\n\
                 7f40-7f80 r--s 00000000 fe:00 12 /a: b\nSize: 400 kB\n{counts}VmFlags: rd mr\n\
                 7f80-7fc0 r--s 00000000 fe:00 12 /a: b\nSize: 8 kB\nRss: 8 kB\nPss: 1 kB\n"
            )
        };
        for (counts, is_shared) in [
            ("Rss:                 400 kB\nPss:                 200 kB\nPss_Dirty:             0 kB\n", true),
            ("Rss: 400 kB\nPss: 300 kB\n", false),
            ("Rss: 400 kB\nPss: 299 kB\n", true),
            ("Rss: 400 kB\nPss: 400 kB\n", false),
            ("Rss: 400 kB\n", false),
            ("Pss: 0 kB\n", false),
            ("", false),
        ] {
            assert_eq!(is_shared_at(0x7f40, &smaps(counts)), is_shared, "{counts}");
        }
        assert!(!is_shared_at(0x7f41, &smaps("Rss: 400 kB\nPss: 1 kB\n")));
    }

    #[test]
    fn released_bytes_are_read_again() {
        let path = std::env::temp_dir().join(format!("metal-candle-map-{}", std::process::id()));
        let bytes: Vec<u8> = (0..20_000_u32).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = map_file(&path).unwrap();
        assert_eq!(&map[..], &bytes[..]);
        map.release(100..15_000);
        map.release(0..1_000_000);
        assert_eq!(&map[..], &bytes[..]);
        drop(map);
        std::fs::write(&path, b"").unwrap();
        assert_eq!(map_file(&path).unwrap().len(), 0);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(map_file(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(map_file(std::env::temp_dir()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
