//! Reports the instruction sets and the tile unit that the kernels use.

use crate::isa::{Int8, Isa, LEVELS, int8, isa, limit};
use crate::tiles;

/// Whether the kernels use instructions that multiply bf16: AVX512-BF16 or AMX.
#[must_use]
pub fn multiplies_bf16() -> bool {
    tiles::unit_name().is_some()
}

/// The instruction sets that the kernels use on this machine: for floats, for 8-bit integers and for bf16.
///
/// # Errors
/// [`crate::ISA_VARIABLE`] is not a level, or this machine does not support the level.
pub fn levels() -> Result<Vec<&'static str>, String> {
    let mut found = vec![isa().name()];
    found.extend(int8().and_then(Int8::name));
    found.extend(tiles::unit_name());
    let has = match limit()?.map(|level| LEVELS[level]) {
        Some("avx2") => isa() >= Isa::Avx2,
        Some("avx512") => isa() >= Isa::Avx512,
        Some("amx") => found.contains(&"amx-bf16"),
        Some(level @ ("avx-vnni" | "avx512-vnni" | "avx512-bf16" | "dotprod")) => found.contains(&level),
        _ => true,
    };
    if has {
        return Ok(found);
    }
    Err(format!("this machine does not support that level; its highest level is {}", found.join(" with ")))
}
