//! Ids of tool calls.

use std::hash::{BuildHasher as _, RandomState};

const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
const LENGTH: usize = 24;

/// `call_` and 24 random letters and digits.
pub(super) fn call_id() -> String {
    let mut id = String::from("call_");
    while id.len() < 5 + LENGTH {
        let mut bytes = [0u8; 2 * LENGTH];
        if getrandom::fill(&mut bytes).is_err() {
            // ids must differ, but nothing depends on their secrecy
            let chunks = bytes.chunks_mut(8);
            chunks.for_each(|chunk| chunk.copy_from_slice(&RandomState::new().hash_one(id.len()).to_le_bytes()));
        }
        // 62 of 64 values are used, so that all are equally likely
        let usable = bytes.iter().filter_map(|byte| ALPHABET.get(usize::from(byte & 63)));
        id.extend(usable.take(5 + LENGTH - id.len()).map(|&byte| char::from(byte)));
    }
    id
}
