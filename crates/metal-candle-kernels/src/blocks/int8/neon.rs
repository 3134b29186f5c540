//! The kernels of 64-bit Arm with dot products.

use super::kernels::kernels;
use super::lanes::{Lanes, Rows};
use std::arch::aarch64::{
    float32x4_t, int32x4_t, uint16x4_t, uint32x4_t, vaddq_f32, vandq_u32, vcvtq_f32_s32, vdupq_n_f32, vdupq_n_s32,
    vdupq_n_u32, veorq_u32, vfmaq_f32, vld1q_f32, vld1q_u8, vld1q_u32, vld2q_u32, vmovn_u32, vmulq_f32, vorrq_u32,
    vqtbl1q_u8, vreinterpretq_f32_u32, vreinterpretq_s32_u32, vreinterpretq_u8_u32, vreinterpretq_u32_u8,
    vreinterpretq_u32_u64, vreinterpretq_u64_u32, vshlq_u32, vst1q_f32, vst1q_u32, vtrn1q_u32, vtrn2q_u32, vtstq_u8,
    vzip1q_u64, vzip2q_u64,
};
use std::arch::asm;

/// 4 rows.
#[derive(Clone, Copy)]
pub(super) struct Dotprod(uint32x4_t);

// SAFETY of the calls: the processor has the instructions, and the caller's promise.
impl Lanes for Dotprod {
    type Floats = float32x4_t;
    type Dots = int32x4_t;
    const ROWS: usize = 4;
    const IS_SIGNED: bool = true;
    const HEIGHT: usize = 8;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        Self(unsafe { vld1q_u32(from.cast()) })
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u64) -> [Self; 2] {
        let pairs = unsafe { vld2q_u32(from.cast()) };
        [Self(pairs.0), Self(pairs.1)]
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        unsafe { vst1q_u32(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn load_rows(rows: Rows) -> [Self; 4] {
        unsafe {
            let row = [
                vld1q_u32(rows.row(0).cast()),
                vld1q_u32(rows.row(1).cast()),
                vld1q_u32(rows.row(2).cast()),
                vld1q_u32(rows.row(3).cast()),
            ];
            let even = [vtrn1q_u32(row[0], row[1]), vtrn1q_u32(row[2], row[3])];
            let odd = [vtrn2q_u32(row[0], row[1]), vtrn2q_u32(row[2], row[3])];
            let (even, odd) = (
                [vreinterpretq_u64_u32(even[0]), vreinterpretq_u64_u32(even[1])],
                [vreinterpretq_u64_u32(odd[0]), vreinterpretq_u64_u32(odd[1])],
            );
            [
                Self(vreinterpretq_u32_u64(vzip1q_u64(even[0], even[1]))),
                Self(vreinterpretq_u32_u64(vzip1q_u64(odd[0], odd[1]))),
                Self(vreinterpretq_u32_u64(vzip2q_u64(even[0], even[1]))),
                Self(vreinterpretq_u32_u64(vzip2q_u64(odd[0], odd[1]))),
            ]
        }
    }

    #[inline(always)]
    fn splat(word: u32) -> Self {
        Self(unsafe { vdupq_n_u32(word) })
    }

    #[inline(always)]
    fn repeat(bytes: &[u8; 16]) -> Self {
        Self(unsafe { vreinterpretq_u32_u8(vld1q_u8(bytes.as_ptr())) })
    }

    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(unsafe { vandq_u32(self.0, other.0) })
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(unsafe { vorrq_u32(self.0, other.0) })
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(unsafe { veorq_u32(self.0, other.0) })
    }

    #[inline(always)]
    fn left<const BITS: i32>(self) -> Self {
        Self(unsafe { vshlq_u32(self.0, vdupq_n_s32(BITS)) })
    }

    #[inline(always)]
    fn right<const BITS: i32>(self) -> Self {
        Self(unsafe { vshlq_u32(self.0, vdupq_n_s32(-BITS)) })
    }

    #[inline(always)]
    fn look_up(table: Self, indices: Self) -> Self {
        unsafe {
            Self(vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(table.0), vreinterpretq_u8_u32(indices.0))))
        }
    }

    #[inline(always)]
    fn has_bit(self, bits: Self) -> Self {
        unsafe { Self(vreinterpretq_u32_u8(vtstq_u8(vreinterpretq_u8_u32(self.0), vreinterpretq_u8_u32(bits.0)))) }
    }

    #[inline(always)]
    fn floats(self) -> float32x4_t {
        unsafe { vcvtq_f32_s32(vreinterpretq_s32_u32(self.0)) }
    }

    #[inline(always)]
    fn halves(self) -> float32x4_t {
        unsafe {
            let halves: uint16x4_t = vmovn_u32(self.0);
            let floats: float32x4_t;
            // the intrinsic is not stable; also below
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) floats, in(vreg) halves, options(pure, nomem, nostack));
            floats
        }
    }

    #[inline(always)]
    fn bits(self) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(self.0) }
    }

    #[inline(always)]
    unsafe fn load_floats(from: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn store_floats(values: float32x4_t, to: *mut f32) {
        unsafe { vst1q_f32(to, values) }
    }

    #[inline(always)]
    fn splat_float(value: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(value) }
    }

    #[inline(always)]
    fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn start(value: i32) -> int32x4_t {
        unsafe { vdupq_n_s32(value) }
    }

    #[inline(always)]
    unsafe fn step(dots: int32x4_t, weights: Self, a: *const u8, _: u32, _: usize, _: usize) -> int32x4_t {
        unsafe {
            let (mut dots, a) = (dots, vdupq_n_s32(a.cast::<i32>().read_unaligned()));
            asm!(
                "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                inout(vreg) dots, in(vreg) weights.0, in(vreg) a,
                options(pure, nomem, nostack)
            );
            dots
        }
    }

    #[inline(always)]
    fn finish(dots: int32x4_t) -> float32x4_t {
        unsafe { vcvtq_f32_s32(dots) }
    }

    #[inline(always)]
    fn prefetch(from: *const u8) {
        unsafe { asm!("prfm pldl2keep, [{0}]", in(reg) from, options(readonly, nostack, preserves_flags)) }
    }
}

kernels!(Dotprod, "neon,dotprod");
