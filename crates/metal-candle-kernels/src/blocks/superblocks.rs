//! Dequantizes superblocks: 256 weights in groups of 16 or 32 with scales of their own.

use super::decode::{Decoder, IQ4_TABLE, PLAIN_TABLE, bytes, centered, half, nibbles, scaled, shifted};
use crate::isa::Arithmetic;

/// Two bits of each byte.
#[inline(always)]
fn bit_pairs(packed: &[u8; 16], shift: usize) -> [u8; 16] {
    let mut q = [0; 16];
    for i in 0..16 {
        q[i] = packed[i] >> shift & 3;
    }
    q
}

/// `low | bit << to`, where `bit` is bit `from` of each byte of `bits`.
#[inline(always)]
fn with_bit(low: &[u8; 16], bits: &[u8; 16], from: usize, to: usize) -> [u8; 16] {
    let mut q = [0; 16];
    for i in 0..16 {
        q[i] = low[i] | (bits[i] >> from & 1) << to;
    }
    q
}

pub(super) struct Q2K;

impl Decoder for Q2K {
    const LEN: usize = 256;
    const BYTES: usize = 84;

    #[inline(always)]
    fn decode<A: Arithmetic>(block: &[u8], to: &mut [f32]) {
        let [scales, minimums] = nibbles(&bytes(block, 0));
        let (d, d_minimum) = (half::<A>(block, 80), half::<A>(block, 82));
        for group in 0..16 {
            let (half_at, shift, part) = (group / 8, group / 2 % 4, group % 2);
            let q = bit_pairs(&bytes(block, 16 + 32 * half_at + 16 * part), 2 * shift);
            let (scale, minimum) = (d * f32::from(scales[group]), d_minimum * f32::from(minimums[group]));
            shifted(&A::look_up(&PLAIN_TABLE, q), scale, -minimum, to, 16 * group);
        }
    }
}

pub(super) struct Q3K;

impl Decoder for Q3K {
    const LEN: usize = 256;
    const BYTES: usize = 110;

    #[inline(always)]
    fn decode<A: Arithmetic>(block: &[u8], to: &mut [f32]) {
        let packed: [u8; 12] = bytes(block, 96);
        let d = half::<A>(block, 108);
        for group in 0..16 {
            let (half_at, shift, part) = (group / 8, group / 2 % 4, group % 2);
            let low = bit_pairs(&bytes(block, 32 + 32 * half_at + 16 * part), 2 * shift);
            let q = with_bit(&low, &bytes(block, 16 * part), group / 2, 2);
            let scale =
                packed[group % 8] >> (4 * (group / 8)) & 15 | (packed[8 + group % 4] >> (2 * (group / 4)) & 3) << 4;
            let scale = d * f32::from(scale.wrapping_sub(32).cast_signed());
            scaled(&centered(&q, 4), scale, to, 16 * group);
        }
    }
}

/// The scales and minimums of `Q4_K` and `Q5_K`, 6 bits each, four at a time.
#[inline(always)]
fn scales_and_minimums(packed: [u8; 12]) -> ([u8; 8], [u8; 8]) {
    let word = |at: usize| u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let upper = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let pair = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let scales = pair(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | upper(a));
    let minimums = pair(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | upper(b));
    (scales, minimums)
}

pub(super) struct Q4K;

impl Decoder for Q4K {
    const LEN: usize = 256;
    const BYTES: usize = 144;

    #[inline(always)]
    fn decode<A: Arithmetic>(block: &[u8], to: &mut [f32]) {
        let (d, d_minimum) = (half::<A>(block, 0), half::<A>(block, 2));
        let (scales, minimums) = scales_and_minimums(bytes(block, 4));
        for pair in 0..4 {
            for part in 0..2 {
                let q = nibbles(&bytes(block, 16 + 32 * pair + 16 * part));
                for (side, q) in q.iter().enumerate() {
                    let group = 2 * pair + side;
                    let (scale, minimum) = (d * f32::from(scales[group]), d_minimum * f32::from(minimums[group]));
                    shifted(&A::look_up(&PLAIN_TABLE, *q), scale, -minimum, to, 32 * group + 16 * part);
                }
            }
        }
    }
}

pub(super) struct Q5K;

impl Decoder for Q5K {
    const LEN: usize = 256;
    const BYTES: usize = 176;

    #[inline(always)]
    fn decode<A: Arithmetic>(block: &[u8], to: &mut [f32]) {
        let (d, d_minimum) = (half::<A>(block, 0), half::<A>(block, 2));
        let (scales, minimums) = scales_and_minimums(bytes(block, 4));
        for pair in 0..4 {
            for part in 0..2 {
                let q = nibbles(&bytes(block, 48 + 32 * pair + 16 * part));
                let fifth = bytes(block, 16 + 16 * part);
                for (side, q) in q.iter().enumerate() {
                    let group = 2 * pair + side;
                    let q = with_bit(q, &fifth, group, 4);
                    let (scale, minimum) = (d * f32::from(scales[group]), d_minimum * f32::from(minimums[group]));
                    shifted(&centered(&q, 0), scale, -minimum, to, 32 * group + 16 * part);
                }
            }
        }
    }
}

pub(super) struct Q6K;

impl Decoder for Q6K {
    const LEN: usize = 256;
    const BYTES: usize = 210;

    #[inline(always)]
    fn decode<A: Arithmetic>(block: &[u8], to: &mut [f32]) {
        let d = half::<A>(block, 208);
        let scales: [u8; 16] = bytes(block, 192);
        for at in 0..8 {
            // half of the block, half of 32 weights, which of two runs of low bits
            let (half_at, part, run) = (at / 4, at / 2 % 2, at % 2);
            let low = nibbles(&bytes(block, 64 * half_at + 32 * run + 16 * part));
            let high = bytes(block, 128 + 32 * half_at + 16 * part);
            for (side, low) in low.iter().enumerate() {
                let quarter = run + 2 * side;
                let (low, high) = (A::look_up(&PLAIN_TABLE, *low), bit_pairs(&high, 2 * quarter));
                let mut q = [0; 16];
                for i in 0..16 {
                    q[i] = (low[i] | (high[i] << 4).cast_signed()) - 32;
                }
                let group = 8 * half_at + 2 * quarter + part;
                scaled(&q, d * f32::from(scales[group].cast_signed()), to, 16 * group);
            }
        }
    }
}

pub(super) struct IQ4XS;

impl Decoder for IQ4XS {
    const LEN: usize = 256;
    const BYTES: usize = 136;

    #[inline(always)]
    fn decode<A: Arithmetic>(block: &[u8], to: &mut [f32]) {
        let d = half::<A>(block, 0);
        let upper = u16::from_le_bytes(bytes(block, 2));
        let lower: [u8; 4] = bytes(block, 4);
        for group in 0..8 {
            let scale = lower[group / 2] >> (4 * (group % 2)) & 15 | ((upper >> (2 * group) & 3) as u8) << 4;
            let scale = d * f32::from(scale.wrapping_sub(32).cast_signed());
            let [low, high] = nibbles(&bytes(block, 8 + 16 * group));
            scaled(&A::look_up(&IQ4_TABLE, low), scale, to, 32 * group);
            scaled(&A::look_up(&IQ4_TABLE, high), scale, to, 32 * group + 16);
        }
    }
}
