//! Dequantizes superblocks: 256 weights in groups of 16 or 32, each with its own scale.

use super::decode::{Decoder, IQ4_TABLE, PLAIN_TABLE, Target, bytes, centered, half, nibbles};
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
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let [scales, minimums] = nibbles(&bytes(block, 0));
        let (d, d_minimum) = (half::<A>(block, 80), half::<A>(block, 82));
        for group in 0..16 {
            let (half_at, shift, part) = (group / 8, group / 2 % 4, group % 2);
            let q = bit_pairs(&bytes(block, 16 + 32 * half_at + 16 * part), 2 * shift);
            let (scale, minimum) = (d * f32::from(scales[group]), d_minimum * f32::from(minimums[group]));
            to.shifted(&A::look_up(&PLAIN_TABLE, q), scale, -minimum, 16 * group);
        }
    }
}

pub(super) struct Q3K;

impl Decoder for Q3K {
    const LEN: usize = 256;
    const BYTES: usize = 110;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let packed: [u8; 12] = bytes(block, 96);
        let d = half::<A>(block, 108);
        for group in 0..16 {
            let (half_at, shift, part) = (group / 8, group / 2 % 4, group % 2);
            let low = bit_pairs(&bytes(block, 32 + 32 * half_at + 16 * part), 2 * shift);
            let q = with_bit(&low, &bytes(block, 16 * part), group / 2, 2);
            let scale =
                packed[group % 8] >> (4 * (group / 8)) & 15 | (packed[8 + group % 4] >> (2 * (group / 4)) & 3) << 4;
            let scale = d * f32::from(scale.wrapping_sub(32).cast_signed());
            to.scaled(&centered(&q, 4), scale, 16 * group);
        }
    }
}

/// The scales and the negative minimums of `Q4_K` and `Q5_K`, stored with 6 bits each.
#[inline(always)]
fn scales_and_minimums<A: Arithmetic>(block: &[u8]) -> ([f32; 8], [f32; 8]) {
    let (d, d_minimum, packed) = (half::<A>(block, 0), half::<A>(block, 2), bytes::<12>(block, 4));
    let word = |at: usize| u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let upper = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let pair = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let scales = pair(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | upper(a));
    let minimums = pair(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | upper(b));
    let mut wide = ([0.0; 8], [0.0; 8]);
    for group in 0..8 {
        wide.0[group] = d * f32::from(scales[group]);
        wide.1[group] = -(d_minimum * f32::from(minimums[group]));
    }
    wide
}

pub(super) struct Q4K;

impl Decoder for Q4K {
    const LEN: usize = 256;
    const BYTES: usize = 144;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let (scales, minimums) = scales_and_minimums::<A>(block);
        for pair in 0..4 {
            let (first, second) = (bytes(block, 16 + 32 * pair), bytes(block, 32 + 32 * pair));
            let (scale, offset) = (scales[2 * pair], minimums[2 * pair]);
            to.looked_up::<A, 0>(&PLAIN_TABLE, &first, scale, Some(offset), 64 * pair);
            to.looked_up::<A, 0>(&PLAIN_TABLE, &second, scale, Some(offset), 64 * pair + 16);
            let (scale, offset) = (scales[2 * pair + 1], minimums[2 * pair + 1]);
            to.looked_up::<A, 4>(&PLAIN_TABLE, &first, scale, Some(offset), 64 * pair + 32);
            to.looked_up::<A, 4>(&PLAIN_TABLE, &second, scale, Some(offset), 64 * pair + 48);
        }
    }
}

pub(super) struct Q5K;

impl Q5K {
    /// Decodes the groups `2 PAIR` and `2 PAIR + 1`. With constant shifts, each is one instruction.
    #[inline(always)]
    fn pair<T: Target + ?Sized, const PAIR: usize>(block: &[u8], scales: &[f32; 8], minimums: &[f32; 8], to: &mut T) {
        let fifth: [[u8; 16]; 2] = [bytes(block, 16), bytes(block, 32)];
        let [first, first_high] = nibbles(&bytes(block, 48 + 32 * PAIR));
        let [second, second_high] = nibbles(&bytes(block, 64 + 32 * PAIR));
        let (group, at) = (2 * PAIR, 64 * PAIR);
        let (scale, offset) = (scales[group], minimums[group]);
        to.shifted(&centered(&with_bit(&first, &fifth[0], group, 4), 0), scale, offset, at);
        to.shifted(&centered(&with_bit(&second, &fifth[1], group, 4), 0), scale, offset, at + 16);
        let (scale, offset) = (scales[group + 1], minimums[group + 1]);
        to.shifted(&centered(&with_bit(&first_high, &fifth[0], group + 1, 4), 0), scale, offset, at + 32);
        to.shifted(&centered(&with_bit(&second_high, &fifth[1], group + 1, 4), 0), scale, offset, at + 48);
    }
}

impl Decoder for Q5K {
    const LEN: usize = 256;
    const BYTES: usize = 176;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let (scales, minimums) = scales_and_minimums::<A>(block);
        Self::pair::<T, 0>(block, &scales, &minimums, to);
        Self::pair::<T, 1>(block, &scales, &minimums, to);
        Self::pair::<T, 2>(block, &scales, &minimums, to);
        Self::pair::<T, 3>(block, &scales, &minimums, to);
    }
}

pub(super) struct Q6K;

impl Q6K {
    /// Decodes 32 weights of one half of the block. With constant shifts, each is one instruction.
    #[inline(always)]
    fn quarter<T: Target + ?Sized, const QUARTER: usize>(block: &[u8], half_at: usize, scales: &[f32; 16], to: &mut T) {
        for part in 0..2 {
            // two quarters share the bytes of the low bits, all four share the bytes of the high bits
            let low: [u8; 16] = bytes(block, 64 * half_at + 32 * (QUARTER % 2) + 16 * part);
            let high: [u8; 16] = bytes(block, 128 + 32 * half_at + 16 * part);
            let mut q = [0; 16];
            for i in 0..16 {
                let low = low[i] >> (4 * (QUARTER / 2)) & 15;
                q[i] = low | (high[i] >> (2 * QUARTER) & 3) << 4;
            }
            let group = 8 * half_at + 2 * QUARTER + part;
            to.scaled(&centered(&q, 32), scales[group], 16 * group);
        }
    }
}

impl Decoder for Q6K {
    const LEN: usize = 256;
    const BYTES: usize = 210;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let (d, packed) = (half::<A>(block, 208), bytes::<16>(block, 192));
        let mut scales = [0.0; 16];
        for group in 0..16 {
            scales[group] = d * f32::from(packed[group].cast_signed());
        }
        for half_at in 0..2 {
            Self::quarter::<T, 0>(block, half_at, &scales, to);
            Self::quarter::<T, 1>(block, half_at, &scales, to);
            Self::quarter::<T, 2>(block, half_at, &scales, to);
            Self::quarter::<T, 3>(block, half_at, &scales, to);
        }
    }
}

pub(super) struct IQ4XS;

impl Decoder for IQ4XS {
    const LEN: usize = 256;
    const BYTES: usize = 136;

    #[inline(always)]
    fn decode<A: Arithmetic, T: Target + ?Sized>(block: &[u8], to: &mut T) {
        let d = half::<A>(block, 0);
        let upper = u16::from_le_bytes(bytes(block, 2));
        let lower: [u8; 4] = bytes(block, 4);
        for group in 0..8 {
            let scale = lower[group / 2] >> (4 * (group % 2)) & 15 | ((upper >> (2 * group) & 3) as u8) << 4;
            let scale = d * f32::from(scale.wrapping_sub(32).cast_signed());
            let packed = bytes(block, 8 + 16 * group);
            to.looked_up::<A, 0>(&IQ4_TABLE, &packed, scale, None, 32 * group);
            to.looked_up::<A, 4>(&IQ4_TABLE, &packed, scale, None, 32 * group + 16);
        }
    }
}
