//! The built-in model and its sample data, which are embedded in the program.

use anyhow::Result;
use metal_candle::models::write_atomically;
use metal_candle_nano::FILES;
use std::path::{Path, PathBuf};

/// The folder of the built-in model; it is written if it is missing or damaged.
pub(crate) fn folder() -> Result<PathBuf> {
    let sum = FILES.iter().fold(0, |sum, (_, bytes)| crc32c::crc32c_append(sum, bytes));
    let name = format!("nano-{sum:08x}");
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .filter(|folder| !folder.is_empty())
        .map(PathBuf::from)
        .or_else(|| Some(std::env::home_dir()?.join(".cache")));
    if let Some(folder) = cache.map(|cache| cache.join("metal-candle").join(&name))
        && unpack(&folder).is_ok()
    {
        return Ok(folder);
    }
    // the home folder cannot be written to
    let folder = std::env::temp_dir().join("metal-candle").join(name);
    unpack(&folder)?;
    Ok(folder)
}

/// The folder of its sample data.
pub(crate) fn data() -> Result<PathBuf> {
    Ok(folder()?.join("data"))
}

fn unpack(folder: &Path) -> metal_candle::Result<()> {
    for (name, bytes) in FILES {
        let path = folder.join(name);
        if metal_candle::files::read_bounded(&path, bytes.len() as u64).is_ok_and(|found| found == bytes) {
            continue;
        }
        let parent = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent)
            .map_err(|source| metal_candle::Error::Write { path: parent.to_path_buf(), source })?;
        write_atomically(&path, |file| file.write_all(bytes))?;
    }
    Ok(())
}
