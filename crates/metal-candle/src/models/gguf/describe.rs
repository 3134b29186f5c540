//! Derives the metadata of a GGUF file from a model's description, and checks that nothing is lost.

use super::architecture::Architecture;
use super::names::GgufNames;
use crate::error::{Error, Result};
use crate::files::{GgufFile, GgufType, GgufValue};
use crate::models::ModelConfig;
use crate::models::description::{AttentionSpec, Description, FeedForwardSpec, GatedMlpSpec, GatedProjections};
use crate::ops::norm::NormKind;
use crate::ops::rotary::{RotaryScaling, RotarySpec};
use metal_candle_kernels::Mask;
use std::collections::BTreeMap;
use std::path::Path;

/// The contents of a GGUF file besides weights and tokenizer.
#[derive(Debug)]
pub(super) struct GgufDescription {
    pub(super) names: GgufNames,
    pub(super) metadata: Vec<(String, GgufValue)>,
    /// Tensors of rotary divisors: name and elements.
    pub(super) tables: Vec<(String, Vec<f32>)>,
}

impl GgufDescription {
    /// Metadata from which the same model is read back.
    ///
    /// # Errors
    /// GGUF has no architecture for the family, or cannot express something that the model computes.
    pub(super) fn new(config: &ModelConfig) -> Result<Self> {
        let description = config.describe()?;
        let names = GgufNames::for_config(config)?;
        let architecture = names.architecture;
        let mut writer = Writer { architecture, metadata: Vec::new(), tables: Vec::new() };
        writer.put("general.architecture", GgufValue::Text(architecture.name.into()));
        writer.put("general.type", GgufValue::Text("model".into()));
        writer.describe(config, &description);
        let described = Self { names, metadata: writer.metadata, tables: writer.tables };
        described.check(config, &description)?;
        Ok(described)
    }

    /// Reads the metadata back, and compares the result with the model.
    fn check(&self, config: &ModelConfig, description: &Description) -> Result<()> {
        let refused = |what: &str| {
            let (family, name) = (&config.model_type, self.names.architecture.name);
            Error::Unsupported(format!(
                "a GGUF file of this `{family}` model: architecture `{name}` cannot express {what}"
            ))
        };
        let mut tensors = Vec::new();
        for spec in config.parameter_specs()? {
            let parts = self.names.parts(&spec.name);
            if parts.is_empty() {
                return Err(refused(&format!("the tensor `{}`", spec.name)));
            }
            let mut shape = spec.shape;
            if let Some(rows) = shape.first_mut() {
                *rows /= parts.len();
            }
            tensors.extend(parts.into_iter().map(|name| (name, shape.clone(), GgufType::F32, None)));
        }
        for (name, values) in &self.tables {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((name.clone(), vec![values.len()], GgufType::F32, Some(bytes)));
        }
        let metadata: BTreeMap<String, GgufValue> = self.metadata.iter().cloned().collect();
        let draft = GgufFile::draft(Path::new("GGUF"), metadata, tensors.into_iter());
        let read = ModelConfig::from_gguf(&draft).map_err(|error| refused(&format!("it: {error}")))?;
        match difference((config, description), (&read, &read.describe()?)) {
            Some(what) => Err(refused(what)),
            None => Ok(()),
        }
    }
}

struct Writer {
    architecture: &'static Architecture,
    metadata: Vec<(String, GgufValue)>,
    tables: Vec<(String, Vec<f32>)>,
}

impl Writer {
    fn put(&mut self, key: &str, value: GgufValue) {
        self.metadata.push((key.into(), value));
    }

    /// Adds a key with the architecture's prefix.
    fn own(&mut self, name: &str, value: GgufValue) {
        self.put(&format!("{}.{name}", self.architecture.name), value);
    }

    fn size(&mut self, name: &str, size: usize) {
        self.own(name, GgufValue::Integer(size as i128));
    }

    fn number(&mut self, name: &str, number: f64) {
        self.own(name, GgufValue::Float(f64::from(number as f32)));
    }

    /// Adds a number that only some architectures have.
    fn optional(&mut self, name: &str, number: Option<f64>) {
        if let Some(number) = number.filter(|_| self.architecture.reads.contains(&name)) {
            self.number(name, number);
        }
    }

    fn describe(&mut self, config: &ModelConfig, description: &Description) {
        self.size("block_count", config.num_hidden_layers);
        self.size("context_length", config.max_position_embeddings);
        self.size("embedding_length", config.hidden_size);
        let inner = description.layers.first().map(|layer| match &layer.feed_forward {
            FeedForwardSpec::Gated(mlp) => mlp.inner,
            FeedForwardSpec::Plain(mlp) => mlp.inner,
        });
        self.size("feed_forward_length", inner.unwrap_or(config.intermediate_size));
        self.size("attention.head_count", config.num_attention_heads);
        self.size("attention.head_count_kv", config.num_key_value_heads);
        self.size("attention.key_length", config.head_dim);
        self.size("attention.value_length", config.head_dim);
        self.size("vocab_size", config.vocab_size);
        let eps = match description.norm.kind {
            NormKind::Rms { .. } => "attention.layer_norm_rms_epsilon",
            NormKind::Layer => "attention.layer_norm_epsilon",
        };
        self.number(eps, description.norm.eps);
        self.optional("embedding_scale", Some(description.embedding.scale.into()));
        let divisor = 1.0 / f64::from(description.head.scale);
        let logits = if self.architecture.divides_logits { divisor } else { description.head.scale.into() };
        self.optional("logit_scale", Some(logits));
        self.optional("final_logit_softcapping", description.head.soft_cap.map(f64::from));
        let Some(first) = description.layers.first() else { return };
        self.optional("residual_scale", Some(first.residual_scale.into()));
        self.optional("attention.scale", Some(first.attention.scale.into()));
        self.optional("attn_logit_softcapping", first.attention.soft_cap.map(f64::from));
        self.optional("attention.clamp_kqv", first.attention.clip.map(f64::from));
        self.optional("attention.temperature_scale", first.attention.query_scaling.map(|scaling| scaling.beta));
        if self.architecture.reads.contains(&"use_parallel_residual") {
            self.own("use_parallel_residual", GgufValue::Flag(first.is_parallel));
        }
        self.windows(description);
        self.rotary(description);
    }

    fn windows(&mut self, description: &Description) {
        let reads = |name: &str| self.architecture.reads.contains(&name);
        let (has_window, has_pattern) = (reads("attention.sliding_window"), reads("attention.sliding_window_pattern"));
        let window = description.layers.iter().find_map(|layer| match layer.attention.mask {
            Mask::Window(size) => Some(size),
            Mask::Causal | Mask::Chunk(_) => None,
        });
        if let Some(size) = window.filter(|_| has_window) {
            self.size("attention.sliding_window", size);
            if has_pattern {
                let flags = description.layers.iter().map(|layer| GgufValue::Flag(has_own_window(&layer.attention)));
                self.own("attention.sliding_window_pattern", GgufValue::List(flags.collect()));
            }
        }
    }

    fn rotary(&mut self, description: &Description) {
        let table = |is_local: bool| {
            let mut layers = description.layers.iter().map(|layer| &layer.attention);
            let layer = layers.find(|attention| has_own_window(attention) == is_local && attention.rotary.is_some());
            layer.and_then(|attention| description.rotary.get(attention.rotary?))
        };
        let (global, local) = (table(false), table(true));
        let Some(spec) = global.or(local) else { return };
        self.number("rope.freq_base", spec.theta);
        self.size("rope.dimension_count", spec.dim);
        if let Some(local) = local {
            self.optional("rope.freq_base_swa", Some(local.theta));
        }
        match &spec.scaling {
            RotaryScaling::Linear { factor } => {
                self.own("rope.scaling.type", GgufValue::Text("linear".into()));
                self.number("rope.scaling.factor", *factor);
            }
            RotaryScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast,
                beta_slow,
                mscale,
                mscale_all_dim,
                ..
            } => {
                let factor = factor.unwrap_or(spec.max_position_embeddings as f64 / *original as f64);
                self.own("rope.scaling.type", GgufValue::Text("yarn".into()));
                self.number("rope.scaling.factor", factor);
                self.size("rope.scaling.original_context_length", *original);
                self.number("rope.scaling.yarn_beta_fast", *beta_fast);
                self.number("rope.scaling.yarn_beta_slow", *beta_slow);
                self.optional("rope.scaling.yarn_log_multiplier", mscale.and(*mscale_all_dim));
            }
            RotaryScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, .. } => {
                let narrow = |factors: &[f64]| factors.iter().map(|factor| *factor as f32).collect();
                if self.architecture.reads.contains(&"rope.scaling.attn_factor") {
                    self.own("rope.scaling.type", GgufValue::Text("longrope".into()));
                    self.size("rope.scaling.original_context_length", *original_max_position_embeddings);
                    self.number("rope.scaling.attn_factor", spec.attention_factor());
                    self.tables.push(("rope_factors_short.weight".into(), narrow(short_factor)));
                    self.tables.push(("rope_factors_long.weight".into(), narrow(long_factor)));
                } else {
                    self.tables.push(("rope_freqs.weight".into(), narrow(long_factor)));
                }
            }
            RotaryScaling::Llama3 { .. } => {
                let unscaled = RotarySpec { scaling: RotaryScaling::Default, ..spec.clone() }.frequencies(1);
                let divisors = unscaled.iter().zip(spec.frequencies(1)).map(|(plain, scaled)| plain / scaled);
                self.tables.push(("rope_freqs.weight".into(), divisors.collect()));
            }
            RotaryScaling::Default | RotaryScaling::Dynamic { .. } | RotaryScaling::Proportional { .. } => {}
        }
    }
}

fn has_own_window(attention: &AttentionSpec) -> bool {
    matches!(attention.mask, Mask::Window(_))
}

/// The first difference between a model and the one that is read back, if any.
fn difference(own: (&ModelConfig, &Description), read: (&ModelConfig, &Description)) -> Option<&'static str> {
    let sizes = |config: &ModelConfig| {
        [
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.max_position_embeddings,
        ]
    };
    let layers = || own.1.layers.iter().zip(&read.1.layers);
    let attention = |same: fn(&AttentionSpec, &AttentionSpec) -> bool| {
        layers().all(|(own, read)| same(&own.attention, &read.attention))
    };
    let close = |own: f32, read: f32| (own - read).abs() <= 1e-6 * own.abs();
    let rotary = || {
        layers().all(|(a, b)| {
            let table = |description: &Description, attention: &AttentionSpec| {
                attention.rotary.and_then(|index| description.rotary.get(index).cloned())
            };
            match (table(own.1, &a.attention), table(read.1, &b.attention)) {
                (Some(own), Some(read)) => same_rotation(&own, &read, own.max_position_embeddings),
                (None, None) => true,
                _ => false,
            }
        })
    };
    let checks: [(&'static str, bool); 11] = [
        ("its sizes", sizes(own.0) == sizes(read.0) && own.1.layers.len() == read.1.layers.len()),
        (
            "its norms",
            own.1.norm.kind == read.1.norm.kind
                && close(own.1.norm.eps as f32, read.1.norm.eps as f32)
                && (own.1.norm.has_weight, own.1.norm.has_bias) == (read.1.norm.has_weight, read.1.norm.has_bias),
        ),
        ("its embedding multiplier", close(own.1.embedding.scale, read.1.embedding.scale)),
        (
            "its logit multiplier or soft cap",
            close(own.1.head.scale, read.1.head.scale) && own.1.head.soft_cap == read.1.head.soft_cap,
        ),
        ("its attention windows", attention(|own, read| own.mask == read.mask)),
        (
            "its attention soft cap or clipping",
            attention(|own, read| own.soft_cap == read.soft_cap && own.clip == read.clip),
        ),
        ("its query scaling", attention(|own, read| own.query_scaling == read.query_scaling)),
        ("its attention scale", attention(|own, read| (own.scale - read.scale).abs() <= 1e-6 * own.scale.abs())),
        (
            "its biases",
            attention(|own, read| (own.has_bias, own.has_output_bias) == (read.has_bias, read.has_output_bias)),
        ),
        ("its rotary positions", rotary()),
        (
            "its layers",
            layers().all(|(own, read)| {
                let bare = |spec: &AttentionSpec| AttentionSpec {
                    scale: 1.0,
                    rotary: None,
                    qk_norm: spec.qk_norm.map(|mut norm| {
                        norm.norm.eps = 0.0;
                        norm
                    }),
                    ..spec.clone()
                };
                bare(&own.attention) == bare(&read.attention)
                    && in_file(&own.feed_forward) == in_file(&read.feed_forward)
                    && own.norms == read.norms
                    && own.is_parallel == read.is_parallel
                    && (own.residual_scale - read.residual_scale).abs() <= 1e-6 * own.residual_scale.abs()
            }),
        ),
    ];
    checks.into_iter().find(|(_, is_same)| !is_same).map(|(what, _)| what)
}

/// The feed-forward part as a file stores it: the shared MLP of a mixture without experts is a plain one.
fn in_file(spec: &FeedForwardSpec) -> FeedForwardSpec {
    match spec {
        FeedForwardSpec::Gated(mlp) if mlp.path == "shared_mlp" => {
            let projections = GatedProjections::Separate(["gate_proj", "up_proj", "down_proj"]);
            FeedForwardSpec::Gated(GatedMlpSpec { path: "mlp", projections, ..mlp.clone() })
        }
        other => other.clone(),
    }
}

/// Whether two tables rotate q and k alike, for short and for long sequences.
fn same_rotation(own: &RotarySpec, read: &RotarySpec, max: usize) -> bool {
    let close = |own: f32, read: f32| (own - read).abs() <= 1e-5 * own.abs();
    own.dim == read.dim
        && own.pairs == read.pairs
        && close(own.attention_factor() as f32, read.attention_factor() as f32)
        && [1, max, max.saturating_mul(2)].into_iter().all(|length| {
            own.frequencies(length).iter().zip(read.frequencies(length)).all(|(own, read)| close(*own, read))
        })
}
