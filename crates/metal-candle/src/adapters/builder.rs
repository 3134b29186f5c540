//! Making a new LoRA adapter.

use super::lora::{Layout, LoRAAdapter, LoRAAdapterConfig, Planned, Settings};
use super::target::TargetModule;
use crate::error::{Error, Result};
use crate::models::Model;

/// All settings of a new adapter.
///
/// ```no_run
/// # fn main() -> metal_candle::Result<()> {
/// use metal_candle::adapters::{LoRAAdapter, TargetModule};
///
/// let model = metal_candle::ModelLoader::new().load("model.safetensors")?;
/// let adapter = LoRAAdapter::builder(&model)
///     .with_rank(16)
///     .with_alpha(32.0)
///     .with_target_modules(TargetModule::ALL)
///     .with_last_layers(4)
///     .with_rslora(true)
///     .build()?;
/// println!("{}", adapter.summary());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LoRAAdapterBuilder<'a> {
    model: &'a Model,
    config: LoRAAdapterConfig,
    layers: Option<Vec<usize>>,
    ranks: Vec<(TargetModule, usize)>,
    alphas: Vec<(TargetModule, f64)>,
    use_rslora: bool,
    seed: u64,
    base_model: Option<String>,
}

impl<'a> LoRAAdapterBuilder<'a> {
    pub(super) fn new(model: &'a Model) -> Self {
        Self {
            model,
            config: LoRAAdapterConfig::default(),
            layers: None,
            ranks: Vec::new(),
            alphas: Vec::new(),
            use_rslora: false,
            seed: 0,
            base_model: None,
        }
    }

    /// Rows of A and columns of B.
    #[must_use]
    pub fn with_rank(mut self, rank: usize) -> Self {
        self.config.rank = rank;
        self
    }

    /// The terms are scaled by `alpha / rank`.
    #[must_use]
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.config.alpha = alpha;
        self
    }

    /// Probability with which an input element of A is dropped in training.
    #[must_use]
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.config.dropout = dropout;
        self
    }

    /// The linear layers of each block that get a term.
    #[must_use]
    pub fn with_target_modules(mut self, modules: impl IntoIterator<Item = TargetModule>) -> Self {
        self.config.target_modules = modules.into_iter().collect();
        self
    }

    /// Only the blocks with these numbers, from 0.
    #[must_use]
    pub fn with_layers(mut self, layers: impl IntoIterator<Item = usize>) -> Self {
        self.layers = Some(layers.into_iter().collect());
        self
    }

    /// Only the last `count` blocks.
    #[must_use]
    pub fn with_last_layers(self, count: usize) -> Self {
        let total = self.model.config().num_hidden_layers;
        self.with_layers(total.saturating_sub(count)..total)
    }

    /// Another rank for one kind of module.
    #[must_use]
    pub fn with_module_rank(mut self, module: TargetModule, rank: usize) -> Self {
        self.ranks.push((module, rank));
        self
    }

    /// Another alpha for one kind of module.
    #[must_use]
    pub fn with_module_alpha(mut self, module: TargetModule, alpha: f64) -> Self {
        self.alphas.push((module, alpha));
        self
    }

    /// Scales by `alpha / sqrt(rank)` (rsLoRA, <https://arxiv.org/abs/2312.03732>, section 3).
    #[must_use]
    pub fn with_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// Seed of A.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Name or path of the model, kept in the files that are written.
    #[must_use]
    pub fn with_base_model(mut self, name: impl Into<String>) -> Self {
        self.base_model = Some(name.into());
        self
    }

    /// The adapter.
    ///
    /// # Errors
    /// A setting is out of its range, or nothing is targeted.
    pub fn build(self) -> Result<LoRAAdapter> {
        let num_layers = self.model.config().num_hidden_layers;
        if let Some(layer) = self.layers.iter().flatten().find(|&&layer| layer >= num_layers) {
            return Err(Error::argument("layers", format!("there is no layer {layer}; the model has {num_layers}")));
        }
        let mut planned = Vec::new();
        for (number, linear) in self.model.linears().iter().enumerate() {
            let target = self.config.target_modules.iter().copied().find(|target| target.name() == linear.module);
            let in_layers =
                self.layers.as_ref().is_none_or(|layers| linear.layer.is_some_and(|layer| layers.contains(&layer)));
            if let (Some(target), true) = (target, in_layers) {
                let rank = last_of(&self.ranks, target).unwrap_or(self.config.rank);
                let widest = linear.in_features.max(linear.out_features).max(MAX_RANK);
                if rank > widest {
                    let message = format!("expected at most {widest} for `{}`, found {rank}", linear.path);
                    return Err(Error::argument("rank", message));
                }
                planned.push(Planned {
                    number,
                    rank,
                    alpha: last_of(&self.alphas, target).unwrap_or(self.config.alpha),
                });
            }
        }
        let settings = Settings {
            rank: self.config.rank,
            alpha: self.config.alpha,
            dropout: self.config.dropout,
            use_rslora: self.use_rslora,
            base_model: self.base_model,
        };
        let layout = Layout::new(self.model, settings, &planned)?;
        let mut values = vec![0.0_f32; layout.num_parameters];
        for module in &layout.modules {
            let bound = 1.0 / (module.in_features as f64).sqrt();
            let mut random = Uniform::new(self.seed, &module.path);
            for value in &mut values[module.offset..module.offset + module.num_a()] {
                *value = (random.next() * bound) as f32;
            }
        }
        LoRAAdapter::from_values(self.model, layout, values)
    }
}

/// A rank above this and above both widths of a layer is a mistake: it would only cost memory.
const MAX_RANK: usize = 1024;

fn last_of<T: Copy>(values: &[(TargetModule, T)], target: TargetModule) -> Option<T> {
    values.iter().rev().find(|(module, _)| *module == target).map(|(_, value)| *value)
}

/// `SplitMix64` (<https://doi.org/10.1145/2714064.2660195>), seeded by a number and a path, so that a matrix starts the
/// same whatever else is adapted.
struct Uniform(u64);

impl Uniform {
    fn new(seed: u64, path: &str) -> Self {
        let hash = path
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// A number from -1 up to 1.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
}
