//! The matrix unit of x86-64 (Intel Advanced Matrix Extensions): eight tiles of 16 rows of 64 bytes, and products of them.
//!
//! Intel Architecture Software Developer's Manual, volume 1, chapter 18, and volume 2, `TDPBF16PS`.

use std::arch::asm;
use std::sync::OnceLock;

/// Rows of a tile, and columns of a tile of sums.
pub(super) const SIDE: usize = 16;
/// Depth of one product of tiles, in elements of bf16.
pub(super) const DEPTH: usize = 32;
/// Bytes of a tile.
pub(super) const TILE: usize = 1024;
/// Bytes from row to row of a whole tile.
const LINE: usize = 64;

/// Whether the processor has the unit, the system lets this process use it, and it multiplies as documented.
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

/// What `CPUID` says of AMX-TILE and AMX-BF16, and `XCR0` of the state that the system saves.
fn has_unit() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    const TILE_AND_BF16: u32 = 1 << 24 | 1 << 22;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn saved_state() -> u64 {
        // SAFETY: the system has enabled the instruction, as its caller found.
        unsafe { _xgetbv(0) }
    }

    let has_xgetbv = __cpuid(1).ecx & 1 << 27 != 0;
    let has_tiles = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILE_AND_BF16 == TILE_AND_BF16;
    // SAFETY: the first condition.
    has_xgetbv && has_tiles && unsafe { saved_state() } & TILE_STATE == TILE_STATE
}

/// Asks Linux for the tiles (`ARCH_REQ_XCOMP_PERM`), which it gives a process that asks.
fn ask() -> bool {
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call changes only what the process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

/// Multiplies tiles of numbers with few digits, whose sums are exact in any order.
fn is_right() -> bool {
    let element = |i: usize, factor: usize| (i * factor % 15) as f32 - 7.0;
    let bits = |value: f32| (value.to_bits() >> 16) as u16;
    let left: Vec<u16> = (0..2 * SIDE * DEPTH).map(|i| bits(element(i, 7))).collect();
    let right: Vec<u16> = (0..2 * SIDE * DEPTH).map(|i| bits(element(i, 11))).collect();
    let mut sums = Sums([1.0; 4 * SIDE * SIDE]);
    let (left, right) =
        (Left { start: left.as_ptr().cast(), stride: LINE }, Right { start: right.as_ptr().cast(), columns: 2 * SIDE });
    // SAFETY: two tiles of each operand, as a step of one term takes.
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

/// Rows of a left operand: one term from row to row, `stride` bytes apart, or the tiles of two terms one behind the other.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) start: *const u8,
    pub(super) stride: usize,
}

/// Columns of a right operand: for each step of the depth the tiles of each term, in which pairs of rows are interleaved.
#[derive(Clone, Copy)]
pub(super) struct Right {
    pub(super) start: *const u8,
    pub(super) columns: usize,
}

/// Sums of two by two tiles, row by row.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(super) struct Sums(pub(super) [f32; 4 * SIDE * SIDE]);

/// What `LDTILECFG` reads.
#[repr(align(64))]
#[allow(dead_code)] // read by the unit
struct Shapes([u8; 64]);

impl Shapes {
    /// Tiles 0 to 3 are sums, 4 and 5 of the left, 6 and 7 of the right operand. A second tile is whole or not used.
    fn new(rows: usize, columns: usize) -> Self {
        let mut shapes = [0; 64];
        // the palette
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

/// Loads term `t` of the right operand; behind it lies the next one.
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

/// Loads term `s` of the left operand, unless it is the only one and there already, and adds the products with term `t` of the
/// right one, if they count.
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

/// Adds the products of `rows` rows and a right operand to sums: to the ones that are there, or else to zeros. Products of terms
/// that are together as small as a term that there is not are left out.
///
/// Rows and columns beyond a whole tile fill a second one; what they hold where there are none is up to the operands.
///
/// # Safety
/// The unit is there. Of `steps` steps the operands hold the tiles that `A` and `B`, the numbers of tiles, and their numbers of
/// terms say.
pub(super) unsafe fn multiply<const A: usize, const B: usize, const A_TERMS: usize, const B_TERMS: usize>(
    left: Left,
    right: Right,
    (rows, steps): (usize, usize),
    is_added: bool,
    sums: &mut Sums,
) {
    let shapes = Shapes::new(rows, right.columns);
    let right_stride = if B == 2 { LINE } else { 4 * right.columns };
    // SAFETY: the caller's promise; all tiles are given back.
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
