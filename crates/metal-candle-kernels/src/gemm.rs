//! Computes matrix products with weights of any type, accumulated in f32.
//!
//! The right operand is packed one panel of a few columns at a time. The panel stays in the L1 cache while the whole left
//! operand, which was packed before, is streamed (the loops of <https://doi.org/10.1145/1356052.1356053>, section 4, with
//! one panel per block). Half-precision operands are widened while they are packed.

use crate::gemm_narrow::{MAX_DOT_ROWS, few_rows, narrow_outer};
#[cfg(not(target_arch = "aarch64"))]
use crate::isa::Separate;
use crate::isa::{Arithmetic, Fused};
use crate::operand::{MatmulPrecision, Matrix, Product, Start};
use crate::pack::{Panel, pack_left, pack_right};
use crate::parallel::{Shared, for_each, written};
use gemmkit::{MatRef, Parallelism};
use std::cell::Cell;

/// The depth (columns of A, rows of B) that is multiplied at a time with a panel of `columns` columns: together they fill about
/// two thirds of the L1 cache.
const fn panel_depth(columns: usize) -> usize {
    if columns > 16 { 256 } else { 320 }
}

/// Elements of the largest panel.
const PANEL: usize = 256 * MAX_COLUMNS;

/// The number of columns of A that are packed at a time is a multiple of this.
const DEPTH: usize = 320;

/// Elements of the left operand that are packed at a time.
const LEFT_ELEMENTS: usize = 4 << 20;

/// Columns of the widest panel.
const MAX_COLUMNS: usize = 32;

/// The size of the packed left operand `[m, depth]` of a product, in bytes.
#[must_use]
pub fn packed_bytes(m: usize, depth: usize) -> usize {
    if crate::tiles::is_always_used() {
        return crate::tiles::shared_bytes(m, depth);
    }
    let rows = m.next_multiple_of(tile_rows());
    4 * rows * depth.min(packed_depth(rows))
}

/// Columns of the left operand that are packed at a time.
fn packed_depth(rows: usize) -> usize {
    (LEFT_ELEMENTS / rows.max(1)).max(DEPTH) / DEPTH * DEPTH
}

/// Rows of a tile.
fn tile_rows() -> usize {
    if crate::isa::isa() == crate::isa::Isa::Avx512 { 12 } else { 6 }
}

/// The start and length of each step of the depth, with lengths as equal as possible.
fn depths<const NR: usize>(k: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = k.div_ceil(k.div_ceil(panel_depth(NR)).max(1)).max(1);
    (0..k).step_by(step).map(move |at| (at, step.min(k - at)))
}

thread_local! {
    static LEFT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `start + sum of products` as a new matrix `[m, n]`, row-major.
///
/// The order of summation does not depend on the number of threads.
///
/// # Panics
/// An operand is shorter than its shape and strides require, or the start is the result itself.
#[must_use]
pub fn gemm_sum((m, n): (usize, usize), start: Start, products: &[Product]) -> Vec<f32> {
    assert!(!matches!(start, Start::Result), "there is no result to start from");
    // SAFETY: every path first writes the initial value.
    unsafe { written(m * n, |c| accumulate((m, n), start, products, c)) }
}

/// As [`gemm_sum`], but overwrites `c`.
///
/// # Panics
/// An operand or `c` is shorter than its shape and strides require.
pub fn gemm_sum_to((m, n): (usize, usize), start: Start, products: &[Product], c: &mut [f32]) {
    assert!(c.len() >= m * n, "the result has {} elements, not {m} x {n}", c.len());
    accumulate((m, n), start, products, Shared::new(c));
}

fn accumulate((m, n): (usize, usize), start: Start, products: &[Product], c: Shared<f32>) {
    if m == 0 || n == 0 {
        return;
    }
    start.check((m, n));
    for Product { a, a_strides, b, b_strides, k, .. } in products.iter().filter(|product| product.k > 0) {
        assert!(a.len() > (m - 1) * a_strides.0 + (k - 1) * a_strides.1, "the left operand is too short");
        assert!(b.len() > (k - 1) * b_strides.0 + (n - 1) * b_strides.1, "the right operand is too short");
    }
    if let Some(unit) = crate::tiles::unit_for(n, products) {
        return crate::tiles::accumulate(unit, (m, n), start, products, c);
    }
    if let ([product], Start::Zero) = (products, start)
        && narrow_outer((m, n), product, c)
    {
        return;
    }
    if m <= MAX_DOT_ROWS && products.iter().all(|p| p.a_strides.1 == 1 && p.b_strides.0 == 1 && p.b_strides.1 >= p.k) {
        return few_rows((m, n), start, products, c);
    }
    // the largest tiles that fit in the registers, but not wider than the result
    #[cfg(target_arch = "x86_64")]
    match crate::isa::isa() {
        crate::isa::Isa::Avx512 if n > 16 => return run::<12, 32>((m, n), start, products, c, avx512::<12, 32>),
        crate::isa::Isa::Avx512 => return run::<12, 16>((m, n), start, products, c, avx512::<12, 16>),
        crate::isa::Isa::Avx2 if n > 8 => return run::<6, 16>((m, n), start, products, c, avx2::<6, 16>),
        crate::isa::Isa::Avx2 => return run::<10, 8>((m, n), start, products, c, avx2::<10, 8>),
        crate::isa::Isa::Baseline => {}
    }
    run::<6, 16>((m, n), start, products, c, baseline);
}

/// A part of the result: columns `panels * NR` of the rows of the left operand's `rows` panels.
struct Task<'a> {
    shape: (usize, usize),
    start: Start<'a>,
    products: &'a [Product<'a>],
    left: &'a [f32],
    panels: (usize, usize),
    rows: (usize, usize),
    c: Shared<f32>,
}

fn run<const MR: usize, const NR: usize>(
    (m, n): (usize, usize),
    start: Start,
    products: &[Product],
    c: Shared<f32>,
    task: impl Fn(&Task) + Send + Sync,
) {
    // packs a part of the depth at a time, to limit the size of the packed left operand
    let max_depth = packed_depth(m.next_multiple_of(MR));
    let (mut start, mut parts, mut depth) = (start, Vec::with_capacity(products.len()), 0);
    for product in products {
        let mut at = 0;
        while at < product.k {
            let k = (product.k - at).min(max_depth - depth);
            parts.push(product.part(at, k));
            (at, depth) = (at + k, depth + k);
            if depth == max_depth {
                run_part::<MR, NR>((m, n), start, &parts, c, &task);
                (start, depth) = (Start::Result, 0);
                parts.clear();
            }
        }
    }
    if depth > 0 || matches!(start, Start::Zero | Start::Row(_) | Start::Matrix(_)) {
        run_part::<MR, NR>((m, n), start, &parts, c, &task);
    }
}

fn run_part<const MR: usize, const NR: usize>(
    (m, n): (usize, usize),
    start: Start,
    products: &[Product],
    c: Shared<f32>,
    task: &(impl Fn(&Task) + Send + Sync),
) {
    let row_panels = m.div_ceil(MR);
    let depth: usize = products.iter().map(|product| product.k).sum();
    let packed: usize = products.iter().filter(|product| !is_direct(product, n)).map(|product| product.k).sum();
    let mut left = LEFT.take();
    if left.len() < row_panels * MR * packed {
        // free first: growing in place would need memory for both buffers
        drop(left);
        left = vec![0.0; row_panels * MR * packed];
    }
    let shared = Shared::new(&mut left);
    for_each(if packed == 0 { 0 } else { row_panels }, m * packed, |panel| {
        let mut offset = 0;
        for product in products.iter().filter(|product| !is_direct(product, n)) {
            for (at, depth) in depths::<NR>(product.k) {
                let rows = (panel * MR, MR.min(m - panel * MR));
                // SAFETY: panels do not overlap.
                let to = unsafe { shared.part(offset + panel * MR * depth, MR * depth) };
                pack_left::<MR>(product, rows, (at, depth), to);
                offset += row_panels * MR * depth;
            }
        }
    });

    let (panels, threads) = (n.div_ceil(NR), rayon::current_num_threads());
    let per_task = panels.div_ceil(4 * threads).clamp(1, 8);
    let columns = panels.div_ceil(per_task);
    // with few columns, the threads split the rows; each part then packs the right operand again
    let min_tasks = if packed == 0 { threads } else { 4 * threads };
    let parts = if threads == 1 { 1 } else { min_tasks.div_ceil(columns).min(row_panels.div_ceil(4)) };
    let rows_per_part = row_panels.div_ceil(parts);
    let parts = row_panels.div_ceil(rows_per_part);
    let left_ref = &left;
    for_each(columns * parts, m * n * depth / 16, |number| {
        let (column, part) = (number / parts, number % parts);
        task(&Task {
            shape: (m, n),
            start,
            products,
            left: left_ref,
            panels: (column * per_task, panels.min((column + 1) * per_task)),
            rows: (part * rows_per_part, row_panels.min((part + 1) * rows_per_part)),
            c,
        });
    });
    LEFT.set(left);
}

#[cfg(target_arch = "x86_64")]
fn avx512<const MR: usize, const NR: usize>(task: &Task) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    fn body<const MR: usize, const NR: usize>(task: &Task) {
        task_body::<Fused, MR, NR>(task);
    }
    // SAFETY: used only if `isa` has detected these instructions.
    unsafe { body::<MR, NR>(task) }
}

#[cfg(target_arch = "x86_64")]
fn avx2<const MR: usize, const NR: usize>(task: &Task) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn body<const MR: usize, const NR: usize>(task: &Task) {
        task_body::<Fused, MR, NR>(task);
    }
    // SAFETY: as above.
    unsafe { body::<MR, NR>(task) }
}

fn baseline(task: &Task) {
    #[cfg(target_arch = "aarch64")]
    task_body::<Fused, 6, 16>(task);
    #[cfg(not(target_arch = "aarch64"))]
    task_body::<Separate, 6, 16>(task);
}

// the panel (32 KB) must be on the stack of the thread that fills it
#[allow(clippy::large_stack_arrays)]
#[inline(always)]
fn task_body<A: Arithmetic, const MR: usize, const NR: usize>(task: &Task) {
    let (m, n) = task.shape;
    let row_panels = m.div_ceil(MR);
    let mut panel = Panel([0.0; PANEL]);
    let mut start = task.start;
    let mut offset = 0;
    let mut is_done = false;
    let columns = (task.panels.0..task.panels.1).map(|panel| (panel * NR, NR.min(n - panel * NR)));
    for product in task.products {
        let is_direct = is_direct(product, n);
        for (at, depth) in depths::<NR>(product.k) {
            for (j, width) in columns.clone() {
                let right = &mut panel.0[..depth * NR];
                pack_right::<A, NR>(product, (j, width), (at, depth), right);
                for row_panel in task.rows.0..task.rows.1 {
                    let tile = if is_direct {
                        let rows = (row_panel * MR, MR.min(m - row_panel * MR));
                        multiply_direct::<A, MR, NR>(product, rows, (at, depth), right)
                    } else {
                        let left = &task.left[offset + row_panel * MR * depth..][..MR * depth];
                        multiply::<A, MR, NR>(left, right)
                    };
                    store(task, &tile, (row_panel * MR, j), width, start);
                }
            }
            offset += if is_direct { 0 } else { row_panels * MR * depth };
            start = Start::Result;
            is_done = true;
        }
    }
    if !is_done {
        for (j, width) in columns {
            for row_panel in task.rows.0..task.rows.1 {
                store(task, &[[0.0; NR]; MR], (row_panel * MR, j), width, start);
            }
        }
    }
}

/// The product of a panel of rows and a panel of columns.
#[inline(always)]
fn multiply<A: Arithmetic, const MR: usize, const NR: usize>(left: &[f32], right: &[f32]) -> [[f32; NR]; MR] {
    let mut sums = [[0.0; NR]; MR];
    for (a, b) in left.as_chunks::<MR>().0.iter().zip(right.as_chunks::<NR>().0) {
        for i in 0..MR {
            for j in 0..NR {
                sums[i][j] = A::mul_add(a[i], b[j], sums[i][j]);
            }
        }
    }
    sums
}

/// Whether the rows of A are read without packing, which would cost more than it saves for few columns.
fn is_direct(product: &Product, n: usize) -> bool {
    n <= MAX_COLUMNS && product.a_strides.1 == 1
}

/// As [`multiply`] with the unpacked rows `rows.0 ..` of A, columns `at ..`; after the last row, it is repeated.
#[inline(always)]
fn multiply_direct<A: Arithmetic, const MR: usize, const NR: usize>(
    product: &Product,
    rows: (usize, usize),
    (at, depth): (usize, usize),
    right: &[f32],
) -> [[f32; NR]; MR] {
    let row = |i: usize| &product.a[(rows.0 + i.min(rows.1 - 1)) * product.a_strides.0 + at..][..depth];
    let left: [&[f32]; MR] = std::array::from_fn(row);
    let mut sums = [[0.0; NR]; MR];
    let right = &right.as_chunks::<NR>().0[..depth];
    for p in 0..depth {
        let b = &right[p];
        for i in 0..MR {
            for j in 0..NR {
                sums[i][j] = A::mul_add(left[i][p], b[j], sums[i][j]);
            }
        }
    }
    sums
}

/// Adds a tile to the result.
#[inline(always)]
fn store<const MR: usize, const NR: usize>(
    task: &Task,
    tile: &[[f32; NR]; MR],
    (i, j): (usize, usize),
    width: usize,
    start: Start,
) {
    let (m, n) = task.shape;
    for (row, sums) in tile.iter().enumerate().take(MR.min(m - i)) {
        let at = (i + row) * n + j;
        // SAFETY: tasks have disjoint rows or columns.
        let c = unsafe { task.c.part(at, width) };
        match start {
            Start::Zero => set::<NR>(c, sums, |_, sum| sum),
            Start::Result => set::<NR>(c, sums, |c, sum| c + sum),
            Start::Row(row) => {
                set::<NR>(c, sums, |_, sum| sum);
                add::<NR>(c, &row[j..j + width]);
            }
            Start::Matrix(matrix) => {
                set::<NR>(c, sums, |_, sum| sum);
                add::<NR>(c, &matrix[at..at + width]);
            }
        }
    }
}

/// Applies `change(c, sum)` to each element; for a whole row of a tile, the compiler knows the length.
#[inline(always)]
fn set<const NR: usize>(c: &mut [f32], sums: &[f32; NR], change: impl Fn(f32, f32) -> f32) {
    if let Some(c) = c.first_chunk_mut::<NR>() {
        for j in 0..NR {
            c[j] = change(c[j], sums[j]);
        }
        return;
    }
    for (c, sum) in c.iter_mut().zip(sums) {
        *c = change(*c, *sum);
    }
}

#[inline(always)]
fn add<const NR: usize>(c: &mut [f32], values: &[f32]) {
    if let (Some(c), Some(values)) = (c.first_chunk_mut::<NR>(), values.first_chunk::<NR>()) {
        for j in 0..NR {
            c[j] += values[j];
        }
        return;
    }
    for (c, value) in c.iter_mut().zip(values) {
        *c += value;
    }
}

/// `C = alpha A B + beta C` with `A: [m, k]`, `B: [k, n]`, `C: [m, n]` row-major; `beta` is 0 or 1.
///
/// # Panics
/// An operand is shorter than its shape and strides require.
#[allow(clippy::too_many_arguments)]
pub fn gemm(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: &[f32],
    a_strides: (usize, usize),
    b: Matrix,
    b_strides: (usize, usize),
    beta: f32,
    c: &mut [f32],
) {
    let start = if beta == 0.0 { Start::Zero } else { Start::Result };
    gemm_sum_to((m, n), start, &[Product { a, a_strides, b, b_strides, k, alpha, precision: MatmulPrecision::F32 }], c);
}

/// `C = alpha A B + beta C` on the calling thread; `c` is a pointer and the row stride.
///
/// # Safety
/// The rows of C are writable, and no other task accesses them during the call.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn serial_gemm(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: &[f32],
    a_strides: (usize, usize),
    b: &[f32],
    b_strides: (usize, usize),
    beta: f32,
    (c, c_stride): (*mut f32, usize),
) {
    let signed = |(row, column): (usize, usize)| (row as isize, column as isize);
    // check that the operands are within their slices
    let (a_row, a_column) = signed(a_strides);
    let (b_row, b_column) = signed(b_strides);
    let _ = (MatRef::new(a, m, k, a_row, a_column), MatRef::new(b, k, n, b_row, b_column));
    // SAFETY: A and B were just checked; C is the caller's promise.
    unsafe {
        gemmkit::gemm_unchecked(
            m,
            k,
            n,
            alpha,
            a.as_ptr(),
            a_row,
            a_column,
            b.as_ptr(),
            b_row,
            b_column,
            beta,
            c,
            c_stride as isize,
            1,
            Parallelism::Serial,
        );
    }
}

/// With at least this number of rows and columns, gemmkit sums each element of C in the same order.
const STABLE_ROWS: usize = 2;
const STABLE_COLUMNS: usize = 32;

/// As [`serial_gemm`], but an element does not depend on other rows of A and columns of B, bit for bit. A small number of rows
/// or columns, which gemmkit sums in a different order, is padded in `scratch`.
///
/// # Safety
/// Same as [`serial_gemm`].
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn serial_gemm_by_row(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: &[f32],
    a_strides: (usize, usize),
    b: &[f32],
    b_strides: (usize, usize),
    beta: f32,
    (c, c_stride): (*mut f32, usize),
    scratch: &mut Vec<f32>,
) {
    if m >= STABLE_ROWS && n >= STABLE_COLUMNS {
        // SAFETY: the caller's promise.
        return unsafe { serial_gemm((m, n, k), alpha, a, a_strides, b, b_strides, beta, (c, c_stride)) };
    }
    let (rows, columns) = (m.max(STABLE_ROWS), n.max(STABLE_COLUMNS));
    scratch.clear();
    scratch.resize((rows + k) * columns, 0.0);
    let (sums, copy) = scratch.split_at_mut(rows * columns);
    for (i, sums) in sums.chunks_exact_mut(columns).enumerate().take(m) {
        // SAFETY: a row of C.
        sums[..n].copy_from_slice(unsafe { std::slice::from_raw_parts(c.add(i * c_stride), n) });
    }
    let is_by_column = b_strides.0 == 1;
    let (b, b_strides) = if n == columns {
        (b, b_strides)
    } else if is_by_column {
        for (j, copy) in copy.chunks_exact_mut(k.max(1)).enumerate().take(n) {
            copy.copy_from_slice(&b[j * b_strides.1..][..k]);
        }
        (&*copy, (1, k))
    } else {
        for (p, copy) in copy.chunks_exact_mut(columns).enumerate() {
            for (j, copy) in copy.iter_mut().enumerate().take(n) {
                *copy = b[p * b_strides.0 + j * b_strides.1];
            }
        }
        (&*copy, (columns, 1))
    };
    // a single row is used twice
    let a_strides = if m == 1 { (0, a_strides.1) } else { a_strides };
    // SAFETY: the sums are local.
    unsafe { serial_gemm((rows, columns, k), alpha, a, a_strides, b, b_strides, beta, (sums.as_mut_ptr(), columns)) };
    for (i, sums) in sums.chunks_exact(columns).enumerate().take(m) {
        // SAFETY: a row of C.
        unsafe { std::slice::from_raw_parts_mut(c.add(i * c_stride), n) }.copy_from_slice(&sums[..n]);
    }
}
