//! `Model`: builds a model from its description and weights, and runs its forward pass.

use super::block::{Block, DecodeSizes};
use super::config::ModelConfig;
use super::layout::Layout;
use super::parts::attention::Attention;
use super::parts::feed_forward::FeedForward;
use super::parts::inputs::InputSquares;
use super::parts::norm::NormLayer;
use super::parts::pass::Context;
use super::parts::step::is_rms_norm;
use super::parts::sublayer::Sublayer;
use super::registry::LinearInfo;
use super::rows::{Rows, gather_rows};
use super::tensors::Tensors;
use super::{Batch, KVCache};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::Digest;
use crate::ops::adapters::{Adapters, BatchUpdates, LayerUpdates};
use crate::ops::attention::{CacheSlots, Spans};
use crate::ops::gpu::{self, Formats};
use crate::ops::head::{self, Head};
use crate::ops::linear::Linear;
use crate::ops::rotary::{RotaryTable, Rotation};
use crate::ops::{LowRankUpdates, MappedFiles, Weight, embedding};
use candle_core::{DType, Tensor};
use metal_candle_kernels::{AttentionShape, BlockFormat, MatmulPrecision};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

/// A model with immutable, shared weights. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Model {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    config: ModelConfig,
    layout: Layout,
    device: Device,
    dtype: DType,
    parameters: Vec<(String, Weight)>,
    /// The block formats of the weights.
    pub(super) formats: Formats,
    /// The mapped files of the parameters.
    pub(super) files: MappedFiles,
    pub(super) embedding: Weight,
    /// The factor on token embeddings.
    pub(super) embedding_scale: f32,
    pub(super) blocks: Vec<Block>,
    /// The sizes of the decode kernels, if the device and all blocks support them.
    pub(super) decode_sizes: Option<DecodeSizes>,
    pub(super) norm: NormLayer,
    /// The head. If it is tied, its weight is the embedding.
    pub(super) head: Head,
    pub(super) rotary: Vec<RotaryTable>,
    /// The distinct kinds of attention among the layers.
    pub(super) shapes: Vec<AttentionShape>,
}

impl Model {
    /// A model from tensors, named as in a checkpoint of the family. All must have the same dtype and be on `device`.
    ///
    /// # Errors
    /// Lists all missing, unexpected and wrongly shaped tensors.
    pub fn from_tensors(config: ModelConfig, tensors: HashMap<String, Tensor>, device: Device) -> Result<Self> {
        let weights = tensors.into_iter().map(|(name, tensor)| (name, tensor.detach().into())).collect();
        Self::from_weights(config, weights, device)
    }

    /// [`Model::from_tensors`] with weights that may be mapped from files.
    pub(crate) fn from_weights(
        config: ModelConfig,
        mut weights: HashMap<String, Weight>,
        device: Device,
    ) -> Result<Self> {
        let parameters = take_parameters(&config, &mut weights)?;
        let dtype = parameters.first().map_or(DType::F32, |(_, weight)| weight.dtype());
        Self::assemble(config, parameters, dtype, device)
    }

    /// A copy of the model with some parameters replaced, by name. The others are shared. An `lm_head.weight` unties
    /// the head.
    ///
    /// On the CPU, a replaced parameter may have another dtype than the others, and the model shares its storage, so
    /// later in-place updates are visible. On other devices tensors are copied and cast.
    ///
    /// # Errors
    /// Lists all unknown names and wrong shapes.
    pub fn with_parameters(&self, mut replaced: HashMap<String, Tensor>) -> Result<Self> {
        let mut config = self.config().clone();
        config.tie_word_embeddings &= !replaced.contains_key("lm_head.weight");
        let own: HashMap<&str, &Weight> =
            self.parameters().iter().map(|(name, weight)| (name.as_str(), weight)).collect();
        let mut problems = Vec::new();
        let mut parameters = Vec::new();
        for (name, shape) in Self::parameter_shapes(&config) {
            let tensor = match (replaced.remove(&name), own.get(name.as_str())) {
                (Some(tensor), _) if tensor.dims() == shape => {
                    Weight::from(tensor.detach()).with_precision(self.matmul_precision())
                }
                (Some(tensor), _) => {
                    problems.push(format!("`{name}`: expected shape {shape:?}, found {:?}", tensor.dims()));
                    continue;
                }
                (None, Some(tensor)) => (*tensor).clone(),
                (None, None) => {
                    problems.push(format!("`{name}` is missing"));
                    continue;
                }
            };
            let is_at_home = self.device().is_cpu() || tensor.dtype() == self.dtype();
            parameters.push((name, if is_at_home { tensor } else { tensor.to_dtype(self.dtype())?.into() }));
        }
        let mut unknown: Vec<_> = replaced.keys().map(|name| format!("`{name}` is not part of the model")).collect();
        unknown.sort();
        problems.extend(unknown);
        if !problems.is_empty() {
            return Err(Error::Tensors { path: "parameters".into(), problems });
        }
        Self::assemble(config, parameters, self.dtype(), self.device())
    }

    /// The same model with this precision of its matrix products on the CPU; weights are shared.
    ///
    /// [`MatmulPrecision::Bf16`] makes training and prefill faster where [`Device::multiplies_bf16`] says so, as other frameworks
    /// are with bf16 models. Elsewhere it changes nothing. An answer has the same bits alone and in any batch in both precisions.
    ///
    /// # Errors
    /// bf16 is requested for a model on a GPU, whose products always round to the type of the weights, or for a model without bf16
    /// matrices.
    pub fn with_matmul_precision(&self, precision: MatmulPrecision) -> Result<Self> {
        if precision == MatmulPrecision::Bf16 {
            let has_bf16 =
                self.parameters().iter().any(|(_, weight)| weight.dtype() == DType::BF16 && weight.dims().len() == 2);
            let problem = match (self.device().is_cpu(), has_bf16) {
                (false, _) => "products on a GPU use the type of the weights: bf16 is for the CPU".to_owned(),
                (true, false) => format!("expected bf16 weights, found {}: load the model as bf16", self.weight_type()),
                (true, true) => String::new(),
            };
            if !problem.is_empty() {
                return Err(Error::argument("matmul_precision", problem));
            }
        }
        let parameters = self.parameters().iter().cloned();
        let parameters = parameters.map(|(name, weight)| (name, weight.with_precision(precision))).collect();
        Self::assemble(self.config().clone(), parameters, self.dtype(), self.device())
    }

    /// The precision of its matrix products on the CPU.
    pub fn matmul_precision(&self) -> MatmulPrecision {
        self.parameters().first().map_or(MatmulPrecision::F32, |(_, weight)| weight.precision())
    }

    /// The type of its largest parameter: `bf16`, or a block format such as `q4_1`.
    pub fn weight_type(&self) -> &'static str {
        let largest = self.parameters().iter().max_by_key(|(_, weight)| weight.elem_count());
        let name = |weight: &Weight| weight.block_format().map_or(weight.dtype().as_str(), BlockFormat::name);
        largest.map_or(self.dtype().as_str(), |(_, weight)| name(weight))
    }

    /// A model from parameters that have been checked.
    fn assemble(config: ModelConfig, parameters: Vec<(String, Weight)>, dtype: DType, device: Device) -> Result<Self> {
        let (description, layout) = (config.describe()?, config.layout()?);
        let tensors = Tensors { linears: &layout.linears, parameters: &parameters, device };
        let norm = |slot: Option<_>| slot.map(|slot| tensors.norm(slot)).transpose();
        let (mut blocks, mut shapes) = (Vec::with_capacity(layout.layers.len()), Vec::new());
        for (layer, (spec, slots)) in description.layers.iter().zip(&layout.layers).enumerate() {
            let attention = Attention::new(layer, &spec.attention, &slots.attention, &description.rotary, &tensors)?;
            if !shapes.contains(&attention.shape) {
                shapes.push(attention.shape);
            }
            let feed_forward = FeedForward::new(&spec.feed_forward, &slots.feed_forward, &tensors)?;
            let scale = spec.residual_scale;
            blocks.push(Block {
                layer,
                attention: Sublayer {
                    before: norm(slots.before_attention)?,
                    part: attention,
                    after: norm(slots.after_attention)?,
                    scale,
                },
                feed_forward: Sublayer {
                    before: norm(slots.before_feed_forward)?,
                    part: feed_forward,
                    after: norm(slots.after_feed_forward)?,
                    scale,
                },
                is_parallel: spec.is_parallel,
                parameters: slots.parameters.clone(),
            });
        }
        let norm = tensors.norm(layout.norm)?;
        let embedding = tensors.matrix(layout.embedding)?;
        let linear = Linear { weight: tensors.matrix(layout.head)?, bias: None };
        let head = Head { linear, scale: description.head.scale, soft_cap: description.head.soft_cap };
        let rotary = description.rotary.iter().map(RotaryTable::new).collect::<Result<_>>()?;
        let embedding_scale = description.embedding.scale;
        let has_steps = norm.norm.weight.as_ref().is_some_and(gpu::has_kernels)
            && embedding.supports_vector_loads(dtype)
            && head.linear.weight.supports_vector_loads(dtype)
            && config.hidden_size.is_multiple_of(8)
            && is_rms_norm(&norm);
        let decode_sizes = if has_steps { DecodeSizes::new(&blocks, dtype) } else { None };
        let inner = Inner {
            config,
            layout,
            device,
            dtype,
            formats: parameters.iter().map(|(_, weight)| weight.block_format()).collect(),
            files: MappedFiles::of(parameters.iter().map(|(_, weight)| weight)),
            parameters,
            embedding,
            embedding_scale,
            blocks,
            decode_sizes,
            norm,
            head,
            rotary,
            shapes,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The name and shape of every tensor in a checkpoint of this configuration; empty if the configuration is not
    /// valid.
    pub fn parameter_shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        let specs = config.parameter_specs().unwrap_or_default();
        specs.into_iter().map(|spec| (spec.name, spec.shape)).collect()
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.inner.device
    }

    /// The dtype of the weights.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// The dtype of activations: f32 on the CPU, otherwise that of the weights.
    pub fn activation_dtype(&self) -> DType {
        if self.inner.device.is_cpu() { DType::F32 } else { self.inner.dtype }
    }

    /// The layers that an adapter can extend, by id: those of each block, then the embedding and the head, even if its
    /// weight is the embedding.
    pub fn linears(&self) -> &[LinearInfo] {
        &self.inner.layout.linears
    }

    /// The name and weight of each parameter, in the order of [`Model::parameter_shapes`]. A tied head is not listed.
    pub fn parameters(&self) -> &[(String, Weight)] {
        &self.inner.parameters
    }

    /// The logits of the requested rows: `[rows, vocab_size]`, f32.
    ///
    /// With a cache, each sequence continues the tokens in its slot, and its own are added to the cache.
    ///
    /// # Errors
    /// A token id is out of range, the cache is full, positions do not continue it, or a mapped file of weights has
    /// been truncated or overwritten.
    pub fn forward(
        &self,
        batch: &Batch,
        updates: Option<&LowRankUpdates>,
        cache: Option<&mut KVCache>,
        rows: Rows,
    ) -> Result<Tensor> {
        self.check_updates(updates)?;
        self.run(batch, BatchUpdates::Same(updates), cache, rows)
    }

    /// [`Model::forward`] with an adapter for each sequence. The weights of the model are read once for all of them.
    ///
    /// # Errors
    /// As [`Model::forward`]; also if there is not one adapter entry per sequence, or an adapter index is out of range.
    pub fn forward_adapted(
        &self,
        batch: &Batch,
        adapters: Adapters,
        cache: Option<&mut KVCache>,
        rows: Rows,
    ) -> Result<Tensor> {
        for updates in adapters.sets {
            self.check_updates(Some(updates))?;
        }
        let runs = adapters.rows(batch.offsets())?;
        let updates =
            if let [run] = runs.as_slice() { BatchUpdates::Same(run.updates) } else { BatchUpdates::ByRows(&runs) };
        self.run(batch, updates, cache, rows)
    }

    fn run(&self, batch: &Batch, updates: BatchUpdates, cache: Option<&mut KVCache>, rows: Rows) -> Result<Tensor> {
        let logits = self.device().step(|| self.logits(batch, updates, cache, rows, None))?;
        self.inner.files.finish_pass()?;
        Ok(logits)
    }

    /// Adds the squares of the inputs of the blocks' linear layers to `inputs`, for a batch.
    pub(super) fn add_inputs(&self, batch: &Batch, inputs: &InputSquares) -> Result<()> {
        self.device().step(|| self.logits(batch, BatchUpdates::Same(None), None, Rows::Of(&[]), Some(inputs)))?;
        self.inner.files.finish_pass()
    }

    /// The final hidden states of the requested rows, after the last norm: `[rows, hidden_size]`, f32.
    ///
    /// With a cache, each sequence continues the tokens in its slot, and its own are added to the cache.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn hidden_states(
        &self,
        batch: &Batch,
        updates: Option<&LowRankUpdates>,
        cache: Option<&mut KVCache>,
        rows: Rows,
    ) -> Result<Tensor> {
        self.check_updates(updates)?;
        let hidden = self.device().step(|| {
            let (hidden, _) = self.hidden(batch, BatchUpdates::Same(updates), cache, rows, None)?;
            Ok(hidden.to_dtype(DType::F32)?)
        })?;
        self.inner.files.finish_pass()?;
        Ok(hidden)
    }

    /// The logits of rows of [`Model::hidden_states`]: `[rows, vocab_size]`, f32.
    pub(crate) fn logits_of(&self, hidden: &Tensor, updates: Option<&LowRankUpdates>) -> Result<Tensor> {
        let updates = BatchUpdates::Same(updates).of_layer(self.head_id());
        let logits = self.device().step(|| {
            let hidden = hidden.to_dtype(self.activation_dtype())?;
            head::logits(&hidden, &self.inner.head, &updates)
        })?;
        self.inner.files.finish_pass()?;
        Ok(logits)
    }

    fn logits(
        &self,
        batch: &Batch,
        updates: BatchUpdates,
        cache: Option<&mut KVCache>,
        rows: Rows,
        inputs: Option<&InputSquares>,
    ) -> Result<Tensor> {
        let (hidden, updates) = self.hidden(batch, updates, cache, rows, inputs)?;
        if hidden.dim(0)? == 0 {
            // a chunk of a prompt needs no logits; the empty tensor is on the CPU on every device
            let shape = (0, self.inner.config.vocab_size);
            return Ok(Tensor::zeros(shape, DType::F32, &candle_core::Device::Cpu)?);
        }
        head::logits(&hidden, &self.inner.head, &updates)
    }

    /// The normed hidden states of the requested rows, and the low-rank updates of the head for them.
    fn hidden<'a>(
        &self,
        batch: &Batch,
        updates: BatchUpdates<'a>,
        mut cache: Option<&mut KVCache>,
        rows: Rows,
        inputs: Option<&InputSquares>,
    ) -> Result<(Tensor, LayerUpdates<'a>)> {
        self.check_positions(batch)?;
        if let Some(cache) = &cache {
            cache.check(batch, &self.cache_shape())?;
        } else if let Some(sequence) = (0..batch.num_sequences()).find(|&i| batch.positions()[batch.offsets()[i]] != 0)
        {
            let message =
                format!("sequence {sequence} does not start at position 0, and there is no cache to continue");
            return Err(Error::argument("batch", message));
        }
        let (mut x, rotations) = self.embed(batch, updates, true)?;
        let spans = self.spans(batch, cache.as_deref().map(|cache| cache.slots_of(batch)), &x)?;
        let (rotations, positions) = (rotations.as_slice(), batch.positions());
        let (spans, dropout_seed) = (&spans, None);
        let context = Context { rotations, positions, spans, updates, is_inference: true, dropout_seed, inputs };
        for block in &self.inner.blocks {
            x = block.forward(&x, context, cache.as_deref_mut())?;
        }
        if let Some(cache) = cache {
            cache.advance(batch);
        }
        let last = batch.last_rows();
        let chosen = match rows {
            Rows::All => None,
            Rows::Of([]) => {
                let empty = Tensor::zeros((0, self.inner.config.hidden_size), x.dtype(), &candle_core::Device::Cpu)?;
                return Ok((empty, LayerUpdates::Same(None)));
            }
            Rows::Last => Some(last.as_slice()),
            Rows::Of(rows) => Some(rows),
        };
        let (x, updates) = match chosen {
            None => (x, updates.of_layer(self.head_id())),
            Some(rows) => (gather_rows(&x, rows)?, updates.of_layer_for(self.head_id(), rows)),
        };
        Ok((self.inner.norm.forward(&x)?, updates))
    }

    /// The residual stream before the first block, and the rotations of the batch's positions for each rotary table.
    pub(super) fn embed(
        &self,
        batch: &Batch,
        updates: BatchUpdates,
        is_inference: bool,
    ) -> Result<(Tensor, Vec<Rotation>)> {
        if batch.is_empty() {
            return Err(Error::argument("batch", "expected at least one token, found none"));
        }
        let (weight, scale) = (&self.inner.embedding, self.inner.embedding_scale);
        let (ids, dtype) = (batch.ids(), self.activation_dtype());
        let x = if is_inference {
            embedding::infer(weight, &updates.of_layer(self.embedding_id()), ids, dtype, scale)?
        } else {
            let update = updates.same().and_then(|updates| updates.get(self.embedding_id()));
            embedding::forward(weight, update, ids, dtype, scale)?
        };
        let rotation = |table: &RotaryTable| table.rotation(batch.positions(), batch.offsets(), &x);
        let rotations = self.inner.rotary.iter().map(rotation).collect::<Result<_>>()?;
        Ok((x, rotations))
    }

    /// The sequence length above which the rotary frequencies change, even those of cached keys (longrope).
    pub(crate) fn rotary_limit(&self) -> Option<usize> {
        self.inner.rotary.iter().filter_map(RotaryTable::limit).min()
    }

    /// The sequences of a batch, as attention needs them.
    pub(super) fn spans(&self, batch: &Batch, cached: Option<CacheSlots>, x: &Tensor) -> Result<Spans> {
        Spans::new(batch.offsets(), &self.inner.shapes, cached, x)
    }

    /// The number of key/value heads of each layer, and their width.
    pub(super) fn cache_shape(&self) -> Vec<[usize; 2]> {
        let shapes = self.inner.blocks.iter().map(|block| block.attention.part.shape);
        shapes.map(|shape| [shape.kv_heads, shape.head_dim]).collect()
    }

    /// The low-rank updates with the tensors that inference derives from A and B: on the CPU their f32 factors, and on any
    /// device the reciprocal norms of DoRA, `[out_features]`. A and B must not change afterwards. A second call is cheap, so a
    /// thread that loads an adapter can call this before it passes the updates to a scheduler.
    ///
    /// # Errors
    /// The updates do not fit the model, or the device fails.
    pub fn with_cached_factors(&self, updates: &LowRankUpdates) -> Result<LowRankUpdates> {
        self.check_updates(Some(updates))?;
        let mut cached = LowRankUpdates::new();
        for (id, update) in updates.iter() {
            let weight = &self.parameters()[self.linears()[id].weight].1;
            cached.insert(id, update.with_cached_factors(weight, id == self.embedding_id())?);
        }
        Ok(cached)
    }

    /// A SHA-256 of everything that determines the results of the model: configuration, weights and the precision of products.
    /// It reads all weights.
    ///
    /// # Errors
    /// A file of the weights has been truncated or overwritten, or the device fails.
    pub(crate) fn digest(&self) -> Result<[u8; 32]> {
        let weights = self.parameters().par_iter().map(|(_, weight)| weight.digest()).collect::<Result<Vec<_>>>()?;
        let mut digest = Digest::new("model");
        digest.add(self.config().identity().as_bytes());
        digest.add(format!("{:?}", self.matmul_precision()).as_bytes());
        for ((name, _), weight) in self.parameters().iter().zip(weights) {
            digest.add(name.as_bytes());
            digest.add(&weight);
        }
        Ok(digest.finish())
    }

    /// The id of the embedding among [`Model::linears`].
    pub(super) fn embedding_id(&self) -> usize {
        self.inner.layout.embedding_id
    }

    /// The id of the head among [`Model::linears`].
    pub(super) fn head_id(&self) -> usize {
        self.inner.layout.head_id
    }

    /// The index of the embedding among [`Model::parameters`].
    pub(super) fn embedding_parameter(&self) -> usize {
        self.inner.layout.embedding
    }

    /// The index of the head's weight among [`Model::parameters`]: that of the embedding if it is tied.
    pub(super) fn head_parameter(&self) -> usize {
        self.inner.layout.head
    }

    pub(super) fn check_positions(&self, batch: &Batch) -> Result<()> {
        let longest = batch.positions().iter().max().map_or(0, |&p| p as usize + 1);
        let limit = self.inner.config.max_sequence_length();
        if longest > limit {
            let message = format!("a sequence of {longest} tokens is longer than the model's limit of {limit}");
            return Err(Error::argument("batch", message));
        }
        Ok(())
    }
}

/// The parameters in checkpoint order, or all problems.
fn take_parameters(config: &ModelConfig, tensors: &mut HashMap<String, Weight>) -> Result<Vec<(String, Weight)>> {
    let mut problems = Vec::new();
    let mut parameters = Vec::new();
    let mut dtype = None;
    for (name, shape) in Model::parameter_shapes(config) {
        match tensors.remove(&name) {
            None => problems.push(format!("`{name}` is missing")),
            Some(tensor) if tensor.dims() != shape => {
                problems.push(format!("`{name}`: expected shape {shape:?}, found {:?}", tensor.dims()));
            }
            // on the CPU, each product supports the dtype of its own weight
            Some(tensor) if !tensor.device().is_cpu() && *dtype.get_or_insert(tensor.dtype()) != tensor.dtype() => {
                problems.push(format!(
                    "`{name}`: its dtype {:?} differs from the dtype of the other tensors",
                    tensor.dtype()
                ));
            }
            Some(tensor) => parameters.push((name, tensor)),
        }
    }
    if config.tie_word_embeddings {
        tensors.remove("lm_head.weight");
    }
    let mut unexpected: Vec<_> = tensors.keys().map(|name| format!("`{name}` is not part of the model")).collect();
    unexpected.sort();
    problems.extend(unexpected);
    if problems.is_empty() { Ok(parameters) } else { Err(Error::Tensors { path: "tensors".into(), problems }) }
}
