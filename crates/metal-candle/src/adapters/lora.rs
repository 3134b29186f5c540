//! LoRA (<https://arxiv.org/abs/2106.09685>, section 4.1): `W x + scale * B A x` with trained A and B.

use super::{LoRAAdapterBuilder, TargetModule};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::ops::{LowRank, LowRankTerms};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

/// The usual settings of a LoRA adapter; [`LoRAAdapter::builder`] has more.
#[derive(Debug, Clone, PartialEq)]
pub struct LoRAAdapterConfig {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// The terms are scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability with which an input element of A is dropped in training.
    pub dropout: f64,
    /// The linear layers of each block that get a term.
    pub target_modules: Vec<TargetModule>,
}

impl Default for LoRAAdapterConfig {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, dropout: 0.0, target_modules: vec![TargetModule::QProj, TargetModule::VProj] }
    }
}

/// The term of one linear layer.
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
    /// Width of its input.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
    /// Rows of A and columns of B.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Factor on `B A x`.
    pub scale: f64,
    /// Where A begins among the parameters; B follows.
    pub(crate) offset: usize,
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
}

/// What is common to all terms of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) dropout: f64,
    pub(crate) use_rslora: bool,
    pub(crate) base_model: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) settings: Settings,
    pub(crate) modules: Vec<LoRAModule>,
    pub(crate) num_parameters: usize,
}

/// A linear layer that is to get a term.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planned {
    pub(crate) number: usize,
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
}

impl Layout {
    pub(crate) fn new(model: &Model, settings: Settings, planned: &[Planned]) -> Result<Self> {
        if planned.is_empty() {
            return Err(Error::argument("target_modules", "no linear layer of the model is targeted"));
        }
        if !(0.0..1.0).contains(&settings.dropout) {
            let message = format!("`{}` is not a probability below 1", settings.dropout);
            return Err(Error::argument("dropout", message));
        }
        let mut modules = Vec::with_capacity(planned.len());
        let mut offset = 0_usize;
        for &Planned { number, rank, alpha } in planned {
            let Some(linear) = model.linears().get(number) else {
                return Err(Error::argument("target_modules", format!("the model has no linear layer {number}")));
            };
            if rank == 0 {
                return Err(Error::argument("rank", format!("is 0 for `{}`", linear.path)));
            }
            if !alpha.is_finite() {
                return Err(Error::argument("alpha", format!("is `{alpha}` for `{}`", linear.path)));
            }
            let divisor = if settings.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
            modules.push(LoRAModule {
                number,
                path: linear.path.clone(),
                layer: linear.layer,
                module: linear.module,
                in_features: linear.in_features,
                out_features: linear.out_features,
                rank,
                alpha,
                scale: alpha / divisor,
                offset,
            });
            offset = (linear.in_features + linear.out_features)
                .checked_mul(rank)
                .and_then(|elements| elements.checked_add(offset))
                .filter(|&elements| elements <= isize::MAX as usize / 16)
                .ok_or_else(|| Error::argument("rank", format!("`{rank}` is too large for `{}`", linear.path)))?;
        }
        Ok(Self { settings, modules, num_parameters: offset })
    }
}

/// A LoRA adapter of one model: A and B of each adapted linear layer, as views of one flat f32 tensor.
///
/// An adapter does not change: training makes new ones. Cloning is cheap and shares the parameters.
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
/// let logits = model.forward(&Batch::single(&[1, 2, 3]), Some(&adapter.terms()?), None, Rows::Last)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LoRAAdapter {
    model: Model,
    layout: Arc<Layout>,
    parameters: Tensor,
}

impl LoRAAdapter {
    /// A new adapter: A uniform in `+-1 / sqrt(in_features)`, B zero, so that it changes no logit yet.
    ///
    /// # Errors
    /// A setting is out of its range, or `device` is not that of the model.
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

    /// A builder with all settings: rank 8, alpha 16, no dropout, `q_proj` and `v_proj` of all layers.
    pub fn builder(model: &Model) -> LoRAAdapterBuilder<'_> {
        LoRAAdapterBuilder::new(model)
    }

    /// An adapter of this layout with the given values, in the order of the layout.
    pub(crate) fn from_values(model: &Model, layout: Layout, values: Vec<f32>) -> Result<Self> {
        let shape = layout.num_parameters;
        let parameters = Tensor::from_vec(values, shape, &model.device().candle())?;
        Ok(Self { model: model.clone(), layout: Arc::new(layout), parameters })
    }

    /// The same adapter with other parameters, shared with the caller.
    ///
    /// # Shapes
    /// `parameters` is `[num_parameters]` in f32.
    ///
    /// # Errors
    /// The shape or dtype is another.
    pub fn with_parameters(&self, parameters: Tensor) -> Result<Self> {
        let shape = self.layout.num_parameters;
        if parameters.dims() != [shape] || parameters.dtype() != DType::F32 {
            return Err(Error::shape("parameters", format!("[{shape}] in f32"), parameters.dims()));
        }
        Ok(Self { model: self.model.clone(), layout: self.layout.clone(), parameters })
    }

    /// The same adapter for another model with the same linear layers, which are found by path.
    ///
    /// # Errors
    /// A layer is missing or has another shape.
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
            planned.push(Planned { number, rank: module.rank, alpha: module.alpha });
        }
        let layout = Layout::new(model, self.layout.settings.clone(), &planned)?;
        let parameters = self.parameters.to_device(&model.device().candle())?;
        Ok(Self { model: model.clone(), layout: Arc::new(layout), parameters })
    }

    /// The model it belongs to.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The adapted linear layers.
    pub fn modules(&self) -> &[LoRAModule] {
        &self.layout.modules
    }

    /// All elements of all A and B: `[num_parameters]`, f32; for each module A `[rank, in_features]`, then B
    /// `[out_features, rank]`.
    pub fn parameters(&self) -> &Tensor {
        &self.parameters
    }

    /// The number of trainable parameters.
    pub fn num_parameters(&self) -> usize {
        self.layout.num_parameters
    }

    /// Rank of the modules that no pattern names.
    pub fn rank(&self) -> usize {
        self.layout.settings.rank
    }

    /// Alpha of the modules that no pattern names.
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

    /// Name or path of the model it was made for, as it stands in a PEFT folder.
    pub fn base_model(&self) -> Option<&str> {
        self.layout.settings.base_model.as_deref()
    }

    /// A `[rank, in_features]` and B `[out_features, rank]` of a module: views in f32.
    ///
    /// # Errors
    /// `module` is not one of [`LoRAAdapter::modules`].
    pub fn matrices(&self, module: &LoRAModule) -> Result<(Tensor, Tensor)> {
        matrices(&self.parameters, module)
    }

    /// What [`Model::forward`] takes: A and B of each linear layer, views where activations are f32, else converted
    /// to their dtype.
    ///
    /// # Errors
    /// The device fails.
    pub fn terms(&self) -> Result<LowRankTerms> {
        let parameters = self.parameters.to_dtype(self.model.activation_dtype())?;
        let mut terms = LowRankTerms::new();
        for module in &self.layout.modules {
            let (a, b) = matrices(&parameters, module)?;
            let dropout = self.layout.settings.dropout as f32;
            terms.insert(module.number, LowRank { dropout, ..LowRank::new(a, b, module.scale as f32) });
        }
        Ok(terms)
    }

    /// One line a kind of module: layers, rank, scale and parameters, and the share of the model's parameters.
    pub fn summary(&self) -> String {
        let mut groups: BTreeMap<(&str, usize, String), (usize, usize)> = BTreeMap::new();
        for module in &self.layout.modules {
            let (layers, parameters) =
                groups.entry((module.module, module.rank, module.scale.to_string())).or_default();
            *layers += 1;
            *parameters += module.num_a() + module.num_b();
        }
        let mut text = String::new();
        for ((module, rank, scale), (layers, parameters)) in groups {
            // writing to a string does not fail
            let _ = writeln!(text, "{module}: {layers} layers, rank {rank}, scale {scale}, {parameters} parameters");
        }
        let total: usize = self.model.parameters().iter().map(|(_, tensor)| tensor.elem_count()).sum();
        let trained = self.num_parameters();
        let share = 100.0 * trained as f64 / total.max(1) as f64;
        let _ = write!(text, "{trained} trained of {total} parameters ({share:.3} %)");
        text
    }
}

fn matrices(parameters: &Tensor, module: &LoRAModule) -> Result<(Tensor, Tensor)> {
    let (num_a, num_b) = (module.num_a(), module.num_b());
    let a = parameters.narrow(0, module.offset, num_a)?.reshape((module.rank, module.in_features))?;
    let b = parameters.narrow(0, module.offset + num_a, num_b)?.reshape((module.out_features, module.rank))?;
    Ok((a, b))
}
