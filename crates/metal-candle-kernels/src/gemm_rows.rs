//! Products whose result for a row does not depend on the other rows: for inference, where a sequence gets the same bits alone
//! and in any batch.
//!
//! Each element of the result is one dot product along contiguous rows. It is summed in [`WIDTH`] lanes over the whole depth
//! and then pairwise, as [`crate::math::dot`] does, for one row as for a thousand. Few rows read the weights in place. For many
//! rows, a block of weights is widened into the first-level cache and multiplied by tiles of rows.

use crate::gemm_narrow::add_dots;
#[cfg(target_arch = "x86_64")]
use crate::gemm_tile::x86;
use crate::gemm_tile::{FIRST, LAST, Lanes, MIDDLE, Operands, Portable, Target, Vector, WHOLE, WIDTH};
#[cfg(target_arch = "aarch64")]
use crate::isa::Fused;
#[cfg(not(target_arch = "aarch64"))]
use crate::isa::Separate;
use crate::math::{Element, widen};
use crate::operand::{Matrix, Product, Start};
use crate::parallel::{Shared, for_each, written};
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
}

/// Elements of a row of weights that are widened at a time, without and with the gap that keeps rows apart in the cache.
const DEPTH: usize = 1024;
const PANEL_ROW: usize = DEPTH + WIDTH;
/// Most rows of weights of a tile.
const MAX_COLUMNS: usize = 4;
/// Rows of A whose part of the depth stays in the second-level cache.
const ROW_BLOCK: usize = 64;
/// Rows of weights of a task with many rows of A.
const TASK_COLUMNS: usize = 48;
/// Most rows of A for which weights are not widened beforehand.
const FEW_ROWS: usize = 8;
/// Weights of a task with few rows of A.
const TASK_ELEMENTS: usize = 64 * 1024;

thread_local! {
    static KEPT: Cell<Vec<Lanes>> = const { Cell::new(Vec::new()) };
}

/// `start + sum of products` as a new matrix `[m, n]`, row-major.
///
/// # Panics
/// An operand is shorter than its shape says, or the start is to be the result itself.
#[must_use]
pub fn row_products((m, n): (usize, usize), start: Start, products: &[RowProduct]) -> Vec<f32> {
    assert!(!matches!(start, Start::Result), "there is no result to start from");
    // SAFETY: every element is written from the start before it is read.
    unsafe { written(m * n, |c| add_up((m, n), start, products, c)) }
}

/// A product whose rows are a multiple of [`WIDTH`] long, except those of B, which are `k` long.
struct Padded<'a> {
    a: &'a [f32],
    a_stride: usize,
    b: Matrix<'a>,
    k: usize,
    alpha: f32,
}

/// Columns `columns` of the result.
struct Task<'a> {
    shape: (usize, usize),
    start: Start<'a>,
    products: &'a [Padded<'a>],
    columns: (usize, usize),
    c: Shared<f32>,
}

fn add_up((m, n): (usize, usize), start: Start, products: &[RowProduct], c: Shared<f32>) {
    if m == 0 || n == 0 {
        return;
    }
    match start {
        Start::Row(row) => assert!(row.len() >= n, "the row is too short"),
        Start::Matrix(matrix) => assert!(matrix.len() >= m * n, "the matrix is too short"),
        Start::Zero | Start::Result => {}
    }
    for product in products {
        assert!(product.a.len() >= m * product.k, "the left operand is too short");
        assert!(product.b.len() >= n * product.k, "the right operand is too short");
    }
    // each product by itself, since an adapter's may be added to those of some of the rows only
    let mut start = start;
    for products in products.chunk_by(|product, next| !is_for_unit(n, product) && !is_for_unit(n, next)) {
        match products {
            [product] if is_for_unit(n, product) => crate::tiles::add_up((m, n), start, &[strided(product)], c),
            _ => add_up_lanes((m, n), start, products, c),
        }
        start = Start::Result;
    }
    if products.is_empty() {
        add_up_lanes((m, n), start, products, c);
    }
}

fn strided<'a>(&RowProduct { a, b, k, alpha }: &RowProduct<'a>) -> Product<'a> {
    Product { a, a_strides: (k, 1), b, b_strides: (1, k), k, alpha }
}

fn is_for_unit(n: usize, product: &RowProduct) -> bool {
    crate::tiles::take(n, &[strided(product)])
}

/// [`add_up`] without a matrix unit.
fn add_up_lanes((m, n): (usize, usize), start: Start, products: &[RowProduct], c: Shared<f32>) {
    let copies: Vec<Vec<Line>> = products.iter().map(|product| copied_rows(product, m)).collect();
    let padded: Vec<Padded> = products
        .iter()
        .zip(&copies)
        .map(|(&RowProduct { a, b, k, alpha }, copy)| {
            let (a, a_stride) = if copy.is_empty() { (a, k) } else { (elements(copy), copied_stride(k)) };
            Padded { a, a_stride, b, k, alpha }
        })
        .collect();
    let depth: usize = products.iter().map(|product| product.k).sum();
    let per_task = if m <= FEW_ROWS {
        (TASK_ELEMENTS / depth.max(1)).max(1).next_multiple_of(24)
    } else {
        TASK_COLUMNS.min(n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(MAX_COLUMNS))
    };
    for_each(n.div_ceil(per_task), m * n * depth, |number| {
        let columns = (number * per_task, n.min((number + 1) * per_task));
        run(&Task { shape: (m, n), start, products: &padded, columns, c });
    });
}

/// A cache line.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line([f32; 16]);

/// The distance of rows that are copied, in elements: whole cache lines, and not a power of two, at multiples of which lines
/// displace each other in the cache.
fn copied_stride(k: usize) -> usize {
    k.next_multiple_of(WIDTH) + 16
}

/// The rows of A at cache lines, with zeros up to a multiple of [`WIDTH`]; nothing where they are read as they are.
fn copied_rows(product: &RowProduct, m: usize) -> Vec<Line> {
    let k = product.k;
    if m <= FEW_ROWS && k.is_multiple_of(WIDTH) {
        return Vec::new();
    }
    let stride = copied_stride(k);
    let mut copy = vec![Line([0.0; 16]); m * stride / 16];
    let shared = Shared::new(&mut copy);
    for_each(m, m * k, |i| {
        // SAFETY: tasks have rows of their own.
        let to = unsafe { shared.part(i * stride / 16, stride / 16) };
        for (to, from) in to.iter_mut().zip(product.a[i * k..][..k].chunks(16)) {
            to.0[..from.len()].copy_from_slice(from);
        }
    });
    copy
}

fn elements(lines: &[Line]) -> &[f32] {
    // SAFETY: a line is sixteen floats.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), 16 * lines.len()) }
}

/// Tiles as large as the registers hold.
fn run(task: &Task) {
    #[cfg(target_arch = "x86_64")]
    match crate::isa::isa() {
        crate::isa::Isa::Avx512 => return run_tiles::<x86::Avx512, 3, 4>(task),
        crate::isa::Isa::Avx2 => return run_tiles::<x86::Avx2, 1, 3>(task),
        crate::isa::Isa::Baseline => {}
    }
    #[cfg(target_arch = "aarch64")]
    run_tiles::<Portable<Fused>, 1, 3>(task);
    #[cfg(not(target_arch = "aarch64"))]
    run_tiles::<Portable<Separate>, 1, 3>(task);
}

/// The columns of a task, in tiles of `R` rows and `C` rows of weights.
fn run_tiles<V: Vector, const R: usize, const C: usize>(task: &Task) {
    let (m, n) = task.shape;
    let (from, to) = task.columns;
    for i in 0..m {
        // SAFETY: tasks have columns of their own.
        let c = unsafe { task.c.part(i * n + from, to - from) };
        match task.start {
            Start::Zero => c.fill(0.0),
            Start::Result => {}
            Start::Row(row) => c.copy_from_slice(&row[from..to]),
            Start::Matrix(matrix) => c.copy_from_slice(&matrix[i * n + from..i * n + to]),
        }
    }
    for product in task.products {
        match product.b {
            Matrix::F32(b) => multiply::<V, f32, R, C>(task, product, b),
            Matrix::F16(b) => multiply::<V, half::f16, R, C>(task, product, b),
            Matrix::BF16(b) => multiply::<V, half::bf16, R, C>(task, product, b),
        }
    }
}

fn multiply<V: Vector, T: Element, const R: usize, const C: usize>(task: &Task, product: &Padded, b: &[T]) {
    let m = task.shape.0;
    if m > FEW_ROWS || !product.k.is_multiple_of(WIDTH) {
        return many::<V, T, R, C>(task, product, b);
    }
    if m == 1 {
        let (from, to) = task.columns;
        // SAFETY: tasks have columns of their own.
        let c = unsafe { task.c.part(from, to - from) };
        return add_dots(&b[from * product.k..to * product.k], product.k, &product.a[..product.k], product.alpha, c);
    }
    for j in task.columns.0..task.columns.1 {
        for i in (0..m).step_by(4) {
            let (k, stride, alpha) = (product.k, task.shape.1, product.alpha);
            let operands = Operands {
                a: &product.a[i * product.a_stride..],
                a_stride: product.a_stride,
                weights: &b[j * k..][..k],
                weights_stride: k,
                depth: k,
            };
            let target = Target { c: task.c, at: i * stride + j, stride, width: 1, alpha };
            match m - i {
                1 => V::tile::<T, 1, 1, WHOLE>(&operands, &mut [], &target),
                2 => V::tile::<T, 2, 1, WHOLE>(&operands, &mut [], &target),
                3 => V::tile::<T, 3, 1, WHOLE>(&operands, &mut [], &target),
                _ => V::tile::<T, 4, 1, WHOLE>(&operands, &mut [], &target),
            }
        }
    }
}

#[repr(align(64))]
struct Panel([f32; MAX_COLUMNS * PANEL_ROW]);

/// Any number of rows: the weights are widened a block at a time.
// the panel belongs on the stack of the thread that fills it: 25 KB
#[allow(clippy::large_stack_arrays)]
fn many<V: Vector, T: Element, const R: usize, const C: usize>(task: &Task, product: &Padded, b: &[T]) {
    let (m, (from, to)) = (task.shape.0, task.columns);
    let k = product.k;
    let depth = k.div_ceil(k.div_ceil(DEPTH).max(1)).next_multiple_of(WIDTH);
    let mut panel = Panel([0.0; MAX_COLUMNS * PANEL_ROW]);
    let mut lanes = KEPT.take();
    let kept = if k > depth { R * C } else { 0 };
    let tiles = (to - from).div_ceil(C) * ROW_BLOCK.div_ceil(R);
    if lanes.len() < tiles * kept {
        lanes.resize(tiles * kept, Lanes::default());
    }
    for first in (0..m).step_by(ROW_BLOCK) {
        let last = m.min(first + ROW_BLOCK);
        for at in (0..k).step_by(depth) {
            let len = depth.min(k - at);
            let padded = len.next_multiple_of(WIDTH);
            let mut number = 0;
            for j in (from..to).step_by(C) {
                let width = C.min(to - j);
                for (c, row) in panel.0.chunks_exact_mut(PANEL_ROW).enumerate().take(width) {
                    widen(&b[(j + c) * k + at..][..len], &mut row[..len]);
                    row[len..padded].fill(0.0);
                }
                for i in (first..last).step_by(R) {
                    let kept = &mut lanes[number * kept..][..kept];
                    number += 1;
                    let operands = Operands {
                        a: &product.a[i * product.a_stride + at..],
                        a_stride: product.a_stride,
                        weights: &panel.0,
                        weights_stride: PANEL_ROW,
                        depth: padded,
                    };
                    let (stride, alpha) = (task.shape.1, product.alpha);
                    let target = Target { c: task.c, at: i * stride + j, stride, width, alpha };
                    match (at == 0, at + depth >= k) {
                        (true, true) => rows::<V, R, C, WHOLE>(last - i, &operands, kept, &target),
                        (true, false) => rows::<V, R, C, FIRST>(last - i, &operands, kept, &target),
                        (false, false) => rows::<V, R, C, MIDDLE>(last - i, &operands, kept, &target),
                        (false, true) => rows::<V, R, C, LAST>(last - i, &operands, kept, &target),
                    }
                }
            }
        }
    }
    KEPT.set(lanes);
}

/// A tile of at most `R` rows.
fn rows<V: Vector, const R: usize, const C: usize, const PART: u8>(
    rows: usize,
    operands: &Operands<f32>,
    kept: &mut [Lanes],
    target: &Target,
) {
    match rows {
        1 => V::tile::<f32, 1, C, PART>(operands, kept, target),
        2 if R > 2 => V::tile::<f32, 2, C, PART>(operands, kept, target),
        _ => V::tile::<f32, R, C, PART>(operands, kept, target),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::isa::Fused;
    use half::{bf16, f16};

    fn random(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .take(count)
        .collect()
    }

    const MOST_ROWS: usize = 500;

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
    fn a_row_alone_has_the_bits_of_the_row_among_others() {
        for (n, k) in SHAPES {
            let (a, z) = (random(MOST_ROWS * k, 1), random(MOST_ROWS * 3, 4));
            let (bias, residual, narrow) = (random(n, 3), random(MOST_ROWS * n, 5), random(n * 3, 6));
            in_every_type(n * k, |b, _| {
                let run = |first: usize, m: usize| -> Vec<u32> {
                    let products = [
                        RowProduct { a: &a[first * k..(first + m) * k], b, k, alpha: 1.0 },
                        RowProduct { a: &z[3 * first..3 * (first + m)], b: Matrix::F32(&narrow), k: 3, alpha: 1.7 },
                    ];
                    let residual = Start::Matrix(&residual[first * n..(first + m) * n]);
                    let starts = [Start::Zero, Start::Row(&bias), residual];
                    let sums = starts.map(|start| row_products((m, n), start, &products));
                    // by row, so that parts can be compared
                    (0..m)
                        .flat_map(|i| sums.each_ref().map(|sum| sum[i * n..][..n].to_vec()).concat())
                        .map(f32::to_bits)
                        .collect()
                };
                let whole = run(0, MOST_ROWS);
                for m in [1, 2, 3, 4, 5, 8, 9, 64] {
                    for first in [0, 7, MOST_ROWS - m] {
                        let expected = &whole[3 * first * n..3 * (first + m) * n];
                        assert!(run(first, m) == expected, "{m} rows from {first} on, n {n}, k {k}");
                    }
                }
            });
        }
    }

    #[test]
    fn sums_are_those_of_f64() {
        for (n, k) in SHAPES {
            let a = random(9 * k, 1);
            in_every_type(n * k, |b, wide| {
                for m in [1, 4, 9] {
                    let found = row_products((m, n), Start::Zero, &[RowProduct { a: &a[..m * k], b, k, alpha: -0.5 }]);
                    for (at, found) in found.iter().enumerate() {
                        let (x, w) = (&a[at / n * k..][..k], &wide[at % n * k..][..k]);
                        let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                        let error = (f64::from(*found) + 0.5 * sum).abs();
                        assert!(error <= 3e-7 * size, "{error} of {size} at {at}, n {n}, k {k}");
                    }
                }
            });
        }
    }

    #[test]
    fn the_portable_kernel_has_the_same_shape_of_sums() {
        let (n, k, m) = (7, 70, 12);
        let (a, b) = (random(m * k, 1), random(n * k, 2));
        let product = RowProduct { a: &a, b: Matrix::F32(&b), k, alpha: 1.0 };
        let copy = copied_rows(&product, m);
        let padded = Padded { a: elements(&copy), a_stride: copied_stride(k), b: product.b, k, alpha: 1.0 };
        let run = |run_tiles: fn(&Task)| {
            let mut c = vec![0.0; m * n];
            let c_shared = Shared::new(&mut c);
            let products = std::slice::from_ref(&padded);
            run_tiles(&Task { shape: (m, n), start: Start::Zero, products, columns: (0, n), c: c_shared });
            c
        };
        let expected = row_products((m, n), Start::Zero, &[product]);
        let separate = run(run_tiles::<Portable<Separate>, 1, 3>);
        assert!(expected.iter().zip(&separate).all(|(a, b)| (a - b).abs() < 1e-5));
        let fused = run(run_tiles::<Portable<Fused>, 1, 3>);
        if crate::isa::isa() != crate::isa::Isa::Baseline {
            assert!(expected == fused);
        }
        #[cfg(target_arch = "x86_64")]
        if crate::isa::isa() != crate::isa::Isa::Baseline {
            assert!(expected == run(run_tiles::<x86::Avx2, 1, 3>));
        }
    }

    #[test]
    fn empty_products_are_the_start() {
        assert!(row_products((0, 3), Start::Zero, &[]).is_empty());
        let nothing = RowProduct { a: &[], b: Matrix::F32(&[]), k: 0, alpha: 1.0 };
        assert_eq!(row_products((2, 2), Start::Row(&[1.0, 2.0]), &[nothing]), [1.0, 2.0, 1.0, 2.0]);
    }
}
