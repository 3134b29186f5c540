//! Tests products of few vectors with quantized blocks on CUDA against sums in f64 on the CPU.

#![allow(clippy::unwrap_used)]

use super::BlockFormat;
use super::gpu_blocks::GpuBlocks;
use super::tests::{random, values};
use super::weight::Weight;
use candle_core::{DType, Device, Tensor};

const ROWS: usize = 37;

fn device() -> Device {
    crate::Device::cuda(0).unwrap().candle()
}

/// A quantized matrix with `columns` columns on the device, and its values.
fn weight(format: BlockFormat, columns: usize, dtype: DType, seed: u64) -> (Weight, Vec<f32>) {
    let blocks = format.quantize(&values(&random(&[ROWS, columns], seed)), columns, None).unwrap();
    let weight = Weight::blocks(blocks, (ROWS, columns), format).unwrap();
    let expected = values(&weight.tensor().unwrap());
    (weight.to_device(&device(), dtype).unwrap(), expected)
}

/// `factors.0 X W^T + factors.1 Y`.
fn expected(x: &[f32], w: &[f32], y: &[f32], columns: usize, factors: (f32, f32)) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let sums = x.chunks_exact(columns).flat_map(|x| w.chunks_exact(columns).map(move |w| dot(x, w)));
    sums.zip(y).map(|(sum, y)| (f64::from(factors.0) * sum + f64::from(factors.1) * f64::from(*y)) as f32).collect()
}

#[track_caller]
fn assert_near(what: &str, found: &Tensor, expected: &[f32]) {
    let found = values(&found.to_device(&Device::Cpu).unwrap());
    let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 2e-5 * largest, "{what}: {found}, not {expected} (of {largest})");
    }
}

/// Parts of 128 rows are dequantized. 40 parts whose sums were rounded to bf16 would be off by more than one rounding.
#[test]
fn sums_of_parts_are_not_rounded() {
    let (rows, columns, tokens) = (40 * 128, 256, 3);
    let format = BlockFormat::Q8_0;
    let blocks = format.quantize(&values(&random(&[rows, columns], 1)), columns, None).unwrap();
    let weight = Weight::blocks(blocks.clone(), (rows, columns), format).unwrap().tensor().unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let own = GpuBlocks::upload(&blocks, (rows, columns), format, dtype, &device()).unwrap();
        let rounded = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap();
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
        let w = wide(&rounded(&weight));
        let (x, start) = (rounded(&random(&[tokens, rows], 2)), rounded(&random(&[tokens, columns], 3)));
        for beta in [0.0, 0.5] {
            let y = start.to_device(&device()).unwrap().force_contiguous().unwrap();
            let there = x.to_device(&device()).unwrap();
            own.multiply_in_parts(&y, &there, false, (0.7, beta), None, 1000).unwrap();
            let sum = (wide(&x).matmul(&w).unwrap() * 0.7).unwrap();
            let sum = (sum + (wide(&start) * f64::from(beta)).unwrap()).unwrap();
            // half an ulp, and what sums in another order differ by
            let ulp = match dtype {
                DType::F32 => 1e-5,
                DType::F16 => 0.51 / 1024.0,
                _ => 0.51 / 128.0,
            };
            let found = values(&wide(&y.to_device(&Device::Cpu).unwrap()));
            for (found, expected) in found.iter().zip(values(&sum)) {
                let most = ulp * expected.abs() + 1e-4;
                assert!((found - expected).abs() <= most, "{dtype:?}, beta {beta}: {found}, not {expected}");
            }
        }
    }
}

#[test]
fn few_vectors_are_multiplied_with_blocks_of_every_format() {
    let of_f16 = [BlockFormat::Q4K, BlockFormat::Q6K, BlockFormat::Q8_0].map(|format| (format, DType::F16));
    let all = BlockFormat::WRITABLE.map(|format| (format, DType::BF16));
    for (format, dtype) in all.into_iter().chain(of_f16) {
        // stages of one block of 256, or of 64 or 128 columns
        let widths: &[usize] = if format.len() > 128 { &[2560] } else { &[576, 1152] };
        let counts: &[usize] = if format == BlockFormat::Q4K { &[1, 9, 20, 64] } else { &[1, 20] };
        for (&columns, &count) in widths.iter().flat_map(|columns| counts.iter().map(move |count| (columns, count))) {
            let what = format!("{} in {dtype:?}, {count} x {columns}", format.name());
            let (own, w) = weight(format, columns, dtype, 1);
            let x = random(&[count, columns], 2).to_dtype(dtype).unwrap();
            let (x, there) = (values(&x.to_dtype(DType::F32).unwrap()), x.to_device(&device()).unwrap());
            let start = random(&[count, ROWS], 3);
            let y = start.to_device(&device()).unwrap();
            own.multiply_on_gpu(&y, &there, true, (0.7, 0.5), None).unwrap();
            assert_near(&what, &y, &expected(&x, &w, &values(&start), columns, (0.7, 0.5)));
            // a range of rows, together with another matrix
            let (other, w2) = weight(format, columns, dtype, 4);
            let part = own.narrow_rows(5, 20).unwrap();
            let ys = [20, ROWS].map(|rows| Tensor::zeros((count, rows), DType::F32, &device()).unwrap());
            Weight::multiply_together(&there, &[(&part, &ys[0]), (&other, &ys[1])], None).unwrap();
            let zeros = vec![0.0; count * ROWS];
            assert_near(&what, &ys[0], &expected(&x, &w[5 * columns..25 * columns], &zeros, columns, (1.0, 0.0)));
            assert_near(&what, &ys[1], &expected(&x, &w2, &zeros, columns, (1.0, 0.0)));
        }
    }
}
