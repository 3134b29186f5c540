//! Compares quantized blocks with ggml's, and checks errors and the bytes on every instruction set.

use super::QuantizeError;
use crate::blocks::matrix::{BlockFormat, BlockMatrix};
use crate::isa::{ISA_VARIABLE, LEVELS};
use crate::testing::random;
use std::process::Command;

/// Written by `dev/reference_quantizers.py`.
const GOLDEN: &[u8] = include_bytes!("quantized.bin");
const COLUMNS: usize = 512;
const ROWS: usize = 3;

/// The importances and values, and the remaining bytes.
fn golden_values() -> (Vec<f32>, Vec<f32>, &'static [u8]) {
    let (values, blocks) = GOLDEN.split_at(4 * COLUMNS * (1 + ROWS));
    let mut values: Vec<f32> = values.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let rows = values.split_off(COLUMNS);
    (values, rows, blocks)
}

/// Calls `check` with each format, the importance or none, and ggml's blocks.
fn for_each_golden(mut check: impl FnMut(BlockFormat, Option<&[f32]>, &[f32], &[u8])) {
    let (importance, values, mut rest) = golden_values();
    let mut seen = Vec::new();
    while let Some((id, after)) = rest.split_first_chunk::<4>() {
        let format = BlockFormat::from_ggml_type(u32::from_le_bytes(*id)).unwrap();
        let size = ROWS * format.row_bytes(COLUMNS).unwrap();
        check(format, None, &values, &after[..size]);
        check(format, Some(&importance), &values, &after[size..2 * size]);
        seen.push(format);
        rest = &after[2 * size..];
    }
    assert_eq!(seen, BlockFormat::WRITABLE);
}

/// Fails with the first block that differs.
fn assert_blocks(format: BlockFormat, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    let blocks = found.chunks_exact(format.bytes()).zip(expected.chunks_exact(format.bytes()));
    for (index, (found, expected)) in blocks.enumerate() {
        assert_eq!(found, expected, "block {index} of {}", format.name());
    }
}

#[test]
fn blocks_match_ggml() {
    for_each_golden(|format, importance, values, expected| {
        assert_blocks(format, &format.quantize(values, COLUMNS, importance).unwrap(), expected);
    });
}

/// The instruction set is selected once per process, so each level runs the test above in a separate process.
#[test]
fn every_instruction_set_quantizes_to_the_same_blocks() {
    let test = "blocks::encode::tests::blocks_match_ggml";
    for level in LEVELS {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command.args([test, "--exact"]).env(ISA_VARIABLE, level).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{level}: {text}");
    }
}

fn dequantized(format: BlockFormat, blocks: &[u8], columns: usize) -> Vec<f32> {
    let rows = blocks.len() / format.row_bytes(columns).unwrap();
    let matrix = BlockMatrix::new(format, blocks, rows, columns).unwrap();
    let mut values = vec![0.0; rows * columns];
    for (row, to) in values.chunks_exact_mut(columns).enumerate() {
        matrix.widen_row(row, 0..columns, to);
    }
    values
}

/// The root of the weighted mean square error, relative to that of the values.
fn error(format: BlockFormat, values: &[f32], columns: usize, importance: Option<&[f32]>, weights: &[f32]) -> f64 {
    let blocks = format.quantize(values, columns, importance).unwrap();
    let (mut error, mut size) = (0.0, 0.0);
    for (at, (found, value)) in dequantized(format, &blocks, columns).iter().zip(values).enumerate() {
        let (weight, value) = (f64::from(weights[at % columns]), f64::from(*value));
        error += weight * (f64::from(*found) - value).powi(2);
        size += weight * value * value;
    }
    (error / size).sqrt()
}

/// Numbers of the normal distribution.
fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let uniform = random(2 * count, seed);
    let pairs = uniform.as_chunks::<2>().0.iter();
    pairs.map(|[a, b]| (-2.0 * (1.0 - a.abs()).ln()).sqrt() * (b * std::f32::consts::PI).cos()).collect()
}

/// Numbers of the Laplace distribution with variance 1.
fn laplace(count: usize, seed: u64) -> Vec<f32> {
    random(count, seed)
        .into_iter()
        .map(|a| -(1.0 - a.abs()).ln().copysign(a) * std::f32::consts::FRAC_1_SQRT_2)
        .collect()
}

/// Errors of ggml's quantizer for Gaussian and Laplacian weights, and for Gaussian weights with an importance.
const ERRORS: [(BlockFormat, f64, f64, f64); 13] = [
    (BlockFormat::Q4_0, 0.0860, 0.107, 0.0771),
    (BlockFormat::Q4_1, 0.0783, 0.092, 0.0637),
    (BlockFormat::Q5_0, 0.0427, 0.0535, 0.0384),
    (BlockFormat::Q5_1, 0.0378, 0.0445, 0.0309),
    (BlockFormat::Q8_0, 0.00536, 0.0067, 0.00537),
    (BlockFormat::Q2K, 0.297, 0.344, 0.235),
    (BlockFormat::Q3K, 0.151, 0.176, 0.134),
    (BlockFormat::Q4K, 0.0714, 0.0847, 0.0644),
    (BlockFormat::Q5K, 0.0362, 0.0429, 0.0327),
    (BlockFormat::Q6K, 0.0178, 0.0217, 0.0161),
    (BlockFormat::IQ4NL, 0.0761, 0.088, 0.0703),
    (BlockFormat::IQ4XS, 0.0767, 0.089, 0.0711),
    (BlockFormat::MXFP4, 0.114, 0.127, 0.114),
];

#[test]
fn errors_match_ggml() {
    let columns = 4096;
    let scale = |values: Vec<f32>| values.into_iter().map(|value| 0.02 * value).collect::<Vec<f32>>();
    let (normal, heavy) = (scale(gaussian(64 * columns, 1)), scale(laplace(64 * columns, 2)));
    let importance: Vec<f32> = gaussian(columns, 3).into_iter().map(f32::exp).collect();
    let ones = vec![1.0; columns];
    for (format, gaussian, laplacian, important) in ERRORS {
        let is_near = |found: f64, expected: f64, tolerance: f64| {
            assert!((found / expected - 1.0).abs() < tolerance, "{}: {found}, expected {expected}", format.name());
        };
        is_near(error(format, &normal, columns, None, &ones), gaussian, 0.02);
        is_near(error(format, &heavy, columns, None, &ones), laplacian, 0.03);
        let with = error(format, &normal, columns, Some(&importance), &importance);
        is_near(with, important, 0.03);
        assert!(with <= error(format, &normal, columns, None, &importance), "{}", format.name());
    }
    let mut order = ERRORS;
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let of = |format| error(format, &normal, columns, None, &ones);
    assert!(order.windows(2).all(|pair| of(pair[0].0) > of(pair[1].0)));
}

#[test]
fn dequantized_blocks_quantize_to_themselves() {
    use BlockFormat::{MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    let values = gaussian(64 * 256, 4);
    for format in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4] {
        let blocks = format.quantize(&values, 256, None).unwrap();
        let again = format.quantize(&dequantized(format, &blocks, 256), 256, None).unwrap();
        assert_blocks(format, &again, &blocks);
    }
}

#[test]
fn the_number_of_threads_does_not_change_the_blocks() {
    let columns = 1280;
    let (values, importance) = (gaussian(70 * columns, 5), vec![1.0; columns]);
    for format in BlockFormat::WRITABLE {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| format.quantize(&values, columns, Some(&importance)).unwrap())
        };
        let all = run(3);
        assert!(run(1) == all, "{}", format.name());
        // other rows do not change them either
        let row = format.row_bytes(columns).unwrap();
        let alone = format.quantize(&values[33 * columns..34 * columns], columns, Some(&importance)).unwrap();
        assert!(alone == all[33 * row..34 * row], "{}", format.name());
    }
}

#[test]
fn special_rows_stay_finite() {
    let columns = 512;
    let spike = |size: f32| {
        let mut row: Vec<f32> = gaussian(columns, 6).into_iter().map(|value| 0.02 * value).collect();
        row[300] = size;
        row
    };
    let rows = [
        vec![0.0; columns],
        vec![-0.0; columns],
        vec![0.7; columns],
        vec![-0.7; columns],
        vec![1e-42; columns],
        vec![-1e-30; columns],
        spike(60000.0),
        spike(-1e4),
        gaussian(columns, 7).into_iter().map(|value| value * 1e-38).collect(),
    ];
    let important: Vec<f32> = gaussian(columns, 8).into_iter().map(|value| value.abs() * 1e30).collect();
    let mut dead = important.clone();
    dead[256..].fill(0.0);
    for format in BlockFormat::WRITABLE {
        for importance in [None, Some(&important), Some(&dead)] {
            for row in &rows {
                let blocks = format.quantize(row, columns, importance.map(Vec::as_slice)).unwrap();
                let largest = row.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                for (found, value) in dequantized(format, &blocks, columns).iter().zip(row) {
                    // 16 values below 2 bits are the coarsest; f16 scales end at 6e-8
                    let tolerance = 0.51 * largest + 1e-4;
                    assert!((found - value).abs() <= tolerance, "{}: {found} for {value}", format.name());
                }
            }
        }
        // columns without importance keep their weights
        let values: Vec<f32> = gaussian(columns, 9);
        let blocks = format.quantize(&values, columns, Some(&dead)).unwrap();
        let (mut error, mut size) = (0.0, 0.0);
        for (found, value) in dequantized(format, &blocks, columns).iter().zip(&values).skip(256) {
            (error, size) = (error + (found - value).powi(2), size + value * value);
        }
        assert!(error < 0.15 * size, "{}: {error} of {size}", format.name());
        // no importance at all
        let zeros = vec![0.0; columns];
        let without = format.quantize(&values, columns, None).unwrap();
        assert!(format.quantize(&values, columns, Some(&zeros)).unwrap() == without, "{}", format.name());
    }
}

#[test]
fn invalid_weights_are_refused() {
    use QuantizeError as E;
    let format = BlockFormat::Q4K;
    let (values, ones) = (vec![0.5_f32; 1024], vec![1.0_f32; 512]);
    assert_eq!(format.quantize(&values, 300, None), Err(E::Columns { format, columns: 300 }));
    assert_eq!(format.quantize(&values[..800], 512, None), Err(E::Values { count: 800, columns: 512 }));
    assert_eq!(format.quantize(&values, 0, None), Err(E::Values { count: 1024, columns: 0 }));
    assert_eq!(format.quantize(&[], 0, None), Ok(Vec::new()));
    assert_eq!(format.quantize(&[], 256, None), Ok(Vec::new()));
    let wrong = format.quantize(&values, 512, Some(&ones[1..]));
    assert_eq!(wrong, Err(E::ImportanceLength { count: 511, columns: 512 }));
    for bad in [-1.0, f32::INFINITY] {
        let mut ones = ones.clone();
        ones[77] = bad;
        let found = format.quantize(&values, 512, Some(&ones));
        assert_eq!(found, Err(E::Importance { column: 77, value: bad }));
    }
    let columns = 512;
    for format in BlockFormat::WRITABLE {
        for importance in [None, Some(ones.as_slice())] {
            let mut values = gaussian(200 * columns, 1);
            values[150 * columns + 33] = f32::NAN;
            let found = format.quantize(&values, columns, importance).unwrap_err();
            assert!(matches!(found, E::NotFinite { index, value } if index == 150 * columns + 33 && value.is_nan()));
            values[3 * columns + 400] = f32::NEG_INFINITY;
            values[3 * columns + 401] = f32::NAN;
            let found = format.quantize(&values, columns, importance);
            assert_eq!(found, Err(E::NotFinite { index: 3 * columns + 400, value: f32::NEG_INFINITY }));
            // scales that round to infinity
            for value in [65504.0 * 128.0 * 32.0, 1e9, -1e38] {
                let mut values = values.clone();
                values[columns + 40] = value;
                values[columns + 39] = 0.9 * value;
                let found = format.quantize(&values[..2 * columns], columns, importance);
                if format == BlockFormat::MXFP4 {
                    assert!(found.is_ok());
                } else if value > 3e8 || format != BlockFormat::Q6K {
                    assert_eq!(found, Err(E::TooLarge { format, index: columns + 40, value }), "{}", format.name());
                }
            }
        }
    }
    let error = format.quantize(&[1e9; 256], 256, None).unwrap_err().to_string();
    assert_eq!(error, "value 255 is 1000000000, too large for the f16 scales of `q4_k`; choose bf16 or f32");
}

#[test]
fn ties_round_as_in_ggml() {
    // 8 bits with a scale of one: away from zero
    let mut values = vec![0.0; 32];
    values[..9].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -2.5, 0.499_999_97, 126.5, -126.499_99]);
    let blocks = BlockFormat::Q8_0.quantize(&values, 32, None).unwrap();
    let found: Vec<i8> = blocks[2..11].iter().map(|byte| byte.cast_signed()).collect();
    assert_eq!(found, [127, 1, 2, 3, -1, -3, 0, 127, -126]);
    // 4-bit floats: towards zero, without a negative zero
    let mut values = vec![0.0; 32];
    values[..16].copy_from_slice(&[
        6.0, 0.25, -0.25, 0.26, -0.26, 0.75, 0.76, 1.25, 1.75, 1.76, 2.5, 2.51, 3.5, 3.51, 5.0, -5.01,
    ]);
    let blocks = BlockFormat::MXFP4.quantize(&values, 32, None).unwrap();
    let found: Vec<u8> = blocks[1..].iter().map(|byte| byte & 15).collect();
    assert_eq!((blocks[0], found), (127, vec![7, 0, 0, 1, 9, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6, 15]));
}

#[test]
fn exponents_of_4_bit_floats_match_ggml() {
    // the f32 logarithm of the largest magnitudes below some powers of two is that of the power
    for (largest, exponent) in [
        (8.0_f32, 128),
        (7.999_999_5, 128),
        (7.999_998, 127),
        (4.0, 127),
        (3.999_999_8, 126),
        (0.999_999_94, 124),
        (63.999_996, 131),
        (f32::MAX, 253),
        // below those of ggml, whose exponent wraps around
        (1e-45, 0),
        (0.0, 0),
    ] {
        let mut values = vec![0.0; 32];
        values[20] = -largest;
        assert_eq!(BlockFormat::MXFP4.quantize(&values, 32, None).unwrap()[0], exponent, "{largest}");
    }
}

#[test]
fn the_largest_scales_are_written() {
    // the scale of the block is the largest f16
    let mut values = vec![0.0; 32];
    values[5] = 8.0 * 65504.0;
    let blocks = BlockFormat::Q4_0.quantize(&values, 32, None).unwrap();
    assert_eq!(dequantized(BlockFormat::Q4_0, &blocks, 32), values);
    values[5] = 8.0 * 65520.0;
    assert!(BlockFormat::Q4_0.quantize(&values, 32, None).is_err());
}

#[test]
fn a_block_that_cannot_be_stored_becomes_not_a_numbers() {
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_0] {
        let mut values = random(32 * 2000, 7);
        let expected = format.quantize(&values, 32, None).unwrap();
        let mut found = vec![1; expected.len()];
        format.quantize_or_nan(&values, &mut found);
        assert!(found == expected, "{}", format.name());
        let wrong =
            [(0, f32::NAN), (1, f32::INFINITY), (2, 1e30), (17, f32::NEG_INFINITY), (700, 1e8), (1999, f32::NAN)];
        for (block, value) in wrong {
            values[32 * block + block % 32] = value;
        }
        format.quantize_or_nan(&values, &mut found);
        let mut widened = vec![0.0; values.len()];
        BlockMatrix::new(format, &found, 2000, 32).unwrap().widen_rows(0..2000, &mut widened);
        let bytes = format.bytes();
        for block in 0..2000 {
            let is_wrong = wrong.iter().any(|(wrong, _)| *wrong == block);
            let row = &widened[32 * block..][..32];
            assert_eq!(row.iter().all(|value| value.is_nan()), is_wrong, "{} {block}", format.name());
            assert!(is_wrong || found[block * bytes..][..bytes] == expected[block * bytes..][..bytes]);
        }
    }
}
