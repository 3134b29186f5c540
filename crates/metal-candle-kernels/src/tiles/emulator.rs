//! Emulates the instructions of [`super::amx`], for tests on processors without AMX. The processor raises SIGILL for them; the
//! handler decodes the instruction, executes it and continues after it. About a thousand times slower than AMX.

use crate::isa::{Arithmetic, dispatch};
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Once;

const TILES: usize = 8;
const ROWS: usize = 16;
const LINE: usize = 64;

/// The tile registers of a thread, and their shapes: rows, and bytes per row.
struct Unit {
    shapes: [(usize, usize); TILES],
    tiles: [[[u8; LINE]; ROWS]; TILES],
}

impl Unit {
    const NONE: Self = Self { shapes: [(0, 0); TILES], tiles: [[[0; LINE]; ROWS]; TILES] };
}

thread_local! {
    static UNIT: RefCell<Unit> = const { RefCell::new(Unit::NONE) };
}

/// The previous SIGILL action.
static mut PREVIOUS: MaybeUninit<libc::sigaction> = MaybeUninit::uninit();

/// Installs the handler.
pub(super) fn install() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: the structures are plain data that the calls fill in. The handler accesses the memory that the emulated
        // instruction accesses, and thread-local state.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_illegal_instruction;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &raw const action, (&raw mut PREVIOUS).cast());
        }
    });
}

extern "C" fn on_illegal_instruction(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes a valid context that no other thread uses, and the decoder reads no byte beyond the instruction.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let registers = &mut context.uc_mcontext.gregs;
        let start = registers[libc::REG_RIP as usize] as *const u8;
        match UNIT.with_borrow_mut(|unit| unit.step(start, registers)) {
            Some(length) => registers[libc::REG_RIP as usize] += length as i64,
            // another illegal instruction: it is executed again with the previous action
            None => drop(libc::sigaction(libc::SIGILL, (&raw const PREVIOUS).cast(), ptr::null_mut())),
        }
    }
}

/// The indices of the sixteen registers in a context, in encoding order.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

impl Unit {
    /// Executes the instruction at `code` and returns its length; `None` if it is not an AMX instruction.
    unsafe fn step(&mut self, code: *const u8, registers: &[i64; 23]) -> Option<usize> {
        // SAFETY: each byte that is read belongs to the instruction.
        let byte = |at: usize| unsafe { *code.add(at) };
        // three-byte VEX prefix, map 0F38, W = 0, L = 0
        if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
            return None;
        }
        let is_set = |inverted: u8, bit: u32| usize::from(inverted >> bit & 1 ^ 1);
        let (high_reg, high_index, high_base) = (is_set(byte(1), 7), is_set(byte(1), 6), is_set(byte(1), 5));
        let (prefix, third) = (byte(2) & 3, usize::from(!byte(2) >> 3 & 15));
        let (opcode, modrm) = (byte(3), byte(4));
        let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7), usize::from(modrm & 7));
        if high_reg != 0 {
            return None;
        }
        if mode == 3 {
            match (opcode, prefix) {
                (0x49, 0) if modrm == 0xc0 => *self = Self::NONE,
                (0x49, 3) if rm == 0 => self.tiles[reg] = [[0; LINE]; ROWS],
                (0x5c, 2) => self.multiply(reg, rm, third),
                _ => return None,
            }
            return Some(5);
        }
        let register = |number: usize| registers[REGISTERS[number] as usize] as usize;
        let (mut address, mut length, mut stride) = (0_usize, 5, 0);
        if rm == 4 {
            let sib = byte(5);
            length = 6;
            let (index, base) = (usize::from(sib >> 3 & 7) + 8 * high_index, usize::from(sib & 7) + 8 * high_base);
            if base & 7 == 5 && mode == 0 {
                return None;
            }
            address = register(base);
            // register 4 means no index
            stride = if index == 4 { 0 } else { register(index) << (sib >> 6) };
        } else if mode == 0 && rm == 5 {
            return None;
        } else {
            address = address.wrapping_add(register(rm + 8 * high_base));
        }
        let displacement = match mode {
            1 => isize::from(byte(length) as i8),
            2 => i32::from_le_bytes([0, 1, 2, 3].map(|at| byte(length + at))) as isize,
            _ => 0,
        };
        length += [0, 1, 4][usize::from(mode)];
        let address = address.wrapping_add_signed(displacement);
        match (opcode, prefix) {
            // SAFETY: the instruction reads 64 bytes.
            (0x49, 0) => self.shape(unsafe { &*(address as *const [u8; 64]) })?,
            (0x4b, 1 | 3) if rm == 4 => {
                let (rows, bytes) = self.shapes[reg];
                self.tiles[reg] = [[0; LINE]; ROWS];
                for row in 0..rows {
                    let from = address.wrapping_add(row.wrapping_mul(stride)) as *const u8;
                    // SAFETY: the instruction reads this row.
                    unsafe { ptr::copy_nonoverlapping(from, self.tiles[reg][row].as_mut_ptr(), bytes) };
                }
            }
            (0x4b, 2) if rm == 4 => {
                let (rows, bytes) = self.shapes[reg];
                for row in 0..rows {
                    let to = address.wrapping_add(row.wrapping_mul(stride)) as *mut u8;
                    // SAFETY: the instruction writes this row.
                    unsafe { ptr::copy_nonoverlapping(self.tiles[reg][row].as_ptr(), to, bytes) };
                }
            }
            _ => return None,
        }
        Some(length)
    }

    /// `LDTILECFG`; `None` for a configuration that raises a fault.
    fn shape(&mut self, bytes: &[u8; 64]) -> Option<()> {
        *self = Self::NONE;
        if bytes[0] != 1 || bytes[1] != 0 {
            return None;
        }
        for tile in 0..TILES {
            let shape = (usize::from(bytes[48 + tile]), usize::from(bytes[16 + 2 * tile]));
            if shape.0 > ROWS || shape.1 > LINE || (shape.0 == 0) != (shape.1 == 0) {
                return None;
            }
            self.shapes[tile] = shape;
        }
        Some(())
    }

    /// `TDPBF16PS`.
    fn multiply(&mut self, sums: usize, left: usize, right: usize) {
        let ((rows, sum_bytes), (left_rows, depth), (pairs, right_bytes)) =
            (self.shapes[sums], self.shapes[left], self.shapes[right]);
        assert!(
            rows == left_rows && sum_bytes == right_bytes && depth / 4 == pairs,
            "shapes that do not belong together"
        );
        let (left, right) = (self.tiles[left], self.tiles[right]);
        dot_products(&mut self.tiles[sums][..rows], &left, &right[..pairs]);
    }
}

dispatch! {
    /// Sums the products of even and of odd depth separately, as the manual specifies. Subnormal values count as zero.
    fn dot_products(sums: &mut [[u8; LINE]], left: &[[u8; LINE]; ROWS], right: &[[u8; LINE]]) = dot_products_body
}

#[inline(always)]
fn dot_products_body<A: Arithmetic>(sums: &mut [[u8; LINE]], left: &[[u8; LINE]; ROWS], right: &[[u8; LINE]]) {
    let normal = |value: f32| if value.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(value) } else { value };
    let words = |line: &[u8; LINE]| -> [u32; LINE / 4] {
        std::array::from_fn(|j| u32::from_le_bytes([0, 1, 2, 3].map(|b| line[4 * j + b])))
    };
    let halves = |word: u32| [normal(f32::from_bits(word << 16)), normal(f32::from_bits(word & 0xffff_0000))];
    for (sums, left) in sums.iter_mut().zip(left) {
        let mut totals = [[0.0_f32; LINE / 4]; 2];
        for (left, right) in words(left).into_iter().zip(right) {
            let (left, right) = (halves(left), words(right));
            for (half, total) in totals.iter_mut().enumerate() {
                for j in 0..LINE / 4 {
                    total[j] = normal(A::mul_add(left[half], halves(right[j])[half], total[j]));
                }
            }
        }
        let before = words(sums).map(f32::from_bits);
        for (j, sum) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *sum = normal(normal(before[j]) + normal(totals[0][j] + totals[1][j])).to_le_bytes();
        }
    }
}
