//! Packs panels of matrix operands in the order in which products read them.

use crate::isa::Arithmetic;
use crate::math::Element;
use crate::operand::{Matrix, Product};

/// A buffer for a panel, aligned to a cache line.
#[repr(align(64))]
pub(crate) struct Panel<const N: usize>(pub(crate) [f32; N]);

/// Packs rows `rows.0 ..` of A, columns `at ..`: `[depth, MR]`, with zeros after the last row.
#[inline(always)]
pub(crate) fn pack_left<const MR: usize>(
    product: &Product,
    rows: (usize, usize),
    (at, depth): (usize, usize),
    to: &mut [f32],
) {
    let (row_stride, column_stride) = product.a_strides;
    let from = &product.a[rows.0 * row_stride + at * column_stride..];
    let to = to.as_chunks_mut::<MR>().0;
    if rows.1 == MR && column_stride == 1 {
        let from: [&[f32]; MR] = std::array::from_fn(|i| &from[i * row_stride..][..depth]);
        for (p, to) in to.iter_mut().enumerate() {
            for i in 0..MR {
                to[i] = from[i][p];
            }
        }
        return;
    }
    for (p, to) in to.iter_mut().enumerate() {
        for (i, to) in to.iter_mut().enumerate() {
            *to = if i < rows.1 { from[i * row_stride + p * column_stride] } else { 0.0 };
        }
    }
}

/// Packs columns `columns.0 ..` of `alpha B`, rows `at ..`, widened: `[depth, NR]`, with zeros after the last column.
#[inline(always)]
pub(crate) fn pack_right<A: Arithmetic, const NR: usize>(
    product: &Product,
    columns: (usize, usize),
    rows: (usize, usize),
    to: &mut [f32],
) {
    match product.b {
        Matrix::F32(b) => pack::<A, f32, NR>(b, product, columns, rows, to),
        Matrix::F16(b) => pack::<A, half::f16, NR>(b, product, columns, rows, to),
        Matrix::BF16(b) => pack::<A, half::bf16, NR>(b, product, columns, rows, to),
    }
}

#[inline(always)]
fn pack<A: Arithmetic, T: Element, const NR: usize>(
    b: &[T],
    product: &Product,
    (first, width): (usize, usize),
    (at, depth): (usize, usize),
    to: &mut [f32],
) {
    let ((row_stride, column_stride), alpha) = (product.b_strides, product.alpha);
    let from = &b[at * row_stride + first * column_stride..];
    let to = to.as_chunks_mut::<NR>().0;
    if width == NR && column_stride == 1 {
        for (p, to) in to.iter_mut().enumerate() {
            let from = &from[p * row_stride..][..NR];
            for j in 0..NR {
                to[j] = alpha * from[j].to_f32();
            }
        }
        return;
    }
    if row_stride == 1 && depth > 0 {
        transpose::<A, T, NR>(from, (width, column_stride), depth, alpha, to);
        return;
    }
    for (p, to) in to.iter_mut().enumerate() {
        for (j, to) in to.iter_mut().enumerate() {
            *to = if j < width { alpha * from[p * row_stride + j * column_stride].to_f32() } else { 0.0 };
        }
    }
}

/// Rows and columns of a square that is transposed in registers.
const SQUARE: usize = 8;

/// Transposes `count` rows of `alpha from`, `stride` apart, to columns followed by zeros.
#[inline(always)]
fn transpose<A: Arithmetic, T: Element, const NR: usize>(
    from: &[T],
    (count, stride): (usize, usize),
    depth: usize,
    alpha: f32,
    to: &mut [[f32; NR]],
) {
    for j in (0..NR).step_by(SQUARE) {
        if j + SQUARE > count {
            for (p, to) in to.iter_mut().enumerate().take(depth) {
                for i in j..NR {
                    to[i] = if i < count { alpha * from[i * stride + p].to_f32() } else { 0.0 };
                }
            }
            return;
        }
        let rows: [&[T]; SQUARE] = std::array::from_fn(|i| &from[(j + i) * stride..][..depth]);
        let rows_of_squares = rows.map(|row| row.as_chunks::<SQUARE>().0);
        let (squares, rest) = to[..depth].as_chunks_mut::<SQUARE>();
        for (p, to) in squares.iter_mut().enumerate() {
            let square = rows_of_squares.map(|row| row[p].map(|value| alpha * value.to_f32()));
            let square = A::transposed(square);
            for q in 0..SQUARE {
                to[q][j..j + SQUARE].copy_from_slice(&square[q]);
            }
        }
        let whole = depth / SQUARE * SQUARE;
        for (p, to) in rest.iter_mut().enumerate() {
            for i in 0..SQUARE {
                to[j + i] = alpha * rows[i][whole + p].to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::isa::{Arithmetic, Fused, Isa, Separate, isa};

    #[test]
    fn a_square_is_transposed() {
        let square: [[f32; 8]; 8] = std::array::from_fn(|i| std::array::from_fn(|j| (8 * i + j) as f32));
        let is_right = |found: [[f32; 8]; 8]| (0..8).all(|i| (0..8).all(|j| (found[i][j] - square[j][i]).abs() < 0.5));
        assert!(is_right(Separate::transposed(square)));
        if isa() != Isa::Baseline {
            assert!(is_right(Fused::transposed(square)));
        }
    }
}
