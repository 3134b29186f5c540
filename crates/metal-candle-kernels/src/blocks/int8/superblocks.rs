//! Unpacks superblocks: 256 weights in groups of 16 or 32, each with its own scale.

use super::lanes::{Arithmetic, Lanes, Rows, Sink, Unpack};
use super::unpack::{bytes_of_table, half_word, high_nibbles, joined, looked_up, low_nibbles, word};
use crate::blocks::decode::{Decoder, IQ4_TABLE};
use crate::blocks::superblocks::{IQ4XS, Q2K, Q3K, Q4K, Q5K, Q6K};

/// One word of each row.
#[repr(align(64))]
struct Words([u32; 16]);

/// # Safety
/// `read` may be called with the start of each row.
#[inline(always)]
unsafe fn collect<L: Lanes>(rows: Rows, read: unsafe fn(*const u8) -> u32) -> L {
    let mut words = Words([0; 16]);
    for row in 0..L::ROWS {
        // SAFETY: the caller's promise.
        words.0[row] = unsafe { read(rows.row(row)) };
    }
    // SAFETY: a vector has at most 16 words.
    unsafe { L::load(words.0.as_ptr().cast()) }
}

/// Byte `AT / 8` of each word.
#[inline(always)]
fn byte<L: Lanes, const AT: i32>(word: L) -> L::Floats {
    word.right::<AT>().and(L::splat(255)).floats()
}

/// The four bytes of each word.
#[inline(always)]
fn four_bytes<L: Lanes>(word: L) -> [L::Floats; 4] {
    [byte::<L, 0>(word), byte::<L, 8>(word), byte::<L, 16>(word), word.right::<24>().floats()]
}

/// The scales and the negative minimums of `Q4_K` and `Q5_K`, stored with 6 bits each.
///
/// # Safety
/// The blocks can be read.
#[inline(always)]
unsafe fn scales_and_minimums<L: Lanes>(rows: Rows) -> ([L::Floats; 8], [L::Floats; 8]) {
    // SAFETY: the caller's promise.
    let [head, a, b, c] = unsafe { L::load_rows(rows) };
    let (low, high, six) = (L::splat(0x0f0f_0f0f), L::splat(0x3030_3030), L::splat(0x3f3f_3f3f));
    let first = four_bytes(a.and(six));
    let second = four_bytes(c.and(low).or(a.right::<2>().and(high)));
    let (d, d_minimum) = (head.halves(), head.right::<16>().xor(L::splat(0x8000)).halves());
    let mut scales = [d; 8];
    for i in 0..4 {
        (scales[i], scales[4 + i]) = (L::mul(d, first[i]), L::mul(d, second[i]));
    }
    let first = four_bytes(b.and(six));
    let second = four_bytes(c.right::<4>().and(low).or(b.right::<2>().and(high)));
    let mut minimums = [d; 8];
    for i in 0..4 {
        (minimums[i], minimums[4 + i]) = (L::mul(d_minimum, first[i]), L::mul(d_minimum, second[i]));
    }
    (scales, minimums)
}

// SAFETY of the following: the caller's promise.

impl Unpack for Q4K {
    type Kind = Arithmetic<1, true, 15>;
    const ZERO: i32 = 0;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S) {
        for block in 0..blocks {
            let rows = rows.skip(block * Self::BYTES);
            let (scales, minimums) = unsafe { scales_and_minimums::<L>(rows) };
            for pair in 0..4 {
                unsafe {
                    let first = L::load_rows(rows.skip(16 + 32 * pair));
                    let second = L::load_rows(rows.skip(32 + 32 * pair));
                    let weights = joined(low_nibbles(first), low_nibbles(second));
                    sink.take(weights, [scales[2 * pair]; 2], [minimums[2 * pair]; 2]);
                    let weights = joined(high_nibbles(first), high_nibbles(second));
                    sink.take(weights, [scales[2 * pair + 1]; 2], [minimums[2 * pair + 1]; 2]);
                }
            }
        }
    }
}

/// Bit `FROM` of each byte as bit 4. One of the two shifts is zero.
#[inline(always)]
fn fifth_bit<L: Lanes, const LEFT: i32, const RIGHT: i32>(bits: L) -> L {
    bits.left::<LEFT>().right::<RIGHT>().and(L::splat(0x1010_1010))
}

/// Nibbles with a fifth bit.
#[inline(always)]
fn with_fifth_bit<L: Lanes, const LEFT: i32, const RIGHT: i32>(mut nibbles: [L; 8], bits: &[L; 8]) -> [L; 8] {
    for i in 0..8 {
        nibbles[i] = nibbles[i].or(fifth_bit::<L, LEFT, RIGHT>(bits[i]));
    }
    nibbles
}

impl Unpack for Q5K {
    type Kind = Arithmetic<1, true, 31>;
    const ZERO: i32 = 0;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S) {
        for block in 0..blocks {
            let rows = rows.skip(block * Self::BYTES);
            let (scales, minimums) = unsafe { scales_and_minimums::<L>(rows) };
            let bits = unsafe { joined(L::load_rows(rows.skip(16)), L::load_rows(rows.skip(32))) };
            macro_rules! pair {
                ($pair:literal, $low:literal, $low_right:literal, $high:literal, $high_right:literal) => {
                    unsafe {
                        let first = L::load_rows(rows.skip(48 + 32 * $pair));
                        let second = L::load_rows(rows.skip(64 + 32 * $pair));
                        let low = joined(low_nibbles(first), low_nibbles(second));
                        let weights = with_fifth_bit::<L, $low, $low_right>(low, &bits);
                        sink.take(weights, [scales[2 * $pair]; 2], [minimums[2 * $pair]; 2]);
                        let high = joined(high_nibbles(first), high_nibbles(second));
                        let weights = with_fifth_bit::<L, $high, $high_right>(high, &bits);
                        sink.take(weights, [scales[2 * $pair + 1]; 2], [minimums[2 * $pair + 1]; 2]);
                    }
                };
            }
            pair!(0, 4, 0, 3, 0);
            pair!(1, 2, 0, 1, 0);
            pair!(2, 0, 0, 0, 1);
            pair!(3, 0, 2, 0, 3);
        }
    }
}

/// Bits `SHIFT` and `SHIFT + 1` of each byte.
#[inline(always)]
fn bit_pairs<L: Lanes, const SHIFT: i32>(packed: &[L; 8]) -> [L; 8] {
    let (mut pairs, mask) = (*packed, L::splat(0x0303_0303));
    for i in 0..8 {
        pairs[i] = packed[i].right::<SHIFT>().and(mask);
    }
    pairs
}

impl Unpack for Q2K {
    type Kind = Arithmetic<2, true, 15>;
    const ZERO: i32 = 0;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S) {
        for block in 0..blocks {
            let rows = rows.skip(block * Self::BYTES);
            let head = unsafe { L::load_rows(rows) };
            let (scales, minimums) = (low_nibbles(head), high_nibbles(head));
            let factors: L = unsafe { collect(rows.skip(80), word) };
            let (d, d_minimum) = (factors.halves(), factors.right::<16>().xor(L::splat(0x8000)).halves());
            for half in 0..2 {
                let at = 16 + 32 * half;
                let packed = unsafe { joined(L::load_rows(rows.skip(at)), L::load_rows(rows.skip(at + 16))) };
                macro_rules! pair {
                    ($part:literal, $shift:literal, $next:literal) => {
                        unsafe {
                            let scales = four_bytes(scales[2 * half + $part]);
                            let minimums = four_bytes(minimums[2 * half + $part]);
                            sink.take(
                                bit_pairs::<L, $shift>(&packed),
                                [L::mul(d, scales[0]), L::mul(d, scales[1])],
                                [L::mul(d_minimum, minimums[0]), L::mul(d_minimum, minimums[1])],
                            );
                            sink.take(
                                bit_pairs::<L, $next>(&packed),
                                [L::mul(d, scales[2]), L::mul(d, scales[3])],
                                [L::mul(d_minimum, minimums[2]), L::mul(d_minimum, minimums[3])],
                            );
                        }
                    };
                }
                pair!(0, 0, 2);
                pair!(1, 4, 6);
            }
        }
    }
}

/// Bit `AT` of each byte as bit 2, moved by one of the shifts.
#[inline(always)]
fn with_third_bit<L: Lanes, const LEFT: i32, const RIGHT: i32>(mut pairs: [L; 8], bits: &[L; 8]) -> [L; 8] {
    let mask = L::splat(0x0404_0404);
    for i in 0..8 {
        pairs[i] = pairs[i].or(bits[i].left::<LEFT>().right::<RIGHT>().and(mask));
    }
    pairs
}

impl Unpack for Q3K {
    type Kind = Arithmetic<2, false, 15>;
    const ZERO: i32 = 4;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S) {
        for block in 0..blocks {
            let rows = rows.skip(block * Self::BYTES);
            // the two bytes before the scales, the 12 bytes of scales, and the factor after them
            let [a, b, c, e] = unsafe { L::load_rows(rows.skip(94)) };
            let d = e.right::<16>().halves();
            let first = a.right::<16>().or(b.left::<16>());
            let second = b.right::<16>().or(c.left::<16>());
            let upper = c.right::<16>().or(e.left::<16>());
            let (low, high) = (L::splat(0x0f0f_0f0f), L::splat(0x3030_3030));
            let scales = [
                first.and(low).or(upper.left::<4>().and(high)),
                second.and(low).or(upper.left::<2>().and(high)),
                first.right::<4>().and(low).or(upper.and(high)),
                second.right::<4>().and(low).or(upper.right::<2>().and(high)),
            ];
            let bits = unsafe { joined(L::load_rows(rows), L::load_rows(rows.skip(16))) };
            let zero = L::splat_float(-32.0);
            macro_rules! half {
                ($half:literal, $($part:literal: $shift:literal $left:literal $right:literal, $next:literal $next_left:literal $next_right:literal);*) => {
                    let at = 32 + 32 * $half;
                    let packed = unsafe { joined(L::load_rows(rows.skip(at)), L::load_rows(rows.skip(at + 16))) };
                    $(unsafe {
                        let mut scales = four_bytes(scales[2 * $half + $part]);
                        for i in 0..4 {
                            scales[i] = L::mul(d, L::add(scales[i], zero));
                        }
                        let weights = with_third_bit::<L, $left, $right>(bit_pairs::<L, $shift>(&packed), &bits);
                        sink.take(weights, [scales[0], scales[1]], [d; 2]);
                        let pairs = bit_pairs::<L, $next>(&packed);
                        let weights = with_third_bit::<L, $next_left, $next_right>(pairs, &bits);
                        sink.take(weights, [scales[2], scales[3]], [d; 2]);
                    })*
                };
            }
            half!(0, 0: 0 2 0, 2 1 0; 1: 4 0 0, 6 0 1);
            half!(1, 0: 0 0 2, 2 0 3; 1: 4 0 4, 6 0 5);
        }
    }
}

/// Bits 4 and 5 of each byte, from bits `4 - LEFT + RIGHT` on.
#[inline(always)]
fn with_upper_bits<L: Lanes, const LEFT: i32, const RIGHT: i32>(mut nibbles: [L; 8], bits: &[L; 8]) -> [L; 8] {
    let mask = L::splat(0x3030_3030);
    for i in 0..8 {
        nibbles[i] = nibbles[i].or(bits[i].left::<LEFT>().right::<RIGHT>().and(mask));
    }
    nibbles
}

impl Unpack for Q6K {
    type Kind = Arithmetic<2, false, 63>;
    const ZERO: i32 = 32;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S) {
        for block in 0..blocks {
            let rows = rows.skip(block * Self::BYTES);
            let d = unsafe { collect::<L>(rows.skip(208), half_word) }.halves();
            let scales = unsafe { L::load_rows(rows.skip(192)) };
            for half in 0..2 {
                let (low, high) = (rows.skip(64 * half), rows.skip(128 + 32 * half));
                let (a, b, bits) = unsafe {
                    (
                        [L::load_rows(low), L::load_rows(low.skip(16))],
                        [L::load_rows(low.skip(32)), L::load_rows(low.skip(48))],
                        joined(L::load_rows(high), L::load_rows(high.skip(16))),
                    )
                };
                macro_rules! pair {
                    ($part:literal, $nibbles:ident, $left:literal $right:literal, $next_left:literal $next_right:literal) => {
                        unsafe {
                            // flipping the sign bits adds 128, which makes them unsigned
                            let mut scales = four_bytes(scales[2 * half + $part].xor(L::splat(0x8080_8080)));
                            for i in 0..4 {
                                scales[i] = L::mul(d, L::add(scales[i], L::splat_float(-128.0)));
                            }
                            let low = joined($nibbles(a[0]), $nibbles(a[1]));
                            let weights = with_upper_bits::<L, $left, $right>(low, &bits);
                            sink.take(weights, [scales[0], scales[1]], [d; 2]);
                            let low = joined($nibbles(b[0]), $nibbles(b[1]));
                            let weights = with_upper_bits::<L, $next_left, $next_right>(low, &bits);
                            sink.take(weights, [scales[2], scales[3]], [d; 2]);
                        }
                    };
                }
                pair!(0, low_nibbles, 4 0, 2 0);
                pair!(1, high_nibbles, 0 0, 0 2);
            }
        }
    }
}

impl Unpack for IQ4XS {
    type Kind = Arithmetic<1, false, 255>;
    const ZERO: i32 = 128;

    #[inline(always)]
    unsafe fn unpack<L: Lanes, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S) {
        let table = bytes_of_table::<L>(&IQ4_TABLE);
        for block in 0..blocks {
            let rows = rows.skip(block * Self::BYTES);
            let [head, lower, _, _] = unsafe { L::load_rows(rows) };
            let d = head.halves();
            macro_rules! group {
                ($group:literal, $lower:literal, $upper:literal) => {
                    unsafe {
                        let low = lower.right::<$lower>().and(L::splat(15));
                        let scale = low.or(head.right::<$upper>().and(L::splat(0x30))).floats();
                        let scale = L::mul(d, L::add(scale, L::splat_float(-32.0)));
                        let weights = looked_up(&table, L::load_rows(rows.skip(8 + 16 * $group)));
                        sink.take(weights, [scale; 2], [scale; 2]);
                    }
                };
            }
            group!(0, 0, 12);
            group!(1, 4, 14);
            group!(2, 8, 16);
            group!(3, 12, 18);
            group!(4, 16, 20);
            group!(5, 20, 22);
            group!(6, 24, 24);
            group!(7, 28, 26);
        }
    }
}
