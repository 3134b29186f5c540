//! Dequantizes blocks of 32 weights.
//!
//! The operations and their order are the same as in ggml, without fused multiply-add, so the results are identical bit for bit.

use crate::isa::{Arithmetic, dispatch};

/// Dequantizes the blocks of a format.
pub(super) trait Decoder {
    /// The number of weights of a block.
    const LEN: usize;
    /// The number of bytes of a block.
    const BYTES: usize;

    /// Dequantizes a block of `BYTES` bytes to `LEN` weights, in ascending order.
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T);
}

/// Receives dequantized weights, 16 at a time.
pub(super) trait Target {
    /// Receives `scale q` as the weights starting at `at`.
    fn scaled(&mut self, q: &[i8; 16], scale: f32, at: usize);

    /// Receives `scale q + offset` as the weights starting at `at`.
    fn shifted(&mut self, q: &[i8; 16], scale: f32, offset: f32, at: usize);

    /// Receives `scale table[index] + offset` as the weights starting at `at`. The indices are the four bits of each byte that
    /// start at bit `SHIFT`.
    #[inline(always)]
    fn looked_up<A: Arithmetic, const SHIFT: u32>(
        &mut self,
        table: &[i8; 16],
        packed: &[u8; 16],
        scale: f32,
        offset: Option<f32>,
        at: usize,
    ) {
        let q = A::look_up(table, nibbles(packed)[SHIFT as usize / 4]);
        match offset {
            Some(offset) => self.shifted(&q, scale, offset, at),
            None => self.scaled(&q, scale, at),
        }
    }
}

impl Target for [f32] {
    #[inline(always)]
    fn scaled(&mut self, q: &[i8; 16], scale: f32, at: usize) {
        let to = &mut self[at..at + 16];
        for i in 0..16 {
            to[i] = scale * f32::from(q[i]);
        }
    }

    #[inline(always)]
    fn shifted(&mut self, q: &[i8; 16], scale: f32, offset: f32, at: usize) {
        let to = &mut self[at..at + 16];
        for i in 0..16 {
            to[i] = scale * f32::from(q[i]) + offset;
        }
    }
}

dispatch! {
    /// Dequantizes whole blocks.
    pub(super) fn widen_blocks<D: Decoder>(blocks: &[u8], to: &mut [f32]) = widen_blocks_body
}

#[inline(always)]
fn widen_blocks_body<A: Arithmetic, D: Decoder>(blocks: &[u8], to: &mut [f32]) {
    for (block, to) in blocks.chunks_exact(D::BYTES).zip(to.chunks_exact_mut(D::LEN)) {
        D::decode::<A, _>(block, to);
    }
}

/// `N` bytes of a block, starting at `at`. The bounds check is optimized away if the length of the block is known.
#[inline(always)]
pub(super) fn bytes<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[at..at + N]);
    bytes
}

/// The f16 at `at`.
#[inline(always)]
pub(super) fn half<A: Arithmetic>(block: &[u8], at: usize) -> f32 {
    A::f16_to_f32(u16::from_le_bytes(bytes(block, at)))
}

/// The low and the high four bits of each byte.
#[inline(always)]
pub(super) fn nibbles(packed: &[u8; 16]) -> [[u8; 16]; 2] {
    let mut parts = [[0; 16]; 2];
    for i in 0..16 {
        parts[0][i] = packed[i] & 15;
        parts[1][i] = packed[i] >> 4;
    }
    parts
}

/// `q - zero` for values whose difference fits in 8 bits.
#[inline(always)]
pub(super) fn centered(q: &[u8; 16], zero: u8) -> [i8; 16] {
    let mut centered = [0; 16];
    for i in 0..16 {
        centered[i] = q[i].wrapping_sub(zero).cast_signed();
    }
    centered
}

/// Nibbles minus 8. A lookup is one instruction, with the sixteen values in one register.
const CENTERED_TABLE: [i8; 16] = [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7];
/// Nibbles without an offset.
pub(super) const PLAIN_TABLE: [i8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Nibbles with their fifth bit, minus `zero`: bit `i` of `bits` belongs to nibble `i`.
#[inline(always)]
fn with_fifth_bit<A: Arithmetic>(nibbles: [u8; 16], bits: [u8; 2], zero: i8) -> [i8; 16] {
    let (low, high) = (A::look_up(&PLAIN_TABLE, nibbles), A::spread_bits(bits));
    let mut q = [0; 16];
    for i in 0..16 {
        q[i] = (low[i] | (high[i] & 16)) - zero;
    }
    q
}

/// Looks up 32 weights: the low four bits of each byte, then the high four bits.
#[inline(always)]
fn look_up_32<A: Arithmetic, T: Target + ?Sized>(
    to: &mut T,
    table: &[i8; 16],
    packed: &[u8; 16],
    scale: f32,
    offset: Option<f32>,
) {
    to.looked_up::<A, 0>(table, packed, scale, offset, 0);
    to.looked_up::<A, 4>(table, packed, scale, offset, 16);
}

pub(super) struct Q4_0;

impl Decoder for Q4_0 {
    const LEN: usize = 32;
    const BYTES: usize = 18;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        look_up_32::<A, T>(to, &CENTERED_TABLE, &bytes(block, 2), d, None);
    }
}

pub(super) struct Q4_1;

impl Decoder for Q4_1 {
    const LEN: usize = 32;
    const BYTES: usize = 20;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let (d, m) = (half::<A>(block, 0), half::<A>(block, 2));
        look_up_32::<A, T>(to, &PLAIN_TABLE, &bytes(block, 4), d, Some(m));
    }
}

pub(super) struct Q5_0;

impl Decoder for Q5_0 {
    const LEN: usize = 32;
    const BYTES: usize = 22;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        let [low, high] = nibbles(&bytes(block, 6));
        to.scaled(&with_fifth_bit::<A>(low, bytes(block, 2), 16), d, 0);
        to.scaled(&with_fifth_bit::<A>(high, bytes(block, 4), 16), d, 16);
    }
}

pub(super) struct Q5_1;

impl Decoder for Q5_1 {
    const LEN: usize = 32;
    const BYTES: usize = 24;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let (d, m) = (half::<A>(block, 0), half::<A>(block, 2));
        let [low, high] = nibbles(&bytes(block, 8));
        to.shifted(&with_fifth_bit::<A>(low, bytes(block, 4), 0), d, m, 0);
        to.shifted(&with_fifth_bit::<A>(high, bytes(block, 6), 0), d, m, 16);
    }
}

pub(super) struct Q8_0;

impl Decoder for Q8_0 {
    const LEN: usize = 32;
    const BYTES: usize = 34;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        to.scaled(&centered(&bytes(block, 2), 0), d, 0);
        to.scaled(&centered(&bytes(block, 18), 0), d, 16);
    }
}

/// The values of `IQ4_NL` and `IQ4_XS`.
pub(super) const IQ4_TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

pub(super) struct IQ4NL;

impl Decoder for IQ4NL {
    const LEN: usize = 32;
    const BYTES: usize = 18;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        look_up_32::<A, T>(to, &IQ4_TABLE, &bytes(block, 2), d, None);
    }
}

/// The 4-bit floats, doubled.
pub(super) const FP4_TABLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

pub(super) struct MXFP4;

impl MXFP4 {
    /// The bits of half of the scale, because the table is doubled. The two smallest scales are subnormal.
    #[inline(always)]
    pub(super) fn half_scale(exponent: u8) -> u32 {
        let exponent = u32::from(exponent);
        if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 }
    }
}

impl Decoder for MXFP4 {
    const LEN: usize = 32;
    const BYTES: usize = 17;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let scale = f32::from_bits(Self::half_scale(block[0]));
        look_up_32::<A, T>(to, &FP4_TABLE, &bytes(block, 1), scale, None);
    }
}
