//! Creates new LoRA adapters: [`LoRAAdapterBuilder`] has all settings, [`LoRAAdapterConfig`] the common ones.

use super::initial_values::initialize;
use super::initialization::Start;
use super::layout::{EMBEDDING, EMBEDDING_WEIGHT, HEAD_WEIGHT, Layout, Planned, Settings, TrainedBiases};
use super::lora::LoRAAdapter;
use super::patterns::Patterns;
use super::target::TargetModule;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::models::{LinearInfo, Model};
use std::collections::BTreeMap;

/// The common settings of a LoRA adapter; [`LoRAAdapter::builder`] has the others.
#[derive(Debug, Clone, PartialEq)]
pub struct LoRAAdapterConfig {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// Low-rank updates are scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability with which an input element of A is dropped in training.
    pub dropout: f64,
    /// The layers that get a low-rank update.
    pub target_modules: Vec<TargetModule>,
}

impl Default for LoRAAdapterConfig {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, dropout: 0.0, target_modules: vec![TargetModule::QProj, TargetModule::VProj] }
    }
}

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
    rank_patterns: Vec<(String, usize)>,
    alpha_patterns: Vec<(String, f64)>,
    use_rslora: bool,
    use_dora: bool,
    modules_to_save: Vec<String>,
    bias: TrainedBiases,
    trainable_tokens: BTreeMap<String, Vec<u32>>,
    ensure_weight_tying: bool,
    start: Start,
    seed: u64,
    base_model: Option<String>,
}

impl LoRAAdapter {
    /// Creates an adapter with A uniform in `+-1 / sqrt(in_features)` and B zero, so it does not change the logits yet.
    ///
    /// # Errors
    /// A setting is out of its range, or `device` is not the model's.
    pub fn new(model: &Model, config: LoRAAdapterConfig, device: &Device) -> Result<Self> {
        if *device != model.device() {
            return Err(Error::argument("device", format!("is {device}, but the model is on {}", model.device())));
        }
        Self::builder(model)
            .with_rank(config.rank)
            .with_alpha(config.alpha)
            .with_dropout(config.dropout)
            .with_target_modules(config.target_modules)
            .build()
    }

    /// A builder with the defaults: rank 8, alpha 16, no dropout, `q_proj` and `v_proj` of all layers.
    pub fn builder(model: &Model) -> LoRAAdapterBuilder<'_> {
        LoRAAdapterBuilder::new(model)
    }
}

impl<'a> LoRAAdapterBuilder<'a> {
    pub(super) fn new(model: &'a Model) -> Self {
        Self {
            model,
            config: LoRAAdapterConfig::default(),
            layers: None,
            ranks: Vec::new(),
            alphas: Vec::new(),
            rank_patterns: Vec::new(),
            alpha_patterns: Vec::new(),
            use_rslora: false,
            use_dora: false,
            modules_to_save: Vec::new(),
            bias: TrainedBiases::None,
            trainable_tokens: BTreeMap::new(),
            ensure_weight_tying: false,
            start: Start::default(),
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

    /// Low-rank updates are scaled by `alpha / rank`.
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

    /// The modules that get a low-rank update, in every block; embedding and head if they are among them.
    #[must_use]
    pub fn with_target_modules(mut self, modules: impl IntoIterator<Item = TargetModule>) -> Self {
        self.config.target_modules = modules.into_iter().collect();
        self
    }

    /// Adapts only the blocks with these indices, from 0.
    #[must_use]
    pub fn with_layers(mut self, layers: impl IntoIterator<Item = usize>) -> Self {
        self.layers = Some(layers.into_iter().collect());
        self
    }

    /// Adapts only the last `count` blocks.
    #[must_use]
    pub fn with_last_layers(self, count: usize) -> Self {
        let total = self.model.config().num_hidden_layers;
        self.with_layers(total.saturating_sub(count)..total)
    }

    /// Sets the rank of one kind of module.
    #[must_use]
    pub fn with_module_rank(mut self, module: TargetModule, rank: usize) -> Self {
        self.ranks.push((module, rank));
        self
    }

    /// Sets the alpha of one kind of module.
    #[must_use]
    pub fn with_module_alpha(mut self, module: TargetModule, alpha: f64) -> Self {
        self.alphas.push((module, alpha));
        self
    }

    /// Sets the rank of modules by the regular expression `pattern`, which must match the whole path or its end after a dot
    /// (`rank_pattern` of PEFT). The first matching pattern applies, before [`LoRAAdapterBuilder::with_module_rank`].
    #[must_use]
    pub fn with_rank_pattern(mut self, pattern: impl Into<String>, rank: usize) -> Self {
        self.rank_patterns.push((pattern.into(), rank));
        self
    }

    /// Sets the alpha of modules, as [`LoRAAdapterBuilder::with_rank_pattern`] sets the rank.
    #[must_use]
    pub fn with_alpha_pattern(mut self, pattern: impl Into<String>, alpha: f64) -> Self {
        self.alpha_patterns.push((pattern.into(), alpha));
        self
    }

    /// Modules whose parameters are trained in full, by the ends of their paths: `lm_head`, `embed_tokens`, `model.norm`.
    /// They get no low-rank updates.
    #[must_use]
    pub fn with_modules_to_save<S: Into<String>>(mut self, modules: impl IntoIterator<Item = S>) -> Self {
        self.modules_to_save = modules.into_iter().map(Into::into).collect();
        self
    }

    /// Also trains biases: all of the model, or those of the adapted layers.
    #[must_use]
    pub fn with_bias(mut self, bias: TrainedBiases) -> Self {
        self.bias = bias;
        self
    }

    /// Trains only these tokens' rows of the embedding (`trainable_token_indices` of PEFT). A tied head shares them.
    #[must_use]
    pub fn with_trainable_tokens(self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.with_rows(EMBEDDING_WEIGHT, ids)
    }

    /// Trains only these tokens' rows of the head. A tied head is untied from the embedding.
    #[must_use]
    pub fn with_trainable_head_tokens(self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.with_rows(HEAD_WEIGHT, ids)
    }

    fn with_rows(mut self, name: &str, ids: impl IntoIterator<Item = u32>) -> Self {
        let ids: Vec<u32> = ids.into_iter().collect();
        if ids.is_empty() {
            self.trainable_tokens.remove(name);
        } else {
            self.trainable_tokens.insert(name.into(), ids);
        }
        self
    }

    /// Keeps the head tied to the embedding if one of them is trained in full (`ensure_weight_tying` of PEFT); otherwise
    /// they are untied. It has no effect on models without tied weights.
    #[must_use]
    pub fn with_ensure_weight_tying(mut self, ensure_weight_tying: bool) -> Self {
        self.ensure_weight_tying = ensure_weight_tying;
        self
    }

    /// Trains a magnitude for each row of the adapted weights (DoRA, <https://arxiv.org/abs/2402.09353>, section 4).
    #[must_use]
    pub fn with_dora(mut self, use_dora: bool) -> Self {
        self.use_dora = use_dora;
        self
    }

    /// The initialization of A and B. As in PEFT, the embedding uses B normal and A zero instead, unless the
    /// initialization is defined for embeddings.
    #[must_use]
    pub fn with_start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Scales by `alpha / sqrt(rank)` (rsLoRA, <https://arxiv.org/abs/2312.03732>, section 3).
    #[must_use]
    pub fn with_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// The seed of random initial values.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The name or path of the model, which is written into saved files.
    #[must_use]
    pub fn with_base_model(mut self, name: impl Into<String>) -> Self {
        self.base_model = Some(name.into());
        self
    }

    /// Creates the adapter. With [`Start::Loftq`], its [`LoRAAdapter::model`] has the rounded weights.
    ///
    /// # Errors
    /// A setting is out of its range, or no layer is targeted.
    pub fn build(self) -> Result<LoRAAdapter> {
        let num_layers = self.model.config().num_hidden_layers;
        if let Some(layer) = self.layers.iter().flatten().find(|&&layer| layer >= num_layers) {
            return Err(Error::argument("layers", format!("there is no layer {layer}; the model has {num_layers}")));
        }
        let ranks = Patterns::new("rank_pattern", self.rank_patterns.clone())?;
        let alphas = Patterns::new("alpha_pattern", self.alpha_patterns.clone())?;
        let settings = Settings {
            rank: self.config.rank,
            alpha: self.config.alpha,
            dropout: self.config.dropout,
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            modules_to_save: self.modules_to_save.clone(),
            parameters_to_save: Vec::new(),
            bias: self.bias,
            trainable_tokens: self.trainable_tokens.clone(),
            ensure_weight_tying: self.ensure_weight_tying && self.model.config().tie_word_embeddings,
            base_model: self.base_model.clone(),
        };
        let is_outside = |target: &TargetModule| TargetModule::OUTSIDE.contains(target);
        if settings.ensure_weight_tying && self.config.target_modules.iter().any(is_outside) {
            let message = "low-rank updates of embedding and head are trained separately: only modules that are trained in \
            full can stay tied";
            return Err(Error::argument("ensure_weight_tying", message));
        }
        let mut planned = Vec::new();
        self.check_targets()?;
        for (number, linear) in self.model.linears().iter().enumerate() {
            if !self.is_target(linear) || settings.saves(&linear.path) {
                continue;
            }
            let rank = ranks.get(&linear.path).or_else(|| last_of(&self.ranks, linear)).unwrap_or(self.config.rank);
            let alpha = alphas.get(&linear.path).or_else(|| last_of(&self.alphas, linear));
            let widest = linear.in_features.max(linear.out_features).max(MAX_RANK);
            if rank > widest {
                let message = format!("expected at most {widest} for `{}`, found {rank}", linear.path);
                return Err(Error::argument("rank", message));
            }
            let is_subtracted = self.start.is_subtracted() && linear.module != EMBEDDING;
            planned.push(Planned { number, rank, alpha: alpha.unwrap_or(self.config.alpha), is_subtracted });
        }
        let paths = planned.iter().map(|planned| self.model.linears()[planned.number].path.as_str());
        for (name, unused) in [("rank_pattern", ranks.unused(&paths)), ("alpha_pattern", alphas.unused(&paths))] {
            if let Some(pattern) = unused.first() {
                return Err(Error::argument(name, format!("`{pattern}` matches no adapted layer")));
            }
        }
        initialize(self.model, Layout::new(self.model, settings, &planned)?, self.start, self.seed)
    }

    fn is_target(&self, linear: &LinearInfo) -> bool {
        let is_chosen = |layer| self.layers.as_ref().is_none_or(|layers| layers.contains(&layer));
        linear.layer.is_none_or(is_chosen) && self.config.target_modules.iter().any(|target| target.selects(linear))
    }

    /// Returns an error for a target that selects no layer of the model.
    fn check_targets(&self) -> Result<()> {
        let linears = self.model.linears();
        let is_unused = |target: &&TargetModule| !linears.iter().any(|linear| target.selects(linear));
        let Some(target) = self.config.target_modules.iter().find(is_unused) else { return Ok(()) };
        let mut names: Vec<&str> = Vec::new();
        for linear in linears {
            if !names.contains(&linear.module) {
                names.push(linear.module);
            }
        }
        let message = format!("`{target}` selects no layer of the model; its modules are `{}`", names.join("`, `"));
        Err(Error::argument("target_modules", message))
    }
}

/// A rank above this and above both widths of a layer is refused: it would only waste memory.
const MAX_RANK: usize = 1024;

/// The value of the last module that selects a layer.
fn last_of<T: Copy>(values: &[(TargetModule, T)], linear: &LinearInfo) -> Option<T> {
    values.iter().rev().find(|(module, _)| module.selects(linear)).map(|(_, value)| *value)
}
