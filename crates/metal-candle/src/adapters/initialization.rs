//! Initializes A and B: the values of PEFT's `init_lora_weights`.

use super::random::Random;
use crate::error::{Error, Result};
use metal_candle_kernels as kernels;
use std::fmt;
use std::str::FromStr;

/// The initialization of A and B, by the conventions of `init_lora_weights` in PEFT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// A uniform in `+-1 / sqrt(in_features)`, B zero.
    #[default]
    Kaiming,
    /// A normal with standard deviation `1 / rank`, B zero.
    Gaussian,
    /// A and B are halves of a random orthogonal matrix, with `B A = 0`; the rank must be even.
    Orthogonal,
    /// The largest singular values of the weight and their vectors (PiSSA, <https://arxiv.org/abs/2404.02948>,
    /// section 3). The adapted weight is `W - scale B0 A0 + scale B A`.
    Pissa {
        /// Steps of subspace iteration from a random matrix; `None` computes the vectors exactly.
        iterations: Option<usize>,
    },
    /// The first columns of Q and rows of R of the weight (OLoRA, <https://arxiv.org/abs/2406.01775>, section 3). As with
    /// [`Start::Pissa`], the initial update is subtracted.
    Olora,
    /// Rounds the weight to few bits, and initializes A and B with the largest part of the rounding error (LoftQ,
    /// <https://arxiv.org/abs/2310.08659>, algorithm 1). The adapter belongs to the model with the rounded weights.
    ///
    /// `rounded + scale B A` approximates the weight for every scale; in PEFT, only if alpha equals the rank.
    Loftq {
        /// 4 (NF4 in blocks of 64) or 8 (int8 by row).
        bits: usize,
        /// Iterations of rounding and decomposing, at least 1.
        iterations: usize,
    },
}

/// The initial factors of a module.
pub(super) struct InitialFactors {
    /// `[rank, in_features]`.
    pub(super) a: Vec<f32>,
    /// `[out_features, rank]`.
    pub(super) b: Vec<f32>,
    /// The rounded weight that replaces the model's, if the initialization rounds it.
    pub(super) weight: Option<Vec<f32>>,
}

impl Start {
    /// Whether the initial `B A` is subtracted from the trained update.
    pub(super) fn is_subtracted(self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }

    /// Whether the initialization depends on the weights.
    pub(super) fn needs_weights(self) -> bool {
        self.is_subtracted() || matches!(self, Self::Loftq { .. })
    }

    /// Returns A and B of a linear layer; `weight: [out_features, in_features]` may be empty unless
    /// [`needs_weights`](Self::needs_weights).
    pub(super) fn initialize(
        self,
        (out_features, in_features): (usize, usize),
        rank: usize,
        scale: f64,
        weight: &[f32],
        random: &mut Random,
    ) -> Result<InitialFactors> {
        let shape = (out_features, in_features);
        if self.needs_weights() && rank > out_features.min(in_features) {
            let message = format!("`{self}` needs a rank of at most {}, found {rank}", out_features.min(in_features));
            return Err(Error::argument("rank", message));
        }
        if self.needs_weights() && scale <= 0.0 {
            return Err(Error::argument("alpha", format!("`{self}` needs a number above 0, found {scale}")));
        }
        let zeros = || vec![0.0; out_features * rank];
        let plain = |a: Vec<f32>, b: Vec<f32>| Ok(InitialFactors { a, b, weight: None });
        match self {
            Self::Kaiming => {
                let bound = 1.0 / (in_features as f64).sqrt();
                plain((0..rank * in_features).map(|_| (random.uniform() * bound) as f32).collect(), zeros())
            }
            Self::Gaussian => {
                let deviation = 1.0 / rank as f64;
                plain((0..rank * in_features).map(|_| (random.normal() * deviation) as f32).collect(), zeros())
            }
            Self::Orthogonal => {
                let (a, b) = orthogonal(shape, rank, random)?;
                plain(a, b)
            }
            Self::Pissa { iterations: None } => {
                let found = kernels::singular_values(shape, weight, rank);
                let (a, b) = factors(shape, &found, scale);
                plain(a, b)
            }
            Self::Pissa { iterations: Some(iterations) } => {
                let first: Vec<f64> = (0..out_features.min(in_features) * rank).map(|_| random.normal()).collect();
                let found = kernels::singular_values_by_iteration(shape, weight, rank, &first, iterations);
                let (a, b) = factors(shape, &found, scale);
                plain(a, b)
            }
            Self::Olora => {
                let (q, r) = kernels::qr(shape, weight, rank);
                plain(r.iter().map(|value| *value as f32).collect(), transposed(&q, out_features, |_| 1.0))
            }
            Self::Loftq { bits, iterations } => loftq(shape, weight, rank, scale, bits, iterations),
        }
    }
}

/// A and B with `scale B A = U S V^T`; each is multiplied by the square root of the singular values.
fn factors((m, n): (usize, usize), found: &kernels::SingularValues, scale: f64) -> (Vec<f32>, Vec<f32>) {
    let roots: Vec<f64> = found.values.iter().map(|value| (value / scale).sqrt()).collect();
    let rows = found.right.chunks_exact(n).zip(&roots);
    let a = rows.flat_map(|(row, root)| row.iter().map(move |value| (value * root) as f32)).collect();
    (a, transposed(&found.left, m, |row| roots[row]))
}

/// Transposes rows of length `width` and multiplies each by its factor.
fn transposed(rows: &[f64], width: usize, factor: impl Fn(usize) -> f64) -> Vec<f32> {
    let count = rows.len() / width.max(1);
    let mut columns = vec![0.0; rows.len()];
    for (number, row) in rows.chunks_exact(width).enumerate() {
        let factor = factor(number);
        row.iter().enumerate().for_each(|(i, value)| columns[i * count + number] = (value * factor) as f32);
    }
    columns
}

fn orthogonal(
    (out_features, in_features): (usize, usize),
    rank: usize,
    random: &mut Random,
) -> Result<(Vec<f32>, Vec<f32>)> {
    if !rank.is_multiple_of(2) {
        return Err(Error::argument("rank", format!("`orthogonal` needs an even rank, found {rank}")));
    }
    let square: Vec<f32> = (0..rank * rank).map(|_| random.normal() as f32).collect();
    let (q, _) = kernels::qr((rank, rank), &square, rank);
    // the rows of Q alternate between A and B; rows and columns of Q would do equally
    let half = rank / 2;
    let mut mixed = |features: usize, parity: usize| -> Vec<f64> {
        let normal: Vec<f64> = (0..features * half).map(|_| random.normal()).collect();
        let mut rows = vec![0.0; features * rank];
        for (row, normal) in rows.chunks_exact_mut(rank).zip(normal.chunks_exact(half)) {
            for (number, factor) in normal.iter().enumerate() {
                let unit = &q[(2 * number + parity) * rank..][..rank];
                row.iter_mut().zip(unit).for_each(|(value, unit)| *value += factor * unit / 10.0);
            }
        }
        rows
    };
    let a = transposed(&mixed(in_features, 0), rank, |_| 1.0);
    let b = mixed(out_features, 1).iter().map(|value| *value as f32).collect();
    Ok((a, b))
}

fn loftq(
    (m, n): (usize, usize),
    weight: &[f32],
    rank: usize,
    scale: f64,
    bits: usize,
    iterations: usize,
) -> Result<InitialFactors> {
    let mut residual = weight.to_vec();
    let mut turn = || {
        // the weight without the low-rank part of the last iteration
        let mut rounded = residual.clone();
        match bits {
            4 => kernels::round_to_nf4(&mut rounded),
            8 => kernels::round_to_int8(&mut rounded, n),
            _ => {
                let message = format!("`loftq` needs 4 or 8 bits, found {bits}");
                return Err(Error::argument("init_lora_weights", message));
            }
        }
        let lost: Vec<f32> = weight.iter().zip(&rounded).map(|(weight, rounded)| weight - rounded).collect();
        let found = kernels::singular_values((m, n), &lost, rank);
        residual.copy_from_slice(weight);
        subtract(&mut residual, (m, n), &found);
        Ok((rounded, found))
    };
    for _ in 1..iterations {
        turn()?;
    }
    let (rounded, found) = turn()?;
    let (a, b) = factors((m, n), &found, scale);
    Ok(InitialFactors { a, b, weight: Some(rounded) })
}

/// Subtracts `U S V^T` from W in place.
fn subtract(w: &mut [f32], (m, n): (usize, usize), found: &kernels::SingularValues) {
    for (number, value) in found.values.iter().enumerate() {
        let (left, right) = (&found.left[number * m..][..m], &found.right[number * n..][..n]);
        for (row, left) in w.chunks_exact_mut(n).zip(left) {
            let factor = value * left;
            row.iter_mut().zip(right).for_each(|(w, right)| *w -= (factor * right) as f32);
        }
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Kaiming => f.write_str("kaiming"),
            Self::Gaussian => f.write_str("gaussian"),
            Self::Orthogonal => f.write_str("orthogonal"),
            Self::Pissa { iterations: None } => f.write_str("pissa"),
            Self::Pissa { iterations: Some(iterations) } => write!(f, "pissa_niter_{iterations}"),
            Self::Olora => f.write_str("olora"),
            Self::Loftq { bits, iterations } => {
                f.write_str("loftq")?;
                if bits != 4 {
                    write!(f, "_{bits}bit")?;
                }
                if iterations == 1 { Ok(()) } else { write!(f, "_niter_{iterations}") }
            }
        }
    }
}

impl FromStr for Start {
    type Err = Error;

    /// `kaiming`, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N`, `olora`, `loftq`, `loftq_niter_N`, `loftq_8bit` or
    /// `loftq_8bit_niter_N`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, iterations) = match text.split_once("_niter_") {
            Some((name, count)) => (name, count.parse().ok().filter(|&count: &usize| count > 0).map(Some)),
            None => (text, Some(None)),
        };
        match (name, iterations) {
            ("kaiming", Some(None)) => Ok(Self::Kaiming),
            ("gaussian", Some(None)) => Ok(Self::Gaussian),
            ("orthogonal", Some(None)) => Ok(Self::Orthogonal),
            ("pissa", Some(iterations)) => Ok(Self::Pissa { iterations }),
            ("olora", Some(None)) => Ok(Self::Olora),
            ("loftq", Some(iterations)) => Ok(Self::Loftq { bits: 4, iterations: iterations.unwrap_or(1) }),
            ("loftq_8bit", Some(iterations)) => Ok(Self::Loftq { bits: 8, iterations: iterations.unwrap_or(1) }),
            _ => {
                let names = "`kaiming`, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N`, `olora`, `loftq`, \
                             `loftq_niter_N`, `loftq_8bit` or `loftq_8bit_niter_N`";
                Err(Error::argument("init_lora_weights", format!("expected {names}, found `{text}`")))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Random, Start};

    #[test]
    fn names_are_parsed() {
        for name in
            ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq", "loftq_8bit_niter_5"]
        {
            assert_eq!(name.parse::<Start>().unwrap().to_string(), name);
        }
        for name in ["", "eva", "pissa_niter_", "pissa_niter_0", "gaussian_niter_3", "loftq_4"] {
            assert!(name.parse::<Start>().is_err(), "{name}");
        }
    }

    #[test]
    fn orthogonal_initialization_has_a_zero_product() {
        let (out_features, in_features, rank) = (40, 600, 8);
        let factors = Start::Orthogonal
            .initialize((out_features, in_features), rank, 1.0, &[], &mut Random::new(3, "x"))
            .unwrap();
        for i in 0..out_features {
            for j in 0..in_features {
                let product: f32 = (0..rank).map(|k| factors.b[i * rank + k] * factors.a[k * in_features + j]).sum();
                assert!(product.abs() < 1e-6, "{i} {j}: {product}");
            }
        }
        // orthonormal rows mix half as many normal numbers of deviation 0.1 as there are elements
        let deviation = |values: &[f32]| {
            (values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
        };
        assert!((deviation(&factors.a) - 0.1 * 0.5_f64.sqrt()).abs() < 0.005, "{}", deviation(&factors.a));
        assert!((deviation(&factors.b) - 0.1 * 0.5_f64.sqrt()).abs() < 0.02, "{}", deviation(&factors.b));
    }

    #[test]
    fn gaussian_initialization_has_the_deviation_of_peft() {
        let factors = Start::Gaussian.initialize((10, 5000), 4, 1.0, &[], &mut Random::new(1, "x")).unwrap();
        let squares: f64 = factors.a.iter().map(|value| f64::from(*value).powi(2)).sum();
        assert!(((squares / 20_000.0).sqrt() - 0.25).abs() < 0.005);
        assert!(factors.b.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn invalid_initializations_are_refused() {
        let mut random = Random::new(0, "x");
        let weight = [1.0; 12];
        assert!(Start::Orthogonal.initialize((3, 4), 3, 1.0, &[], &mut random).is_err());
        assert!(Start::Olora.initialize((3, 4), 4, 1.0, &weight, &mut random).is_err());
        assert!(Start::Olora.initialize((3, 4), 2, 0.0, &weight, &mut random).is_err());
        assert!(Start::Loftq { bits: 3, iterations: 1 }.initialize((3, 4), 2, 1.0, &weight, &mut random).is_err());
    }
}
