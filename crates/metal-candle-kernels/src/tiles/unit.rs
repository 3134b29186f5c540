//! The instructions that multiply tiles, behind one interface.

use super::amx::{self, Operands, Sums};
use super::dots;

/// Instructions that multiply tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TileUnit {
    /// Advanced Matrix Extensions.
    Amx,
    /// The dot products of AVX512-BF16.
    Dots,
}

impl TileUnit {
    /// The fastest unit of this machine that [`crate::ISA_VARIABLE`] permits.
    pub(super) fn fastest() -> Option<Self> {
        use crate::isa::{self, Isa};

        if isa::isa() != Isa::Avx512 {
            None
        } else if isa::is_permitted("amx") && amx::is_available() {
            Some(Self::Amx)
        } else {
            (isa::is_permitted("avx512-bf16") && is_x86_feature_detected!("avx512bf16")).then_some(Self::Dots)
        }
    }

    /// The name of the instructions.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx-bf16",
            Self::Dots => "avx512-bf16",
        }
    }

    /// Whether it is faster than the vector units in every precision. Dot products of two terms take as long as f32 products.
    pub(crate) fn is_always_used(self) -> bool {
        self == Self::Amx
    }
}

/// A unit that this thread uses.
pub(super) enum Unit {
    Amx(amx::Unit),
    Dots,
}

impl Unit {
    /// # Safety
    /// The unit is available, and this thread uses no other.
    pub(super) unsafe fn new(kind: TileUnit) -> Self {
        match kind {
            // SAFETY: the caller's promise.
            TileUnit::Amx => Self::Amx(unsafe { amx::Unit::new() }),
            TileUnit::Dots => Self::Dots,
        }
    }

    /// [`amx::Unit::multiply`] for these numbers of tiles.
    ///
    /// # Safety
    /// As of [`amx::Unit::multiply`].
    pub(super) unsafe fn multiply<const A_TERMS: usize, const B_TERMS: usize>(
        &self,
        (rows, columns): (usize, usize),
        operands: Operands,
        is_added: bool,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match (rows, columns) {
                (1, 1) => self.multiply_tiles::<1, 1, A_TERMS, B_TERMS>(operands, is_added, sums),
                (1, _) => self.multiply_tiles::<1, 2, A_TERMS, B_TERMS>(operands, is_added, sums),
                (_, 1) => self.multiply_tiles::<2, 1, A_TERMS, B_TERMS>(operands, is_added, sums),
                _ => self.multiply_tiles::<2, 2, A_TERMS, B_TERMS>(operands, is_added, sums),
            }
        }
    }

    unsafe fn multiply_tiles<const A: usize, const B: usize, const A_TERMS: usize, const B_TERMS: usize>(
        &self,
        operands: Operands,
        is_added: bool,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Amx(unit) => unit.multiply::<A, B, A_TERMS, B_TERMS>(operands, is_added, sums),
                Self::Dots => dots::multiply::<A, B, A_TERMS, B_TERMS>(operands, is_added, sums),
            }
        }
    }
}
