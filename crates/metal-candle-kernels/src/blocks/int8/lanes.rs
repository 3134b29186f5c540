//! The interface of an instruction set: vectors with a lane of 32 bits for each of several rows of weights.

/// The columns of activations that share a scale.
pub(super) const COLUMNS: usize = 32;

/// The arithmetic that a format needs. Formats of equal arithmetic share kernels.
pub(super) trait Kind {
    /// The number of groups of 32 columns with separate scales: 1 or 2.
    const GROUPS: usize;
    /// Whether groups have minimums. Otherwise weights have a zero point.
    const HAS_MINIMUMS: bool;
    /// The largest unpacked weight. Formats with 255 are signed if [`Lanes::IS_SIGNED`].
    const MAX_WEIGHT: u32;
}

/// A [`Kind`] by its values.
pub(super) struct Arithmetic<const GROUPS: usize, const HAS_MINIMUMS: bool, const MAX_WEIGHT: u32>;

impl<const GROUPS: usize, const HAS_MINIMUMS: bool, const MAX_WEIGHT: u32> Kind
    for Arithmetic<GROUPS, HAS_MINIMUMS, MAX_WEIGHT>
{
    const GROUPS: usize = GROUPS;
    const HAS_MINIMUMS: bool = HAS_MINIMUMS;
    const MAX_WEIGHT: u32 = MAX_WEIGHT;
}

/// The same bytes of several rows of weights.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// The bytes of the first row.
    pub(super) first: *const u8,
    /// The row stride in bytes.
    pub(super) stride: usize,
}

impl Rows {
    /// The bytes of row `row`.
    #[inline(always)]
    pub(super) fn row(self, row: usize) -> *const u8 {
        self.first.wrapping_add(row * self.stride)
    }

    /// Skips `bytes` bytes of each row.
    #[inline(always)]
    pub(super) fn skip(self, bytes: usize) -> Self {
        Self { first: self.first.wrapping_add(bytes), ..self }
    }
}

/// A vector of unsigned 32-bit words, one for each row of weights.
///
/// The methods may be called only if the processor has the instructions, and are inlined into functions compiled for them.
pub(super) trait Lanes: Copy {
    /// The same number of f32 values.
    type Floats: Copy;
    /// Running dot products.
    type Dots: Copy;
    /// The number of rows.
    const ROWS: usize;
    /// Whether weights of 8 bits are signed.
    const IS_SIGNED: bool;
    /// Maximum number of rows of A whose sums fit in the registers.
    const HEIGHT: usize;

    /// # Safety
    /// A vector can be read there.
    unsafe fn load(from: *const u8) -> Self;

    /// The low and the high words of [`Lanes::ROWS`] pairs.
    ///
    /// # Safety
    /// The pairs can be read.
    unsafe fn load_pairs(from: *const u64) -> [Self; 2];

    /// # Safety
    /// A vector can be written there.
    unsafe fn store(self, to: *mut u8);

    /// 16 bytes of each row: word `i` of the rows is the vector `i`.
    ///
    /// # Safety
    /// The bytes of the rows can be read.
    unsafe fn load_rows(rows: Rows) -> [Self; 4];

    /// The same word in each lane.
    fn splat(word: u32) -> Self;

    /// The same 16 bytes in each 128 bits.
    fn repeat(bytes: &[u8; 16]) -> Self;

    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;

    /// Each word shifted left.
    fn left<const BITS: i32>(self) -> Self;

    /// Each word shifted right; zeros come in.
    fn right<const BITS: i32>(self) -> Self;

    /// In each 128 bits: the bytes of `table` with these indices, all below 16.
    fn look_up(table: Self, indices: Self) -> Self;

    /// For each byte, 255 if it has the bit set in `bits`, else 0.
    fn has_bit(self, bits: Self) -> Self;

    /// The words, which are below 2^31, as f32.
    fn floats(self) -> Self::Floats;

    /// The f16 values in the low halves of the words, as f32.
    fn halves(self) -> Self::Floats;

    /// The words as the bits of f32 values.
    fn bits(self) -> Self::Floats;

    /// # Safety
    /// A vector can be read there.
    unsafe fn load_floats(from: *const f32) -> Self::Floats;

    /// # Safety
    /// A vector can be written there.
    unsafe fn store_floats(values: Self::Floats, to: *mut f32);

    fn splat_float(value: f32) -> Self::Floats;
    fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// `a b + c`, rounded once.
    fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;

    /// Dot products that start from a value.
    fn start(value: i32) -> Self::Dots;

    /// Adds the products of four columns: the bytes of each word of `weights`, which are at most `max_weight`, and four signed
    /// bytes. It is step `step` of `steps`.
    ///
    /// # Safety
    /// Four bytes can be read at `a`.
    unsafe fn step(
        dots: Self::Dots,
        weights: Self,
        a: *const u8,
        max_weight: u32,
        step: usize,
        steps: usize,
    ) -> Self::Dots;

    /// The dot products after the last step.
    fn finish(dots: Self::Dots) -> Self::Floats;

    /// Prefetches a cache line to the L2 cache.
    fn prefetch(from: *const u8);
}

/// Receives unpacked weights.
pub(super) trait Sink<L: Lanes> {
    /// Receives 32 columns of the rows: vector `i` of the weights has columns `4 i..4 i + 4`. With one group, the second scale
    /// and minimum equal the first.
    ///
    /// # Safety
    /// The buffer of the sink is large enough.
    unsafe fn take(&mut self, weights: [L; 8], scales: [L::Floats; 2], minimums: [L::Floats; 2]);
}

/// Unpacks a format.
pub(super) trait Unpack {
    type Kind: Kind;
    /// The zero point of unsigned unpacked weights.
    const ZERO: i32;

    /// Unpacks blocks of [`Lanes::ROWS`] rows.
    ///
    /// # Safety
    /// Each row has `blocks` blocks.
    unsafe fn unpack<L: Lanes, S: Sink<L>>(rows: Rows, blocks: usize, sink: &mut S);

    /// The zero point of the weights in the format of these lanes.
    fn zero<L: Lanes>() -> i32 {
        if L::IS_SIGNED && Self::Kind::MAX_WEIGHT == 255 { 0 } else { Self::ZERO }
    }
}
