//! Dequantizes the read-only formats: formats of 1 to 3 bits that store groups of 4 or 8 weights as entries of a codebook, and
//! ternary formats. All have superblocks of 256 weights.

use super::decode::{Decoder, Target, bytes, half};
use crate::isa::Arithmetic;

/// The entries of all codebooks, written by `dev/reference_codebooks.py`.
const ENTRIES: &[u8] = include_bytes!("codebooks.bin");

/// Entries `start..start + N`, of `W` weights with `BITS` bits each.
const fn codebook<const N: usize, const W: usize, const BITS: usize>(start: usize, values: &[i8]) -> [[i8; W]; N] {
    let mut entries = [[0; W]; N];
    let mut i = 0;
    while i < N {
        let at = 2 * (start + i);
        let packed = u16::from_le_bytes([ENTRIES[at], ENTRIES[at + 1]]) as usize;
        let mut j = 0;
        while j < W {
            entries[i][j] = values[packed >> (BITS * j) & ((1 << BITS) - 1)];
            j += 1;
        }
        i += 1;
    }
    entries
}

const VALUES_OF_2: [i8; 3] = [8, 25, 43];
static CODEBOOK_2XXS: [[i8; 8]; 256] = codebook::<256, 8, 2>(0, &VALUES_OF_2);
static CODEBOOK_2XS: [[i8; 8]; 512] = codebook::<512, 8, 2>(256, &VALUES_OF_2);
static CODEBOOK_2S: [[i8; 8]; 1024] = codebook::<1024, 8, 2>(768, &VALUES_OF_2);
static CODEBOOK_1: [[i8; 8]; 2048] = codebook::<2048, 8, 2>(1792, &[-1, 0, 1]);
static CODEBOOK_3XXS: [[i8; 4]; 256] = codebook::<256, 4, 4>(3840, &[4, 12, 20, 28, 36, 44, 52, 62]);
static CODEBOOK_3S: [[i8; 4]; 512] = codebook::<512, 4, 4>(4096, &[1, 3, 5, 7, 9, 11, 13, 15]);

/// Eight signs from the seven that are stored: the number of negative signs is even.
#[inline(always)]
fn with_parity(signs: u32) -> u8 {
    let signs = signs & 127;
    (signs | (signs.count_ones() & 1) << 7) as u8
}

/// 16 weights: two entries of eight, negated where bits are set.
#[inline(always)]
fn signed<A: Arithmetic>(entries: [[i8; 8]; 2], signs: [u8; 2]) -> [i8; 16] {
    let is_negative = A::spread_bits(signs);
    let mut q = [0; 16];
    for i in 0..16 {
        // two's complement
        q[i] = (entries[i / 8][i % 8] ^ is_negative[i]) - is_negative[i];
    }
    q
}

/// Two entries of four.
#[inline(always)]
fn joined(first: [i8; 4], second: [i8; 4]) -> [i8; 8] {
    let [a, b, c, d] = first;
    let [e, f, g, h] = second;
    [a, b, c, d, e, f, g, h]
}

/// `(0.5 + scale) d` times a power of two, which is exact.
#[inline(always)]
fn half_scale(d: f32, scale: u32, power: f32) -> f32 {
    d * (0.5 + scale as f32) * power
}

pub(super) struct IQ2XXS;

impl Decoder for IQ2XXS {
    const LEN: usize = 256;
    const BYTES: usize = 66;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        for group in 0..8 {
            let indices: [u8; 4] = bytes(block, 2 + 8 * group);
            let packed = u32::from_le_bytes(bytes(block, 6 + 8 * group));
            let scale = half_scale(d, packed >> 28, 0.25);
            for part in 0..2 {
                let entry = |i: usize| CODEBOOK_2XXS[usize::from(indices[2 * part + i])];
                let signs = |i: usize| with_parity(packed >> (14 * part + 7 * i));
                let q = signed::<A>([entry(0), entry(1)], [signs(0), signs(1)]);
                to.scaled(&q, scale, 32 * group + 16 * part);
            }
        }
    }
}

pub(super) struct IQ2XS;

impl Decoder for IQ2XS {
    const LEN: usize = 256;
    const BYTES: usize = 74;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        let scales: [u8; 8] = bytes(block, 66);
        for group in 0..16 {
            let scale = half_scale(d, u32::from(scales[group / 2] >> (4 * (group % 2)) & 15), 0.25);
            let packed = [0, 2].map(|at| u16::from_le_bytes(bytes(block, 2 + 4 * group + at)));
            let [first, second] = packed.map(|packed| CODEBOOK_2XS[usize::from(packed & 511)]);
            let signs = packed.map(|packed| with_parity(u32::from(packed >> 9)));
            to.scaled(&signed::<A>([first, second], signs), scale, 16 * group);
        }
    }
}

pub(super) struct IQ2S;

impl Decoder for IQ2S {
    const LEN: usize = 256;
    const BYTES: usize = 82;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        let (upper, scales): ([u8; 8], [u8; 8]) = (bytes(block, 66), bytes(block, 74));
        for group in 0..16 {
            let scale = half_scale(d, u32::from(scales[group / 2] >> (4 * (group % 2)) & 15), 0.25);
            let lower: [u8; 2] = bytes(block, 2 + 2 * group);
            let upper = usize::from(upper[group / 2] >> (4 * (group % 2)));
            let entry = |i: usize| CODEBOOK_2S[usize::from(lower[i]) | (upper >> (2 * i) & 3) << 8];
            to.scaled(&signed::<A>([entry(0), entry(1)], bytes(block, 34 + 2 * group)), scale, 16 * group);
        }
    }
}

pub(super) struct IQ3XXS;

impl Decoder for IQ3XXS {
    const LEN: usize = 256;
    const BYTES: usize = 98;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        for group in 0..8 {
            let packed = u32::from_le_bytes(bytes(block, 66 + 4 * group));
            let scale = half_scale(d, packed >> 28, 0.5);
            for part in 0..2 {
                let indices: [u8; 4] = bytes(block, 2 + 8 * group + 4 * part);
                let [a, b, c, d] = indices.map(|index| CODEBOOK_3XXS[usize::from(index)]);
                let signs = |i: usize| with_parity(packed >> (14 * part + 7 * i));
                let q = signed::<A>([joined(a, b), joined(c, d)], [signs(0), signs(1)]);
                to.scaled(&q, scale, 32 * group + 16 * part);
            }
        }
    }
}

pub(super) struct IQ3S;

impl Decoder for IQ3S {
    const LEN: usize = 256;
    const BYTES: usize = 110;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        let (upper, scales): ([u8; 8], [u8; 4]) = (bytes(block, 66), bytes(block, 106));
        for group in 0..8 {
            let scale = d * f32::from(1 + 2 * (scales[group / 2] >> (4 * (group % 2)) & 15));
            for part in 0..2 {
                let lower: [u8; 4] = bytes(block, 2 + 8 * group + 4 * part);
                let upper = usize::from(upper[group] >> (4 * part));
                let entry = |i: usize| CODEBOOK_3S[usize::from(lower[i]) | (upper >> i & 1) << 8];
                let entries = [joined(entry(0), entry(1)), joined(entry(2), entry(3))];
                let q = signed::<A>(entries, bytes(block, 74 + 4 * group + 2 * part));
                to.scaled(&q, scale, 32 * group + 16 * part);
            }
        }
    }
}

/// 16 weights of the 1-bit formats, in eighths: two entries of -1, 0 and 1, each shifted up or down by an eighth.
#[inline(always)]
fn moved(indices: [usize; 2], are_down: [bool; 2]) -> [i8; 16] {
    let mut q = [0; 16];
    for i in 0..16 {
        q[i] = 8 * CODEBOOK_1[indices[i / 8]][i % 8] + if are_down[i / 8] { -1 } else { 1 };
    }
    q
}

pub(super) struct IQ1S;

impl Decoder for IQ1S {
    const LEN: usize = 256;
    const BYTES: usize = 50;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        for group in 0..8 {
            let packed = u16::from_le_bytes(bytes(block, 34 + 2 * group));
            let scale = d * f32::from(2 * (packed >> 12 & 7) + 1) * 0.125;
            let lower: [u8; 4] = bytes(block, 2 + 4 * group);
            let index = |i: usize| usize::from(lower[i]) | usize::from(packed >> (3 * i) & 7) << 8;
            let is_down = packed & 0x8000 != 0;
            for part in 0..2 {
                let q = moved([index(2 * part), index(2 * part + 1)], [is_down; 2]);
                to.scaled(&q, scale, 32 * group + 16 * part);
            }
        }
    }
}

pub(super) struct IQ1M;

impl Decoder for IQ1M {
    const LEN: usize = 256;
    const BYTES: usize = 56;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let scales = [48, 50, 52, 54].map(|at| u16::from_le_bytes(bytes(block, at)));
        // the scale is in the upper four bits of each word
        let [a, b, c, d] = scales.map(|scale| scale >> 12);
        let d = A::f16_to_f32(a | b << 4 | c << 8 | d << 12);
        for group in 0..16 {
            let scale = d * f32::from(2 * (scales[group / 4] >> (3 * (group % 4)) & 7) + 1) * 0.125;
            let (lower, upper): ([u8; 2], u8) = (bytes(block, 2 * group), block[32 + group]);
            let index = |i: usize| usize::from(lower[i]) | usize::from(upper >> (4 * i) & 7) << 8;
            let q = moved([index(0), index(1)], [upper & 8 != 0, upper & 128 != 0]);
            to.scaled(&q, scale, 16 * group);
        }
    }
}

pub(super) struct TQ1_0;

impl TQ1_0 {
    /// Digit `digit` in base 3 of the bytes from `at` on, minus 1.
    #[inline(always)]
    fn digits(block: &[u8], at: usize, digit: usize) -> [i8; 16] {
        const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
        let packed: [u8; 16] = bytes(block, at);
        let mut q = [0; 16];
        for i in 0..16 {
            // a byte is a fraction of 256; multiplied by a power of 3, its integer part ends with the digit
            q[i] = ((u16::from(packed[i].wrapping_mul(POWERS[digit])) * 3) >> 8) as i8 - 1;
        }
        q
    }
}

impl Decoder for TQ1_0 {
    const LEN: usize = 256;
    const BYTES: usize = 54;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 52);
        for digit in 0..5 {
            to.scaled(&Self::digits(block, 0, digit), d, 32 * digit);
            to.scaled(&Self::digits(block, 16, digit), d, 32 * digit + 16);
            to.scaled(&Self::digits(block, 32, digit), d, 160 + 16 * digit);
        }
        // the last 16 weights are four digits of four bytes
        let mut q = [0; 16];
        for digit in 0..4 {
            let digits = Self::digits(block, 36, digit);
            q[4 * digit..][..4].copy_from_slice(&digits[12..]);
        }
        to.scaled(&q, d, 240);
    }
}

pub(super) struct TQ2_0;

impl Decoder for TQ2_0 {
    const LEN: usize = 256;
    const BYTES: usize = 66;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 64);
        for group in 0..16 {
            let (half_at, shift, part) = (group / 8, group / 2 % 4, group % 2);
            let packed: [u8; 16] = bytes(block, 32 * half_at + 16 * part);
            let mut q = [0; 16];
            for i in 0..16 {
                q[i] = (packed[i] >> (2 * shift) & 3).cast_signed() - 1;
            }
            to.scaled(&q, d, 16 * group);
        }
    }
}
