//! Names the instruction set and the matrix unit that the kernels use.

use crate::isa::{Isa, isa, limit};
use crate::tiles;

/// The instruction set that the kernels use on this machine, and the matrix unit if there is one.
///
/// # Errors
/// [`crate::ISA_VARIABLE`] is not a level, or is a level that this machine does not have.
pub fn levels() -> Result<Vec<&'static str>, String> {
    let mut found = vec![isa().name()];
    if tiles::is_there() {
        found.push("amx-bf16");
    }
    let has = match limit()? {
        None | Some(0) => true,
        Some(1) => isa() >= Isa::Avx2,
        Some(2) => isa() >= Isa::Avx512,
        Some(_) => tiles::is_there(),
    };
    if has {
        return Ok(found);
    }
    Err(format!("this machine does not have that level; the highest it has is {}", found.join(" with ")))
}
