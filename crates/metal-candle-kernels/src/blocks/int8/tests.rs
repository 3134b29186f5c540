//! Compares every level with the portable kernel bit for bit, and the portable kernel with f64.

use super::portable;
use super::products::run;
use crate::blocks::matrix::{BlockFormat, BlockMatrix};
use crate::blocks::task::Task;
use crate::blocks::tests::{bits, check, random_blocks, scales_of, shapes, widened};
use crate::isa::Fused;
use crate::operand::Start;
use crate::parallel::Shared;
use crate::testing::random;

type Level = (&'static str, fn(&Task));

/// The kernels that this machine can run.
fn levels() -> Vec<Level> {
    #[allow(unused_mut)]
    let mut levels: Vec<Level> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        use super::x86;
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            levels.push(("avx2", run::<x86::Avx2>));
            if is_x86_feature_detected!("avxvnni") {
                levels.push(("avx-vnni", run::<x86::AvxVnni>));
            }
            if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl") {
                levels.push(("avx512-vnni", run::<x86::Avx512>));
                levels.push(("avx512-vnni of 256 bits", run::<x86::tests::Vnni256>));
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        levels.push(("dotprod", run::<super::neon::Dotprod>));
    }
    levels
}

fn product((m, n): (usize, usize), start: Start, a: &[f32], b: BlockMatrix, alpha: f32, run: fn(&Task)) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    run(&Task { shape: (m, n), start, a, b, alpha, c: Shared::new(&mut c) });
    c
}

#[test]
fn every_level_matches_the_portable_kernel() {
    for format in BlockFormat::WRITABLE {
        for (n, k) in shapes(format) {
            let blocks = random_blocks(format, n * k / format.len(), 5);
            let b = BlockMatrix::new(format, &blocks, n, k).unwrap();
            let bias = random(n, 2);
            for m in [1, 2, 3, 4, 5, 7, 8, 9, 33] {
                let mut a = random(m * k, m as u64);
                // a block of zeros, and a block in which one value dominates all others
                a[(m - 1) * k..][..32].fill(0.0);
                a[m * k - 1] = 1e30;
                let start = Start::Row(&bias);
                let expected = bits(&product((m, n), start, &a, b, -1.3, portable::run::<Fused>));
                for (level, run) in levels() {
                    let found = bits(&product((m, n), start, &a, b, -1.3, run));
                    assert!(found == expected, "{level}, {}, m {m}, n {n}, k {k}", format.name());
                }
            }
        }
    }
}

/// Normal numbers.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    random(12 * count, seed).chunks(12).map(|numbers| numbers.iter().sum::<f32>() / 2.0).collect()
}

/// The relative error of products of normal activations: 0.0054 with a scale for 32 of them.
#[test]
fn rounding_activations_has_an_error_of_half_a_percent() {
    let (m, n, k) = (8, 64, 1024);
    let a = normal(m * k, 3);
    for format in BlockFormat::WRITABLE {
        let blocks = random_blocks(format, n * k / format.len(), 6);
        let b = BlockMatrix::new(format, &blocks, n, k).unwrap();
        let wide = widened(b);
        let kernels = std::iter::once(("portable", portable::run::<Fused> as fn(&Task))).chain(levels());
        for (level, run) in kernels {
            let found = product((m, n), Start::Zero, &a, b, 1.0, run);
            let (mut error, mut size) = (0.0, 0.0);
            for (at, found) in found.iter().enumerate() {
                let (a, w) = (&a[at / n * k..][..k], &wide[at % n * k..][..k]);
                let exact: f64 = a.iter().zip(w).map(|(a, w)| f64::from(*a) * f64::from(*w)).sum();
                // without cancellation, so that the sums of weights do not matter
                let squares: f64 = a.iter().zip(w).map(|(a, w)| (f64::from(*a) * f64::from(*w)).powi(2)).sum();
                error += (f64::from(*found) - exact).powi(2);
                size += squares;
            }
            let relative = (error / size).sqrt();
            assert!((0.0045..0.0065).contains(&relative), "{level}, {}: {relative}", format.name());
        }
    }
}

#[test]
fn non_finite_numbers_make_the_row_nan() {
    let (m, n, k) = (3, 20, 512);
    for format in BlockFormat::WRITABLE {
        let blocks = random_blocks(format, n * k / format.len(), 6);
        let b = BlockMatrix::new(format, &blocks, n, k).unwrap();
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut a = random(m * k, 3);
            a[k + 77] = value;
            for (level, run) in levels() {
                let found = product((m, n), Start::Zero, &a, b, 1.0, run);
                for (i, found) in found.chunks(n).enumerate() {
                    assert!(found.iter().all(|value| value.is_nan() == (i == 1)), "{level}, {}: {i}", format.name());
                }
            }
        }
    }
}

/// Multiplies the largest integers: nothing overflows.
#[test]
fn the_largest_sums_are_exact() {
    let (n, k) = (17, 256);
    for format in BlockFormat::WRITABLE {
        for byte in [0, 0x7f, 0x80, 0xff] {
            let mut blocks = vec![byte; n * k / format.len() * format.bytes()];
            // finite scales
            let scales = random_blocks(format, n * k / format.len(), 3);
            for (to, from) in blocks.chunks_exact_mut(format.bytes()).zip(scales.chunks_exact(format.bytes())) {
                for at in scales_of(format) {
                    to[*at..at + 2].copy_from_slice(&from[*at..at + 2]);
                }
                if format == BlockFormat::MXFP4 {
                    to[0] = from[0];
                }
            }
            let b = BlockMatrix::new(format, &blocks, n, k).unwrap();
            let wide = widened(b);
            for sign in [1.0, -1.0] {
                let a = vec![sign * 127.0; 9 * k];
                let expected = bits(&product((9, n), Start::Zero, &a, b, 1.0, portable::run::<Fused>));
                let by_row = |j: usize, p: usize| wide[j * k + p];
                for (level, run) in levels() {
                    let found = product((9, n), Start::Zero, &a, b, 1.0, run);
                    assert!(bits(&found) == expected, "{level}, {}, {byte}", format.name());
                    check(0.0, &found, (9, n, k), 0.0, 1.0, &a, by_row);
                }
            }
        }
    }
}
