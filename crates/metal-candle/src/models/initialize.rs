//! New models with random weights.

use super::{Model, ModelConfig};
use crate::device::Device;
use crate::error::Result;
use candle_core::Tensor;
use std::collections::HashMap;
use std::f64::consts::TAU;

impl Model {
    /// A new model in f32: matrices drawn from a normal distribution of standard deviation `initializer_range`, biases of
    /// 0, norms of 1..
    ///
    /// # Errors
    /// The configuration makes no decoder, or the device cannot hold it.
    pub fn initialize(config: ModelConfig, seed: u64, device: Device) -> Result<Self> {
        config.validate()?;
        let mut tensors = HashMap::new();
        for (number, (name, shape)) in Self::parameter_shapes(&config).into_iter().enumerate() {
            let count = shape.iter().product();
            let values = if name.contains("norm") {
                vec![1.0; count]
            } else if name.rsplit('.').next() == Some("bias") {
                vec![0.0; count]
            } else {
                normal(mix(seed ^ mix(number as u64)), config.initializer_range, count)
            };
            let tensor = Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?;
            tensors.insert(name, tensor.to_device(&device.candle())?);
        }
        Self::from_tensors(config, tensors, device)
    }
}

/// `count` draws from a normal distribution around 0, two of each pair of uniform draws (Box and Muller, 1958).
fn normal(seed: u64, deviation: f64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // the upper 53 bits, never 0
        ((mix(state) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    };
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let radius = deviation * (-2.0 * uniform().ln()).sqrt();
        let (sine, cosine) = (TAU * uniform()).sin_cos();
        values.extend([(radius * cosine) as f32, (radius * sine) as f32]);
    }
    values.truncate(count);
    values
}

/// The output function of `SplitMix64` (<https://doi.org/10.1145/2660193.2660195>, figure 17).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::normal;

    #[test]
    fn draws_are_normal_and_follow_the_seed() {
        let values = normal(7, 0.02, 100_001);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 1e5;
        let deviation = (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 1e5).sqrt();
        assert!(mean.abs() < 3e-4, "{mean}");
        assert!((deviation - 0.02).abs() < 3e-4, "{deviation}");
        let beyond = values.iter().filter(|v| v.abs() > 0.04).count() as f64 / 1e5;
        assert!((beyond - 0.0455).abs() < 0.005, "{beyond}");
        assert_eq!(values, normal(7, 0.02, 100_001));
        assert_ne!(values[..10], normal(8, 0.02, 10));
    }
}
