//! Reads 8-bit float matrices with a scale for the matrix, for each row or for each block.

use super::matrix::{PackedMatrix, Values};
use super::module::{Checked, Module};
use super::small_floats::{e4m3, e8m0};
use candle_core::DType;

/// The dtypes of scales.
const SCALES: &[&str] = &["F32", "F16", "BF16", "F8_E8M0"];

/// The matrix `[rows, columns]` of a module, with scales in the tensor `scale`; `None` if it is not quantized.
pub(super) fn find<'a>(
    module: &Module<'a>,
    [rows, columns]: [usize; 2],
    scale: &str,
    block: Option<[usize; 2]>,
    dense_dtype: DType,
) -> Checked<Option<PackedMatrix<'a>>> {
    let is_packed = module.find("weight").is_some_and(|weight| weight.dtype().starts_with("F8"));
    if !is_packed && module.find(scale).is_none() {
        return Ok(None);
    }
    let weight = module.require_shape("weight", &["F8_E4M3"], &[rows, columns])?;
    let scales = module.require(scale, SCALES)?;
    // the rows and columns of a block, and the blocks of a row
    let grid = match (scales.shape(), block) {
        (shape, _) if shape.iter().all(|&size| size == 1) => [rows, columns, 1],
        (&[a, b], Some([of_rows, of_columns]))
            if of_rows > 0 && of_columns > 0 && [a, b] == [rows.div_ceil(of_rows), columns.div_ceil(of_columns)] =>
        {
            [of_rows, of_columns, b]
        }
        (&[found] | &[found, 1], _) if found == rows => [1, columns, 1],
        (found, _) => {
            let blocks = block.map_or_else(String::new, |[a, b]| format!(", or one for each block of {a} x {b}"));
            let expected = format!("expected one scale, or {rows}{blocks}");
            return Err(format!("`{}`: {expected} of [{rows}, {columns}], found {found:?}", scales.name()));
        }
    };
    let read = move || {
        let bytes = weight.bytes();
        let factors: Vec<f32> = match scales.dtype() {
            "F8_E8M0" => scales.bytes().iter().map(|byte| e8m0(*byte)).collect(),
            _ => scales.floats()?,
        };
        let values: Vec<f32> = (0..=u8::MAX).map(e4m3).collect();
        let row = move |row: usize, to: &mut [f32]| {
            let [of_rows, of_columns, count] = grid;
            let factors = &factors[row / of_rows * count..][..count];
            let bytes = &bytes[row * columns..(row + 1) * columns];
            for ((to, bytes), factor) in to.chunks_mut(of_columns).zip(bytes.chunks(of_columns)).zip(factors) {
                for (value, byte) in to.iter_mut().zip(bytes) {
                    *value = values[usize::from(*byte)] * factor;
                }
            }
        };
        Ok(Values::Rows(Box::new(row), scales.half_dtype().unwrap_or(dense_dtype)))
    };
    let mut parts = vec![weight, scales];
    parts.extend(module.of_activations());
    Ok(Some(PackedMatrix { shape: [rows, columns], parts, read: Box::new(read) }))
}
