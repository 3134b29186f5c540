//! Computes products whose result for a row does not depend on other rows, for inference: the results of a sequence are
//! identical alone and in any batch.
//!
//! Each element is one dot product of two contiguous rows, accumulated in lanes over the whole depth and then added pairwise,
//! for any number of rows. Weights are read in place and widened in registers, for up to eight rows at once; with
//! [`MatmulPrecision::Bf16`], where the processor multiplies bf16, the rows are rounded to bf16 instead.

#[cfg(target_arch = "x86_64")]
use crate::gemm_tile::x86;
use crate::gemm_tile::{Destination, FloatVector, Operands, Portable, Vector, Weights};
#[cfg(target_arch = "aarch64")]
use crate::isa::Fused;
#[cfg(not(target_arch = "aarch64"))]
use crate::isa::Separate;
use crate::isa::{Arithmetic, dispatch};
use crate::operand::{MatmulPrecision, Matrix, Product, Start};
use crate::parallel::{Shared, for_each, written};
use crate::tiles::TileUnit;
use half::{bf16, f16};
use std::cell::Cell;

/// `alpha A B^T` with `A: [m, k]` and `B: [n, k]`, both row-major without gaps.
#[derive(Debug, Clone, Copy)]
pub struct RowProduct<'a> {
    /// A.
    pub a: &'a [f32],
    /// B.
    pub b: Matrix<'a>,
    /// The number of columns of A and of B.
    pub k: usize,
    /// The factor.
    pub alpha: f32,
    /// The precision.
    pub precision: MatmulPrecision,
}

/// Rows of weights of a task if A has more than [`FEW_ROWS`] rows.
const TASK_COLUMNS: usize = 48;
/// Maximum number of rows of A for which the size of a task is [`TASK_ELEMENTS`].
const FEW_ROWS: usize = 8;
/// Weights of a task if A has few rows.
const TASK_ELEMENTS: usize = 64 * 1024;

/// `start + sum of products` as a new matrix `[m, n]`, row-major.
///
/// # Panics
/// An operand is shorter than its shape requires, or the start is the result itself.
#[must_use]
pub fn row_products((m, n): (usize, usize), start: Start, products: &[RowProduct]) -> Vec<f32> {
    assert!(!matches!(start, Start::Result), "there is no result to start from");
    // SAFETY: every element is written from the start before it is read.
    unsafe { written(m * n, |c| accumulate((m, n), start, products, c)) }
}

fn accumulate((m, n): (usize, usize), start: Start, products: &[RowProduct], c: Shared<f32>) {
    if m == 0 || n == 0 {
        return;
    }
    start.check((m, n));
    for product in products {
        assert!(product.a.len() >= m * product.k, "the left operand is too short");
        assert!(product.b.len() >= n * product.k, "the right operand is too short");
    }
    // products with bf16 instructions are separate: an adapter's product may be added to some rows only without changing other bits
    let mut start = start;
    let has_tiles = |product: &RowProduct| tile_unit(n, product).is_some();
    for products in products.chunk_by(|product, next| !has_tiles(product) && !has_tiles(next)) {
        match tile_unit(n, &products[0]) {
            Some(unit) if unit.is_always_used() => {
                crate::tiles::accumulate(unit, (m, n), start, &[strided(&products[0])], c);
            }
            Some(_) => accumulate_rounded((m, n), start, &products[0], c),
            None => accumulate_lanes((m, n), start, products, c),
        }
        start = Start::Result;
    }
    if products.is_empty() {
        accumulate_lanes((m, n), start, products, c);
    }
}

fn strided<'a>(&RowProduct { a, b, k, alpha, precision }: &RowProduct<'a>) -> Product<'a> {
    Product { a, a_strides: (k, 1), b, b_strides: (1, k), k, alpha, precision }
}

/// The unit that computes a product. Weights with more than one bf16 term use the vector units: splitting them takes longer than
/// reading them, which limits decoding.
fn tile_unit(n: usize, product: &RowProduct) -> Option<TileUnit> {
    if matches!(product.b, Matrix::BF16(_)) { crate::tiles::unit_for(n, &[strided(product)]) } else { None }
}

/// A product whose left operand is rounded to bf16. Reading both operands along the depth needs neither packed nor transposed
/// weights, for any number of rows.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
fn accumulate_rounded(shape: (usize, usize), start: Start, product: &RowProduct, c: Shared<f32>) {
    #[cfg(target_arch = "x86_64")]
    if let Matrix::BF16(b) = product.b {
        let order = |product: &RowProduct, m: usize, rows: &mut [Line]| round_rows(product.a, (m, product.k), rows);
        let multiply =
            |task: &Task, product: &RowProduct, rows: &Ordered| multiply::<x86::Bf16Dots, bf16>(task, product, rows, b);
        accumulate_in::<x86::Bf16Dots>(shape, start, std::slice::from_ref(product), c, order, multiply);
    }
}

/// [`accumulate`] in f32.
fn accumulate_lanes(shape: (usize, usize), start: Start, products: &[RowProduct], c: Shared<f32>) {
    #[cfg(target_arch = "x86_64")]
    match crate::isa::isa() {
        crate::isa::Isa::Avx512 => return accumulate_floats::<x86::Avx512>(shape, start, products, c),
        crate::isa::Isa::Avx2 => return accumulate_floats::<x86::Avx2>(shape, start, products, c),
        crate::isa::Isa::Baseline => {}
    }
    #[cfg(target_arch = "aarch64")]
    accumulate_floats::<Portable<Fused>>(shape, start, products, c);
    #[cfg(not(target_arch = "aarch64"))]
    accumulate_floats::<Portable<Separate>>(shape, start, products, c);
}

/// Rows of A in the order of [`Weights::pair`].
pub(crate) struct Ordered<'a> {
    pub(crate) rows: &'a [Line],
    /// The row stride, in lines.
    pub(crate) stride: usize,
    /// The number of columns.
    pub(crate) depth: usize,
}

thread_local! {
    static ROWS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// This thread's buffer, with at least `needed` lines.
fn take_rows(needed: usize) -> Vec<Line> {
    let mut buffer = ROWS.take();
    if buffer.len() < needed {
        // free first: growing in place would need memory for both buffers
        drop(buffer);
        buffer = vec![Line::default(); needed];
    }
    buffer
}

/// Columns `columns` of the result.
struct Task {
    shape: (usize, usize),
    columns: (usize, usize),
    c: Shared<f32>,
}

fn accumulate_floats<V: FloatVector>(shape: (usize, usize), start: Start, products: &[RowProduct], c: Shared<f32>) {
    let order = |product: &RowProduct, m: usize, rows: &mut [Line]| {
        order_rows::<V>(product.a, (m, product.k), matches!(product.b, Matrix::BF16(_)), rows);
    };
    let multiply = |task: &Task, product: &RowProduct, rows: &Ordered| match product.b {
        Matrix::F32(b) => multiply::<V, f32>(task, product, rows, b),
        Matrix::F16(b) => multiply::<V, f16>(task, product, rows, b),
        Matrix::BF16(b) => multiply::<V, bf16>(task, product, rows, b),
    };
    accumulate_in::<V>(shape, start, products, c, order, multiply);
}

/// [`accumulate`] with rows that `order` copies.
fn accumulate_in<V: Vector>(
    (m, n): (usize, usize),
    start: Start,
    products: &[RowProduct],
    c: Shared<f32>,
    order: impl Fn(&RowProduct, usize, &mut [Line]),
    multiply: impl Fn(&Task, &RowProduct, &Ordered) + Sync,
) {
    let lines = |product: &RowProduct| m * row_lines::<V::Row>(product.k);
    let mut buffer = take_rows(products.iter().map(lines).sum());
    let mut rest = &mut buffer[..];
    let mut ordered = Vec::with_capacity(products.len());
    for product in products.iter().filter(|product| product.k > 0) {
        let rows = rest.split_off_mut(..lines(product)).unwrap_or_default();
        order(product, m, rows);
        ordered.push((product, Ordered { rows, stride: row_lines::<V::Row>(product.k), depth: product.k }));
    }
    let depth: usize = products.iter().map(|product| product.k).sum();
    let per_task = if m <= FEW_ROWS {
        (TASK_ELEMENTS / depth.max(1)).max(1).next_multiple_of(24)
    } else {
        TASK_COLUMNS.min(n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(24))
    };
    for_each(n.div_ceil(per_task), m * n * depth, |number| {
        let columns = (number * per_task, n.min((number + 1) * per_task));
        // SAFETY: tasks have disjoint columns.
        unsafe { start.write_columns(c, (m, n), columns.0..columns.1) };
        let task = Task { shape: (m, n), columns, c };
        for (product, rows) in &ordered {
            multiply(&task, product, rows);
        }
    });
    ROWS.set(buffer);
}

/// Calls `run` with the rows of A, in the order for weights of f32.
pub(crate) fn with_ordered_rows<V: Vector>(a: &[f32], (m, k): (usize, usize), run: impl FnOnce(&[Line])) {
    let needed = m * row_lines::<f32>(k);
    let mut buffer = take_rows(needed);
    order_rows::<V>(a, (m, k), false, &mut buffer[..needed]);
    run(&buffer[..needed]);
    ROWS.set(buffer);
}

/// A cache line.
#[repr(align(64))]
#[derive(Clone, Copy, Default)]
#[allow(dead_code)] // accessed as floats
pub(crate) struct Line([f32; 16]);

impl Line {
    /// The floats of the lines.
    pub(crate) fn floats_mut(lines: &mut [Self]) -> &mut [f32] {
        // SAFETY: a line is sixteen floats.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 16) }
    }

    /// The bf16 of the lines.
    #[cfg(target_arch = "x86_64")]
    fn bf16_mut(lines: &mut [Self]) -> &mut [bf16] {
        // SAFETY: a line is 32 elements of two bytes, of which every bit pattern is valid.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 32) }
    }

    /// The bytes of the lines.
    pub(crate) fn bytes_mut(lines: &mut [Self]) -> &mut [u8] {
        // SAFETY: a line is 64 bytes, all of which are initialized.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 64) }
    }
}

/// The stride of ordered rows of `T`, in lines: at least a multiple of two vectors, but not a power of two, which would map rows to
/// the same cache sets.
pub(crate) fn row_lines<T>(k: usize) -> usize {
    k.next_multiple_of(32) * size_of::<T>() / size_of::<Line>() + 1
}

/// Copies the rows of A in the order of [`Weights::pair`], padded with zeros.
fn order_rows<V: Vector>(a: &[f32], (m, k): (usize, usize), is_split: bool, rows: &mut [Line]) {
    let lines = row_lines::<f32>(k);
    let shared = Shared::new(rows);
    for_each(m, m * k, |i| {
        // SAFETY: tasks have disjoint rows.
        let to = Line::floats_mut(unsafe { shared.part(i * lines, lines) });
        if is_split {
            // the last group may be partial
            to[k / 32 * 32..].fill(0.0);
            split(&a[i * k..][..k], 2 * V::LANES, to);
        } else {
            pad(&a[i * k..][..k], to);
        }
    });
}

/// Copies the rows of A, rounded to the nearest bf16 and padded with zeros.
#[cfg(target_arch = "x86_64")]
fn round_rows(a: &[f32], (m, k): (usize, usize), rows: &mut [Line]) {
    let lines = row_lines::<bf16>(k);
    let shared = Shared::new(rows);
    for_each(m, m * k, |i| {
        // SAFETY: tasks have disjoint rows.
        let to = Line::bf16_mut(unsafe { shared.part(i * lines, lines) });
        to[k / 32 * 32..].fill(bf16::ZERO);
        round(&a[i * k..][..k], to);
    });
}

dispatch! {
    /// Rounds to the nearest bf16.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fn round(from: &[f32], to: &mut [bf16]) = round_body
}

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[inline(always)]
fn round_body<A: Arithmetic>(from: &[f32], to: &mut [bf16]) {
    for (from, to) in from.iter().zip(to) {
        let bits = from.to_bits();
        let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        let quiet = bits | 0x40_0000;
        *to = bf16::from_bits(((if from.is_nan() { quiet } else { nearest }) >> 16) as u16);
    }
}

/// Copies a row and pads it with zeros.
fn pad(from: &[f32], to: &mut [f32]) {
    let (row, rest) = to.split_at_mut(from.len());
    row.copy_from_slice(from);
    rest.fill(0.0);
}

/// Calls `run` with the rows of A, in the order for weights of f32, on the calling thread alone.
pub(crate) fn with_padded_rows(a: &[f32], (m, k): (usize, usize), run: impl FnOnce(&[Line])) {
    let lines = row_lines::<f32>(k);
    let mut buffer = take_rows(m * lines);
    for (from, to) in a.chunks_exact(k.max(1)).zip(buffer.chunks_exact_mut(lines)).take(m) {
        pad(from, Line::floats_mut(to));
    }
    run(&buffer[..m * lines]);
    ROWS.set(buffer);
}

dispatch! {
    /// Splits each group into the elements with even index, then those with odd index.
    fn split(from: &[f32], group: usize, to: &mut [f32]) = split_body
}

#[inline(always)]
fn split_body<A: Arithmetic>(from: &[f32], group: usize, to: &mut [f32]) {
    for (from, to) in from.chunks(group).zip(to.chunks_exact_mut(group)) {
        let (even, odd) = to.split_at_mut(group / 2);
        let (pairs, last) = from.as_chunks::<2>();
        for ((pair, even), odd) in pairs.iter().zip(even.iter_mut()).zip(odd) {
            (*even, *odd) = (pair[0], pair[1]);
        }
        if let [last] = last {
            even[pairs.len()] = *last;
        }
    }
}

fn multiply<V: Vector, T: Weights<V>>(task: &Task, product: &RowProduct, rows: &Ordered, b: &[T]) {
    let weights = (&b[task.columns.0 * product.k..], product.k);
    // SAFETY: tasks have disjoint columns.
    unsafe { add_dots::<V, T>(task.shape, rows, weights, task.columns, product.alpha, task.c) };
}

/// Adds `alpha` times the dot products of the rows and rows of weights to columns `from..to` of the result `[m, n]`. `b` starts
/// with the weights of column `from`, and its rows are `b_stride` apart.
///
/// # Safety
/// No other task has these columns.
pub(crate) unsafe fn add_dots<V: Vector, T: Weights<V>>(
    (m, n): (usize, usize),
    &Ordered { rows, stride, depth }: &Ordered,
    (b, b_stride): (&[T], usize),
    (from, to): (usize, usize),
    alpha: f32,
    c: Shared<f32>,
) {
    let mut i = 0;
    while i < m {
        let (height, width) = V::shape(m - i);
        let height = height.min(m - i);
        // weights that are read once are read at distant rows: the hardware prefetches several streams at once
        let is_read_once = height == m;
        let apart = if is_read_once { (to - from).div_ceil(width) } else { 1 };
        let (end, step) = if is_read_once { (from + apart, 1) } else { (to, width) };
        for j in (from..end).step_by(step) {
            let width = width.min((to - j).div_ceil(apart));
            let weights = &b[(j - from) * b_stride..][..(width - 1) * apart * b_stride + depth];
            let operands = Operands {
                a: (rows[i * stride..].as_ptr().cast(), stride * size_of::<Line>() / size_of::<V::Row>(), height),
                weights: (weights.as_ptr(), b_stride * apart, width),
                depth,
                prefetches: !is_read_once,
            };
            // SAFETY: the element is within the columns.
            let first = unsafe { c.pointer().add(i * n + j) };
            let to = Destination { first, row_stride: n, column_stride: apart, alpha };
            // SAFETY: the rows are ordered and padded, the slice of the weights covers their rows, and the caller owns the elements.
            unsafe { V::add_dots(m - i, &operands, to) };
        }
        i += height;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::isa::Fused;
    use crate::testing::random;

    const MAX_ROWS: usize = 500;

    /// Calls `check` with the elements of a weight in each type, and as f32.
    fn in_every_type(count: usize, check: impl Fn(Matrix, &[f32])) {
        let wide = random(count, 2);
        check(Matrix::F32(&wide), &wide);
        let half: Vec<f16> = wide.iter().map(|&value| f16::from_f32(value)).collect();
        check(Matrix::F16(&half), &half.iter().map(|value| value.to_f32()).collect::<Vec<_>>());
        let brain: Vec<bf16> = wide.iter().map(|&value| bf16::from_f32(value)).collect();
        check(Matrix::BF16(&brain), &brain.iter().map(|value| value.to_f32()).collect::<Vec<_>>());
    }

    /// Odd widths, depths below and above a block, and the widths of a low-rank matrix.
    const SHAPES: [(usize, usize); 6] = [(37, 99), (64, 64), (5, 8), (3, 2600), (130, 1056), (1, 1)];

    #[test]
    fn the_bits_of_a_row_do_not_depend_on_other_rows() {
        for (n, k) in SHAPES {
            let (a, z) = (random(MAX_ROWS * k, 1), random(MAX_ROWS * 3, 4));
            let (bias, residual, narrow) = (random(n, 3), random(MAX_ROWS * n, 5), random(n * 3, 6));
            in_every_type(n * k, |b, _| {
                let run = |precision: MatmulPrecision, first: usize, m: usize| -> Vec<u32> {
                    let (a, z) = (&a[first * k..(first + m) * k], &z[3 * first..3 * (first + m)]);
                    let products = [
                        RowProduct { a, b, k, alpha: 1.0, precision },
                        RowProduct { a: z, b: Matrix::F32(&narrow), k: 3, alpha: 1.7, precision },
                    ];
                    let residual = Start::Matrix(&residual[first * n..(first + m) * n]);
                    let starts = [Start::Zero, Start::Row(&bias), residual];
                    let sums = starts.map(|start| row_products((m, n), start, &products));
                    // row by row, so that parts can be compared
                    (0..m)
                        .flat_map(|i| sums.each_ref().map(|sum| sum[i * n..][..n].to_vec()).concat())
                        .map(f32::to_bits)
                        .collect()
                };
                for precision in [MatmulPrecision::F32, MatmulPrecision::Bf16] {
                    let whole = run(precision, 0, MAX_ROWS);
                    for m in [1, 2, 3, 4, 5, 8, 9, 64] {
                        for first in [0, 7, MAX_ROWS - m] {
                            let expected = &whole[3 * first * n..3 * (first + m) * n];
                            let found = run(precision, first, m);
                            assert!(found == expected, "{m} rows from {first} on, n {n}, k {k}, {precision:?}");
                        }
                    }
                }
            });
        }
    }

    /// Rows and weights of which the last group is partial, and rows of every shape of a tile.
    #[test]
    fn rounded_rows_are_multiplied_in_f32() {
        let (n, k) = (133, 1050);
        let brain: Vec<bf16> = random(n * k, 2).into_iter().map(bf16::from_f32).collect();
        for m in [1, 2, 3, 4, 5, 8, 9, 40] {
            let a = random(m * k, 1);
            let product =
                RowProduct { a: &a, b: Matrix::BF16(&brain), k, alpha: -0.5, precision: MatmulPrecision::Bf16 };
            let is_rounded = tile_unit(n, &product).is_some();
            let rows: Vec<f32> = a.iter().map(|&a| if is_rounded { bf16::from_f32(a).to_f32() } else { a }).collect();
            let found = row_products((m, n), Start::Zero, &[product]);
            for (at, found) in found.into_iter().enumerate() {
                let (row, weights) = (&rows[at / n * k..][..k], &brain[at % n * k..][..k]);
                let products = row.iter().zip(weights).map(|(&a, b)| -0.5 * f64::from(a) * b.to_f64());
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                assert!((f64::from(found) - sum).abs() < 1e-6 * size, "{found} instead of {sum} at {at} of {m} rows");
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_even_bf16() {
        let mut values =
            vec![0.0, -0.0, 1.0, f32::MAX, f32::MIN_POSITIVE, 1e-40, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        values.extend((0..300).map(|i| f32::from_bits(0x3f80_0000 + (i << 12))));
        let mut found = vec![bf16::ZERO; values.len()];
        round(&values, &mut found);
        for (value, found) in values.iter().zip(found) {
            let expected = bf16::from_f32(*value);
            assert!(found == expected || found.is_nan() && expected.is_nan(), "{value} became {found}");
        }
    }

    /// The product of an adapter is added to some rows of a batch in a separate call.
    #[test]
    fn a_product_added_later_has_the_same_bits() {
        let (m, n, k) = (9, 37, 99);
        let (a, z, narrow) = (random(m * k, 1), random(m * 3, 2), random(n * 3, 3));
        in_every_type(n * k, |b, _| {
            let base = RowProduct { a: &a, b, k, alpha: 1.0, precision: MatmulPrecision::F32 };
            let update =
                RowProduct { a: &z, b: Matrix::F32(&narrow), k: 3, alpha: 1.7, precision: MatmulPrecision::F32 };
            let together = row_products((m, n), Start::Zero, &[base, update]);
            let first = row_products((m, n), Start::Zero, &[base]);
            assert_eq!(together, row_products((m, n), Start::Matrix(&first), &[update]));
        });
    }

    #[test]
    fn sums_match_f64() {
        for (n, k) in SHAPES {
            let a = random(9 * k, 1);
            in_every_type(n * k, |b, wide| {
                for m in [1, 4, 9] {
                    let found = row_products(
                        (m, n),
                        Start::Zero,
                        &[RowProduct { a: &a[..m * k], b, k, alpha: -0.5, precision: MatmulPrecision::F32 }],
                    );
                    for (at, found) in found.iter().enumerate() {
                        let (x, w) = (&a[at / n * k..][..k], &wide[at % n * k..][..k]);
                        let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                        let error = (f64::from(*found) + 0.5 * sum).abs();
                        // a matrix unit multiplies half precision with 16 bits of the activations
                        let bound = if crate::tiles::is_always_used() { 1e-5 } else { 3e-7 };
                        assert!(error <= bound * size, "{error} of {size} at {at}, n {n}, k {k}");
                    }
                }
            });
        }
    }

    type Accumulate = fn((usize, usize), Start, &[RowProduct], Shared<f32>);

    #[test]
    fn every_kernel_of_the_machine_computes_the_sums() {
        let (n, k, m) = (7, 70, 12);
        let a = random(m * k, 1);
        in_every_type(n * k, |b, _| {
            let product = RowProduct { a: &a, b, k, alpha: 1.0, precision: MatmulPrecision::F32 };
            let run = |accumulate: Accumulate| {
                let mut c = vec![0.0; m * n];
                accumulate((m, n), Start::Zero, &[product], Shared::new(&mut c));
                c
            };
            let fused = run(accumulate_floats::<Portable<Fused>>);
            let is_close = |other: &[f32]| fused.iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(is_close(&run(accumulate_floats::<Portable<crate::isa::Separate>>)));
            #[cfg(target_arch = "x86_64")]
            {
                use crate::isa::{Isa, isa};
                // the same number of lanes and the same operations
                assert!(isa() < Isa::Avx2 || fused == run(accumulate_floats::<x86::Avx2>));
                assert!(isa() < Isa::Avx512 || is_close(&run(accumulate_floats::<x86::Avx512>)));
            }
        });
    }

    #[test]
    fn empty_products_return_the_initial_value() {
        assert!(row_products((0, 3), Start::Zero, &[]).is_empty());
        let nothing = RowProduct { a: &[], b: Matrix::F32(&[]), k: 0, alpha: 1.0, precision: MatmulPrecision::F32 };
        assert_eq!(row_products((2, 2), Start::Row(&[1.0, 2.0]), &[nothing]), [1.0, 2.0, 1.0, 2.0]);
    }
}
