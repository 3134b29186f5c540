//! Multiplies tiles with Intel's Advanced Matrix Extensions (AMX): eight tile registers of 16 rows of 64 bytes.
//!
//! Intel Architecture Software Developer's Manual, volume 1, chapter 18, and volume 2, `TDPBF16PS`.

use std::arch::asm;
use std::sync::OnceLock;

/// Rows of a tile, and columns of a tile of sums.
pub(super) const SIDE: usize = 16;
/// Depth of one tile product, in bf16 elements.
pub(super) const DEPTH: usize = 32;
/// Bytes of a tile.
pub(super) const TILE: usize = 1024;
/// Row stride of a full tile, in bytes.
const LINE: usize = 64;

/// Whether the processor has AMX, the kernel permits this process to use it, and a small product is correct.
pub(super) fn is_there() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| is_permitted() && is_right())
}

fn is_permitted() -> bool {
    if has_unit() {
        return ask();
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
    // SAFETY: the first condition.
    has_xgetbv && has_tiles && unsafe { saved_state() } & TILE_STATE == TILE_STATE
}

/// Requests permission to use tiles from Linux (`ARCH_REQ_XCOMP_PERM`).
fn ask() -> bool {
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call only changes the permissions of this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

/// Multiplies tiles of small integers, whose sums are exact in any order, and checks the result.
fn is_right() -> bool {
    let element = |i: usize, factor: usize| (i * factor % 15) as f32 - 7.0;
    let bits = |value: f32| (value.to_bits() >> 16) as u16;
    let left: Vec<u16> = (0..2 * SIDE * DEPTH).map(|i| bits(element(i, 7))).collect();
    let right: Vec<u16> = (0..2 * SIDE * DEPTH).map(|i| bits(element(i, 11))).collect();
    let mut sums = Sums([1.0; 4 * SIDE * SIDE]);
    let (left, right) =
        (Left { start: left.as_ptr().cast(), stride: LINE }, Right { start: right.as_ptr().cast(), columns: 2 * SIDE });
    // SAFETY: each operand has the two tiles that one step of one term reads.
    unsafe { multiply::<2, 2, 1, 1>(left, right, (2 * SIDE, 1), true, &mut sums) };
    (0..2 * SIDE).all(|i| {
        (0..2 * SIDE).all(|j| {
            let left = |p: usize| element(i * DEPTH + p, 7);
            let right = |p: usize| element(j / SIDE * SIDE * DEPTH + p / 2 * DEPTH + j % SIDE * 2 + p % 2, 11);
            let expected: f32 = (0..DEPTH).map(|p| left(p) * right(p)).sum();
            (sums.0[i * 2 * SIDE + j] - 1.0 - expected).abs() < 0.5
        })
    })
}

/// A left operand: rows `stride` bytes apart if it has one term; otherwise, for each step of the depth, the tiles of each term.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) start: *const u8,
    pub(super) stride: usize,
}

/// A right operand: for each step of the depth, the tiles of each term, with pairs of rows interleaved.
#[derive(Clone, Copy)]
pub(super) struct Right {
    pub(super) start: *const u8,
    pub(super) columns: usize,
}

/// The accumulators of two by two tiles, row-major.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(super) struct Sums(pub(super) [f32; 4 * SIDE * SIDE]);

/// The operand of `LDTILECFG`.
#[repr(align(64))]
#[allow(dead_code)] // read by the unit
struct Shapes([u8; 64]);

impl Shapes {
    /// Tiles 0 to 3 hold sums, 4 and 5 the left operand, 6 and 7 the right operand. A second tile is full or unused.
    fn new(rows: usize, columns: usize) -> Self {
        let mut shapes = [0; 64];
        // palette 1
        shapes[0] = 1;
        let mut set = |tile: usize, rows: usize, bytes: usize| {
            shapes[16 + 2 * tile] = bytes as u8;
            shapes[48 + tile] = rows as u8;
        };
        let (height, width) = (rows.min(SIDE), 4 * columns.min(SIDE));
        for (tile, (height, width)) in
            [(height, width), (height, LINE), (SIDE, width), (SIDE, LINE)].into_iter().enumerate()
        {
            set(tile, height, width);
        }
        set(4, height, LINE);
        set(5, SIDE, LINE);
        set(6, SIDE, width);
        set(7, SIDE, LINE);
        Self(shapes)
    }
}

/// Loads term `t` of the right operand. The terms follow each other in memory.
macro_rules! right {
    ($t:literal) => {
        concat!(
            ".if ",
            $t,
            " < {b_terms}\n",
            ".if ",
            $t,
            " > 0\n",
            "add {right}, {right_term}\n",
            ".endif\n",
            "tileloadd tmm6, [{right} + {right_stride}*1]\n",
            ".if {b} == 2\n",
            "tileloadd tmm7, [{right} + {right_stride}*1 + 1024]\n",
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
            " < {most})\n",
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

/// Multiplies `rows` rows with a right operand. Adds to the existing `sums` if `is_added`, otherwise overwrites them.
///
/// More than 16 rows or columns use a second tile, which the operands pad to its full size.
///
/// # Safety
/// AMX is available. Each operand holds `steps` steps of `A` or `B` tiles per term.
pub(super) unsafe fn multiply<const A: usize, const B: usize, const A_TERMS: usize, const B_TERMS: usize>(
    left: Left,
    right: Right,
    (rows, steps): (usize, usize),
    is_added: bool,
    sums: &mut Sums,
) {
    let shapes = Shapes::new(rows, right.columns);
    let right_stride = if B == 2 { LINE } else { 4 * right.columns };
    // SAFETY: the caller's promise; the block releases all tiles.
    unsafe {
        asm!(
            "ldtilecfg [{shapes}]",
            "test {is_added:e}, {is_added:e}",
            "jz 3f",
            "tileloadd tmm0, [{sums} + {line}*1]",
            ".if {b} == 2",
            "tileloadd tmm1, [{sums} + {line}*1 + 64]",
            ".endif",
            ".if {a} == 2",
            "tileloadd tmm2, [{sums} + {line}*1 + 2048]",
            ".if {b} == 2",
            "tileloadd tmm3, [{sums} + {line}*1 + 2112]",
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
            pair!(0, 0),
            pair!(1, 0),
            pair!(2, 0),
            right!(1),
            pair!(0, 1),
            pair!(1, 1),
            right!(2),
            pair!(0, 2),
            "add {right}, {right_term}",
            "add {left}, {left_step}",
            "add {second}, {left_step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            ".if {b} == 2",
            "tilestored [{sums} + {line}*1 + 64], tmm1",
            ".endif",
            ".if {a} == 2",
            "tilestored [{sums} + {line}*1 + 2048], tmm2",
            ".if {b} == 2",
            "tilestored [{sums} + {line}*1 + 2112], tmm3",
            ".endif",
            ".endif",
            "tilerelease",
            shapes = in(reg) &raw const shapes,
            is_added = in(reg) u32::from(is_added),
            sums = in(reg) sums.0.as_mut_ptr(),
            line = in(reg) 2 * LINE,
            left = inout(reg) left.start => _,
            second = inout(reg) left.start.wrapping_add(if A_TERMS > 1 { TILE } else { SIDE * left.stride }) => _,
            left_stride = in(reg) if A_TERMS > 1 { LINE } else { left.stride },
            right = inout(reg) right.start => _,
            right_stride = in(reg) right_stride,
            right_term = in(reg) SIDE * B * right_stride,
            steps = inout(reg) steps => _,
            left_term = const TILE * A,
            a = const A,
            b = const B,
            a_terms = const A_TERMS,
            b_terms = const B_TERMS,
            most = const if A_TERMS > B_TERMS { A_TERMS } else { B_TERMS },
            left_step = const if A_TERMS > 1 { A_TERMS * TILE * A } else { LINE },
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
