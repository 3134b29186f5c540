//! Reports the instruction sets and the matrix unit that the kernels use.

use crate::isa::{Int8, Isa, LEVELS, int8, isa, limit};
use crate::tiles;

/// The instruction sets that the kernels use on this machine, for floats and for 8-bit integers, and the matrix unit if there is
/// one.
///
/// # Errors
/// [`crate::ISA_VARIABLE`] is not a level, or this machine does not support the level.
pub fn levels() -> Result<Vec<&'static str>, String> {
    let mut found = vec![isa().name()];
    found.extend(int8().and_then(Int8::name));
    if tiles::is_there() {
        found.push("amx-bf16");
    }
    let has = match limit()?.map(|level| LEVELS[level]) {
        Some("avx2") => isa() >= Isa::Avx2,
        Some("avx512") => isa() >= Isa::Avx512,
        Some("amx") => tiles::is_there(),
        Some(level @ ("avx-vnni" | "avx512-vnni" | "dotprod")) => found.contains(&level),
        _ => true,
    };
    if has {
        return Ok(found);
    }
    Err(format!("this machine does not support that level; its highest level is {}", found.join(" with ")))
}
