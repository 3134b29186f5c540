//! Untrusted input: bounded reads, text made safe for messages, and panics of dependencies turned into errors.

mod guard;
#[cfg(any(test, feature = "cuda"))]
mod kernels;
mod read;
mod sanitize;
mod write;

pub use guard::{guard, is_guarded};
#[cfg(feature = "cuda")]
pub(crate) use kernels::KernelFolder;
pub use read::{
    BoundedLines, MAX_METRICS_LINE_BYTES, MAX_SIDE_FILE_BYTES, check_integers, read_bounded, read_if_exists, read_json,
    read_stream, read_text, read_text_stream,
};
pub use sanitize::{printable, printable_json, sanitize};
pub(crate) use write::sync_folder;
pub use write::{create_folder, open_to_append, remove_stale_temporaries, write_atomically};
