//! Writes files: regular files are replaced atomically, links and devices are written through.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The number of links in a row that Linux follows.
const MAX_LINKS: usize = 40;

/// The number of temporary files of this process so far, for unique names.
static NUM_TEMPORARY: AtomicUsize = AtomicUsize::new(0);

/// The destination of a write.
#[derive(Debug, PartialEq, Eq)]
enum Destination {
    /// A regular or missing file: a complete temporary file is renamed over it.
    File(PathBuf),
    /// A pipe, device or socket, which is opened and written to.
    Stream,
}

/// Who may read a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Everyone whom the umask permits.
    Shared,
    /// Only the user of this process, on Unix.
    Private,
}

/// Writes a temporary file next to `path` and renames it over `path` once it is complete and synced.
///
/// Only regular files are replaced. For a symbolic link, its target is replaced. Pipes and devices are written to
/// directly. A replaced file keeps its permissions.
///
/// # Errors
/// The file cannot be written, or `path` is a folder. Then a file at `path` is unchanged, and the temporary file is
/// removed.
pub fn write_atomically(path: impl AsRef<Path>, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    write_with_access(path.as_ref(), Access::Shared, write)
}

fn write_with_access(path: &Path, access: Access, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    if path.file_name().is_none() {
        return Err(Error::argument("path", format!("expected a file, found `{}`", path.display())));
    }
    let written = match destination(path) {
        Ok(Destination::File(target)) => replace(&target, access, write),
        Ok(Destination::Stream) => write_through(path, write),
        Err(error) => Err(error),
    };
    written.map_err(|e| Error::write(path, e))
}

/// As [`write_atomically`], with a function that returns the library's errors, and with this access to a new file.
///
/// # Errors
/// As [`write_atomically`], or errors of `write`.
pub(crate) fn write_contents(
    path: &Path,
    access: Access,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let mut failure = None;
    let written = write_with_access(path, access, |file| {
        write(file).map_err(|error| {
            failure = Some(error);
            io::Error::other("the contents could not be created")
        })
    });
    failure.map_or(written, Err)
}

/// Opens a file to append lines or records, and creates it if it is missing.
///
/// # Errors
/// The file cannot be opened for reading and writing, or is not a regular file.
pub fn open_to_append(path: impl AsRef<Path>) -> Result<File> {
    let path = path.as_ref();
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        let message = "expected a regular file, found a folder, pipe or device";
        return Err(Error::write(path, io::Error::new(ErrorKind::InvalidInput, message)));
    }
    let opened = OpenOptions::new().read(true).append(true).create(true).open(path);
    opened.map_err(|e| Error::write(path, e))
}

/// Creates a folder and its parents.
///
/// # Errors
/// The folder cannot be created.
pub fn create_folder(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    fs::create_dir_all(path).map_err(|e| Error::write(path, e))
}

/// Creates a folder and its parents for files that only the user of this process may read.
///
/// # Errors
/// The folder cannot be created, or on Unix, the folder exists and other users may access it.
pub(crate) fn create_private_folder(path: &Path) -> Result<()> {
    let failed = |error| Error::write(path, error);
    #[cfg(unix)]
    {
        use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
        // parents that are missing are created with the same access
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let mode = fs::metadata(path).map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            let message = format!(
                "expected a folder that only its owner may access (mode 700), found mode {mode:o}; use another folder, or run \
                 `chmod 700` on it"
            );
            return Err(failed(io::Error::new(ErrorKind::PermissionDenied, message)));
        }
    }
    #[cfg(not(unix))]
    fs::create_dir_all(path).map_err(failed)?;
    Ok(())
}

/// Removes temporary files of killed processes from `folder`. The caller must hold a lock that keeps other processes from
/// writing there.
///
/// # Errors
/// The folder cannot be read, or a file cannot be removed.
pub fn remove_stale_temporaries(folder: impl AsRef<Path>) -> Result<()> {
    let folder = folder.as_ref();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(()),
        Err(error) => return Err(Error::read(folder, error)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::read(folder, e))?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && is_temporary(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path()).map_err(|e| Error::write(entry.path(), e))?;
        }
    }
    Ok(())
}

fn destination(path: &Path) -> io::Result<Destination> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Err(io::Error::new(ErrorKind::IsADirectory, "expected a file, found a folder")),
        // `/dev/stdout` and `/proc/self/fd/1` lead to files of other programs
        Ok(found) if !found.is_file() || is_descriptor(path) => Ok(Destination::Stream),
        Ok(_) => fs::canonicalize(path).map(Destination::File),
        Err(error) if error.kind() == ErrorKind::NotFound => follow(path).map(Destination::File),
        Err(error) => Err(error),
    }
}

fn is_descriptor(path: &Path) -> bool {
    ["/dev/fd/", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/proc/"].iter().any(|folder| path.starts_with(folder))
}

/// The missing target of a dangling symbolic link.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        if !fs::symlink_metadata(&target).is_ok_and(|found| found.is_symlink()) {
            return Ok(target);
        }
        let link = fs::read_link(&target)?;
        target = target.parent().map_or_else(|| link.clone(), |folder| folder.join(&link));
    }
    Err(io::Error::other("too many symbolic links"))
}

fn replace(target: &Path, access: Access, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_beside(target);
    let replaced = write_and_rename(&temporary, target, access, write);
    if replaced.is_err() {
        // the first error is the one to report
        drop(fs::remove_file(&temporary));
    }
    replaced
}

fn write_and_rename(
    temporary: &Path,
    target: &Path,
    access: Access,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if access == Access::Private {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    let mut file = BufWriter::new(options.open(temporary)?);
    if access == Access::Shared
        && let Ok(found) = fs::metadata(target)
    {
        file.get_ref().set_permissions(found.permissions())?;
    }
    write(&mut file)?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    drop(file);
    fs::rename(temporary, target)?;
    sync_folder(target.parent().unwrap_or(Path::new("")))
}

fn write_through(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut file = BufWriter::new(OpenOptions::new().write(true).truncate(true).open(path)?);
    write(&mut file)?;
    file.flush()
}

/// Syncs a folder: a renamed file survives a power cut only after its folder is on disk.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    // only Unix can open folders as files
    if cfg!(unix) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

fn temporary_beside(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    // file systems limit names to 255 bytes
    let name: String = name.chars().take(50).collect();
    let number = NUM_TEMPORARY.fetch_add(1, Ordering::Relaxed);
    target.with_file_name(format!(".{name}.{}-{number}.tmp", std::process::id()))
}

/// Whether a name was created by [`temporary_beside`] of this or an earlier version.
pub(crate) fn is_temporary(name: &str) -> bool {
    if ["run.json.part", "loss.svg.part"].contains(&name) {
        return true;
    }
    let numbers = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp")?.rsplit_once('.'));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers
        .and_then(|(_, numbers)| numbers.split_once('-'))
        .is_some_and(|(process, number)| is_number(process) && is_number(number))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{is_temporary, open_to_append, remove_stale_temporaries, temporary_beside, write_atomically};
    use std::fs;
    use std::io;
    use std::path::Path;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_leaves_only_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let full = |file: &mut dyn io::Write| {
            file.write_all(b"new")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        };
        write_atomically(&path, full).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["file"]);
        write_atomically(folder.path(), |file| file.write_all(b"new")).unwrap_err();
    }

    #[cfg(unix)]
    #[test]
    fn links_are_written_through() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("other")).unwrap();
        fs::write(at("other/target"), "old").unwrap();
        fs::set_permissions(at("other/target"), fs::Permissions::from_mode(0o600)).unwrap();
        symlink("other/target", at("link")).unwrap();
        symlink("link", at("chain")).unwrap();
        symlink("other/missing", at("dangling")).unwrap();
        for name in ["link", "chain", "dangling"] {
            write_atomically(at(name), |file| file.write_all(name.as_bytes())).unwrap();
            assert!(at(name).is_symlink());
            assert_eq!(fs::read_to_string(at(name)).unwrap(), name);
        }
        assert_eq!(fs::metadata(at("other/target")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(&at("other")), ["missing", "target"]);
        symlink("loop", at("loop")).unwrap();
        write_atomically(at("loop"), |file| file.write_all(b"x")).unwrap_err();
    }

    #[cfg(unix)]
    #[test]
    fn a_device_is_written_through() {
        use std::os::unix::fs::FileTypeExt;
        write_atomically("/dev/null", |file| file.write_all(b"text")).unwrap();
        assert!(open_to_append("/dev/null").unwrap_err().to_string().contains("expected a regular file"));
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    }

    #[test]
    fn only_temporary_files_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let temporary = temporary_beside(&folder.path().join("run.json"));
        assert!(is_temporary(&temporary.file_name().unwrap().to_string_lossy()));
        fs::write(&temporary, "").unwrap();
        let kept = [".a.tmp", ".b.1-x.tmp", "c.1-2.tmp", "run.json"];
        for name in kept {
            fs::write(folder.path().join(name), "").unwrap();
        }
        remove_stale_temporaries(folder.path()).unwrap();
        remove_stale_temporaries(folder.path().join("missing")).unwrap();
        assert_eq!(names(folder.path()), kept);
    }
}
