//! Creates models with random weights.

use super::registry::{ParameterSpec, Role};
use super::{Model, ModelConfig};
use crate::device::Device;
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::collections::HashMap;
use std::f64::consts::TAU;

impl Model {
    /// A new model in f32: matrices are drawn from a normal distribution with standard deviation `initializer_range`,
    /// biases are 0, and norms are 1.
    ///
    /// # Errors
    /// The configuration is not valid, or the device has too little memory.
    pub fn initialize(config: ModelConfig, seed: u64, device: Device) -> Result<Self> {
        config.validate()?;
        let mut tensors = HashMap::new();
        for (index, spec) in config.parameter_specs()?.into_iter().enumerate() {
            let count = spec.shape.iter().product();
            let values = match neutral(spec.role) {
                Some(value) => vec![value; count],
                None => normal(mix(seed ^ mix(index as u64)), config.initializer_range, count),
            };
            let tensor = Tensor::from_vec(values, spec.shape, &candle_core::Device::Cpu)?;
            tensors.insert(spec.name, tensor.to_device(&device.candle())?);
        }
        Self::from_tensors(config, tensors, device)
    }

    /// A new model in `dtype` for benchmarks. Its matrices are consecutive slices of one million draws from a normal
    /// distribution with standard deviation `initializer_range`, repeated on the device; biases are 0 and norms 1.
    ///
    /// No matrix is allocated on the host or in f32, so creating a model takes little more memory and time than copying
    /// it.
    ///
    /// # Errors
    /// The configuration is not valid, or the device has too little memory.
    pub fn repeated_pattern(config: ModelConfig, seed: u64, dtype: DType, device: Device) -> Result<Self> {
        config.validate()?;
        let home = device.candle();
        let drawn = normal(mix(seed), config.initializer_range, PATTERN);
        let pattern = Tensor::from_vec(drawn, PATTERN, &candle_core::Device::Cpu)?.to_dtype(dtype)?.to_device(&home)?;
        let mut tensors = HashMap::new();
        let mut position = 0;
        for ParameterSpec { name, shape, role } in config.parameter_specs()? {
            let tensor = if let Some(value) = neutral(role) {
                Tensor::full(value, shape, &home)?.to_dtype(dtype)?
            } else {
                let count: usize = shape.iter().product();
                let mut pieces = Vec::with_capacity(count / PATTERN + 2);
                let mut missing = count;
                while missing > 0 {
                    let length = missing.min(PATTERN - position);
                    pieces.push(pattern.narrow(0, position, length)?);
                    position = (position + length) % PATTERN;
                    missing -= length;
                }
                // even a single piece is copied, so that no matrix shares the pattern's memory
                let tensor = if pieces.len() == 1 { pieces[0].force_contiguous()? } else { Tensor::cat(&pieces, 0)? };
                tensor.reshape(shape)?
            };
            tensors.insert(name, tensor);
        }
        device.synchronize()?;
        Self::from_tensors(config, tensors, device)
    }
}

/// The constant initial value of a parameter; `None` if it is random.
fn neutral(role: Role) -> Option<f32> {
    match role {
        Role::Embedding | Role::Matrix => None,
        Role::Bias | Role::Norm { is_offset: true } => Some(0.0),
        Role::Norm { is_offset: false } => Some(1.0),
    }
}

/// The number of draws of [`Model::repeated_pattern`]: a prime, so that no two rows of a matrix are equal.
const PATTERN: usize = 1_048_573;

/// `count` draws from a normal distribution with mean 0; each pair of uniform draws returns two (Box and Muller, 1958).
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Device, Model, ModelConfig, PATTERN, normal};
    use candle_core::DType;
    use std::collections::HashSet;

    #[test]
    fn a_repeated_pattern_is_as_wide_as_the_configuration_says() {
        let config = r#"{"model_type": "qwen2", "vocab_size": 20000, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": false,
            "initializer_range": 0.05}"#;
        let config = ModelConfig::from_json_str(config).unwrap();
        let model = Model::repeated_pattern(config, 3, DType::BF16, Device::CPU).unwrap();
        assert_eq!(model.dtype(), DType::BF16);
        let mut first_values = HashSet::new();
        for (name, tensor) in model.parameters() {
            let values: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            if name.contains("norm") || name.ends_with("bias") {
                let expected: f32 = if name.contains("norm") { 1.0 } else { 0.0 };
                assert!(values.iter().all(|value| value.to_bits() == expected.to_bits()), "{name}");
                continue;
            }
            let square = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / values.len() as f64;
            assert!((square.sqrt() - 0.05).abs() < 0.003, "{name}: {square}");
            first_values.insert(values[..8].iter().map(|value| value.to_bits()).collect::<Vec<_>>());
        }
        assert_eq!(first_values.len(), 2 + 2 * 7, "some matrices start with the same values");
        let head = model.parameters().iter().find(|(name, _)| name == "lm_head.weight").unwrap();
        assert!(head.1.elem_count() > PATTERN, "the pattern is not repeated in this test");
    }

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
