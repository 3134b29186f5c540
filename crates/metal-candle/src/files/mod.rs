//! Reads files that may be damaged or hostile (text, JSON, safetensors, GGUF), writes files atomically, and downloads
//! models from the Hub.

mod convert;
mod digest;
mod foreign;
mod gguf;
mod gguf_header;
#[cfg(test)]
pub(crate) mod gguf_testing;
mod gguf_tokens;
mod gguf_type;
mod gguf_write;
mod guard;
#[cfg(feature = "hub")]
mod hub;
mod json_object;
#[cfg(any(test, feature = "cuda"))]
mod kernels;
mod keyed_file;
mod read;
mod safetensors;
mod sanitize;
mod saver;
mod shards;
mod write;

pub use crate::error::format_bytes;
pub(crate) use digest::Digest;
pub use gguf::GgufFile;
pub use gguf_header::{GgufTensor, GgufValue};
pub(crate) use gguf_tokens::{END_MARKS, end_of_generation_ids};
pub use gguf_type::GgufType;
pub(crate) use gguf_write::{GgufField, NewTensor, split, split_fields, write_gguf};
pub use guard::{guard, is_guarded};
#[cfg(feature = "hub")]
pub use hub::{DownloadProgress, Hub, HubName};
pub(crate) use json_object::{JsonObject, describe};
#[cfg(feature = "cuda")]
pub(crate) use kernels::KernelFolder;
pub(crate) use keyed_file::KeyedFile;
pub use read::{
    BoundedLines, MAX_METRICS_LINE_BYTES, MAX_SIDE_FILE_BYTES, check_integers, read_bounded, read_if_exists, read_json,
    read_stream, read_text, read_text_stream,
};
pub(crate) use safetensors::element_count;
pub use safetensors::{SafetensorsFile, TensorEntry};
pub use sanitize::{printable, printable_json, sanitize};
pub(crate) use saver::write_tensor;
pub use saver::{check_finite, write_safetensors};
pub(crate) use shards::Shards;
pub use shards::shard_names;
pub(crate) use write::{Access, create_private_folder, is_temporary, sync_folder};
pub use write::{create_folder, open_to_append, remove_stale_temporaries, write_atomically};
