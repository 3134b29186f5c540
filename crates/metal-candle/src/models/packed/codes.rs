//! Unpacks integers of a few bits from 32-bit words.

/// The packed integers (codes) of a matrix, little-endian.
pub(super) struct Codes<'a> {
    bytes: &'a [u8],
    bits: u32,
    packing: Packing,
}

#[derive(Clone, Copy)]
enum Packing {
    Rows { row_bytes: usize },
    Columns { rows: usize },
    Awq { columns_words: usize },
    Signed { columns: usize },
}

impl<'a> Codes<'a> {
    /// Each row is a stream of codes of `bits` bits, lowest first, in `row_bytes` bytes.
    pub(super) fn in_rows(bytes: &'a [u8], bits: u32, row_bytes: usize) -> Self {
        Self { bytes, bits, packing: Packing::Rows { row_bytes } }
    }

    /// Each of `rows` rows is such a stream in a column of words.
    pub(super) fn in_columns(bytes: &'a [u8], bits: u32, rows: usize) -> Self {
        Self { bytes, bits, packing: Packing::Columns { rows } }
    }

    /// 4-bit codes as in AWQ: each word contains the codes of 8 rows, and the words for one column of codes are
    /// adjacent.
    pub(super) fn of_awq(bytes: &'a [u8], rows: usize) -> Self {
        Self { bytes, bits: 4, packing: Packing::Awq { columns_words: rows / 8 } }
    }

    /// Signed bytes; their codes are offset by 128.
    pub(super) fn signed(bytes: &'a [u8], columns: usize) -> Self {
        Self { bytes, bits: 8, packing: Packing::Signed { columns } }
    }

    pub(super) fn bits(&self) -> u32 {
        self.bits
    }

    /// Writes the codes of a row.
    pub(super) fn row(&self, row: usize, codes: &mut [u8]) {
        match self.packing {
            Packing::Rows { row_bytes } => {
                let bytes = &self.bytes[row * row_bytes..(row + 1) * row_bytes];
                match self.bits {
                    2 => split::<4>(bytes, codes),
                    4 => split::<2>(bytes, codes),
                    8 => codes.copy_from_slice(&bytes[..codes.len()]),
                    bits => stream(words(bytes), bits, codes),
                }
            }
            Packing::Columns { rows } => stream(words(self.bytes).skip(row).step_by(rows), self.bits, codes),
            Packing::Awq { columns_words } => {
                // the bit offsets of the codes of rows 0 to 7
                const SHIFTS: [u32; 8] = [0, 16, 4, 20, 8, 24, 12, 28];
                let shift = SHIFTS[row % 8];
                for (code, word) in codes.iter_mut().zip(words(self.bytes).skip(row / 8).step_by(columns_words)) {
                    *code = (word >> shift & 15) as u8;
                }
            }
            Packing::Signed { columns } => {
                for (code, byte) in codes.iter_mut().zip(&self.bytes[row * columns..]) {
                    *code = byte ^ 0x80;
                }
            }
        }
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word))
}

/// Splits each byte into `N` codes, lowest bits first.
fn split<const N: usize>(bytes: &[u8], codes: &mut [u8]) {
    let bits = 8 / N;
    let code = |byte: u8, number: usize| (byte >> (bits * number)) & (u8::MAX >> (8 - bits));
    let (whole, rest) = codes.as_chunks_mut::<N>();
    for (codes, byte) in whole.iter_mut().zip(bytes) {
        *codes = std::array::from_fn(|number| code(*byte, number));
    }
    if let Some(byte) = bytes.get(whole.len()) {
        for (number, to) in rest.iter_mut().enumerate() {
            *to = code(*byte, number);
        }
    }
}

/// Unpacks a stream of codes of `bits` bits.
fn stream(mut words: impl Iterator<Item = u32>, bits: u32, codes: &mut [u8]) {
    let mask = (1_u64 << bits) - 1;
    let (mut buffer, mut len) = (0_u64, 0);
    for code in codes {
        if len < bits {
            buffer |= u64::from(words.next().unwrap_or(0)) << len;
            len += u32::BITS;
        }
        *code = (buffer & mask) as u8;
        buffer >>= bits;
        len -= bits;
    }
}
