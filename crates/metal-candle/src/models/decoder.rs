//! The decoder: one description-driven stack of blocks for all families.

use super::block::{Block, BlockParameters, Context, MODULES};
use super::{Batch, KVCache, ModelConfig, families};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::attention::{Cached, Spans};
use crate::ops::head::Head;
use crate::ops::linear::Linear;
use crate::ops::norm::Norm;
use crate::ops::rotary::{Pairs, RotaryScaling, RotarySpec, RotaryTable, Rotation};
use crate::ops::{LowRankTerms, Weight, embedding, head};
use candle_core::{DType, Tensor};
use metal_candle_kernels::AttentionShape;
use std::collections::HashMap;
use std::sync::Arc;

/// Linear layers of a block.
pub(super) const NUM_LINEARS: usize = 7;

/// A model: immutable, shared weights. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Model {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    config: ModelConfig,
    device: Device,
    dtype: DType,
    linears: Vec<LinearInfo>,
    parameters: Vec<(String, Tensor)>,
    pub(super) embedding: Weight,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: Norm,
    /// The head; its weight is the embedding itself where it is tied.
    pub(super) head: Head,
    pub(super) rotary: RotaryTable,
    pub(super) attention: AttentionShape,
}

/// A linear layer of a model, known to adapters by its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearInfo {
    /// Path in the checkpoint without `.weight`: `model.layers.0.self_attn.q_proj`, `model.embed_tokens`, `lm_head`.
    pub path: String,
    /// The block it is in; none for the embedding and the head.
    pub layer: Option<usize>,
    /// Last part of the path: `q_proj`.
    pub module: &'static str,
    /// Width of its input; for the embedding the size of the vocabulary.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
}

/// The rows of a batch whose logits are wanted.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// Each token's.
    All,
    /// Those of the last token of each sequence.
    Last,
    /// Those of the tokens with these indices.
    Of(&'a [usize]),
}

impl Model {
    /// A model of these tensors, named as in a checkpoint of the family; all of one dtype and on `device`.
    ///
    /// # Errors
    /// All missing, unexpected and misshaped tensors, in one error.
    pub fn from_tensors(config: ModelConfig, mut tensors: HashMap<String, Tensor>, device: Device) -> Result<Self> {
        let parameters = take_parameters(&config, &mut tensors)?;
        let dtype = parameters.first().map_or(DType::F32, |(_, tensor)| tensor.dtype());
        Self::assemble(config, parameters, dtype, device)
    }

    /// The same model with some parameters replaced, by name; the others are shared. A `lm_head.weight` unties the head.
    ///
    /// On the CPU a replaced parameter may have another dtype than the others, and what is changed in place later is
    /// seen; elsewhere it is converted.
    ///
    /// # Errors
    /// A name is unknown or a shape is another: all such parameters are told.
    pub fn with_parameters(&self, mut replaced: HashMap<String, Tensor>) -> Result<Self> {
        let mut config = self.config().clone();
        config.tie_word_embeddings &= !replaced.contains_key("lm_head.weight");
        let own: HashMap<&str, &Tensor> =
            self.parameters().iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut problems = Vec::new();
        let mut parameters = Vec::new();
        for (name, shape) in Self::parameter_shapes(&config) {
            let tensor = match (replaced.remove(&name), own.get(name.as_str())) {
                (Some(tensor), _) if tensor.dims() == shape => tensor.detach(),
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
            parameters.push((name, if is_at_home { tensor } else { tensor.to_dtype(self.dtype())? }));
        }
        let mut unknown: Vec<_> = replaced.keys().map(|name| format!("`{name}` is not part of the model")).collect();
        unknown.sort();
        problems.extend(unknown);
        if !problems.is_empty() {
            return Err(Error::Tensors { path: "parameters".into(), problems });
        }
        Self::assemble(config, parameters, self.dtype(), self.device())
    }

    /// A model of parameters that are known to fit.
    fn assemble(config: ModelConfig, parameters: Vec<(String, Tensor)>, dtype: DType, device: Device) -> Result<Self> {
        // norms and biases are small and only f32 is fast with f32 activations
        let small = |tensor: &Tensor| if device.is_cpu() { tensor.to_dtype(DType::F32) } else { Ok(tensor.clone()) };
        let numbers: HashMap<&str, usize> =
            parameters.iter().enumerate().map(|(number, (name, _))| (name.as_str(), number)).collect();
        let find = |name: &str| -> Result<(usize, &Tensor)> {
            let number = numbers.get(name).copied();
            let number = number.ok_or_else(|| Error::argument("tensors", format!("`{name}` is missing")))?;
            Ok((number, &parameters[number].1))
        };
        let norm = |name: &str| -> Result<(usize, Norm)> {
            let (number, weight) = find(name)?;
            Ok((number, Norm::rms(small(weight)?, config.rms_norm_eps)))
        };
        let shape = AttentionShape::new(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            (1.0 / (config.head_dim as f64).sqrt()) as f32,
        );
        let (mut linears, mut blocks) = (Vec::new(), Vec::new());
        for layer in 0..config.num_hidden_layers {
            let (mut weights, mut places) = (Vec::with_capacity(NUM_LINEARS), Vec::with_capacity(NUM_LINEARS));
            for (place, module) in MODULES.into_iter().enumerate() {
                let room = if place < 4 { "self_attn" } else { "mlp" };
                let path = format!("model.layers.{layer}.{room}.{module}");
                let (number, weight) = find(&format!("{path}.weight"))?;
                let bias = numbers.get(format!("{path}.bias").as_str()).copied();
                places.push((number, bias));
                let bias = bias.map(|bias| small(&parameters[bias].1)).transpose()?;
                let (out_features, in_features) = weight.dims2()?;
                linears.push(LinearInfo { path, layer: Some(layer), module, in_features, out_features });
                weights.push(Linear { weight: weight.clone().into(), bias });
            }
            let (input, input_layernorm) = norm(&format!("model.layers.{layer}.input_layernorm.weight"))?;
            let (middle, post_attention_layernorm) =
                norm(&format!("model.layers.{layer}.post_attention_layernorm.weight"))?;
            blocks.push(Block {
                layer,
                input_layernorm,
                post_attention_layernorm,
                linears: weights,
                parameters: BlockParameters {
                    linears: places,
                    input_layernorm: input,
                    post_attention_layernorm: middle,
                },
                shape,
            });
        }
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        for (path, module, in_features, out_features) in
            [("model.embed_tokens", "embed_tokens", vocab, hidden), ("lm_head", "lm_head", hidden, vocab)]
        {
            linears.push(LinearInfo { path: path.into(), layer: None, module, in_features, out_features });
        }
        let embedding = Weight::from(find("model.embed_tokens.weight")?.1.clone());
        let head =
            if config.tie_word_embeddings { embedding.clone() } else { find("lm_head.weight")?.1.clone().into() };
        let head = Head::new(Linear { weight: head, bias: None });
        let norm = norm("model.norm.weight")?.1;
        let rotary = RotaryTable::new(&RotarySpec {
            dim: config.head_dim,
            theta: config.rope_theta,
            scaling: RotaryScaling::Default,
            pairs: Pairs::Halves,
            max_position_embeddings: config.max_position_embeddings,
        })?;
        drop(numbers);
        let inner = Inner {
            config,
            device,
            dtype,
            linears,
            parameters,
            embedding,
            blocks,
            norm,
            head,
            rotary,
            attention: shape,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Name and shape of every tensor a checkpoint of this configuration holds.
    pub fn parameter_shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        families::qwen2::parameters(config)
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// The device the weights are on.
    pub fn device(&self) -> Device {
        self.inner.device
    }

    /// The dtype of the weights.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// The dtype of activations: f32 on the CPU, else that of the weights.
    pub fn activation_dtype(&self) -> DType {
        if self.inner.device.is_cpu() { DType::F32 } else { self.inner.dtype }
    }

    /// The layers that an adapter can extend, by number: seven of each block, then the embedding and the head, the
    /// latter also where its weight is the embedding's.
    pub fn linears(&self) -> &[LinearInfo] {
        &self.inner.linears
    }

    /// Name and tensor of each parameter, in the order of [`Model::parameter_shapes`]; a tied head is not listed.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.inner.parameters
    }

    /// Logits of the wanted rows: `[rows, vocab_size]`, f32.
    ///
    /// With a cache, each sequence continues what its slot holds, and is added to it.
    ///
    /// # Errors
    /// A token id is out of range, the cache is full, or positions do not continue it.
    pub fn forward(
        &self,
        batch: &Batch,
        terms: Option<&LowRankTerms>,
        cache: Option<&mut KVCache>,
        rows: Rows,
    ) -> Result<Tensor> {
        self.device().step(|| self.logits(batch, terms, cache, rows))
    }

    fn logits(
        &self,
        batch: &Batch,
        terms: Option<&LowRankTerms>,
        mut cache: Option<&mut KVCache>,
        rows: Rows,
    ) -> Result<Tensor> {
        let config = &self.inner.config;
        self.check_positions(batch)?;
        self.check_terms(terms)?;
        if let Some(cache) = &cache {
            cache.check(batch, config.num_key_value_heads, config.head_dim, config.num_hidden_layers)?;
        } else if let Some(sequence) = (0..batch.num_sequences()).find(|&i| batch.positions()[batch.offsets()[i]] != 0)
        {
            let message =
                format!("sequence {sequence} does not begin at position 0, and there is no cache to continue");
            return Err(Error::argument("batch", message));
        }
        let (mut x, rotation) = self.embed(batch, terms)?;
        let spans = self.spans(batch, cache.as_deref().map(|cache| cache.cached(batch)), &x)?;
        let context = Context { rotation: &rotation, spans: &spans, terms, dropout_seed: None };
        for block in &self.inner.blocks {
            x = block.forward(&x, context, cache.as_deref_mut())?;
        }
        if let Some(cache) = cache {
            cache.advance(batch);
        }
        let x = match rows {
            Rows::All => x,
            // a part of a prompt: the head is not computed, and an empty tensor is the CPU's on every device
            Rows::Of([]) => return Ok(Tensor::zeros((0, config.vocab_size), DType::F32, &candle_core::Device::Cpu)?),
            Rows::Last => gather_rows(&x, &batch.last_rows())?,
            Rows::Of(rows) => gather_rows(&x, rows)?,
        };
        let term = terms.and_then(|terms| terms.get(self.head_number()));
        head::logits(&self.inner.norm.forward(&x)?, &self.inner.head, term)
    }

    /// The residual stream that enters the first block, and the rotation of the batch's positions.
    pub(super) fn embed(&self, batch: &Batch, terms: Option<&LowRankTerms>) -> Result<(Tensor, Rotation)> {
        if batch.is_empty() {
            return Err(Error::argument("batch", "expected at least one token, found none"));
        }
        let term = terms.and_then(|terms| terms.get(self.embedding_number()));
        let x = embedding::forward(&self.inner.embedding, term, batch.ids(), self.activation_dtype(), 1.0)?;
        let rotation = self.inner.rotary.rotation(batch.positions(), batch.offsets(), &x)?;
        Ok((x, rotation))
    }

    /// Where the sequences of a batch are, for attention.
    pub(super) fn spans(&self, batch: &Batch, cached: Option<Cached>, x: &Tensor) -> Result<Spans> {
        Spans::new(batch.offsets(), &[self.inner.attention], cached, x)
    }

    /// The terms with what their magnitudes are divided by worked out, for as long as A and B stay what they are.
    pub(crate) fn with_fixed_norms(&self, terms: &LowRankTerms) -> Result<LowRankTerms> {
        self.check_terms(Some(terms))?;
        let mut fixed = LowRankTerms::new();
        for (number, term) in terms.iter() {
            let is_embedding = number == self.embedding_number();
            let weight = match self.inner.blocks.get(number / NUM_LINEARS) {
                Some(block) => &block.linears[number % NUM_LINEARS].weight,
                None if is_embedding => &self.inner.embedding,
                None => &self.inner.head.linear.weight,
            };
            fixed.insert(number, term.with_fixed_norms(weight, is_embedding)?);
        }
        Ok(fixed)
    }

    /// The number of the embedding among [`Model::linears`].
    pub(super) fn embedding_number(&self) -> usize {
        NUM_LINEARS * self.inner.blocks.len()
    }

    /// The number of the head among [`Model::linears`].
    pub(super) fn head_number(&self) -> usize {
        self.embedding_number() + 1
    }

    pub(super) fn check_positions(&self, batch: &Batch) -> Result<()> {
        let longest = batch.positions().iter().max().map_or(0, |&p| p as usize + 1);
        let limit = self.inner.config.max_position_embeddings;
        if longest > limit {
            let message = format!("a sequence of {longest} tokens is longer than the model's {limit}");
            return Err(Error::argument("batch", message));
        }
        Ok(())
    }
}

/// The rows of `x: [tokens, width]` with these indices.
pub(super) fn gather_rows(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let count = x.dim(0)?;
    if let Some(row) = rows.iter().find(|&&row| row >= count) {
        return Err(Error::argument("rows", format!("row {row} is not below the number of tokens, {count}")));
    }
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
}

/// The parameters in checkpoint order, or everything that is wrong with them.
fn take_parameters(config: &ModelConfig, tensors: &mut HashMap<String, Tensor>) -> Result<Vec<(String, Tensor)>> {
    let mut problems = Vec::new();
    let mut parameters = Vec::new();
    let mut dtype = None;
    for (name, shape) in Model::parameter_shapes(config) {
        match tensors.remove(&name) {
            None => problems.push(format!("`{name}` is missing")),
            Some(tensor) if tensor.dims() != shape => {
                problems.push(format!("`{name}`: expected shape {shape:?}, found {:?}", tensor.dims()));
            }
            Some(tensor) if *dtype.get_or_insert(tensor.dtype()) != tensor.dtype() => {
                problems
                    .push(format!("`{name}`: its dtype {:?} differs from that of the other tensors", tensor.dtype()));
            }
            Some(tensor) => parameters.push((name, tensor.detach())),
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
