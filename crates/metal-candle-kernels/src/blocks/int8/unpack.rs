//! Unpacks blocks of 32 weights.

use super::lanes::{Arithmetic, Lanes, Rows, Sink, Unpack};
use crate::blocks::decode::{Decoder, FP4_TABLE, IQ4_TABLE, IQ4NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};

/// The number of blocks whose scales are collected at a time: reading a vector right after writing its words would stall.
const COLLECTED: usize = 8;

/// A format with 32 weights per block, and one or two words of scales and other bits.
trait SmallBlock: Decoder {
    /// Whether a block has two words.
    const HAS_TWO_WORDS: bool = false;
    /// Whether a minimum follows the scale.
    const HAS_MINIMUM: bool = false;

    /// The words of a block, the first in the low half.
    ///
    /// # Safety
    /// The block can be read.
    #[inline(always)]
    unsafe fn words(block: *const u8) -> u64 {
        // SAFETY: the caller's promise.
        unsafe {
            match (Self::HAS_TWO_WORDS, Self::HAS_MINIMUM) {
                (true, _) => two_words(block),
                (false, true) => u64::from(word(block)),
                (false, false) => u64::from(half_word(block)),
            }
        }
    }

    /// The scale in the low half of the first word and, if there is one, the minimum in the high half.
    #[inline(always)]
    fn scales<L: Lanes>(word: L) -> [L::Floats; 2] {
        let scale = word.halves();
        [scale, if Self::HAS_MINIMUM { word.right::<16>().halves() } else { scale }]
    }

    /// The weights.
    ///
    /// # Safety
    /// The rows can be read.
    unsafe fn weights<L: Lanes>(rows: Rows, words: [L; 2]) -> [L; 8];
}

#[repr(align(64))]
struct Words([[u64; 16]; COLLECTED]);

/// # Safety
/// Same as [`Unpack::unpack`].
#[inline(always)]
unsafe fn unpack_small<L: Lanes, B: SmallBlock, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S) {
    let mut words = Words([[0; 16]; COLLECTED]);
    for from in (0..blocks).step_by(COLLECTED) {
        let count = COLLECTED.min(blocks - from);
        for block in 0..count {
            let to = words.0[block].as_mut_ptr();
            for row in 0..L::ROWS {
                // SAFETY: the caller's promise, and there are at most 16 rows.
                unsafe {
                    let words = B::words(rows.skip((from + block) * B::BYTES).row(row));
                    if B::HAS_TWO_WORDS {
                        to.add(row).write(words);
                    } else {
                        to.cast::<u32>().add(row).write(words as u32);
                    }
                }
            }
        }
        for block in 0..count {
            let words = words.0[block].as_ptr();
            // SAFETY: as above, and the words have been written.
            unsafe {
                let words = if B::HAS_TWO_WORDS { L::load_pairs(words) } else { [L::load(words.cast()); 2] };
                let [scale, minimum] = B::scales(words[0]);
                let weights = B::weights(rows.skip((from + block) * B::BYTES), words);
                sink.take(weights, [scale; 2], [minimum; 2]);
            }
        }
    }
}

/// Two bytes as a word.
///
/// # Safety
/// They can be read.
#[inline(always)]
pub(super) unsafe fn half_word(from: *const u8) -> u32 {
    // SAFETY: the caller's promise.
    u32::from(unsafe { from.cast::<u16>().read_unaligned() }.to_le())
}

/// Eight bytes as two words.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn two_words(from: *const u8) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<u64>().read_unaligned() }.to_le()
}

/// Four bytes as a word.
///
/// # Safety
/// They can be read.
#[inline(always)]
pub(super) unsafe fn word(from: *const u8) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<u32>().read_unaligned() }.to_le()
}

/// The low four bits of each byte.
#[inline(always)]
pub(super) fn low_nibbles<L: Lanes>(packed: [L; 4]) -> [L; 4] {
    let mask = L::splat(0x0f0f_0f0f);
    [packed[0].and(mask), packed[1].and(mask), packed[2].and(mask), packed[3].and(mask)]
}

/// The high four bits of each byte.
#[inline(always)]
pub(super) fn high_nibbles<L: Lanes>(packed: [L; 4]) -> [L; 4] {
    low_nibbles([packed[0].right::<4>(), packed[1].right::<4>(), packed[2].right::<4>(), packed[3].right::<4>()])
}

/// Joins two arrays of four vectors.
#[inline(always)]
pub(super) fn joined<L: Lanes>(first: [L; 4], second: [L; 4]) -> [L; 8] {
    [first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]]
}

/// Looks up the low four bits of each byte, then the high four bits.
#[inline(always)]
pub(super) fn looked_up<L: Lanes>(table: &[u8; 16], packed: [L; 4]) -> [L; 8] {
    let table = L::repeat(table);
    let mut weights = joined(low_nibbles(packed), high_nibbles(packed));
    for i in 0..8 {
        weights[i] = L::look_up(table, weights[i]);
    }
    weights
}

/// Nibbles with their fifth bit, which is bit `i` of the word for column `i`.
#[inline(always)]
fn with_fifth_bits<L: Lanes>(packed: [L; 4], bits: L) -> [L; 8] {
    const BYTES: [[u8; 16]; 4] = {
        let mut bytes = [[0; 16]; 4];
        let mut i = 0;
        while i < 64 {
            bytes[i / 16][i % 16] = (i % 16 / 4 * 4 + i / 16) as u8;
            i += 1;
        }
        bytes
    };
    let mut weights = joined(low_nibbles(packed), high_nibbles(packed));
    let (masks, fifth) = ([L::splat(0x0804_0201), L::splat(0x8040_2010)], L::splat(0x1010_1010));
    for i in 0..8 {
        // repeats the byte with the bits of these four columns
        let bits = L::look_up(bits, L::repeat(&BYTES[i / 2]));
        weights[i] = weights[i].or(bits.has_bit(masks[i % 2]).and(fifth));
    }
    weights
}

macro_rules! unpack_small {
    ($format:ty, $kind:ty, $zero:expr) => {
        impl Unpack for $format {
            type Kind = $kind;
            const ZERO: i32 = $zero;

            #[inline(always)]
            unsafe fn unpack<L: Lanes, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S) {
                // SAFETY: the caller's promise.
                unsafe { unpack_small::<L, Self, S>(rows, blocks, sink) }
            }
        }
    };
}

unpack_small!(Q4_0, Arithmetic<1, false, 15>, 8);
unpack_small!(Q4_1, Arithmetic<1, true, 15>, 0);
unpack_small!(Q5_0, Arithmetic<1, false, 31>, 16);
unpack_small!(Q5_1, Arithmetic<1, true, 31>, 0);
unpack_small!(Q8_0, Arithmetic<1, false, 255>, 128);
unpack_small!(IQ4NL, Arithmetic<1, false, 255>, 128);
unpack_small!(MXFP4, Arithmetic<1, false, 31>, 12);

// SAFETY of the following: the caller's promise.

impl SmallBlock for Q4_0 {
    #[inline(always)]
    unsafe fn weights<L: Lanes>(rows: Rows, _: [L; 2]) -> [L; 8] {
        let packed = unsafe { L::load_rows(rows.skip(2)) };
        joined(low_nibbles(packed), high_nibbles(packed))
    }
}

impl SmallBlock for Q4_1 {
    const HAS_MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn weights<L: Lanes>(rows: Rows, _: [L; 2]) -> [L; 8] {
        let packed = unsafe { L::load_rows(rows.skip(4)) };
        joined(low_nibbles(packed), high_nibbles(packed))
    }
}

impl SmallBlock for Q5_0 {
    const HAS_TWO_WORDS: bool = true;

    #[inline(always)]
    unsafe fn weights<L: Lanes>(rows: Rows, words: [L; 2]) -> [L; 8] {
        // the bits follow the two bytes of the scale
        let bits = words[0].right::<16>().or(words[1].left::<16>());
        with_fifth_bits(unsafe { L::load_rows(rows.skip(6)) }, bits)
    }
}

impl SmallBlock for Q5_1 {
    const HAS_TWO_WORDS: bool = true;
    const HAS_MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn weights<L: Lanes>(rows: Rows, words: [L; 2]) -> [L; 8] {
        with_fifth_bits(unsafe { L::load_rows(rows.skip(8)) }, words[1])
    }
}

impl SmallBlock for Q8_0 {
    #[inline(always)]
    unsafe fn weights<L: Lanes>(rows: Rows, _: [L; 2]) -> [L; 8] {
        let mut weights = unsafe { joined(L::load_rows(rows.skip(2)), L::load_rows(rows.skip(18))) };
        if !L::IS_SIGNED {
            let sign = L::splat(0x8080_8080);
            for i in 0..8 {
                weights[i] = weights[i].xor(sign);
            }
        }
        weights
    }
}

/// Converts a table of 8-bit values to the format of the lanes.
#[inline(always)]
pub(super) fn bytes_of_table<L: Lanes>(table: &[i8; 16]) -> [u8; 16] {
    let mut bytes = [0; 16];
    for i in 0..16 {
        bytes[i] = table[i].cast_unsigned() ^ if L::IS_SIGNED { 0 } else { 0x80 };
    }
    bytes
}

impl SmallBlock for IQ4NL {
    #[inline(always)]
    unsafe fn weights<L: Lanes>(rows: Rows, _: [L; 2]) -> [L; 8] {
        looked_up(&bytes_of_table::<L>(&IQ4_TABLE), unsafe { L::load_rows(rows.skip(2)) })
    }
}

/// The 4-bit floats, doubled, plus 12, so that none is negative.
const SHIFTED_FP4_TABLE: [u8; 16] = {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (FP4_TABLE[i] + 12).cast_unsigned();
        i += 1;
    }
    table
};

impl SmallBlock for MXFP4 {
    #[inline(always)]
    unsafe fn words(block: *const u8) -> u64 {
        u64::from(Self::half_scale(unsafe { *block }))
    }

    #[inline(always)]
    fn scales<L: Lanes>(word: L) -> [L::Floats; 2] {
        [word.bits(); 2]
    }

    #[inline(always)]
    unsafe fn weights<L: Lanes>(rows: Rows, _: [L; 2]) -> [L; 8] {
        looked_up(&SHIFTED_FP4_TABLE, unsafe { L::load_rows(rows.skip(1)) })
    }
}
