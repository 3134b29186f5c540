//! Lays out parameters and optimizer state in flat buffers.

use super::OptimizerConfig;
use crate::error::{Error, Result};
use crate::training::Parameter;
use metal_candle_kernels::{BLOCK, MatrixSection, Section};

/// The settings of an optimizer that can differ between parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParameterGroup {
    /// Factor of the learning rate.
    pub learning_rate_factor: f64,
    /// Whether weight decay applies.
    pub decays: bool,
}

impl Default for ParameterGroup {
    fn default() -> Self {
        Self { learning_rate_factor: 1.0, decays: true }
    }
}

/// A range of the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) name: &'static str,
    pub(super) len: usize,
}

/// How an optimizer lays out its state for some parameters.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) num_parameters: usize,
    /// Ranges updated element by element; for 8-bit moments and Adafactor each section is one tensor.
    pub(super) sections: Vec<Section>,
    /// Matrices updated as a whole.
    pub(super) matrices: Vec<MatrixSection>,
    /// The f32 state, in its order after the parameters.
    pub(super) slots: Vec<Slot>,
    /// The number of one-byte codes of each of the two moments.
    pub(super) num_codes: usize,
}

/// The kind of state of a parameter.
enum Kind {
    /// One element per element of the parameter.
    Elements,
    /// One scale per block.
    Blocks,
    /// A mean per row and a mean per column.
    Factors(usize, usize),
    /// One element per element of a matrix.
    Matrix(usize, usize),
}

impl Kind {
    fn of(config: &OptimizerConfig, parameter: &Parameter) -> Self {
        match (config, parameter.shape.as_slice()) {
            (OptimizerConfig::AdamW8bit(_), _) => Self::Blocks,
            (OptimizerConfig::Adafactor(_), &[rows, columns]) => Self::Factors(rows, columns),
            (OptimizerConfig::Muon(_), &[rows, columns]) if is_hidden(&parameter.name) => Self::Matrix(rows, columns),
            _ => Self::Elements,
        }
    }
}

/// Whether a matrix maps hidden states to hidden states: neither an embedding nor the head.
fn is_hidden(name: &str) -> bool {
    !name.split('.').any(|part| matches!(part, "embed_tokens" | "lm_head"))
}

impl Layout {
    pub(super) fn new(
        config: &OptimizerConfig,
        parameters: &[Parameter],
        group: impl Fn(&Parameter) -> ParameterGroup,
    ) -> Result<Self> {
        let mut layout = Self::default();
        let (mut elements, mut blocks, mut rows_so_far, mut columns_so_far, mut of_matrices) = (0, 0, 0, 0, 0);
        let keeps_tensors_apart = matches!(config, OptimizerConfig::AdamW8bit(_) | OptimizerConfig::Adafactor(_));
        for parameter in parameters {
            check_offset(parameter, layout.num_parameters)?;
            layout.num_parameters += parameter.len;
            let ParameterGroup { learning_rate_factor: rate, decays } = group(parameter);
            if !(rate.is_finite() && rate >= 0.0) {
                let message = format!("`{rate}` for `{}` is not a valid learning-rate factor", parameter.name);
                return Err(Error::argument("parameter group", message));
            }
            let section = Section { start: parameter.offset, len: parameter.len, state: 0, rate, decays };
            match Kind::of(config, parameter) {
                Kind::Elements => {
                    let section = Section { state: elements, ..section };
                    elements += parameter.len;
                    match layout.sections.last_mut() {
                        Some(last) if !keeps_tensors_apart && joins(last, &section) => last.len += section.len,
                        _ => layout.sections.push(section),
                    }
                }
                Kind::Blocks => {
                    layout.sections.push(Section { state: blocks, ..section });
                    blocks += parameter.len.div_ceil(BLOCK);
                }
                Kind::Factors(rows, columns) => {
                    let section = Section { state: rows_so_far, ..section };
                    layout.matrices.push(MatrixSection { section, rows, columns, column_state: columns_so_far });
                    (rows_so_far, columns_so_far) = (rows_so_far + rows, columns_so_far + columns);
                }
                Kind::Matrix(rows, columns) => {
                    let section = Section { state: of_matrices, ..section };
                    layout.matrices.push(MatrixSection { section, rows, columns, column_state: of_matrices });
                    of_matrices += parameter.len;
                }
            }
        }
        let slots = match config {
            OptimizerConfig::AdamW(_) | OptimizerConfig::Adam(_) => {
                vec![("first_moment", elements), ("second_moment", elements)]
            }
            OptimizerConfig::Sgd(config) if config.momentum == 0.0 => vec![],
            OptimizerConfig::Sgd(_) | OptimizerConfig::Lion(_) => vec![("first_moment", elements)],
            OptimizerConfig::Adafactor(_) => {
                vec![("row_means", rows_so_far), ("column_means", columns_so_far), ("second_moment", elements)]
            }
            OptimizerConfig::Muon(_) => {
                vec![("matrix_moment", of_matrices), ("first_moment", elements), ("second_moment", elements)]
            }
            OptimizerConfig::AdamW8bit(_) => {
                layout.num_codes = layout.num_parameters;
                vec![("first_scales", blocks), ("second_scales", blocks)]
            }
            OptimizerConfig::ScheduleFreeAdamW(_) => vec![("last_point", elements), ("second_moment", elements)],
        };
        layout.slots = slots.into_iter().map(|(name, len)| Slot { name, len }).collect();
        Ok(layout)
    }

    /// The number of elements of the f32 state.
    pub(super) fn state_len(&self) -> usize {
        self.slots.iter().map(|slot| slot.len).sum()
    }

    pub(super) fn state_bytes(&self) -> usize {
        4 * self.state_len() + 2 * self.num_codes
    }
}

fn joins(last: &Section, next: &Section) -> bool {
    (last.start + last.len, last.state + last.len) == (next.start, next.state)
        && last.rate.to_bits() == next.rate.to_bits()
        && last.decays == next.decays
}

fn check_offset(parameter: &Parameter, expected_offset: usize) -> Result<()> {
    if parameter.offset != expected_offset {
        let message = format!("`{}` starts at {}, expected {expected_offset}", parameter.name, parameter.offset);
        return Err(Error::argument("parameters", message));
    }
    if parameter.shape.iter().product::<usize>() != parameter.len {
        return Err(Error::shape(&parameter.name, format!("{} elements", parameter.len), &parameter.shape));
    }
    Ok(())
}
