//! Rounds weights to the values that a low-bit quantization can represent.

/// The sixteen values of NF4 (<https://arxiv.org/abs/2305.14314>, appendix E): quantiles of the normal distribution.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The number of weights that share a scale in NF4.
const NF4_BLOCK: usize = 64;

/// Replaces each value with the nearest value of NF4, scaled by the largest absolute value of its block of 64.
pub fn round_to_nf4(values: &mut [f32]) {
    let middles: Vec<f32> = NF4.windows(2).map(|pair| f32::midpoint(pair[0], pair[1])).collect();
    for block in values.chunks_mut(NF4_BLOCK) {
        let largest = block.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let divisor = largest.max(1e-30);
        for value in block {
            let share = *value / divisor;
            *value = NF4[middles.partition_point(|middle| *middle < share)] * largest;
        }
    }
}

/// Rounds each row of `width` values to multiples of its largest absolute value divided by 127.
pub fn round_to_int8(values: &mut [f32], width: usize) {
    for row in values.chunks_mut(width.max(1)) {
        let largest = row.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        if largest > 0.0 {
            let (factor, step) = (127.0 / largest, largest / 127.0);
            for value in row {
                *value = (*value * factor).round_ties_even() * step;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::{NF4, round_to_int8, round_to_nf4};

    #[test]
    fn values_on_the_grid_do_not_change() {
        let mut values: Vec<f32> = NF4.iter().cycle().take(80).map(|value| value * 3.0).collect();
        let expected = values.clone();
        round_to_nf4(&mut values);
        assert_eq!(values, expected);
        let mut values: Vec<f32> = (-127..=127).map(|value| value as f32 * 0.25).collect();
        let expected = values.clone();
        round_to_int8(&mut values, 255);
        assert_eq!(values, expected);
    }

    #[test]
    fn blocks_and_rows_have_separate_factors() {
        let mut values = vec![0.0; 128];
        values[3] = 10.0;
        values[64] = 0.1;
        values[65] = -0.049;
        round_to_nf4(&mut values);
        assert_eq!((values[3], values[64]), (10.0, 0.1));
        assert!((values[65] + 0.052_507_305).abs() < 1e-7, "{}", values[65]);
        let mut values = [0.0, 0.0, 1.0, 0.4];
        round_to_int8(&mut values, 2);
        assert_eq!(values, [0.0, 0.0, 1.0, 51.0 / 127.0]);
    }
}
