//! Decomposes matrices in f64: the largest singular values with their vectors, and Householder QR.
//!
//! Each decomposition runs on the calling thread, so that many matrices can be decomposed in parallel.

use crate::isa::{Arithmetic, dispatch};
use gemmkit::{MatMut, MatRef, Parallelism};

/// The largest singular values of a matrix `[m, n]`, in descending order, and their vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct SingularValues {
    /// Left vectors, one per row: `[rank, m]`.
    pub left: Vec<f64>,
    /// `[rank]`.
    pub values: Vec<f64>,
    /// Right vectors, one per row: `[rank, n]`.
    pub right: Vec<f64>,
}

/// Computes the `rank` largest singular values of `w: [m, n]`, row-major, from the eigenvectors of the smaller of `W W^T` and
/// `W^T W` (Golub and Van Loan, Matrix Computations, 4th edition, sections 8.3, 8.4 and 8.6).
///
/// # Panics
/// `w` is shorter than its shape requires, or `rank` exceeds the smaller side.
#[must_use]
pub fn singular_values((m, n): (usize, usize), w: &[f32], rank: usize) -> SingularValues {
    let w = widened((m, n), w, rank);
    largest((m, n), &w, rank)
}

/// As [`singular_values`], by `iterations` of subspace iteration from `W` times `start: [n, rank]`
/// (<https://arxiv.org/abs/0909.4061>, algorithms 4.4 and 5.1). A wide matrix is transposed, so `start` is `[m, rank]`.
///
/// # Panics
/// An operand is shorter than its shape requires, or `rank` exceeds the smaller side.
#[must_use]
pub fn singular_values_by_iteration(
    (m, n): (usize, usize),
    w: &[f32],
    rank: usize,
    start: &[f64],
    iterations: usize,
) -> SingularValues {
    let w = widened((m, n), w, rank);
    let is_wide = m < n;
    // the longer and the shorter side, and their strides
    let (long, short, strides) = if is_wide { (n, m, (1, n)) } else { (m, n, (n, 1)) };
    let turned = (strides.1, strides.0);
    assert!(start.len() >= short * rank, "the start is too short");
    // Q, one vector per row: [rank, long]
    let mut basis = product((rank, long, short), start, (1, rank), &w, turned);
    orthonormalize(&mut basis, long);
    for _ in 0..iterations {
        let mut other = product((rank, short, long), &basis, (long, 1), &w, strides);
        orthonormalize(&mut other, short);
        basis = product((rank, long, short), &other, (short, 1), &w, turned);
        orthonormalize(&mut basis, long);
    }
    let projected = product((rank, short, long), &basis, (long, 1), &w, strides);
    let SingularValues { left, values, right } = largest((rank, short), &projected, rank);
    let left = product((rank, long, rank), &left, (rank, 1), &basis, (long, 1));
    if is_wide { SingularValues { left: right, values, right: left } } else { SingularValues { left, values, right } }
}

/// The first `count` columns of Q, as rows `[count, m]`, and the first `count` rows of R, `[count, n]`, of `w: [m, n]`,
/// with the signs of LAPACK (Golub and Van Loan, section 5.2).
///
/// # Panics
/// `w` is shorter than its shape requires, or `count` exceeds the smaller side.
#[must_use]
pub fn qr((m, n): (usize, usize), w: &[f32], count: usize) -> (Vec<f64>, Vec<f64>) {
    let w = widened((m, n), w, count);
    let mut columns = vec![0.0; m * n];
    for (i, row) in w.chunks_exact(n.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(j, value)| columns[j * m + i] = *value);
    }
    let mut factors = Vec::with_capacity(count);
    for j in 0..count {
        let (done, rest) = columns.split_at_mut((j + 1) * m);
        let (factor, corner) = reflector(&mut done[j * m + j..]);
        let v = &done[j * m + j..];
        rest.chunks_exact_mut(m).for_each(|column| reflect(v, factor, &mut column[j..]));
        factors.push((factor, corner));
    }
    let mut q = vec![0.0; count * m];
    let mut r = vec![0.0; count * n];
    for i in 0..count {
        r[i * n + i] = factors[i].1;
        (i + 1..n).for_each(|j| r[i * n + j] = columns[j * m + i]);
        let unit = &mut q[i * m..][..m];
        unit[i] = 1.0;
        for j in (0..=i).rev() {
            reflect(&columns[j * m + j..(j + 1) * m], factors[j].0, &mut unit[j..]);
        }
    }
    (q, r)
}

fn widened((m, n): (usize, usize), w: &[f32], rank: usize) -> Vec<f64> {
    assert!(w.len() >= m * n, "the matrix has {} elements, not {m} x {n}", w.len());
    assert!(rank <= m.min(n), "a matrix of {m} x {n} has no rank of {rank}");
    w[..m * n].iter().map(|value| f64::from(*value)).collect()
}

fn largest((m, n): (usize, usize), w: &[f64], rank: usize) -> SingularValues {
    let is_wide = m <= n;
    let (long, short, strides) = if is_wide { (n, m, (1, n)) } else { (m, n, (n, 1)) };
    let turned = (strides.1, strides.0);
    let mut gram = product((short, short, long), w, turned, w, strides);
    let shorter = largest_eigenvectors(&mut gram, short, rank);
    drop(gram);
    let mut longer = product((rank, long, short), &shorter, (short, 1), w, turned);
    let mut values = Vec::with_capacity(rank);
    for vector in longer.chunks_exact_mut(long.max(1)) {
        // more accurate than the square root of the eigenvalue
        let value = dot(vector, vector).sqrt();
        let factor = if value > 0.0 { 1.0 / value } else { 0.0 };
        scale(factor, vector);
        values.push(value);
    }
    if is_wide {
        SingularValues { left: shorter, values, right: longer }
    } else {
        SingularValues { left: longer, values, right: shorter }
    }
}

/// Eigenvectors of the `count` largest eigenvalues of a symmetric matrix `[n, n]`, which is overwritten: `[count, n]`.
fn largest_eigenvectors(a: &mut [f64], n: usize, count: usize) -> Vec<f64> {
    let (diagonal, off_diagonal, factors) = tridiagonal(a, n);
    let mut vectors = vec![0.0; count * n];
    let mut above = None;
    for number in 0..count {
        let eigenvalue = eigenvalue_from_top(&diagonal, &off_diagonal, number, above);
        above = Some(eigenvalue);
        let (done, rest) = vectors.split_at_mut(number * n);
        inverse_iteration(&diagonal, &off_diagonal, eigenvalue, done, &mut rest[..n]);
    }
    for vector in vectors.chunks_exact_mut(n.max(1)) {
        for k in (0..n.saturating_sub(2)).rev() {
            reflect(&a[k * n + k + 1..(k + 1) * n], factors[k], &mut vector[k + 1..]);
        }
    }
    vectors
}

/// Returns the diagonal and off-diagonal of `Q^T A Q`, and the factors of the reflectors of Q; row k of `a` becomes reflector k.
fn tridiagonal(a: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut off_diagonal, mut factors) = (Vec::with_capacity(n), Vec::with_capacity(n));
    let mut w = vec![0.0; n];
    for k in 0..n.saturating_sub(2) {
        let (done, rest) = a.split_at_mut((k + 1) * n);
        let v = &mut done[k * n + k + 1..];
        let (factor, corner) = reflector(v);
        let w = &mut w[k + 1..];
        for (w, row) in w.iter_mut().zip(rest.chunks_exact(n)) {
            *w = factor * dot(&row[k + 1..], v);
        }
        let half = -0.5 * factor * dot(w, v);
        add_scaled(half, v, w);
        for (i, row) in rest.chunks_exact_mut(n).enumerate() {
            add_scaled(-v[i], w, &mut row[k + 1..]);
            add_scaled(-w[i], v, &mut row[k + 1..]);
        }
        off_diagonal.push(corner);
        factors.push(factor);
    }
    if n > 1 {
        off_diagonal.push(a[(n - 1) * n + n - 2]);
    }
    ((0..n).map(|i| a[i * n + i]).collect(), off_diagonal, factors)
}

/// Replaces `x` by the vector v of the reflection `1 - f v v^T` that zeroes all but the first element of x; returns f and that
/// element.
fn reflector(x: &mut [f64]) -> (f64, f64) {
    let Some((first, rest)) = x.split_first_mut() else { return (0.0, 0.0) };
    let below = dot(rest, rest);
    let corner = *first;
    if below == 0.0 {
        return (0.0, corner);
    }
    let image = -(corner * corner + below).sqrt().copysign(corner);
    *first = corner - image;
    (2.0 / (*first * *first + below), image)
}

fn reflect(v: &[f64], factor: f64, x: &mut [f64]) {
    if factor != 0.0 {
        add_scaled(-factor * dot(v, x), v, x);
    }
}

/// The eigenvalue of a symmetric tridiagonal matrix with `number` larger eigenvalues, by bisection.
fn eigenvalue_from_top(diagonal: &[f64], off_diagonal: &[f64], number: usize, below: Option<f64>) -> f64 {
    let n = diagonal.len();
    let radius = |i: usize| {
        let before = if i > 0 { off_diagonal[i - 1].abs() } else { 0.0 };
        before + off_diagonal.get(i).map_or(0.0, |value| value.abs())
    };
    let mut low = (0..n).map(|i| diagonal[i] - radius(i)).fold(f64::INFINITY, f64::min);
    let mut high = (0..n).map(|i| diagonal[i] + radius(i)).fold(f64::NEG_INFINITY, f64::max);
    let width = f64::EPSILON * low.abs().max(high.abs());
    // because of rounding, the previous bisection may have ended slightly too low
    high = below.map_or(high, |below| high.min(below + width));
    while high - low > width {
        let middle = f64::midpoint(low, high);
        if middle <= low || middle >= high {
            break;
        }
        if num_above(diagonal, off_diagonal, middle) > number {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// The number of eigenvalues above `x`: the number of positive pivots of `T - x`.
fn num_above(diagonal: &[f64], off_diagonal: &[f64], x: f64) -> usize {
    let (mut pivot, mut count) = (1.0, 0);
    for (i, value) in diagonal.iter().enumerate() {
        let before = if i > 0 { off_diagonal[i - 1] } else { 0.0 };
        pivot = value - x - before * before / pivot;
        if pivot == 0.0 {
            pivot = f64::MIN_POSITIVE;
        }
        count += usize::from(pivot > 0.0);
    }
    count
}

/// The eigenvector of `eigenvalue`, orthogonal to the previous ones in `done`.
fn inverse_iteration(diagonal: &[f64], off_diagonal: &[f64], eigenvalue: f64, done: &[f64], vector: &mut [f64]) {
    let n = vector.len();
    let size = diagonal.iter().chain(off_diagonal).fold(f64::MIN_POSITIVE, |size, value| size.max(value.abs()));
    let smallest = size * f64::EPSILON;
    // any start that is not orthogonal to the vector works; each vector uses a different one
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_add(done.len() as u64);
    for value in vector.iter_mut() {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        *value = (state >> 11) as f64 / (1_u64 << 53) as f64 - 0.5;
    }
    // rows of the upper triangle of `T - eigenvalue` after elimination, and the elimination steps
    let mut upper = vec![[0.0; 3]; n];
    let mut steps = Vec::with_capacity(n);
    let entry = |values: &[f64], i: usize| values.get(i).copied().unwrap_or(0.0);
    let mut row = [diagonal[0] - eigenvalue, entry(off_diagonal, 0), 0.0];
    for i in 0..n - 1 {
        let mut next = [off_diagonal[i], diagonal[i + 1] - eigenvalue, entry(off_diagonal, i + 1)];
        let is_swapped = next[0].abs() > row[0].abs();
        if is_swapped {
            std::mem::swap(&mut row, &mut next);
        }
        if row[0] == 0.0 {
            row[0] = smallest;
        }
        let factor = next[0] / row[0];
        steps.push((is_swapped, factor));
        upper[i] = row;
        row = [next[1] - factor * row[1], next[2] - factor * row[2], 0.0];
    }
    if row[0].abs() < smallest {
        row[0] = smallest.copysign(row[0]);
    }
    upper[n - 1] = row;
    for _ in 0..4 {
        for (i, (is_swapped, factor)) in steps.iter().enumerate() {
            if *is_swapped {
                vector.swap(i, i + 1);
            }
            vector[i + 1] -= factor * vector[i];
        }
        for i in (0..n).rev() {
            let [first, second, third] = upper[i];
            let sum = second * entry(vector, i + 1) + third * entry(vector, i + 2);
            vector[i] = (vector[i] - sum) / first;
        }
        let largest = vector.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        scale(1.0 / largest, vector);
        project_out(done, vector);
    }
}

/// Makes `vector` orthogonal to the rows of `done` (twice, because of rounding) and normalizes it.
fn project_out(done: &[f64], vector: &mut [f64]) {
    for _ in 0..2 {
        for other in done.chunks_exact(vector.len()) {
            let share = dot(other, vector);
            add_scaled(-share, other, vector);
        }
        let length = dot(vector, vector).sqrt();
        let factor = if length > 0.0 { 1.0 / length } else { 0.0 };
        scale(factor, vector);
    }
}

fn scale(factor: f64, vector: &mut [f64]) {
    for value in vector {
        *value *= factor;
    }
}

/// Makes the rows of length `n` orthonormal.
fn orthonormalize(rows: &mut [f64], n: usize) {
    for start in (0..rows.len()).step_by(n.max(1)) {
        let (done, rest) = rows.split_at_mut(start);
        project_out(done, &mut rest[..n]);
    }
}

/// `A B` with `A: [m, k]`, `B: [k, n]` by strides of rows and columns, row-major.
fn product(
    (m, n, k): (usize, usize, usize),
    a: &[f64],
    a_strides: (usize, usize),
    b: &[f64],
    b_strides: (usize, usize),
) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    if m * n * k > 0 {
        let a = MatRef::new(a, m, k, a_strides.0 as isize, a_strides.1 as isize);
        let b = MatRef::new(b, k, n, b_strides.0 as isize, b_strides.1 as isize);
        let c = MatMut::new(&mut c, m, n, n as isize, 1);
        gemmkit::gemm(1.0, a, b, 0.0, c, Parallelism::Serial);
    }
    c
}

dispatch! {
    fn dot(a: &[f64], b: &[f64]) -> f64 = dot_body
}

#[inline(always)]
fn dot_body<A: Arithmetic>(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_lanes.zip(b_lanes) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f64>() + rest
}

dispatch! {
    /// `y += scale x`.
    fn add_scaled(scale: f64, x: &[f64], y: &mut [f64]) = add_scaled_body
}

#[inline(always)]
fn add_scaled_body<A: Arithmetic>(scale: f64, x: &[f64], y: &mut [f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += scale * x;
    }
}

#[cfg(test)]
mod tests {
    use super::{SingularValues, dot, qr, singular_values, singular_values_by_iteration};

    fn matrix(m: usize, n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut values = Vec::with_capacity(m * n);
        for _ in 0..m * n {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            values.push(((state >> 40) as f64 / f64::from(1_u32 << 24) - 0.5) as f32);
        }
        values
    }

    /// The largest deviation of vectors from orthonormality, of `W v = s u` and of `W^T u = s v`.
    fn error((m, n): (usize, usize), w: &[f32], found: &SingularValues) -> f64 {
        let rank = found.values.len();
        let mut worst = 0.0_f64;
        for i in 0..rank {
            let (u, v) = (&found.left[i * m..][..m], &found.right[i * n..][..n]);
            for j in 0..rank {
                let expected = f64::from(u8::from(i == j));
                worst = worst.max((dot(u, &found.left[j * m..][..m]) - expected).abs());
                worst = worst.max((dot(v, &found.right[j * n..][..n]) - expected).abs());
            }
            for row in 0..m {
                let image: f64 = (0..n).map(|k| f64::from(w[row * n + k]) * v[k]).sum();
                worst = worst.max((image - found.values[i] * u[row]).abs());
            }
            for column in 0..n {
                let image: f64 = (0..m).map(|k| f64::from(w[k * n + column]) * u[k]).sum();
                worst = worst.max((image - found.values[i] * v[column]).abs());
            }
        }
        worst
    }

    #[test]
    fn singular_vectors_satisfy_their_equations() {
        for (m, n, rank) in [(1, 1, 1), (2, 5, 2), (40, 7, 7), (31, 60, 12), (96, 96, 30), (3, 3, 3)] {
            let w = matrix(m, n, 3);
            let found = singular_values((m, n), &w, rank);
            assert!(found.values.is_sorted_by(|a, b| a >= b), "{:?}", found.values);
            let error = error((m, n), &w, &found);
            assert!(error < 1e-9, "{m} x {n}: {error}");
        }
    }

    #[test]
    fn squares_of_singular_values_sum_to_the_squared_norm() {
        let w = matrix(20, 33, 5);
        let found = singular_values((20, 33), &w, 20);
        let squares: f64 = w.iter().map(|value| f64::from(*value).powi(2)).sum();
        let sum: f64 = found.values.iter().map(|value| value * value).sum();
        assert!((sum - squares).abs() < 1e-10 * squares, "{sum} {squares}");
    }

    #[test]
    fn equal_and_vanishing_singular_values_are_found() {
        let mut unit = vec![0.0; 30 * 30];
        (0..30).for_each(|i| unit[i * 31] = if i < 20 { 2.0 } else { 0.0 });
        let found = singular_values((30, 30), &unit, 25);
        for (number, value) in found.values.iter().enumerate() {
            let expected = if number < 20 { 2.0 } else { 0.0 };
            assert!((value - expected).abs() < 1e-6, "{number}: {value}");
        }
        for i in 0..20 {
            for j in 0..i {
                assert!(dot(&found.left[i * 30..][..30], &found.left[j * 30..][..30]).abs() < 1e-9, "{i} {j}");
            }
        }
    }

    #[test]
    fn iteration_approximates_the_exact_values() {
        for (m, n) in [(50, 30), (30, 50)] {
            let w = matrix(m, n, 7);
            let start: Vec<f64> = matrix(30, 4, 9).into_iter().map(f64::from).collect();
            let exact = singular_values((m, n), &w, 4);
            let (rough, fine) = (
                singular_values_by_iteration((m, n), &w, 4, &start, 1),
                singular_values_by_iteration((m, n), &w, 4, &start, 200),
            );
            for i in 0..4 {
                assert!(rough.values[i] <= exact.values[i] + 1e-9 && rough.values[i] > 0.5 * exact.values[i]);
                assert!((fine.values[i] - exact.values[i]).abs() < 1e-6 * exact.values[i], "{i}");
            }
            let error = error((m, n), &w, &fine);
            assert!(error < 1e-3, "{error}");
        }
    }

    #[test]
    fn q_is_orthonormal_and_times_r_is_the_matrix() {
        for (m, n) in [(12, 12), (20, 7), (7, 20)] {
            let (w, count) = (matrix(m, n, 11), m.min(n));
            let (q, r) = qr((m, n), &w, count);
            for i in 0..count {
                for j in 0..count {
                    let expected = f64::from(u8::from(i == j));
                    assert!((dot(&q[i * m..][..m], &q[j * m..][..m]) - expected).abs() < 1e-12);
                }
                assert!(r[i * n..i * n + i].iter().all(|value| *value == 0.0));
            }
            for i in 0..m {
                for j in 0..n {
                    let found: f64 = (0..count).map(|k| q[k * m + i] * r[k * n + j]).sum();
                    assert!((found - f64::from(w[i * n + j])).abs() < 1e-12);
                }
            }
        }
    }
}
