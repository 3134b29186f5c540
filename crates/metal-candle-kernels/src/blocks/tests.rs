//! Compares weights with gguf's and products with f64, and checks that the bits of rows do not depend on other rows.

use super::matrix::{BlockFormat, BlockMatrix};
use super::rows::{add_rows, run};
use super::task::Task;
use super::{block_products, block_row_products, block_transposed_products, codebooks, decode, superblocks};
use crate::gemm_tile::Portable;
use crate::isa::{Arithmetic, Fused, Separate};
use crate::operand::Start;
use crate::parallel::Shared;
use crate::testing::random;
use decode::Decoder;

/// Written by `dev/reference_blocks.py`.
const GOLDEN: &[u8] = include_bytes!("golden.bin");

/// Calls `check` with each format, its blocks and gguf's weights.
fn for_each_golden(mut check: impl FnMut(BlockFormat, &[u8], &[f32])) {
    let mut rest = GOLDEN;
    let mut seen = Vec::new();
    while let Some((header, after)) = rest.split_first_chunk::<8>() {
        let [id, count] = [0, 4].map(|at| u32::from_le_bytes(std::array::from_fn(|i| header[at + i])));
        let format = BlockFormat::from_ggml_type(id).unwrap();
        let (blocks, after) = after.split_at(count as usize * format.bytes());
        let (weights, after) = after.split_at(4 * count as usize * format.len());
        let weights: Vec<f32> = weights.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        check(format, blocks, &weights);
        seen.push(format);
        rest = after;
    }
    assert_eq!(seen, BlockFormat::ALL);
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The offsets of f16 values in a block.
pub(super) fn scales_of(format: BlockFormat) -> &'static [usize] {
    match format {
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
        BlockFormat::Q2K => &[80, 82],
        BlockFormat::Q3K => &[108],
        BlockFormat::Q6K => &[208],
        BlockFormat::TQ1_0 => &[52],
        BlockFormat::TQ2_0 => &[64],
        // IQ1M stores the bits of the scale in several words
        BlockFormat::MXFP4 | BlockFormat::IQ1M => &[],
        _ => &[0],
    }
}

/// Random blocks with scales of about 0.01.
pub(super) fn random_blocks(format: BlockFormat, count: usize, seed: u64) -> Vec<u8> {
    let bytes = random(count * format.bytes(), seed).into_iter().map(|value| ((value + 1.0) * 127.99) as u8);
    let mut bytes: Vec<u8> = bytes.collect();
    let scales = scales_of(format);
    for block in bytes.chunks_exact_mut(format.bytes()) {
        if format == BlockFormat::MXFP4 {
            block[0] = 118 + block[0] % 8;
        }
        if format == BlockFormat::IQ1M {
            // 2^-7 with other bits
            for (at, upper) in [(49, 0x30), (51, 0x00), (53, 0x00), (55, 0x20)] {
                block[at] = block[at] & 15 | upper;
            }
        }
        for &at in scales {
            // the exponent of 2^-7, and of 2^-10 for the scales of scales
            let exponent = if format.len() == 32 { 8 } else { 5 };
            block[at + 1] = block[at + 1] & 0x83 | exponent << 2;
        }
    }
    bytes
}

pub(super) fn widened(matrix: BlockMatrix) -> Vec<f32> {
    let k = matrix.columns();
    let mut wide = vec![0.0; matrix.rows() * k];
    for (row, wide) in wide.chunks_exact_mut(k).enumerate() {
        matrix.widen_row(row, 0..k, wide);
    }
    wide
}

#[test]
fn weights_match_gguf_bit_for_bit() {
    for_each_golden(|format, blocks, weights| {
        let matrix = BlockMatrix::new(format, blocks, 1, weights.len()).unwrap();
        assert_eq!(bits(&widened(matrix)), bits(weights), "{}", format.name());
        let mut part = vec![0.0; format.len()];
        matrix.widen_row(0, format.len()..2 * format.len(), &mut part);
        assert_eq!(bits(&part), bits(&weights[format.len()..2 * format.len()]));
        let rows = BlockMatrix::new(format, blocks, weights.len() / format.len(), format.len()).unwrap();
        assert_eq!(bits(&widened(rows.narrow_rows(1, 1).unwrap())), bits(&part));
    });
}

/// Decodes without the dispatch.
fn decode_as<A: Arithmetic>(format: BlockFormat, blocks: &[u8], to: &mut [f32]) {
    use BlockFormat as F;
    let decode = match format {
        F::Q4_0 => decode::Q4_0::decode::<A, _>,
        F::Q4_1 => decode::Q4_1::decode::<A, _>,
        F::Q5_0 => decode::Q5_0::decode::<A, _>,
        F::Q5_1 => decode::Q5_1::decode::<A, _>,
        F::Q8_0 => decode::Q8_0::decode::<A, _>,
        F::Q2K => superblocks::Q2K::decode::<A, _>,
        F::Q3K => superblocks::Q3K::decode::<A, _>,
        F::Q4K => superblocks::Q4K::decode::<A, _>,
        F::Q5K => superblocks::Q5K::decode::<A, _>,
        F::Q6K => superblocks::Q6K::decode::<A, _>,
        F::IQ4NL => decode::IQ4NL::decode::<A, _>,
        F::IQ4XS => superblocks::IQ4XS::decode::<A, _>,
        F::MXFP4 => decode::MXFP4::decode::<A, _>,
        F::IQ1S => codebooks::IQ1S::decode::<A, _>,
        F::IQ1M => codebooks::IQ1M::decode::<A, _>,
        F::IQ2XXS => codebooks::IQ2XXS::decode::<A, _>,
        F::IQ2XS => codebooks::IQ2XS::decode::<A, _>,
        F::IQ2S => codebooks::IQ2S::decode::<A, _>,
        F::IQ3XXS => codebooks::IQ3XXS::decode::<A, _>,
        F::IQ3S => codebooks::IQ3S::decode::<A, _>,
        F::TQ1_0 => codebooks::TQ1_0::decode::<A, _>,
        F::TQ2_0 => codebooks::TQ2_0::decode::<A, _>,
    };
    for (block, to) in blocks.chunks_exact(format.bytes()).zip(to.chunks_exact_mut(format.len())) {
        decode(block, to);
    }
}

#[test]
fn every_instruction_set_decodes_the_same_bits() {
    let can_fuse = cfg!(target_arch = "aarch64") || crate::isa::isa() > crate::isa::Isa::Baseline;
    for_each_golden(|format, blocks, weights| {
        let mut found = vec![0.0; weights.len()];
        decode_as::<Separate>(format, blocks, &mut found);
        assert_eq!(bits(&found), bits(weights), "{}", format.name());
        if can_fuse {
            decode_as::<Fused>(format, blocks, &mut found);
            assert_eq!(bits(&found), bits(weights), "{}", format.name());
        }
    });
}

#[test]
fn every_bit_pattern_decodes() {
    for format in BlockFormat::ALL {
        for byte in [0, 0x7c, 0x7f, 0x80, 0xff] {
            let blocks = vec![byte; 3 * format.bytes()];
            widened(BlockMatrix::new(format, &blocks, 3, format.len()).unwrap());
        }
    }
}

#[test]
fn sizes_are_checked() {
    let format = BlockFormat::Q4K;
    assert_eq!((format.name(), format.len(), format.bytes()), ("q4_k", 256, 144));
    assert_eq!((format.row_bytes(512), format.row_bytes(896), format.row_bytes(0)), (Some(288), None, Some(0)));
    let bytes = vec![0; 2 * 288];
    assert!(BlockMatrix::new(format, &bytes, 2, 512).is_some());
    for (rows, columns) in [(1, 512), (3, 512), (2, 500), (usize::MAX, 512), (2, usize::MAX / 256 * 256)] {
        assert!(BlockMatrix::new(format, &bytes, rows, columns).is_none(), "{rows} {columns}");
    }
    let huge = usize::MAX / 256 * 256;
    assert!(BlockMatrix::new(format, &[], 0, huge).is_none_or(|matrix| matrix.narrow_rows(0, 1).is_none()));
    let matrix = BlockMatrix::new(format, &bytes, 2, 512).unwrap();
    for (start, len) in [(0, 3), (2, 1), (usize::MAX, 2), (1, usize::MAX)] {
        assert!(matrix.narrow_rows(start, len).is_none());
    }
    assert_eq!(matrix.narrow_rows(2, 0).unwrap().rows(), 0);
    let known = [2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23, 29, 34, 35, 39];
    for id in 0..64 {
        assert_eq!(BlockFormat::from_ggml_type(id).is_some(), known.contains(&id), "{id}");
    }
}

/// Shapes `[n, k]`: odd numbers of rows, the smallest width, a width that is not a multiple of 256, and one above a panel.
pub(super) fn shapes(format: BlockFormat) -> Vec<(usize, usize)> {
    let shapes = [(37, 32), (5, 256), (131, 896), (1, 256), (150, 1280), (7, 2304)];
    shapes.into_iter().filter(|(_, k)| k % format.len() == 0).collect()
}

/// Checks `found = start + alpha A B^T` against f64, where the activations may be wrong by `rounding` times the largest of 32.
pub(super) fn check(
    rounding: f64,
    found: &[f32],
    (m, n, k): (usize, usize, usize),
    start: f32,
    alpha: f32,
    a: &[f32],
    b: impl Fn(usize, usize) -> f32,
) {
    assert_eq!(found.len(), m * n);
    for (at, found) in found.iter().enumerate() {
        let (mut sum, mut size, mut rounded) = (0.0, 0.0, 0.0);
        let row = &a[at / n * k..][..k];
        for (number, a) in row.chunks(32).enumerate() {
            let largest = a.iter().fold(0.0, |largest: f32, a| largest.max(a.abs()));
            for (p, a) in a.iter().enumerate() {
                let weight = f64::from(b(at % n, 32 * number + p));
                sum += f64::from(*a) * weight;
                size += (f64::from(*a) * weight).abs();
                rounded += f64::from(largest) * weight.abs();
            }
        }
        let error = (f64::from(*found) - f64::from(start) - f64::from(alpha) * sum).abs();
        let bound = 2e-6 * (size + 1.0) + rounding * f64::from(alpha.abs()) * rounded;
        assert!(error <= bound, "{error} of {size} at {at}; m {m}, n {n}, k {k}");
    }
}

#[test]
fn products_match_f64() {
    // half of the last of 127 steps
    let rounding = if crate::isa::int8().is_some() { 0.5 / 127.0 } else { 0.0 };
    for format in BlockFormat::ALL {
        for (n, k) in shapes(format) {
            let blocks = random_blocks(format, n * k / format.len(), 7);
            let b = BlockMatrix::new(format, &blocks, n, k).unwrap();
            let wide = widened(b);
            for m in [1, 3, 33] {
                let a = random(m * k, 3);
                let by_row = |j: usize, p: usize| wide[j * k + p];
                check(
                    rounding,
                    &block_row_products((m, n), Start::Zero, &a, b, -0.5),
                    (m, n, k),
                    0.0,
                    -0.5,
                    &a,
                    by_row,
                );
                check(0.0, &block_products((m, n), Start::Zero, &a, b, 1.0), (m, n, k), 0.0, 1.0, &a, by_row);
                let ones = vec![1.0; m * n];
                for start in [Start::Matrix(&ones), Start::Row(&ones[..n])] {
                    check(rounding, &block_row_products((m, n), start, &a, b, 2.0), (m, n, k), 1.0, 2.0, &a, by_row);
                    check(0.0, &block_products((m, n), start, &a, b, 2.0), (m, n, k), 1.0, 2.0, &a, by_row);
                }

                let a = random(m * n, 4);
                let by_column = |j: usize, p: usize| wide[p * k + j];
                check(
                    0.0,
                    &block_transposed_products((m, k), Start::Zero, &a, b, 0.5),
                    (m, k, n),
                    0.0,
                    0.5,
                    &a,
                    by_column,
                );
                let ones = vec![1.0; m * k];
                for start in [Start::Matrix(&ones), Start::Row(&ones[..k])] {
                    let found = block_transposed_products((m, k), start, &a, b, 1.0);
                    check(0.0, &found, (m, k, n), 1.0, 1.0, &a, by_column);
                }
            }
        }
    }
}

#[test]
fn the_bits_of_a_row_do_not_depend_on_other_rows() {
    for format in BlockFormat::ALL {
        for (n, k) in shapes(format) {
            let blocks = random_blocks(format, n * k / format.len(), 8);
            let b = BlockMatrix::new(format, &blocks, n, k).unwrap();
            let (max_rows, bias) = (100, random(n, 2));
            let a = random(max_rows * k, 1);
            let run = |first: usize, m: usize| {
                bits(&block_row_products((m, n), Start::Row(&bias), &a[first * k..][..m * k], b, 1.3))
            };
            let all = run(0, max_rows);
            for (first, m) in [(0, 1), (3, 1), (1, 2), (2, 3), (5, 4), (0, 5), (9, 8), (11, 9), (20, 33), (99, 1)] {
                assert_eq!(run(first, m), all[first * n..][..m * n], "{first} {m} n {n} k {k}");
            }
            // they do not depend on other weights either
            let part = b.narrow_rows(n / 2, n - n / 2).unwrap();
            let found = bits(&block_row_products((1, n - n / 2), Start::Row(&bias[n / 2..]), &a, part, 1.3));
            assert_eq!(found, all[n / 2..n]);
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_the_bits() {
    let (m, n, k) = (21, 300, 1280);
    for format in [BlockFormat::Q8_0, BlockFormat::Q6K] {
        let blocks = random_blocks(format, n * k / format.len(), 9);
        let b = BlockMatrix::new(format, &blocks, n, k).unwrap();
        let (a, gradient) = (random(m * k, 1), random(m * n, 2));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                [
                    bits(&block_row_products((m, n), Start::Zero, &a, b, 1.0)),
                    bits(&block_products((m, n), Start::Zero, &a, b, 1.0)),
                    bits(&block_transposed_products((m, k), Start::Zero, &gradient, b, 1.0)),
                ]
            })
        };
        assert_eq!(run(1), run(3));
    }
}

#[test]
fn every_kernel_of_the_machine_computes_the_sums() {
    let (m, n, k) = (5, 7, 1280);
    let format = BlockFormat::Q4K;
    let blocks = random_blocks(format, n * k / format.len(), 9);
    let (a, b) = (random(m * k, 1), BlockMatrix::new(format, &blocks, n, k).unwrap());
    let with = |run: fn(&Task)| {
        let mut c = vec![0.0; m * n];
        run(&Task { shape: (m, n), start: Start::Zero, a: &a, b, alpha: 1.0, c: Shared::new(&mut c) });
        c
    };
    let mut found = vec![0.0; m * n];
    add_rows(&Task { shape: (m, n), start: Start::Zero, a: &a, b, alpha: 1.0, c: Shared::new(&mut found) });
    let is_close = |other: &[f32]| found.iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(is_close(&with(run::<Portable<Fused>>)) && is_close(&with(run::<Portable<Separate>>)));
    #[cfg(target_arch = "x86_64")]
    {
        use crate::gemm_tile::x86;
        use crate::isa::{Isa, isa};
        assert!(isa() < Isa::Avx2 || is_close(&with(run::<x86::Avx2>)));
        assert!(isa() < Isa::Avx512 || is_close(&with(run::<x86::Avx512>)));
    }
}

#[test]
fn empty_products_return_the_initial_value() {
    let nothing = BlockMatrix::new(BlockFormat::Q8_0, &[], 2, 0).unwrap();
    assert_eq!(block_row_products((2, 2), Start::Row(&[1.0, 2.0]), &[], nothing, 1.0), [1.0, 2.0, 1.0, 2.0]);
    assert_eq!(block_products((6, 2), Start::Row(&[1.0, 2.0]), &[], nothing, 1.0), [1.0, 2.0].repeat(6));
    let nothing = BlockMatrix::new(BlockFormat::Q8_0, &[], 0, 32).unwrap();
    assert_eq!(block_transposed_products((1, 32), Start::Row(&[1.0; 32]), &[], nothing, 1.0), [1.0; 32]);
    assert!(block_products((0, 0), Start::Zero, &[], nothing, 1.0).is_empty());
}
