//! Untrusted input: bounded reads, text made safe for messages, and panics of dependencies turned into errors.

mod guard;
mod read;
mod sanitize;

pub use guard::{guard, is_guarded};
pub use read::{MAX_SIDE_FILE_BYTES, read_bounded, read_if_exists, read_json, read_text};
pub use sanitize::{printable, printable_json, sanitize};
