//! LoRA (<https://arxiv.org/abs/2106.09685>, section 4.1): `W x + scale * B A x` with trained A and B.

use super::layout::{
    EMBEDDING_WEIGHT, HEAD_WEIGHT, Layout, LoRAModule, Planned, SavedParameter, TrainedBiases, parameter, weight,
};
use crate::error::{Error, Result};
use crate::models::Model;
use crate::ops::{LowRank, LowRankUpdates, Magnitude, weight_norms_squared};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;

/// A LoRA adapter of one model: A and B of each adapted layer, DoRA magnitudes and the parameters of fully trained
/// modules, all views of one flat f32 tensor.
///
/// An adapter is immutable: training creates new ones. Cloning is cheap and shares the parameters. Pass its low-rank
/// updates to [`LoRAAdapter::run_model`], which is [`LoRAAdapter::model`] unless modules are trained in full.
///
/// ```no_run
/// # fn main() -> metal_candle::Result<()> {
/// use metal_candle::adapters::{LoRAAdapter, LoRAAdapterConfig, TargetModule};
/// use metal_candle::models::{Batch, Rows};
/// use metal_candle::{Device, ModelLoader};
///
/// let model = ModelLoader::new().load("model.safetensors")?;
/// let config = LoRAAdapterConfig {
///     rank: 8,
///     alpha: 16.0,
///     dropout: 0.0,
///     target_modules: vec![TargetModule::QProj, TargetModule::VProj],
/// };
/// let adapter = LoRAAdapter::new(&model, config, &Device::CPU)?;
/// let logits = adapter.run_model().forward(&Batch::single(&[1, 2, 3]), Some(&adapter.low_rank_updates()?), None, Rows::Last)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LoRAAdapter {
    model: Model,
    /// The model with the saved parameters.
    run_model: Model,
    layout: Arc<Layout>,
    parameters: Tensor,
    /// The subtracted A and B: `[num_start]`, f32.
    start: Option<Tensor>,
    /// The squared row norms of each module's weight, for modules with DoRA magnitudes.
    norms: Arc<Vec<Tensor>>,
}

impl LoRAAdapter {
    /// Creates an adapter from its values, in the order of the layout, and the subtracted values.
    pub(crate) fn from_values(model: &Model, layout: Layout, values: Vec<f32>, start: Vec<f32>) -> Result<Self> {
        let device = model.device().candle();
        let parameters = Tensor::from_vec(values, layout.num_parameters, &device)?;
        let start = match layout.num_start {
            0 => None,
            count => Some(Tensor::from_vec(start, count, &device)?),
        };
        Self::assemble(model, Arc::new(layout), parameters, start)
    }

    fn assemble(model: &Model, layout: Arc<Layout>, parameters: Tensor, start: Option<Tensor>) -> Result<Self> {
        let mut norms = Vec::new();
        if layout.settings.use_dora {
            for module in &layout.modules {
                norms.push(norms_squared(model, module)?);
            }
        }
        let run_model = run_model(model, &layout, &parameters, None)?;
        Ok(Self { model: model.clone(), run_model, layout, parameters, start, norms: Arc::new(norms) })
    }

    /// Returns a copy of the adapter with these parameters, whose storage it shares.
    ///
    /// # Shapes
    /// `parameters` is `[num_parameters]` in f32.
    ///
    /// # Errors
    /// The shape or dtype is wrong.
    pub fn with_parameters(&self, parameters: Tensor) -> Result<Self> {
        let shape = self.layout.num_parameters;
        if parameters.dims() != [shape] || parameters.dtype() != DType::F32 {
            return Err(Error::shape("parameters", format!("[{shape}] in f32"), parameters.dims()));
        }
        let run_model = run_model(&self.model, &self.layout, &parameters, None)?;
        Ok(Self { run_model, parameters, ..self.clone() })
    }

    /// Like [`LoRAAdapter::with_parameters`], but trained rows of embedding or head are updated in place in this adapter's
    /// [`LoRAAdapter::run_model`] instead of copying the whole weight.
    pub(crate) fn with_parameters_in_place(&self, parameters: Tensor) -> Result<Self> {
        let run_model = run_model(&self.model, &self.layout, &parameters, Some(&self.run_model))?;
        Ok(Self { run_model, parameters, ..self.clone() })
    }

    /// Returns a copy of the adapter for another model with the same linear layers, which are found by path.
    ///
    /// # Errors
    /// A layer is missing or has a different shape.
    pub fn attach(&self, model: &Model) -> Result<Self> {
        let numbers: BTreeMap<&str, usize> =
            model.linears().iter().enumerate().map(|(number, linear)| (linear.path.as_str(), number)).collect();
        let mut planned = Vec::with_capacity(self.layout.modules.len());
        for module in &self.layout.modules {
            let Some(&number) = numbers.get(module.path.as_str()) else {
                return Err(Error::argument("model", format!("has no linear layer `{}`", module.path)));
            };
            let linear = &model.linears()[number];
            if (linear.out_features, linear.in_features) != (module.out_features, module.in_features) {
                let expected = format!("[{}, {}]", module.out_features, module.in_features);
                return Err(Error::shape(&module.path, expected, &[linear.out_features, linear.in_features]));
            }
            let (rank, alpha, is_subtracted) = (module.rank, module.alpha, module.start.is_some());
            planned.push(Planned { number, rank, alpha, is_subtracted });
        }
        let layout = Layout::new(model, self.layout.settings.clone(), &planned)?;
        if layout.saved != self.layout.saved {
            return Err(Error::argument("model", "the modules that the adapter trains in full differ"));
        }
        let device = model.device().candle();
        let parameters = self.parameters.to_device(&device)?;
        let start = self.start.as_ref().map(|start| start.to_device(&device)).transpose()?;
        Self::assemble(model, Arc::new(layout), parameters, start)
    }

    /// Returns an equivalent adapter without subtracted updates: each module of rank r becomes one of rank 2 r, with
    /// `[A; A0]` and `[B, -B0]`.
    ///
    /// # Errors
    /// The device fails.
    pub fn without_start(&self) -> Result<Self> {
        let Some(start) = &self.start else { return Ok(self.clone()) };
        let mut settings = self.layout.settings.clone();
        let factor = if settings.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        settings.rank *= 2;
        settings.alpha *= factor;
        let mut planned = Vec::with_capacity(self.layout.modules.len());
        for module in &self.layout.modules {
            let (rank, alpha) = match module.start {
                Some(_) => (2 * module.rank, factor * module.alpha),
                None => (module.rank, module.alpha),
            };
            planned.push(Planned { number: module.number, rank, alpha, is_subtracted: false });
        }
        let layout = Layout::new(&self.model, settings, &planned)?;
        let mut parts = Vec::new();
        for module in &self.layout.modules {
            let (a, b) = self.matrices(module)?;
            let (a, b) = match starts(start, module)? {
                Some((a0, b0)) => (Tensor::cat(&[a, a0], 0)?, Tensor::cat(&[b, b0.neg()?], 1)?),
                None => (a, b),
            };
            parts.extend([a.flatten_all()?, b.contiguous()?.flatten_all()?]);
            parts.extend(self.magnitudes(module)?);
        }
        for saved in &self.layout.saved {
            parts.push(self.parameters.narrow(0, saved.offset, saved.num_parameters())?);
        }
        let parameters = Tensor::cat(&parts, 0)?;
        Self::assemble(&self.model, Arc::new(layout), parameters, None)
    }

    /// The inverse of [`LoRAAdapter::without_start`]: extracts the parameters of this adapter from `plain`; none if `plain`
    /// belongs to another adapter.
    pub(crate) fn parameters_with_start(&self, plain: &Self) -> Result<Option<Tensor>> {
        let fits = |(module, found): (&LoRAModule, &LoRAModule)| {
            let rank = if module.start.is_some() { 2 * module.rank } else { module.rank };
            (found.number, found.rank, found.use_dora) == (module.number, rank, module.use_dora)
        };
        let names = |adapter: &Self| -> Vec<(String, Vec<usize>)> {
            adapter.layout.saved.iter().map(|saved| (saved.name.clone(), saved.shape.clone())).collect()
        };
        if plain.modules().len() != self.modules().len()
            || !self.modules().iter().zip(plain.modules()).all(fits)
            || names(plain) != names(self)
        {
            return Ok(None);
        }
        let mut parts = Vec::new();
        for (module, found) in self.modules().iter().zip(plain.modules()) {
            let (a, b) = plain.matrices(found)?;
            if let Some((a0, b0)) = self.start(module)? {
                let (rank, rest) = (module.rank, found.rank - module.rank);
                if !is_same(&a.narrow(0, rank, rest)?, &a0)? || !is_same(&b.narrow(1, rank, rest)?, &b0.neg()?)? {
                    return Ok(None);
                }
            }
            parts.push(a.narrow(0, 0, module.rank)?.flatten_all()?);
            parts.push(b.narrow(1, 0, module.rank)?.contiguous()?.flatten_all()?);
            parts.extend(plain.magnitudes(found)?);
        }
        for saved in &plain.layout.saved {
            parts.push(plain.parameters.narrow(0, saved.offset, saved.num_parameters())?);
        }
        Ok(Some(Tensor::cat(&parts, 0)?))
    }

    /// The model of the adapter.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The model to use with [`LoRAAdapter::low_rank_updates`]: [`LoRAAdapter::model`] with the saved parameters.
    pub fn run_model(&self) -> &Model {
        &self.run_model
    }

    /// The parameters that are trained in full.
    pub fn saved_parameters(&self) -> &[SavedParameter] {
        &self.layout.saved
    }

    /// The value of a saved parameter: a view in f32.
    ///
    /// # Errors
    /// `saved` is not one of [`LoRAAdapter::saved_parameters`].
    pub fn saved_tensor(&self, saved: &SavedParameter) -> Result<Tensor> {
        saved_tensor(&self.parameters, saved)
    }

    /// The adapted layers.
    pub fn modules(&self) -> &[LoRAModule] {
        &self.layout.modules
    }

    /// All elements: `[num_parameters]`, f32; for each module A `[rank, in_features]`, then B `[out_features, rank]`, then
    /// its magnitudes `[out_features]`, if any; after the modules the saved parameters.
    pub fn parameters(&self) -> &Tensor {
        &self.parameters
    }

    /// The number of trainable parameters.
    pub fn num_parameters(&self) -> usize {
        self.layout.num_parameters
    }

    /// The default rank, for modules that no pattern matches.
    pub fn rank(&self) -> usize {
        self.layout.settings.rank
    }

    /// The default alpha, for modules that no pattern matches.
    pub fn alpha(&self) -> f64 {
        self.layout.settings.alpha
    }

    /// Probability with which an input element of A is dropped in training.
    pub fn dropout(&self) -> f64 {
        self.layout.settings.dropout
    }

    /// Whether the scale is `alpha / sqrt(rank)` (rsLoRA, <https://arxiv.org/abs/2312.03732>, section 3).
    pub fn use_rslora(&self) -> bool {
        self.layout.settings.use_rslora
    }

    /// Whether the rows of the adapted weights have trained magnitudes (DoRA, <https://arxiv.org/abs/2402.09353>).
    pub fn use_dora(&self) -> bool {
        self.layout.settings.use_dora
    }

    /// Ends of the paths of fully trained modules.
    pub fn modules_to_save(&self) -> &[String] {
        &self.layout.settings.modules_to_save
    }

    /// Which biases are trained.
    pub fn bias(&self) -> TrainedBiases {
        self.layout.settings.bias
    }

    /// The token ids of the trained rows, by the name of embedding or head.
    pub fn trainable_tokens(&self) -> &BTreeMap<String, Vec<u32>> {
        &self.layout.settings.trainable_tokens
    }

    /// Whether a tied head stays tied to the trained embedding.
    pub(crate) fn is_tied(&self) -> bool {
        self.layout.is_tied()
    }

    /// Whether the head stays tied to a trained embedding.
    pub fn ensure_weight_tying(&self) -> bool {
        self.layout.settings.ensure_weight_tying
    }

    /// Names of parameters that an adapter file replaces.
    pub(crate) fn parameters_to_save(&self) -> &[String] {
        &self.layout.settings.parameters_to_save
    }

    /// The name or path of its base model, as written in a PEFT folder.
    pub fn base_model(&self) -> Option<&str> {
        self.layout.settings.base_model.as_deref()
    }

    /// Returns a copy of the adapter with this name or path of its base model.
    #[must_use]
    pub fn with_base_model(&self, name: impl Into<String>) -> Self {
        let mut layout = (*self.layout).clone();
        layout.settings.base_model = Some(name.into());
        Self { layout: Arc::new(layout), ..self.clone() }
    }

    /// A `[rank, in_features]` and B `[out_features, rank]` of a module: views in f32.
    ///
    /// # Errors
    /// `module` is not one of [`LoRAAdapter::modules`].
    pub fn matrices(&self, module: &LoRAModule) -> Result<(Tensor, Tensor)> {
        matrices(&self.parameters, module)
    }

    /// The DoRA magnitudes of a module, `[out_features]`, if it has them: a view in f32.
    ///
    /// # Errors
    /// `module` is not one of [`LoRAAdapter::modules`].
    pub fn magnitudes(&self, module: &LoRAModule) -> Result<Option<Tensor>> {
        magnitudes(&self.parameters, module)
    }

    /// The initial A and B whose update is subtracted (PiSSA, OLoRA); none for other initializations.
    ///
    /// # Errors
    /// `module` is not one of [`LoRAAdapter::modules`].
    pub fn start(&self, module: &LoRAModule) -> Result<Option<(Tensor, Tensor)>> {
        self.start.as_ref().map_or(Ok(None), |start| starts(start, module))
    }

    /// The low-rank updates to pass to [`Model::forward`]: A and B of each linear layer, as views if activations are f32,
    /// otherwise converted to their dtype.
    ///
    /// # Errors
    /// The device fails.
    pub fn low_rank_updates(&self) -> Result<LowRankUpdates> {
        let dtype = self.model.activation_dtype();
        let parameters = self.parameters.to_dtype(dtype)?;
        let start = self.start.as_ref().map(|start| start.to_dtype(dtype)).transpose()?;
        let mut terms = LowRankUpdates::new();
        for (place, module) in self.layout.modules.iter().enumerate() {
            let (a, b) = matrices(&parameters, module)?;
            let magnitude = match (magnitudes(&self.parameters, module)?, self.norms.get(place)) {
                (Some(m), Some(norms)) => {
                    Some(Magnitude { m, weight_norms_squared: norms.clone(), reciprocal_norms: None })
                }
                _ => None,
            };
            let start = start.as_ref().map_or(Ok(None), |start| starts(start, module))?;
            let dropout = self.layout.settings.dropout as f32;
            let term =
                LowRank { dropout, initial_factors: start, magnitude, ..LowRank::new(a, b, module.scale as f32) };
            terms.insert(module.number, term);
        }
        Ok(terms)
    }

    /// A summary as text: one line per kind of module, and the share of trained parameters.
    pub fn summary(&self) -> String {
        let mut groups: BTreeMap<(&str, usize, String), (usize, usize)> = BTreeMap::new();
        for module in &self.layout.modules {
            let (layers, parameters) =
                groups.entry((module.module, module.rank, module.scale.to_string())).or_default();
            *layers += 1;
            *parameters += module.num_parameters();
        }
        let mut text = String::new();
        for ((module, rank, scale), (layers, parameters)) in groups {
            // writing to a string does not fail
            let _ = writeln!(text, "{module}: {layers} layers, rank {rank}, scale {scale}, {parameters} parameters");
        }
        for saved in &self.layout.saved {
            let what = saved.rows.as_ref().map_or("in full".into(), |rows| format!("{} rows", rows.len()));
            let _ = writeln!(text, "{}: {what}, {} parameters", saved.name, saved.num_parameters());
        }
        let total: usize = self.model.parameters().iter().map(|(_, tensor)| tensor.elem_count()).sum();
        let trained = self.num_parameters();
        let share = 100.0 * trained as f64 / total.max(1) as f64;
        let _ = write!(text, "{trained} trained of {total} parameters ({share:.3} %)");
        text
    }
}

fn is_same(left: &Tensor, right: &Tensor) -> Result<bool> {
    let values = |tensor: &Tensor| -> Result<Vec<f32>> { Ok(tensor.contiguous()?.flatten_all()?.to_vec1()?) };
    Ok(values(left)? == values(right)?)
}

fn matrices(parameters: &Tensor, module: &LoRAModule) -> Result<(Tensor, Tensor)> {
    matrices_at(parameters, module, module.offset)
}

fn matrices_at(values: &Tensor, module: &LoRAModule, offset: usize) -> Result<(Tensor, Tensor)> {
    let (num_a, num_b) = (module.num_a(), module.num_b());
    let a = values.narrow(0, offset, num_a)?.reshape((module.rank, module.in_features))?;
    let b = values.narrow(0, offset + num_a, num_b)?.reshape((module.out_features, module.rank))?;
    Ok((a, b))
}

fn starts(start: &Tensor, module: &LoRAModule) -> Result<Option<(Tensor, Tensor)>> {
    module.start.map(|offset| matrices_at(start, module, offset)).transpose()
}

fn magnitudes(parameters: &Tensor, module: &LoRAModule) -> Result<Option<Tensor>> {
    if !module.use_dora {
        return Ok(None);
    }
    Ok(Some(parameters.narrow(0, module.magnitude_offset(), module.out_features)?))
}

fn saved_tensor(parameters: &Tensor, saved: &SavedParameter) -> Result<Tensor> {
    Ok(parameters.narrow(0, saved.offset, saved.num_parameters())?.reshape(saved.shape.as_slice())?)
}

/// The squared row norms of the weight of a module: `[out_features]`, f32.
pub(super) fn norms_squared(model: &Model, module: &LoRAModule) -> Result<Tensor> {
    let weight = weight(model, &format!("{}.weight", module.path))?;
    // the embedding is stored as `[vocab, hidden]`, the transpose of a linear layer's weight
    if module.is_embedding() {
        weight_norms_squared(&weight.tensor()?.t()?.contiguous()?)
    } else {
        weight.row_norms_squared()
    }
}

/// Returns the model with views of the saved parameters, or copies if its activations are not f32. Trained rows are
/// written into a copy of the parameter, or in place into the copy in `earlier`.
fn run_model(model: &Model, layout: &Layout, parameters: &Tensor, earlier: Option<&Model>) -> Result<Model> {
    if layout.saved.is_empty() {
        return Ok(model.clone());
    }
    let dtype = model.activation_dtype();
    let mut replaced = HashMap::with_capacity(layout.saved.len() + 1);
    for saved in &layout.saved {
        let mut tensor = saved_tensor(parameters, saved)?.to_dtype(dtype)?;
        if let Some(ids) = &saved.rows {
            let whole = match earlier {
                Some(earlier) => parameter(earlier, &saved.name)?,
                None => own_copy(&parameter(model, &saved.name)?, dtype)?,
            };
            tensor = with_rows(whole, ids, &tensor)?;
        }
        replaced.insert(saved.name.clone(), tensor);
    }
    // if only the embedding is trained, a tied head keeps the old values
    if model.config().tie_word_embeddings && !layout.is_tied() && replaced.contains_key(EMBEDDING_WEIGHT) {
        let head = parameter(model, HEAD_WEIGHT)?;
        replaced.entry(HEAD_WEIGHT.into()).or_insert(head);
    }
    model.with_parameters(replaced)
}

/// A contiguous copy that does not share storage with `tensor`.
fn own_copy(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(if tensor.dtype() == dtype { tensor.force_contiguous()? } else { tensor.to_dtype(dtype)?.contiguous()? })
}

/// Replaces rows of `whole` in place, by index.
pub(super) fn with_rows(whole: Tensor, ids: &[u32], rows: &Tensor) -> Result<Tensor> {
    for (number, &id) in ids.iter().enumerate() {
        whole.slice_set(&rows.narrow(0, number, 1)?.contiguous()?, 0, id as usize)?;
    }
    Ok(whole)
}
