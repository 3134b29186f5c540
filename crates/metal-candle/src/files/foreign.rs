//! Recognizes common files that are not safetensors files, so that the error can name the format.

/// The number of leading bytes that are examined.
const LOOKED_AT: usize = 256;

/// Describes a file that is not a safetensors file, and what to do; `None` if its format is unknown.
pub(crate) fn recognize(file: &[u8]) -> Option<String> {
    let start = &file[..file.len().min(LOOKED_AT)];
    let text = String::from_utf8_lossy(start).trim_start().to_ascii_lowercase();
    let what = if start.starts_with(b"GGUF") {
        "a GGUF file: use the safetensors files of the model"
    } else if start.starts_with(b"PK\x03\x04") {
        "a zip archive, as PyTorch writes it (`.bin`, `.pt`): use the safetensors files of the model"
    } else if matches!(start, [0x80, 2..=5, ..]) {
        "a Python pickle, as PyTorch writes it (`.bin`, `.pt`): use the safetensors files of the model"
    } else if text.starts_with("version https://git-lfs") {
        "a git-lfs pointer instead of the file: run `git lfs pull` in the clone"
    } else if ["<!doctype", "<html", "<head", "<?xml"].iter().any(|tag| text.starts_with(tag)) {
        "a web page: the download got an error or login page instead of the file"
    } else if start.starts_with(b"\x93NUMPY") {
        "a NumPy array"
    } else if start.starts_with(b"\x89HDF") {
        "an HDF5 file"
    } else if start.starts_with(b"\x1f\x8b") {
        "a gzip archive: unpack it first"
    } else if text.starts_with('{') || text.starts_with('[') {
        "JSON: pass the weights, an index of shards or the folder"
    } else if start.iter().all(|&byte| byte == 0) {
        "only zeros at the start: an unfinished download or a damaged disk"
    } else {
        return None;
    };
    Some(format!("expected a safetensors file, found {what}"))
}
