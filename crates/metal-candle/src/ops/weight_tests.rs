//! Tests mapped and quantized weights, and that the result of a row does not depend on the batch.

#![allow(clippy::unwrap_used)]

use super::linear::{Linear, NeedsGrad};
use super::tests::{assert_close, random, values};
use super::{LowRank, Magnitude, MappedFiles, Weight, weight_norms_squared};
use candle_core::{DType, Tensor};
use metal_candle_kernels::{BlockFormat, BlockMatrix};
use std::sync::Arc;

fn little_endian(tensor: &Tensor) -> Vec<u8> {
    fn bytes<T: candle_core::WithDType, const N: usize>(tensor: &Tensor, to_bytes: fn(T) -> [u8; N]) -> Vec<u8> {
        tensor.flatten_all().unwrap().to_vec1::<T>().unwrap().into_iter().flat_map(to_bytes).collect()
    }
    match tensor.dtype() {
        DType::F32 => bytes(tensor, f32::to_le_bytes),
        DType::F16 => bytes(tensor, half::f16::to_le_bytes),
        _ => bytes(tensor, half::bf16::to_le_bytes),
    }
}

/// A mapped weight returns the same bits as the same weight in a tensor, in every use.
#[test]
fn a_mapped_weight_equals_its_tensor() {
    let path = std::env::temp_dir().join(format!("metal-candle-weight-{}", std::process::id()));
    let (rows, columns) = (19, 34);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let dense = random(&[rows, columns], 1).to_dtype(dtype).unwrap();
        let size = dtype.size_in_bytes();
        let bytes = little_endian(&dense);
        let content: Vec<u8> = [vec![7; 12], bytes, vec![7; 3]].concat();
        std::fs::write(&path, &content).unwrap();
        let file = Arc::new(metal_candle_kernels::map_file(&path).unwrap());
        let end = 12 + rows * columns * size;
        assert!(Weight::mapped(&file, 12..end, &[rows, columns + 1], dtype).is_none());
        assert!(Weight::mapped(&file, 11..end - 1, &[rows, columns], dtype).is_none());
        assert!(Weight::mapped(&file, 12..end, &[rows, columns], DType::I64).is_none());
        let mapped = Weight::mapped(&file, 12..end, &[rows, columns], dtype).unwrap();
        let weight = Weight::from(dense.clone());
        assert_eq!((mapped.dims(), mapped.dtype()), (weight.dims(), dtype));
        let same = |found: Tensor, expected: Tensor| {
            assert_eq!(found.dims(), expected.dims());
            assert_eq!(found.dtype(), expected.dtype());
            let bits =
                |x: &Tensor| values(&x.to_dtype(DType::F32).unwrap()).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&expected), "{dtype:?}");
        };
        same(mapped.tensor().unwrap(), dense.clone());
        same(mapped.rows(&[18, 0, 18], DType::F32).unwrap(), weight.rows(&[18, 0, 18], DType::F32).unwrap());
        same(mapped.row_norms_squared().unwrap(), weight_norms_squared(&dense).unwrap());
        let part = mapped.narrow_rows(3, 7).unwrap();
        same(part.tensor().unwrap(), dense.narrow(0, 3, 7).unwrap());
        same(part.narrow_rows(6, 1).unwrap().tensor().unwrap(), dense.narrow(0, 9, 1).unwrap());
        assert!(part.narrow_rows(6, 2).is_err() && mapped.rows(&[19], DType::F32).is_err() && mapped.dense().is_err());
        let update = LowRank::new(random(&[3, columns], 3), random(&[rows, 3], 4), 1.7);
        let layers = [&mapped, &weight].map(|weight| Linear { weight: weight.clone(), bias: Some(random(&[rows], 2)) });
        for count in [1, 70] {
            let (x, dy) = (random(&[count, columns], 5), random(&[count, rows], 6));
            let [found, expected] =
                layers.each_ref().map(|layer| layer.forward(&x, Some(&update), None, None).unwrap());
            same(found, expected);
            let needs_grad = NeedsGrad { input: true, weight: false, bias: false };
            let [found, expected] = layers
                .each_ref()
                .map(|layer| layer.backward(Some(&x), Some(&update), None, &dy, needs_grad, None, None).unwrap());
            same(found.input.unwrap(), expected.input.unwrap());
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// Quantized blocks, in a file or in memory, return the results of their dequantized matrix, in every use.
#[test]
fn a_quantized_weight_equals_its_values() {
    let (rows, columns, format) = (19, 64, BlockFormat::Q8_0);
    let num_bytes = format.row_bytes(columns).unwrap() * rows;
    // the f16 scales of the blocks are small and not zero
    let byte = |at: usize| if at % 34 == 1 { 0x24 + (at / 34 % 3) as u8 } else { (at * 37 % 251) as u8 };
    let blocks: Vec<u8> = (0..num_bytes).map(byte).collect();
    let path = std::env::temp_dir().join(format!("metal-candle-blocks-{}", std::process::id()));
    std::fs::write(&path, [&[7; 12][..], &blocks].concat()).unwrap();
    let file = Arc::new(metal_candle_kernels::map_file(&path).unwrap());
    let range = 12..12 + num_bytes;
    assert!(Weight::mapped_blocks(&file, range.clone(), (rows, columns + 32), format).is_none());
    assert!(Weight::mapped_blocks(&file, 13..13 + num_bytes, (rows, columns), format).is_none());
    assert!(Weight::blocks(blocks[1..].to_vec(), (rows, columns), format).is_none());
    let mut values_of = vec![0.0; rows * columns];
    let matrix = BlockMatrix::new(format, &blocks, rows, columns).unwrap();
    for (row, to) in values_of.chunks_exact_mut(columns).enumerate() {
        matrix.widen_row(row, 0..columns, to);
    }
    let dense = Tensor::from_vec(values_of, (rows, columns), &candle_core::Device::Cpu).unwrap();
    let mapped = Weight::mapped_blocks(&file, range, (rows, columns), format).unwrap();
    for weight in [mapped, Weight::blocks(blocks.clone(), (rows, columns), format).unwrap()] {
        let same = |found: Tensor, expected: Tensor| {
            assert_eq!(found.dims(), expected.dims());
            assert_eq!(values(&found), values(&expected));
        };
        assert_eq!((weight.dims(), weight.num_bytes()), (&[rows, columns][..], num_bytes));
        same(weight.tensor().unwrap(), dense.clone());
        same(
            weight.rows(&[18, 0, 18], DType::F32).unwrap(),
            Weight::from(dense.clone()).rows(&[18, 0, 18], DType::F32).unwrap(),
        );
        same(weight.row_norms_squared().unwrap(), weight_norms_squared(&dense).unwrap());
        let part = weight.narrow_rows(3, 7).unwrap();
        same(part.tensor().unwrap(), dense.narrow(0, 3, 7).unwrap());
        same(part.narrow_rows(6, 1).unwrap().tensor().unwrap(), dense.narrow(0, 9, 1).unwrap());
        assert!(part.narrow_rows(6, 2).is_err() && weight.rows(&[19], DType::F32).is_err() && weight.dense().is_err());
        let update = LowRank::new(random(&[3, columns], 3), random(&[rows, 3], 4), 1.7);
        let layers = [weight, dense.clone().into()].map(|weight| Linear { weight, bias: Some(random(&[rows], 2)) });
        for count in [1, 70] {
            let (x, dy) = (random(&[count, columns], 5), random(&[count, rows], 6));
            let [found, expected] =
                layers.each_ref().map(|layer| layer.forward(&x, Some(&update), None, None).unwrap());
            assert_close(&found, &expected, 1e-5);
            let [found, expected] = layers.each_ref().map(|layer| layer.infer(&x, Some(&update), Some(&dy)).unwrap());
            // activations are rounded to 8 bits
            assert_close(&found, &expected, 1e-2);
            let needs_grad = NeedsGrad { input: true, weight: false, bias: false };
            let [found, expected] = layers
                .each_ref()
                .map(|layer| layer.backward(Some(&x), Some(&update), None, &dy, needs_grad, None, None).unwrap());
            assert_close(&found.input.unwrap(), &expected.input.unwrap(), 1e-5);
        }
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn files_that_are_shared_at_first_are_copied_later() {
    let path = std::env::temp_dir().join(format!("metal-candle-passes-{}", std::process::id()));
    std::fs::write(&path, vec![0; 400_000]).unwrap();
    let [file, other] = [(); 2].map(|()| Arc::new(metal_candle_kernels::map_file(&path).unwrap()));
    let weight = Weight::mapped(&file, 0..400_000, &[100, 1000], DType::F32).unwrap();
    let files = MappedFiles::of([&weight].into_iter());
    let (mapped, sum) = (file.as_ptr(), |file: &[u8]| file.iter().map(|byte| u64::from(*byte)).sum::<u64>());
    assert_eq!(sum(&file) + sum(&other), 0);
    let finish_passes = |count: u32| (0..count).for_each(|_| files.finish_pass().unwrap());
    finish_passes(32);
    assert_eq!(file.as_ptr(), mapped, "copied after a few passes");
    // not copied here where the system counts the readers of a page
    finish_passes(32);
    drop(other);
    finish_passes(65);
    assert_ne!(file.as_ptr(), mapped, "not copied when it was no longer shared");
    std::fs::remove_file(&path).unwrap();
}

/// Without a backward pass, a row has the same bits alone and in any batch, for every kind of layer.
#[test]
fn the_result_of_a_row_does_not_depend_on_the_batch() {
    let (x, residual) = (random(&[70, 40], 5), random(&[70, 33], 6));
    let weight = random(&[33, 40], 1);
    let plain = LowRank::new(random(&[3, 40], 3), random(&[33, 3], 4), 1.7);
    let weight_norms_squared = weight_norms_squared(&weight).unwrap();
    let magnitude = Magnitude { m: random(&[33], 10), weight_norms_squared, reciprocal_norms: None };
    let updates = [
        None,
        Some(plain.clone()),
        Some(LowRank {
            initial_factors: Some((random(&[2, 40], 8), random(&[33, 2], 9))),
            dropout: 0.4,
            ..plain.clone()
        }),
        Some(LowRank { magnitude: Some(magnitude), ..plain }),
    ];
    for (bias, dtype) in [(None, DType::F32), (Some(random(&[33], 2)), DType::BF16)] {
        let layer = Linear { weight: weight.to_dtype(dtype).unwrap().into(), bias };
        for (update, residual) in updates.iter().flat_map(|update| [(update, None), (update, Some(&residual))]) {
            let all = layer.infer(&x, update.as_ref(), residual).unwrap();
            assert_close(&all, &layer.forward(&x, update.as_ref(), None, residual).unwrap(), 1e-5);
            for (first, count) in [(0, 1), (69, 1), (7, 3), (1, 9), (0, 64)] {
                let part = |x: &Tensor| x.narrow(0, first, count).unwrap().force_contiguous().unwrap();
                let found = layer.infer(&part(&x), update.as_ref(), residual.map(part).as_ref()).unwrap();
                assert_eq!(values(&found), values(&part(&all)), "{count} rows");
            }
        }
    }
}
