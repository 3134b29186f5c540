//! The modules of an adapter, and their offsets in its flat parameters.

use crate::error::{Error, Result};
use crate::models::{LinearInfo, Model};
use crate::ops::Weight;
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

/// The low-rank update of one linear layer, of the embedding or of the head.
#[derive(Debug, Clone, PartialEq)]
pub struct LoRAModule {
    /// Index of the linear layer in [`Model::linears`].
    pub number: usize,
    /// Its path in the checkpoint: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// The index of its block; none for embedding and head.
    pub layer: Option<usize>,
    /// Last part of the path: `q_proj`.
    pub module: &'static str,
    /// Width of its input; for the embedding, the size of the vocabulary.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
    /// Rows of A and columns of B.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Factor of `B A x`.
    pub scale: f64,
    /// Whether it has DoRA magnitudes.
    pub use_dora: bool,
    /// The offset of A in the parameters; B and then the magnitudes follow.
    pub(crate) offset: usize,
    /// The offset of A in the subtracted values, if the module has them; B follows.
    pub(crate) start: Option<usize>,
}

impl LoRAModule {
    /// The number of elements of A.
    pub(crate) fn num_a(&self) -> usize {
        self.rank * self.in_features
    }

    /// The number of elements of B.
    pub(crate) fn num_b(&self) -> usize {
        self.out_features * self.rank
    }

    /// The number of magnitudes.
    pub(crate) fn num_magnitudes(&self) -> usize {
        if self.use_dora { self.out_features } else { 0 }
    }

    /// The offset of the magnitudes in the parameters.
    pub(crate) fn magnitude_offset(&self) -> usize {
        self.offset + self.num_a() + self.num_b()
    }

    /// The number of elements of A, B and the magnitudes.
    pub(crate) fn num_parameters(&self) -> usize {
        self.num_a() + self.num_b() + self.num_magnitudes()
    }

    /// Whether it is the embedding, whose A is looked up by token id.
    pub(crate) fn is_embedding(&self) -> bool {
        self.module == EMBEDDING
    }
}

/// Last part of the path of the embedding.
pub(super) const EMBEDDING: &str = "embed_tokens";
pub(super) const EMBEDDING_WEIGHT: &str = "model.embed_tokens.weight";
pub(super) const HEAD_WEIGHT: &str = "lm_head.weight";

/// A parameter of the model that is trained in full, in addition to the low-rank updates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedParameter {
    /// Its name in the checkpoint: `lm_head.weight`.
    pub name: String,
    /// Its shape; `[rows, hidden]` if only some rows are trained.
    pub shape: Vec<usize>,
    /// The token ids of the trained rows, if not all are trained (`trainable_token_indices` of PEFT).
    pub rows: Option<Vec<u32>>,
    /// Its offset in the parameters.
    pub(crate) offset: usize,
}

impl SavedParameter {
    pub(crate) fn num_parameters(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The biases that an adapter trains; `bias` in PEFT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainedBiases {
    /// None.
    #[default]
    None,
    /// All biases of the model.
    All,
    /// The biases of the adapted layers.
    LoraOnly,
}

impl TrainedBiases {
    /// Its name in PEFT: `none`, `all` or `lora_only`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }
}

impl FromStr for TrainedBiases {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::None, Self::All, Self::LoraOnly]
            .into_iter()
            .find(|bias| bias.name() == text)
            .ok_or_else(|| Error::argument("bias", format!("expected `none`, `all` or `lora_only`, found `{text}`")))
    }
}

/// The settings of a whole adapter.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) dropout: f64,
    pub(crate) use_rslora: bool,
    pub(crate) use_dora: bool,
    /// Ends of the paths of fully trained modules.
    pub(crate) modules_to_save: Vec<String>,
    /// Which biases are trained.
    pub(crate) bias: TrainedBiases,
    /// The token ids of the trained rows, by the name of embedding or head.
    pub(crate) trainable_tokens: BTreeMap<String, Vec<u32>>,
    /// Names of parameters that an adapter file replaces: another embedding or head. They are not trained.
    pub(crate) parameters_to_save: Vec<String>,
    /// Whether the head stays tied to a trained embedding (`ensure_weight_tying` of PEFT); false in models without tied
    /// weights.
    pub(crate) ensure_weight_tying: bool,
    pub(crate) base_model: Option<String>,
}

impl Settings {
    /// The divisor of alpha.
    fn divisor(&self, rank: usize) -> f64 {
        if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 }
    }

    /// Whether the module with this path is trained in full, alone or as part of another module.
    pub(crate) fn saves(&self, module: &str) -> bool {
        let mut path = module;
        loop {
            // as in PEFT, the end need not start after a dot
            if self.modules_to_save.iter().any(|name| path.ends_with(name.as_str())) {
                return true;
            }
            match path.rsplit_once('.') {
                Some((outer, _)) => path = outer,
                None => return false,
            }
        }
    }

    /// Whether the adapter may contain more than low-rank updates.
    pub(crate) fn saves_something(&self) -> bool {
        !self.modules_to_save.is_empty()
            || !self.parameters_to_save.is_empty()
            || !self.trainable_tokens.is_empty()
            || self.bias == TrainedBiases::All
    }

    /// Whether embedding and head are trained in full and stay tied.
    pub(crate) fn saves_tied(&self) -> bool {
        self.ensure_weight_tying && (self.saves("model.embed_tokens") || self.saves("lm_head"))
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) settings: Settings,
    pub(crate) modules: Vec<LoRAModule>,
    pub(crate) saved: Vec<SavedParameter>,
    pub(crate) num_parameters: usize,
    /// The number of elements of the subtracted A and B.
    pub(crate) num_start: usize,
}

/// A linear layer that will get a low-rank update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planned {
    pub(crate) number: usize,
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    /// Whether the initial update is subtracted.
    pub(crate) is_subtracted: bool,
}

/// Maximum number of parameters in an adapter; it keeps the sizes of their optimizer state from overflowing.
const MAX_PARAMETERS: usize = isize::MAX as usize / 16;

impl Layout {
    pub(crate) fn new(model: &Model, settings: Settings, planned: &[Planned]) -> Result<Self> {
        if planned.is_empty() && !settings.saves_something() {
            return Err(Error::argument("target_modules", "matches no linear layer of the model"));
        }
        if !(0.0..1.0).contains(&settings.dropout) {
            let message = format!("expected a probability below 1, found `{}`", settings.dropout);
            return Err(Error::argument("dropout", message));
        }
        let mut layout = Self {
            settings,
            modules: Vec::with_capacity(planned.len()),
            saved: Vec::new(),
            num_parameters: 0,
            num_start: 0,
        };
        for planned in planned {
            let Some(linear) = model.linears().get(planned.number) else {
                let message = format!("the model has no linear layer {}", planned.number);
                return Err(Error::argument("target_modules", message));
            };
            layout.push(linear, *planned)?;
        }
        layout.save_modules(model)?;
        Ok(layout)
    }

    /// Whether a tied head stays tied: it is not replaced separately, and the embedding is trained in rows or together with
    /// the head.
    pub(crate) fn is_tied(&self) -> bool {
        let tokens = &self.settings.trainable_tokens;
        (self.settings.ensure_weight_tying || tokens.contains_key(EMBEDDING_WEIGHT))
            && !self.saved.iter().any(|saved| saved.name == HEAD_WEIGHT)
    }

    fn push(&mut self, linear: &LinearInfo, planned: Planned) -> Result<()> {
        let Planned { number, rank, alpha, is_subtracted } = planned;
        if rank == 0 {
            return Err(Error::argument("rank", format!("expected at least 1 for `{}`, found 0", linear.path)));
        }
        if !alpha.is_finite() {
            return Err(Error::argument(
                "alpha",
                format!("expected a finite number for `{}`, found `{alpha}`", linear.path),
            ));
        }
        let too_large = || Error::argument("rank", format!("`{rank}` is too large for `{}`", linear.path));
        let elements = (linear.in_features + linear.out_features)
            .checked_mul(rank)
            .filter(|&elements| elements <= MAX_PARAMETERS)
            .ok_or_else(too_large)?;
        let module = LoRAModule {
            number,
            path: linear.path.clone(),
            layer: linear.layer,
            module: linear.module,
            in_features: linear.in_features,
            out_features: linear.out_features,
            rank,
            alpha,
            scale: alpha / self.settings.divisor(rank),
            use_dora: self.settings.use_dora,
            offset: self.num_parameters,
            start: is_subtracted.then_some(self.num_start),
        };
        if is_subtracted {
            self.num_start += elements;
        }
        self.num_parameters += elements + module.num_magnitudes();
        if self.num_parameters > MAX_PARAMETERS {
            return Err(too_large());
        }
        self.modules.push(module);
        Ok(())
    }

    fn save_modules(&mut self, model: &Model) -> Result<()> {
        let is_tied = self.settings.ensure_weight_tying;
        for (name, shape) in all_parameters(model) {
            let Some((module, leaf)) = name.rsplit_once('.') else { continue };
            // a tied head is trained with the embedding
            let is_whole = match name.as_str() {
                HEAD_WEIGHT if is_tied => false,
                EMBEDDING_WEIGHT if is_tied => self.settings.saves_tied(),
                _ => self.settings.saves(module),
            };
            let has_term = self.modules.iter().any(|term| term.path == module);
            let is_trained_bias = leaf == "bias"
                && match self.settings.bias {
                    TrainedBiases::None => false,
                    TrainedBiases::All => true,
                    TrainedBiases::LoraOnly => has_term,
                };
            let rows = self.settings.trainable_tokens.get(&name).cloned();
            if is_whole || is_trained_bias || self.settings.parameters_to_save.contains(&name) || rows.is_some() {
                let mut saved = SavedParameter { shape, offset: self.num_parameters, name, rows };
                if let Some(rows) = &saved.rows {
                    check_rows(&saved.name, rows, saved.shape[0], is_whole, has_term)?;
                    saved.shape[0] = rows.len();
                }
                self.num_parameters += saved.num_parameters();
                self.saved.push(saved);
            }
        }
        for name in &self.settings.modules_to_save {
            let only = Settings { modules_to_save: vec![name.clone()], ..self.settings.clone() };
            let is_found = |saved: &SavedParameter| {
                saved.name.rsplit_once('.').is_some_and(|(path, _)| only.saves(path))
                    || (is_tied && saved.name == EMBEDDING_WEIGHT && only.saves_tied())
            };
            if name.is_empty() || !self.saved.iter().any(is_found) {
                return Err(Error::argument("modules_to_save", format!("the model has no module `{name}`")));
            }
        }
        Ok(())
    }
}

/// Returns an error for rows that cannot be trained.
fn check_rows(name: &str, rows: &[u32], vocab: usize, is_whole: bool, has_term: bool) -> Result<()> {
    let wrong = |message: String| Err(Error::argument("trainable_token_indices", message));
    if is_whole || has_term {
        return wrong(format!(
            "`{name}` is trained in full or has a low-rank update, so single rows of it cannot be trained"
        ));
    }
    if let Some(row) = rows.iter().find(|&&row| row as usize >= vocab) {
        return wrong(format!("token {row} is outside the vocabulary of {vocab} of `{name}`"));
    }
    let mut seen = BTreeSet::new();
    match rows.iter().find(|row| !seen.insert(**row)) {
        Some(row) => wrong(format!("token {row} of `{name}` is given twice")),
        None if rows.is_empty() => wrong(format!("expected at least one token of `{name}`, found none")),
        None => Ok(()),
    }
}

/// The name and shape of each parameter, including a tied head.
pub(super) fn all_parameters(model: &Model) -> Vec<(String, Vec<usize>)> {
    let mut parameters: Vec<(String, Vec<usize>)> =
        model.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
    if model.config().tie_word_embeddings
        && let Some(shape) =
            parameters.iter().find(|(name, _)| name == EMBEDDING_WEIGHT).map(|(_, shape)| shape.clone())
    {
        parameters.push((HEAD_WEIGHT.into(), shape));
    }
    parameters
}

/// A parameter of a model; the embedding for a tied head.
pub(super) fn weight<'a>(model: &'a Model, name: &str) -> Result<&'a Weight> {
    let name = if name == HEAD_WEIGHT && model.config().tie_word_embeddings { EMBEDDING_WEIGHT } else { name };
    let found = model.parameters().iter().find(|(found, _)| found == name);
    found.map(|(_, weight)| weight).ok_or_else(|| Error::argument("model", format!("has no tensor `{name}`")))
}

/// [`weight`] as a tensor; a copy if it is memory-mapped.
pub(super) fn parameter(model: &Model, name: &str) -> Result<Tensor> {
    weight(model, name)?.tensor()
}
