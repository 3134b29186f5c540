//! Multiplies tiles with Intel's Advanced Matrix Extensions (AMX): eight tile registers of 16 rows of 64 bytes.
//!
//! Intel Architecture Software Developer's Manual, volume 1, chapter 18, and volume 2, `TDPBF16PS`.

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile, and columns of a tile of sums.
pub(super) const SIDE: usize = 16;
/// Depth of one tile product, in bf16 elements.
pub(super) const DEPTH: usize = 32;
/// Bytes of a tile.
pub(super) const TILE: usize = 1024;
/// Row stride of a full tile, in bytes: a cache line.
pub(super) const LINE: usize = 64;

/// Whether the processor has AMX, the system permits this process to use it, and a small product is correct.
pub(super) fn is_available() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| is_permitted() && is_correct())
}

fn is_permitted() -> bool {
    if has_unit() {
        return request_permission();
    }
    #[cfg(feature = "emulate-tiles")]
    super::emulator::install();
    cfg!(feature = "emulate-tiles")
}

/// Whether `CPUID` reports AMX-TILE and AMX-BF16, and `XCR0` shows that the system saves the tile state.
fn has_unit() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    const TILE_AND_BF16: u32 = 1 << 24 | 1 << 22;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn saved_state() -> u64 {
        // SAFETY: the caller checked that the system enabled `xgetbv`.
        unsafe { _xgetbv(0) }
    }

    let has_xgetbv = __cpuid(1).ecx & 1 << 27 != 0;
    let has_tiles = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILE_AND_BF16 == TILE_AND_BF16;
    // SAFETY: `xgetbv` is only called if the first condition holds.
    has_xgetbv && has_tiles && unsafe { saved_state() } & TILE_STATE == TILE_STATE
}

/// Requests permission to use tiles from Linux (`ARCH_REQ_XCOMP_PERM`).
fn request_permission() -> bool {
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call only changes the permissions of this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

/// Multiplies tiles of small integers, whose sums are exact in any order, and checks the result.
fn is_correct() -> bool {
    let element = |i: usize, factor: usize| (i * factor % 15) as f32 - 7.0;
    let bits = |value: f32| (value.to_bits() >> 16) as u16;
    let left: Vec<u16> = (0..2 * SIDE * DEPTH).map(|i| bits(element(i, 7))).collect();
    let right: Vec<u16> = (0..2 * SIDE * DEPTH).map(|i| bits(element(i, 11))).collect();
    let mut sums = Sums([1.0; 4 * SIDE * SIDE]);
    let left = Left { start: left.as_ptr().cast(), stride: LINE, step: LINE };
    let operands = Operands { left, right: right.as_ptr().cast(), steps: 1, ahead: None };
    // SAFETY: each operand has the two tiles that one step of one term reads.
    unsafe { Unit::new().multiply::<2, 2, 1, 1>(operands, true, &mut sums) };
    (0..2 * SIDE).all(|i| {
        (0..2 * SIDE).all(|j| {
            let left = |p: usize| element(i * DEPTH + p, 7);
            let right = |p: usize| element(j / SIDE * SIDE * DEPTH + p / 2 * DEPTH + j % SIDE * 2 + p % 2, 11);
            let expected: f32 = (0..DEPTH).map(|p| left(p) * right(p)).sum();
            (sums.0[i * 2 * SIDE + j] - 1.0 - expected).abs() < 0.5
        })
    })
}

/// A left operand: rows `stride` bytes apart, and `step` bytes from a step of the depth to the next. With several terms, each step
/// has the tiles of each term in turn.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) start: *const u8,
    pub(super) stride: usize,
    pub(super) step: usize,
}

/// The operands of a product of tiles.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) left: Left,
    /// For each step of the depth, the tiles of each term in turn.
    pub(super) right: *const u8,
    /// Steps of the depth.
    pub(super) steps: usize,
    /// Where to prefetch 2 KiB for each step.
    pub(super) ahead: Option<*const u8>,
}

/// The accumulators of two by two tiles, row-major.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(super) struct Sums(pub(super) [f32; 4 * SIDE * SIDE]);

/// The operand of `LDTILECFG`: all tiles are full.
#[repr(align(64))]
#[allow(dead_code)] // read by the unit
struct Shapes([u8; 64]);

static SHAPES: Shapes = {
    let mut shapes = [0; 64];
    // palette 1
    shapes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        shapes[16 + 2 * tile] = LINE as u8;
        shapes[48 + tile] = SIDE as u8;
        tile += 1;
    }
    Shapes(shapes)
};

/// Loads term `t` of the right operand.
macro_rules! right {
    ($t:literal) => {
        concat!(
            ".if ",
            $t,
            " < {b_terms}\n",
            "tileloadd tmm6, [{right} + {line}*1 + ",
            $t,
            "*{right_term}]\n",
            ".if {b} == 2\n",
            "tileloadd tmm7, [{right} + {line}*1 + ",
            $t,
            "*{right_term} + 1024]\n",
            ".endif\n",
            ".endif\n",
        )
    };
}

/// Loads term `s` of the left operand, unless a single term is already loaded, and adds its products with term `t` of the right
/// operand. Pairs with `s + t` beyond the last term are skipped: they are below the rounding error.
macro_rules! pair {
    ($s:literal, $t:literal) => {
        concat!(
            ".if (",
            $s,
            " < {a_terms}) && (",
            $t,
            " < {b_terms}) && (",
            $s,
            " + ",
            $t,
            " < {max_terms})\n",
            ".if ({a_terms} > 1) || (",
            $t,
            " == 0)\n",
            "tileloadd tmm4, [{left} + {left_stride}*1 + ",
            $s,
            "*{left_term}]\n",
            ".if {a} == 2\n",
            "tileloadd tmm5, [{second} + {left_stride}*1 + ",
            $s,
            "*{left_term}]\n",
            ".endif\n",
            ".endif\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            ".if {b} == 2\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            ".endif\n",
            ".if {a} == 2\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            ".if {b} == 2\n",
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            ".endif\n",
            ".endif\n",
            ".endif\n",
        )
    };
}

/// Prefetches four cache lines.
macro_rules! prefetch {
    ($line:literal) => {
        concat!(
            ".if {is_ahead}\n",
            "prefetcht1 [{ahead} + 64*(",
            $line,
            ")]\n",
            "prefetcht1 [{ahead} + 64*(",
            $line,
            " + 1)]\n",
            "prefetcht1 [{ahead} + 64*(",
            $line,
            " + 2)]\n",
            "prefetcht1 [{ahead} + 64*(",
            $line,
            " + 3)]\n",
            ".endif\n",
        )
    };
}

/// The tile registers of this thread. Dropping it releases them.
pub(super) struct Unit {
    thread: PhantomData<*const ()>,
}

impl Unit {
    /// # Safety
    /// AMX is available, and this thread has no other unit.
    pub(super) unsafe fn new() -> Self {
        // SAFETY: the caller's promise; the shapes are valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, readonly)) };
        Self { thread: PhantomData }
    }

    /// Multiplies `A` tiles of rows with `B` tiles of columns. Adds to the existing `sums` if `is_added`, otherwise overwrites them.
    ///
    /// # Safety
    /// The operands have these tiles.
    #[allow(clippy::unused_self)] // the tiles are configured while a unit exists
    pub(super) unsafe fn multiply<const A: usize, const B: usize, const A_TERMS: usize, const B_TERMS: usize>(
        &self,
        operands: Operands,
        is_added: bool,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's promise; a unit exists, so the tiles have their shapes.
        unsafe {
            if operands.ahead.is_some() {
                multiply::<A, B, A_TERMS, B_TERMS, 1>(operands, is_added, sums);
            } else {
                multiply::<A, B, A_TERMS, B_TERMS, 0>(operands, is_added, sums);
            }
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: a unit exists, so AMX is available.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}

/// [`Unit::multiply`] with or without prefetching.
unsafe fn multiply<const A: usize, const B: usize, const A_TERMS: usize, const B_TERMS: usize, const AHEAD: u32>(
    Operands { left, right, steps, ahead }: Operands,
    is_added: bool,
    sums: &mut Sums,
) {
    // SAFETY: the caller's promise; no other code uses the tiles.
    unsafe {
        asm!(
            "test {is_added:e}, {is_added:e}",
            "jz 3f",
            "tileloadd tmm0, [{sums} + {line}*2]",
            ".if {b} == 2",
            "tileloadd tmm1, [{sums} + {line}*2 + 64]",
            ".endif",
            ".if {a} == 2",
            "tileloadd tmm2, [{sums} + {line}*2 + 2048]",
            ".if {b} == 2",
            "tileloadd tmm3, [{sums} + {line}*2 + 2112]",
            ".endif",
            ".endif",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            right!(0),
            prefetch!(0),
            prefetch!(4),
            prefetch!(8),
            prefetch!(12),
            pair!(0, 0),
            prefetch!(16),
            prefetch!(20),
            prefetch!(24),
            prefetch!(28),
            pair!(1, 0),
            pair!(2, 0),
            right!(1),
            pair!(0, 1),
            pair!(1, 1),
            right!(2),
            pair!(0, 2),
            "add {right}, {right_step}",
            "add {left}, {left_step}",
            "add {second}, {left_step}",
            ".if {is_ahead}",
            "add {ahead}, 2048",
            ".endif",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}*2], tmm0",
            ".if {b} == 2",
            "tilestored [{sums} + {line}*2 + 64], tmm1",
            ".endif",
            ".if {a} == 2",
            "tilestored [{sums} + {line}*2 + 2048], tmm2",
            ".if {b} == 2",
            "tilestored [{sums} + {line}*2 + 2112], tmm3",
            ".endif",
            ".endif",
            is_added = in(reg) u32::from(is_added),
            sums = in(reg) sums.0.as_mut_ptr(),
            line = in(reg) LINE,
            left = inout(reg) left.start => _,
            second = inout(reg) left.start.wrapping_add(SIDE * left.stride) => _,
            left_stride = in(reg) left.stride,
            left_step = in(reg) left.step,
            right = inout(reg) right => _,
            ahead = inout(reg) ahead.unwrap_or(right) => _,
            steps = inout(reg) steps => _,
            is_ahead = const AHEAD,
            left_term = const TILE * A,
            right_term = const TILE * B,
            a = const A,
            b = const B,
            a_terms = const A_TERMS,
            b_terms = const B_TERMS,
            max_terms = const if A_TERMS > B_TERMS { A_TERMS } else { B_TERMS },
            right_step = const B_TERMS * TILE * B,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
