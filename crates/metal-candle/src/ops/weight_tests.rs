//! Layers with mapped weights, and rows of a batch in inference.

#![allow(clippy::unwrap_used)]

use super::linear::{Linear, Wanted};
use super::tests::{assert_close, random, values};
use super::{LowRank, Magnitude, Weight, weight_norms_squared};
use candle_core::{DType, Tensor};
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

/// A weight in a file gives the bits of the same weight in a tensor, in every use of it.
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
        let term = LowRank::new(random(&[3, columns], 3), random(&[rows, 3], 4), 1.7);
        let layers = [&mapped, &weight].map(|weight| Linear { weight: weight.clone(), bias: Some(random(&[rows], 2)) });
        for count in [1, 70] {
            let (x, dy) = (random(&[count, columns], 5), random(&[count, rows], 6));
            let [found, expected] = layers.each_ref().map(|layer| layer.forward(&x, Some(&term), None, None).unwrap());
            same(found, expected);
            let wanted = Wanted { input: true, weight: false, bias: false };
            let [found, expected] = layers
                .each_ref()
                .map(|layer| layer.backward(Some(&x), Some(&term), None, &dy, wanted, None, None).unwrap());
            same(found.input.unwrap(), expected.input.unwrap());
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// Where no backward pass follows, a row has the same bits alone and among others, whatever is added to the layer.
#[test]
fn a_row_is_inferred_as_if_it_were_alone() {
    let (x, residual) = (random(&[70, 40], 5), random(&[70, 33], 6));
    let weight = random(&[33, 40], 1);
    let plain = LowRank::new(random(&[3, 40], 3), random(&[33, 3], 4), 1.7);
    let weight_norms_squared = weight_norms_squared(&weight).unwrap();
    let magnitude = Magnitude { m: random(&[33], 10), weight_norms_squared, reciprocal_norms: None };
    let terms = [
        None,
        Some(plain.clone()),
        Some(LowRank { start: Some((random(&[2, 40], 8), random(&[33, 2], 9))), dropout: 0.4, ..plain.clone() }),
        Some(LowRank { magnitude: Some(magnitude), ..plain }),
    ];
    for (bias, dtype) in [(None, DType::F32), (Some(random(&[33], 2)), DType::BF16)] {
        let layer = Linear { weight: weight.to_dtype(dtype).unwrap().into(), bias };
        for (term, residual) in terms.iter().flat_map(|term| [(term, None), (term, Some(&residual))]) {
            let all = layer.infer(&x, term.as_ref(), residual).unwrap();
            assert_close(&all, &layer.forward(&x, term.as_ref(), None, residual).unwrap(), 1e-5);
            for (first, count) in [(0, 1), (69, 1), (7, 3), (1, 9), (0, 64)] {
                let part = |x: &Tensor| x.narrow(0, first, count).unwrap().force_contiguous().unwrap();
                let found = layer.infer(&part(&x), term.as_ref(), residual.map(part).as_ref()).unwrap();
                assert_eq!(values(&found), values(&part(&all)), "{count} rows");
            }
        }
    }
}
