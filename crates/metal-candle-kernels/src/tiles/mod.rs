//! Matrix products on a unit that multiplies bf16 tiles and accumulates in f32.
//!
//! An f32 value is split into a sum of bf16 terms, and a product is the sum of the products of its terms; negligible pairs are
//! skipped. bf16 weights are one term and f16 weights two. With them, f32 activations are two terms (16 bits), and the product
//! is within 1e-5 of the f32 product. f32 weights and their activations are three terms, which is as precise as f32. With
//! [`MatmulPrecision::Bf16`], bf16 weights and their activations are one term each.
//!
//! The activations are packed once and shared by all tasks. Each task streams panels of 32 rows or columns of the weights, in
//! place if they are aligned rows of bf16. Each element is summed in the order of the depth, for any number of rows, columns and
//! threads.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod dots;
#[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "emulate-tiles")))]
mod emulator;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod engine;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod lanes;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod pack;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod unit;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use engine::{accumulate, shared_bytes};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use unit::TileUnit;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod none {
    use crate::operand::{Product, Start};
    use crate::parallel::Shared;

    /// No unit is supported here.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum TileUnit {}

    impl TileUnit {
        pub(super) fn fastest() -> Option<Self> {
            None
        }

        pub(super) fn name(self) -> &'static str {
            match self {}
        }

        pub(crate) fn is_always_used(self) -> bool {
            match self {}
        }
    }

    pub(crate) fn accumulate(unit: TileUnit, _: (usize, usize), _: Start, _: &[Product], _: Shared<f32>) {
        match unit {}
    }

    pub(crate) fn shared_bytes(_: usize, _: usize) -> usize {
        0
    }
}
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(crate) use none::{TileUnit, accumulate, shared_bytes};

use crate::operand::{MatmulPrecision, Matrix, Product};
use std::sync::OnceLock;

/// Minimum number of weights for which tiles are used. Low under emulation, so that the small models of tests use tiles.
const MIN_ELEMENTS: usize = if cfg!(feature = "emulate-tiles") { 256 } else { 32 * 1024 };

/// The unit that computes a sum of products with `n` columns; none if the vector units are faster. Independent of the number of
/// rows.
pub(crate) fn unit_for(n: usize, products: &[Product]) -> Option<TileUnit> {
    let unit = unit()?;
    let largest = products.iter().max_by_key(|product| product.k)?;
    let is_rounded = largest.precision == MatmulPrecision::Bf16 && matches!(largest.b, Matrix::BF16(_));
    (n * largest.k >= MIN_ELEMENTS && (is_rounded || unit.is_always_used())).then_some(unit)
}

fn unit() -> Option<TileUnit> {
    static FOUND: OnceLock<Option<TileUnit>> = OnceLock::new();
    *FOUND.get_or_init(TileUnit::fastest)
}

/// Whether a unit computes products of every precision.
pub(crate) fn is_always_used() -> bool {
    unit().is_some_and(TileUnit::is_always_used)
}

/// The name of the unit's instructions; none if there is no unit.
pub(crate) fn unit_name() -> Option<&'static str> {
    unit().map(TileUnit::name)
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests {
    use super::*;
    use crate::operand::{Matrix, Start};
    use crate::parallel::Shared;
    use crate::testing::random;
    use half::{bf16, f16};

    /// The units that can be tested here: AMX is emulated if it is missing.
    fn units() -> impl Iterator<Item = TileUnit> {
        if !amx::is_available() {
            emulator::install();
        }
        let has_dots = is_x86_feature_detected!("avx512bf16");
        [TileUnit::Amx, TileUnit::Dots].into_iter().filter(move |&unit| unit == TileUnit::Amx || has_dots)
    }

    fn sum(unit: TileUnit, (m, n): (usize, usize), start: Start, products: &[Product]) -> Vec<f32> {
        let mut c = vec![f32::NAN; m * n];
        if let Start::Result = start {
            c.fill(1.0);
        }
        accumulate(unit, (m, n), start, products, Shared::new(&mut c));
        c
    }

    /// A product of f32 matrices, with A row-major.
    fn floats<'a>(a: &'a [f32], b: &'a [f32], b_strides: (usize, usize), k: usize) -> Product<'a> {
        let (a_strides, b) = ((k, 1), Matrix::F32(b));
        Product { a, a_strides, b, b_strides, k, alpha: 1.0, precision: MatmulPrecision::F32 }
    }

    fn value(matrix: &Matrix, at: usize) -> f64 {
        match matrix {
            Matrix::F32(values) => f64::from(values[at]),
            Matrix::F16(values) => values[at].to_f64(),
            Matrix::BF16(values) => values[at].to_f64(),
        }
    }

    /// The largest error of an element, relative to the sum of the magnitudes of its products.
    fn error(found: &[f32], (m, n): (usize, usize), start: f64, products: &[Product]) -> f64 {
        assert_eq!(found.len(), m * n);
        let mut largest = 0.0_f64;
        for i in 0..m {
            for j in 0..n {
                let (mut sum, mut size) = (start, start.abs());
                for product in products {
                    for p in 0..product.k {
                        let a = f64::from(product.a[i * product.a_strides.0 + p * product.a_strides.1]);
                        let b = value(&product.b, j * product.b_strides.1 + p * product.b_strides.0);
                        sum += f64::from(product.alpha) * a * b;
                        size += (f64::from(product.alpha) * a * b).abs();
                    }
                }
                let error = (f64::from(found[i * n + j]) - sum).abs() / size.max(1e-30);
                assert!(error.is_finite(), "{} at {i}, {j}", found[i * n + j]);
                largest = largest.max(error);
            }
        }
        largest
    }

    #[test]
    fn the_bits_of_a_row_do_not_depend_on_other_rows() {
        let (m, n, k) = (67, 40, 610);
        let (a, wide) = (random(m * k, 1), random(n * k, 2));
        let brain: Vec<bf16> = wide.iter().map(|&value| bf16::from_f32(value)).collect();
        let operands = [
            (Matrix::F32(&wide), MatmulPrecision::F32),
            (Matrix::BF16(&brain), MatmulPrecision::F32),
            (Matrix::BF16(&brain), MatmulPrecision::Bf16),
        ];
        for (unit, (b, precision)) in units().flat_map(|unit| operands.map(|operand| (unit, operand))) {
            for b_strides in [(1, k), (n, 1)] {
                let run = |first: usize, m: usize| {
                    let a = &a[first * k..(first + m) * k];
                    let product = Product { a, a_strides: (k, 1), b, b_strides, k, alpha: 1.0, precision };
                    sum(unit, (m, n), Start::Zero, &[product])
                };
                let whole = run(0, m);
                for (first, rows) in [(0, 1), (66, 1), (3, 5), (20, 16), (30, 17), (1, 33)] {
                    assert!(run(first, rows) == whole[first * n..(first + rows) * n], "{rows} rows from {first} on");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row_and_column() {
        let (m, n, k) = (20, 35, 70);
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for (unit, bad) in units().flat_map(|unit| bad.map(|bad| (unit, bad))) {
            for b_strides in [(1, k), (n, 1)] {
                let (mut a, mut b) = (random(m * k, 1), random(n * k, 2));
                a[7 * k + 3] = bad;
                b[5 * b_strides.1 + 4 * b_strides.0] = bad;
                // the nearest bf16 of the largest f32 is infinite
                a[9 * k] = f32::MAX;
                b[6 * b_strides.1] = 1e-3;
                let product = floats(&a, &b, b_strides, k);
                let found = sum(unit, (m, n), Start::Zero, &[product]);
                for (at, found) in found.iter().enumerate() {
                    let is_bad = at / n == 7 || at % n == 5;
                    assert_eq!(found.is_finite(), !is_bad, "{found} at {}, {}", at / n, at % n);
                }
            }
        }
    }

    #[test]
    fn no_product_leaves_the_initial_value() {
        let nothing = floats(&[], &[], (1, 0), 0);
        for unit in units() {
            assert_eq!(sum(unit, (2, 2), Start::Row(&[1.0, 2.0]), &[nothing]), [1.0, 2.0, 1.0, 2.0]);
            assert_eq!(sum(unit, (1, 2), Start::Zero, &[]), [0.0; 2]);
            assert!(sum(unit, (0, 3), Start::Zero, &[]).is_empty());
        }
    }

    const SHAPES: [(usize, usize, usize); 9] = [
        (1, 32, 64),
        (3, 40, 33),
        (16, 16, 32),
        (17, 50, 31),
        (33, 17, 600),
        (70, 96, 544),
        (1, 1, 1),
        (5, 33, 1100),
        (34, 600, 40),
    ];

    /// Each pair of terms counts: without one of them the largest error is above 1e-6.
    #[test]
    fn products_of_f32_are_as_precise_as_in_f32() {
        let (m, n, k) = (40, 48, 2);
        let (a, b) = (random(m * k, 1), random(n * k, 2));
        for (unit, b_strides) in units().flat_map(|unit| [(1, k), (n, 1)].map(|strides| (unit, strides))) {
            let product = floats(&a, &b, b_strides, k);
            let error = error(&sum(unit, (m, n), Start::Zero, &[product]), (m, n), 0.0, &[product]);
            // dot products round after each product
            let bound = if unit == TileUnit::Amx { 2e-7 } else { 5e-7 };
            assert!(error < bound, "{error}: {unit:?} {b_strides:?}");
        }
    }

    #[test]
    fn sums_match_f64() {
        for (number, (m, n, k)) in SHAPES.into_iter().enumerate() {
            let (a, wide) = (random(m * k + m, 1), random(n * k + n + k, 2));
            let half: Vec<f16> = wide.iter().map(|&value| f16::from_f32(value)).collect();
            let brain: Vec<bf16> = wide.iter().map(|&value| bf16::from_f32(value)).collect();
            let (z, narrow) = (random(m * 3, 4), random(n * 3, 5));
            let operands = [
                (Matrix::F32(&wide), MatmulPrecision::F32, 2e-5),
                (Matrix::F16(&half), MatmulPrecision::F32, 2e-5),
                (Matrix::BF16(&brain), MatmulPrecision::F32, 2e-5),
                (Matrix::BF16(&brain), MatmulPrecision::Bf16, 1.0 / 256.0),
            ];
            for (unit, (b, precision, bound)) in units().flat_map(|unit| operands.map(|operand| (unit, operand))) {
                // row-major and column-major operands, and operands with gaps
                for a_strides in [(k, 1), (1, m), (k + 1, 1)] {
                    for b_strides in [(1, k), (n, 1), (1, k + 1), (n + 1, 1)] {
                        let first = Product { a: &a, a_strides, b, b_strides, k, alpha: -0.5, precision };
                        let second = Product {
                            a: &z,
                            a_strides: (3, 1),
                            b: Matrix::F32(&narrow),
                            b_strides: (n, 1),
                            k: 3,
                            alpha: 2.0,
                            precision,
                        };
                        for products in [&[first][..], &[first, second]] {
                            let found = sum(unit, (m, n), Start::Result, products);
                            let error = error(&found, (m, n), 1.0, products);
                            assert!(
                                error < bound,
                                "{error} of {unit:?} {number}: {a_strides:?} {b_strides:?} {}",
                                products.len()
                            );
                        }
                    }
                }
            }
        }
    }
}
