//! Writes small GGUF files for tests.

use super::gguf_write::{NewTensor, write_gguf};
use super::{GgufType, GgufValue};
use crate::error::Error;

/// The bytes of a GGUF file with this metadata and these tensors: name, shape (the last dimension is contiguous), `ggml_type`
/// and data.
#[allow(clippy::unwrap_used)]
pub(crate) fn write(metadata: &[(&str, GgufValue)], tensors: &[(&str, &[usize], u32, Vec<u8>)]) -> Vec<u8> {
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| ((*key).to_string(), value.clone().into())).collect();
    let new = |(name, shape, kind, _): &(&str, &[usize], u32, Vec<u8>)| NewTensor {
        name: (*name).into(),
        shape: shape.to_vec(),
        kind: GgufType::from_id(*kind).unwrap(),
    };
    let new: Vec<NewTensor> = tensors.iter().map(new).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    write_gguf(file.path(), &metadata, &new, |index, to| {
        to.write_all(&tensors[index].3).map_err(|error| Error::write(file.path(), error))
    })
    .unwrap();
    std::fs::read(file.path()).unwrap()
}
