//! What an adapter consists of, and where each part is among its parameters.

use crate::error::{Error, Result};
use crate::models::{LinearInfo, Model};
use crate::ops::Weight;
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

/// The term of one linear layer, of the embedding or of the head.
#[derive(Debug, Clone, PartialEq)]
pub struct LoRAModule {
    /// Number of the linear layer in [`Model::linears`].
    pub number: usize,
    /// Its path in the checkpoint: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// The block it is in; none for the embedding and the head.
    pub layer: Option<usize>,
    /// Last part of the path: `q_proj`.
    pub module: &'static str,
    /// Width of its input; of the embedding, the size of the vocabulary.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
    /// Rows of A and columns of B.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Factor on `B A x`.
    pub scale: f64,
    /// Whether it has magnitudes (DoRA).
    pub use_dora: bool,
    /// Where A begins among the parameters; B and then the magnitudes follow.
    pub(crate) offset: usize,
    /// Where its A begins among the values that are subtracted, if it has such; B follows.
    pub(crate) start: Option<usize>,
}

impl LoRAModule {
    /// Elements of A.
    pub(crate) fn num_a(&self) -> usize {
        self.rank * self.in_features
    }

    /// Elements of B.
    pub(crate) fn num_b(&self) -> usize {
        self.out_features * self.rank
    }

    /// Elements of the magnitudes.
    pub(crate) fn num_magnitudes(&self) -> usize {
        if self.use_dora { self.out_features } else { 0 }
    }

    /// Where the magnitudes begin among the parameters.
    pub(crate) fn magnitude_offset(&self) -> usize {
        self.offset + self.num_a() + self.num_b()
    }

    /// All its elements.
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

/// A parameter of the model that is trained as a whole beside the low-rank terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedParameter {
    /// Its name in the checkpoint: `lm_head.weight`.
    pub name: String,
    /// Its shape; with rows, that of the trained ones: `[rows, hidden]`.
    pub shape: Vec<usize>,
    /// The ids of the tokens whose rows are trained, if not all are (`trainable_token_indices` of PEFT).
    pub rows: Option<Vec<u32>>,
    /// Where it begins among the parameters.
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
    /// All of the model.
    All,
    /// Those of the layers with low-rank terms.
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

/// What is common to all terms of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) dropout: f64,
    pub(crate) use_rslora: bool,
    pub(crate) use_dora: bool,
    /// Ends of the paths of modules that are trained as a whole.
    pub(crate) modules_to_save: Vec<String>,
    /// Which biases are trained.
    pub(crate) bias: TrainedBiases,
    /// The ids of the tokens whose rows are trained, by the name of embedding or head.
    pub(crate) trainable_tokens: BTreeMap<String, Vec<u32>>,
    /// Names of single parameters that an adapter file replaces: another embedding or head. They are not trained.
    pub(crate) parameters_to_save: Vec<String>,
    /// Whether the head stays tied to an embedding that is trained (`ensure_weight_tying` of PEFT); no in models that tie
    /// nothing.
    pub(crate) ensure_weight_tying: bool,
    pub(crate) base_model: Option<String>,
}

impl Settings {
    /// The divisor of alpha.
    fn divisor(&self, rank: usize) -> f64 {
        if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 }
    }

    /// Whether the module with this path is trained as a whole, by itself or as a part of another one.
    pub(crate) fn saves(&self, module: &str) -> bool {
        let mut path = module;
        loop {
            // as in PEFT, the end need not begin at a part of the path
            if self.modules_to_save.iter().any(|name| path.ends_with(name.as_str())) {
                return true;
            }
            match path.rsplit_once('.') {
                Some((outer, _)) => path = outer,
                None => return false,
            }
        }
    }

    /// Whether anything beside low-rank terms may be in the adapter.
    pub(crate) fn saves_something(&self) -> bool {
        !self.modules_to_save.is_empty()
            || !self.parameters_to_save.is_empty()
            || !self.trainable_tokens.is_empty()
            || self.bias == TrainedBiases::All
    }

    /// Whether embedding and head are trained as a whole and as one.
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
    /// Elements of all A and B that are subtracted.
    pub(crate) num_start: usize,
}

/// A linear layer that is to get a term.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planned {
    pub(crate) number: usize,
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    /// Whether A and B of the start are subtracted.
    pub(crate) is_subtracted: bool,
}

/// Most parameters of an adapter: with their moments they can be addressed.
const MAX_PARAMETERS: usize = isize::MAX as usize / 16;

impl Layout {
    pub(crate) fn new(model: &Model, settings: Settings, planned: &[Planned]) -> Result<Self> {
        if planned.is_empty() && !settings.saves_something() {
            return Err(Error::argument("target_modules", "no linear layer of the model is targeted"));
        }
        if !(0.0..1.0).contains(&settings.dropout) {
            let message = format!("`{}` is not a probability below 1", settings.dropout);
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

    /// Whether the head of a model that ties it stays tied: it is not replaced by itself, and of the embedding rows are
    /// trained, or all of it as one with the head.
    pub(crate) fn is_tied(&self) -> bool {
        let tokens = &self.settings.trainable_tokens;
        (self.settings.ensure_weight_tying || tokens.contains_key(EMBEDDING_WEIGHT))
            && !self.saved.iter().any(|saved| saved.name == HEAD_WEIGHT)
    }

    fn push(&mut self, linear: &LinearInfo, planned: Planned) -> Result<()> {
        let Planned { number, rank, alpha, is_subtracted } = planned;
        if rank == 0 {
            return Err(Error::argument("rank", format!("is 0 for `{}`", linear.path)));
        }
        if !alpha.is_finite() {
            return Err(Error::argument("alpha", format!("is `{alpha}` for `{}`", linear.path)));
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
            // a tied head is trained as the embedding
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

/// Refuses rows that cannot be trained.
fn check_rows(name: &str, rows: &[u32], vocab: usize, is_whole: bool, has_term: bool) -> Result<()> {
    let wrong = |message: String| Err(Error::argument("trainable_token_indices", message));
    if is_whole || has_term {
        return wrong(format!(
            "`{name}` is trained as a whole or has low-rank terms, so its rows cannot be trained beside"
        ));
    }
    if let Some(row) = rows.iter().find(|&&row| row as usize >= vocab) {
        return wrong(format!("token {row} is not below the {vocab} of `{name}`"));
    }
    let mut seen = BTreeSet::new();
    match rows.iter().find(|row| !seen.insert(**row)) {
        Some(row) => wrong(format!("token {row} of `{name}` is there twice")),
        None if rows.is_empty() => wrong(format!("no token of `{name}` is named")),
        None => Ok(()),
    }
}

/// Name and shape of each parameter, with the head also where it is the embedding.
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

/// A parameter of a model; the embedding for a head that is tied to it.
pub(super) fn weight<'a>(model: &'a Model, name: &str) -> Result<&'a Weight> {
    let name = if name == HEAD_WEIGHT && model.config().tie_word_embeddings { EMBEDDING_WEIGHT } else { name };
    let found = model.parameters().iter().find(|(found, _)| found == name);
    found.map(|(_, weight)| weight).ok_or_else(|| Error::argument("model", format!("has no tensor `{name}`")))
}

/// [`weight`] as a tensor; a copy where it is mapped.
pub(super) fn parameter(model: &Model, name: &str) -> Result<Tensor> {
    weight(model, name)?.tensor()
}
