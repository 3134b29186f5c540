//! The Adafactor step.

use super::section::{CHUNK, MatrixSection, Section, check, sum_of_squares};
use crate::isa::{Arithmetic, dispatch};
use crate::math::{LANES, add_lanes};
use crate::parallel::{Shared, for_each};

/// The coefficients of one step of Adafactor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdafactorStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay rate of the means of the squared gradients.
    pub beta2: f64,
    /// Added to the squared gradients.
    pub eps: f64,
    /// Maximum root mean square of an update with learning rate 1.
    pub clip_threshold: f64,
    /// If set, the learning rate of a tensor is multiplied by its root mean square, or by this value if it is larger.
    pub least_scale: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The gradient is multiplied by this factor, for clipping.
    pub grad_scale: f64,
}

impl AdafactorStep {
    /// The learning rate of a tensor with the values `params`.
    fn rate(&self, section: &Section, params: &[f32]) -> f64 {
        let rate = section.learning_rate(self.learning_rate);
        match self.least_scale {
            Some(least) => rate * root_mean_square(sum_of_squares(params), params.len()).max(least),
            None => rate,
        }
    }

    /// The factor of the parameters, and the factor of an update with the sum of squares `squares`.
    fn factors(&self, section: &Section, params: &[f32], squares: f64) -> (f32, f32) {
        let rate = self.rate(section, params);
        let size = root_mean_square(squares, params.len());
        let keep = 1.0 - rate * section.weight_decay(self.weight_decay);
        (keep as f32, (rate / (size / self.clip_threshold).max(1.0)) as f32)
    }
}

fn root_mean_square(squares: f64, count: usize) -> f64 {
    (squares / count.max(1) as f64).sqrt()
}

/// Computes one step of Adafactor (<https://arxiv.org/abs/1804.04235>, algorithm 4) for matrices, in place. The state is the
/// row and column means of the squared gradients.
///
/// # Panics
/// The sections are out of order, overlap, or exceed a buffer.
pub fn adafactor_matrices(
    params: &mut [f32],
    grads: &[f32],
    row_means: &mut [f32],
    column_means: &mut [f32],
    step: &AdafactorStep,
    matrices: &[MatrixSection],
) {
    check(matrices.iter().map(|m| (m.section.start, m.section.len)), params.len().min(grads.len()), "parameters");
    check(matrices.iter().map(|m| (m.section.state, m.rows)), row_means.len(), "state of rows");
    check(matrices.iter().map(|m| (m.column_state, m.columns)), column_means.len(), "state of columns");
    let work = params.len();
    let (params, row_means, column_means) = (Shared::new(params), Shared::new(row_means), Shared::new(column_means));
    for_each(matrices.len(), work, |number| {
        let matrix = &matrices[number];
        let section = &matrix.section;
        assert_eq!(section.len, matrix.rows * matrix.columns, "the length of a matrix does not match its shape");
        // SAFETY: the sections are disjoint and within the buffers.
        let (params, rows, columns) = unsafe {
            (
                params.part(section.start, section.len),
                row_means.part(section.state, matrix.rows),
                column_means.part(matrix.column_state, matrix.columns),
            )
        };
        update_matrix(params, &grads[section.start..][..section.len], rows, columns, step, section);
    });
}

fn update_matrix(
    params: &mut [f32],
    grads: &[f32],
    row_means: &mut [f32],
    column_means: &mut [f32],
    step: &AdafactorStep,
    section: &Section,
) {
    let (num_rows, num_columns) = (row_means.len(), column_means.len());
    if grads.is_empty() {
        return;
    }
    let rows_per_task = (CHUNK / num_columns).max(1);
    let num_tasks = num_rows.div_ceil(rows_per_task);
    let rows_of = |task: usize| task * rows_per_task..num_rows.min((task + 1) * rows_per_task);
    let mut column_sums = vec![0.0f32; num_tasks * num_columns];
    {
        let (sums, rows) = (Shared::new(&mut column_sums), Shared::new(&mut *row_means));
        for_each(num_tasks, grads.len(), |task| {
            let range = rows_of(task);
            // SAFETY: tasks have disjoint rows and sums.
            let (sums, rows) =
                unsafe { (sums.part(task * num_columns, num_columns), rows.part(range.start, range.len())) };
            add_squares(&grads[range.start * num_columns..range.end * num_columns], rows, sums, step);
        });
    }
    for (column, mean) in column_means.iter_mut().enumerate() {
        let sum: f64 = column_sums[column..].iter().step_by(num_columns).map(|&sum| f64::from(sum)).sum();
        *mean = (step.beta2 * f64::from(*mean) + (1.0 - step.beta2) * sum / num_rows as f64) as f32;
    }
    let mean = row_means.iter().map(|&mean| f64::from(mean)).sum::<f64>() / num_rows as f64;
    let scale = step.grad_scale;
    let by_row: Vec<f32> = row_means.iter().map(|&row| (scale * (mean / f64::from(row)).sqrt()) as f32).collect();
    let by_column: Vec<f32> = column_means.iter().map(|&column| (1.0 / f64::from(column).sqrt()) as f32).collect();
    let mut squares = vec![0.0f64; num_tasks];
    {
        let squares = Shared::new(&mut squares);
        for_each(num_tasks, grads.len(), |task| {
            let range = rows_of(task);
            // SAFETY: tasks have disjoint elements.
            let sum = unsafe { squares.part(task, 1) };
            sum[0] = squares_of_update(
                &grads[range.start * num_columns..range.end * num_columns],
                &by_row[range],
                &by_column,
            );
        });
    }
    let (keep, factor) = step.factors(section, params, squares.iter().sum());
    let params = Shared::new(params);
    for_each(num_tasks, grads.len(), |task| {
        let range = rows_of(task);
        let (start, end) = (range.start * num_columns, range.end * num_columns);
        // SAFETY: tasks have disjoint rows.
        let params = unsafe { params.part(start, end - start) };
        apply(params, &grads[start..end], &by_row[range], &by_column, keep, factor);
    });
}

dispatch! {
    /// Updates `row_means` with the mean square of each row, and sums the squares of each column.
    fn add_squares(grads: &[f32], row_means: &mut [f32], column_sums: &mut [f32], step: &AdafactorStep) = add_squares_body
}

#[inline(always)]
fn add_squares_body<A: Arithmetic>(
    grads: &[f32],
    row_means: &mut [f32],
    column_sums: &mut [f32],
    step: &AdafactorStep,
) {
    let num_columns = column_sums.len();
    let (eps, scale) = (step.eps as f32, step.grad_scale as f32);
    for (row, mean) in grads.chunks_exact(num_columns).zip(row_means) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        let (sums, rest_sums) = column_sums.as_chunks_mut::<LANES>();
        for (chunk, sums) in chunks.iter().zip(sums) {
            for i in 0..LANES {
                let g = chunk[i] * scale;
                let square = A::mul_add(g, g, eps);
                lanes[i] += square;
                sums[i] += square;
            }
        }
        for (i, (g, sum)) in rest.iter().zip(rest_sums).enumerate() {
            let g = g * scale;
            let square = A::mul_add(g, g, eps);
            lanes[i] += square;
            *sum += square;
        }
        let found = f64::from(add_lanes(lanes)) / num_columns as f64;
        *mean = (step.beta2 * f64::from(*mean) + (1.0 - step.beta2) * found) as f32;
    }
}

dispatch! {
    fn squares_of_update(grads: &[f32], by_row: &[f32], by_column: &[f32]) -> f64 = squares_of_update_body
}

#[inline(always)]
fn squares_of_update_body<A: Arithmetic>(grads: &[f32], by_row: &[f32], by_column: &[f32]) -> f64 {
    let mut sum = 0.0;
    for (row, &factor) in grads.chunks_exact(by_column.len()).zip(by_row) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        let (columns, rest_columns) = by_column.as_chunks::<LANES>();
        for (chunk, columns) in chunks.iter().zip(columns) {
            for i in 0..LANES {
                let u = factor * chunk[i] * columns[i];
                lanes[i] = A::mul_add(u, u, lanes[i]);
            }
        }
        for (i, (g, column)) in rest.iter().zip(rest_columns).enumerate() {
            let u = factor * g * column;
            lanes[i] = A::mul_add(u, u, lanes[i]);
        }
        sum += f64::from(add_lanes(lanes));
    }
    sum
}

dispatch! {
    fn apply(params: &mut [f32], grads: &[f32], by_row: &[f32], by_column: &[f32], keep: f32, factor: f32) = apply_body
}

#[inline(always)]
fn apply_body<A: Arithmetic>(
    params: &mut [f32],
    grads: &[f32],
    by_row: &[f32],
    by_column: &[f32],
    keep: f32,
    factor: f32,
) {
    let columns = by_column.len();
    for ((params, grads), row) in params.chunks_exact_mut(columns).zip(grads.chunks_exact(columns)).zip(by_row) {
        for i in 0..columns {
            params[i] = params[i] * keep - factor * (row * grads[i] * by_column[i]);
        }
    }
}

/// Computes one step of Adafactor for vectors, one per section, in place. The state is the mean of the squared gradients.
///
/// # Panics
/// The sections are out of order, overlap, or exceed a buffer.
pub fn adafactor_vectors(
    params: &mut [f32],
    grads: &[f32],
    means: &mut [f32],
    step: &AdafactorStep,
    sections: &[Section],
) {
    check(sections.iter().map(|s| (s.start, s.len)), params.len().min(grads.len()), "parameters");
    check(sections.iter().map(|s| (s.state, s.len)), means.len(), "state");
    let work = sections.iter().map(|section| section.len).sum();
    let (params, means) = (Shared::new(params), Shared::new(means));
    for_each(sections.len(), work, |number| {
        let section = &sections[number];
        // SAFETY: the sections are disjoint and within the buffers.
        let (params, means) =
            unsafe { (params.part(section.start, section.len), means.part(section.state, section.len)) };
        let grads = &grads[section.start..][..section.len];
        let (beta2, rest) = (step.beta2 as f32, (1.0 - step.beta2) as f32);
        let (eps, scale) = (step.eps as f32, step.grad_scale as f32);
        let mut squares = 0.0;
        for (mean, g) in means.iter_mut().zip(grads) {
            let g = g * scale;
            *mean = beta2 * *mean + rest * (g * g + eps);
            squares += f64::from(g) * f64::from(g) / f64::from(*mean);
        }
        let (keep, factor) = step.factors(section, params, squares);
        for ((p, g), mean) in params.iter_mut().zip(grads).zip(means) {
            *p = *p * keep - factor * (g * scale / mean.sqrt());
        }
    });
}
