//! Files mapped into memory.

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
/// A file that is replaced by renaming or deleted stays mapped as it was. If another process shortens or overwrites the file in
/// place, reads return zeros or the new bytes and [`MappedFile::check`] fails from then on, so callers check after they have
/// read and before they use what they computed. A write within the resolution of the file system's clock, some milliseconds
/// after the file was mapped, can go unseen.
#[derive(Debug)]
pub struct MappedFile {
    // dropped before the map, whose addresses may then belong to others
    watch: Watch,
    map: memmap2::Mmap,
    /// A copy of the bytes, in large pages where the system has them.
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

/// Maps `path` read-only; nothing is read until its bytes are looked at.
///
/// # Errors
/// `path` cannot be opened, or is not a regular file.
pub fn map_file(path: impl AsRef<Path>) -> io::Result<MappedFile> {
    let path = path.as_ref();
    // asked before opening, since opening a pipe would wait
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = File::open(path)?;
    let modified = file.metadata()?.modified().ok();
    // SAFETY: the map is read-only and its bytes are handed out as numbers, for which every bit pattern is valid. Changes of
    // the file meanwhile are found by `check`; a page that is missing is replaced by `Watch`.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(MappedFile { watch: Watch::new(&map), map, copy: OnceLock::new(), file, path: path.to_path_buf(), modified })
}

impl MappedFile {
    /// Its path when it was mapped.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies the file into memory of its own, which bytes are read from afterwards. Pages of a file are small, and looking them up
    /// makes reading slower; those of the copy are large where the system allows it. The pages of the file are given back as they
    /// are copied, so that both are never held as a whole. Without memory for a copy the file stays in use, and also while
    /// another process has it mapped (on Linux), since their pages are the same memory.
    ///
    /// In the copy, byte `aligned` begins a cache line: vector units and matrix units read rows faster that do.
    ///
    /// # Errors
    /// The file was shortened or overwritten since it was mapped.
    pub fn make_resident(&self, aligned: usize) -> io::Result<()> {
        if self.copy.get().is_some() || self.map.is_empty() || self.is_shared() {
            return Ok(());
        }
        let start = aligned.next_multiple_of(CACHE_LINE) - aligned;
        let Ok(mut copy) = memmap2::MmapMut::map_anon(start + self.map.len()) else { return Ok(()) };
        // large pages are a gain where there are any, and nothing is lost otherwise
        #[cfg(target_os = "linux")]
        drop(copy.advise(memmap2::Advice::HugePage));
        for from in (0..self.map.len()).step_by(BYTES_COPIED) {
            let range = from..self.map.len().min(from + BYTES_COPIED);
            copy[start + range.start..start + range.end].copy_from_slice(&self.map[range.clone()]);
            self.release(range);
        }
        self.check()?;
        if let Ok(memory) = copy.make_read_only() {
            // another thread may have been first
            drop(self.copy.set(Copied { memory, start }));
        }
        Ok(())
    }

    /// Whether other processes have read a good part of the file through maps of their own: the share of its pages that counts as
    /// this process's (`Pss`) is then less than what it has read (`Rss`).
    #[cfg(target_os = "linux")]
    fn is_shared(&self) -> bool {
        let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return false };
        let first = format!("{:x}-", self.map.as_ptr().addr());
        let lines = maps.lines().skip_while(|line| !line.starts_with(&first));
        let kibibytes = |name: &str| {
            let line = lines.clone().take(30).find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0)
        };
        // half and more of the pages have a second reader
        kibibytes("Pss:") * 4 < kibibytes("Rss:") * 3
    }

    #[cfg(not(target_os = "linux"))]
    fn is_shared(&self) -> bool {
        false
    }

    /// The bytes: those of the copy, if there is one.
    fn bytes(&self) -> &[u8] {
        self.copy.get().map_or(&self.map, |copy| &copy.memory[copy.start..])
    }

    /// Whether all that was read so far are the bytes that the file had when it was mapped.
    ///
    /// # Errors
    /// The file was shortened or overwritten since, before there was a copy of it.
    pub fn check(&self) -> io::Result<()> {
        let is_same = self.copy.get().is_some() || {
            let metadata = self.file.metadata()?;
            metadata.len() == self.map.len() as u64 && metadata.modified().ok() == self.modified
        };
        if is_same && !self.watch.has_lost_pages() {
            return Ok(());
        }
        let message = "the file was shortened or overwritten while it was in use: load it again, and replace files by \
                       renaming";
        Err(io::Error::new(io::ErrorKind::InvalidData, message))
    }

    /// The little-endian elements in a byte range, without a copy; none where the range ends outside the file, is not aligned
    /// for the type or no multiple of its size, or where the machine is big-endian.
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

    /// Gives the memory of a byte range back to the system; it is read again when it is looked at again.
    ///
    /// Without this, a file that was read once counts towards the memory of the process until it is unmapped.
    pub fn release(&self, range: Range<usize>) {
        if range.start >= range.end || range.end > self.map.len() {
            return;
        }
        #[cfg(unix)]
        {
            // SAFETY: the map is shared, read-only and backed by the file, so dropped pages come back with the
            // same bytes, and the range lies inside it.
            let advised = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.end - range.start,
                )
            };
            // only memory is at stake, never the result
            drop(advised);
        }
    }
}

/// Types of which every bit pattern is a value.
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
    fn elements_are_read_where_they_are_aligned() {
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
    fn a_file_that_is_cut_gives_an_error_and_no_signal() {
        let path = path("cut");
        std::fs::write(&path, vec![7; 100_000]).unwrap();
        let map = map_file(&path).unwrap();
        map.check().unwrap();
        let sum = |map: &MappedFile| map.iter().map(|byte| usize::from(*byte)).sum::<usize>();
        assert_eq!(sum(&map), 700_000);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(10).unwrap();
        assert_eq!(map.check().unwrap_err().kind(), io::ErrorKind::InvalidData);
        // without the watch this ends the process
        assert!(sum(&map) < 700_000);
        assert!(map.watch.has_lost_pages());
        // as long as it was before, the file still has other bytes
        file.set_len(100_000).unwrap();
        assert!(map.check().is_err());
        let again = map_file(&path).unwrap();
        assert_eq!(again.len(), 100_000);
        assert!(!again.watch.has_lost_pages());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_overwritten_gives_an_error_and_one_that_is_replaced_does_not() {
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
        map.make_resident(0).unwrap();
        assert!(map.copy.get().is_none());
        drop(other);
        map.make_resident(0).unwrap();
        assert!(map.copy.get().is_some());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn bytes_are_those_of_the_file_also_after_release() {
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
