//! `QuantizationMixture`: the type of each tensor of a quantized file, as in llama.cpp's `llama-quantize`.

use crate::files::GgufType;
use crate::models::ModelConfig;
use metal_candle_kernels::BlockFormat;

/// A named assignment of types to the tensors of a GGUF file, with the same meaning as in `llama-quantize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizationMixture {
    /// Its name, in lower case: `q4_k_m`.
    pub name: &'static str,
    /// The type of most matrices.
    pub base: GgufType,
    /// The value of `general.file_type`.
    pub file_type: u32,
    rule: Rule,
}

/// The tensors that differ from the base type, besides embedding and head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// All matrices have the base type, including embedding and head.
    Uniform,
    /// No other tensors.
    Base,
    Q2K,
    Q3KM,
    Q3KL,
    Q4KS,
    /// `q4_k_m` and `q5_k_m`.
    More,
    /// `iq4_nl` and `iq4_xs`.
    Table,
}

const fn mixture(name: &'static str, format: BlockFormat, file_type: u32, rule: Rule) -> QuantizationMixture {
    QuantizationMixture { name, base: GgufType::Blocks(format), file_type, rule }
}

const fn dense(name: &'static str, base: GgufType, file_type: u32) -> QuantizationMixture {
    QuantizationMixture { name, base, file_type, rule: Rule::Uniform }
}

/// The properties of a model that mixtures depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MixtureContext {
    num_layers: usize,
    is_tied: bool,
    /// Query heads for each key/value head.
    group: usize,
    has_importance: bool,
}

impl MixtureContext {
    pub(crate) fn new(config: &ModelConfig, has_importance: bool) -> Self {
        Self {
            num_layers: config.num_hidden_layers,
            is_tied: config.tie_word_embeddings,
            group: config.num_attention_heads / config.num_key_value_heads.max(1),
            has_importance,
        }
    }
}

impl QuantizationMixture {
    /// All mixtures.
    pub const ALL: &'static [Self] = &[
        dense("f32", GgufType::F32, 0),
        dense("f16", GgufType::F16, 1),
        dense("bf16", GgufType::BF16, 32),
        mixture("q8_0", BlockFormat::Q8_0, 7, Rule::Base),
        mixture("q6_k", BlockFormat::Q6K, 18, Rule::Base),
        mixture("q5_k_m", BlockFormat::Q5K, 17, Rule::More),
        mixture("q5_k_s", BlockFormat::Q5K, 16, Rule::Base),
        mixture("q5_1", BlockFormat::Q5_1, 9, Rule::Base),
        mixture("q5_0", BlockFormat::Q5_0, 8, Rule::Base),
        mixture("q4_k_m", BlockFormat::Q4K, 15, Rule::More),
        mixture("q4_k_s", BlockFormat::Q4K, 14, Rule::Q4KS),
        mixture("iq4_nl", BlockFormat::IQ4NL, 25, Rule::Table),
        mixture("iq4_xs", BlockFormat::IQ4XS, 30, Rule::Table),
        mixture("mxfp4", BlockFormat::MXFP4, 38, Rule::Base),
        mixture("q4_1", BlockFormat::Q4_1, 3, Rule::Base),
        mixture("q4_0", BlockFormat::Q4_0, 2, Rule::Base),
        mixture("q3_k_l", BlockFormat::Q3K, 13, Rule::Q3KL),
        mixture("q3_k_m", BlockFormat::Q3K, 12, Rule::Q3KM),
        mixture("q3_k_s", BlockFormat::Q3K, 11, Rule::Base),
        mixture("q2_k", BlockFormat::Q2K, 10, Rule::Q2K),
    ];

    /// The mixture with this name, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|mixture| mixture.name.eq_ignore_ascii_case(name))
    }

    /// The type of a matrix with rows of this length.
    pub(crate) fn of(self, parameter: &str, columns: usize, model: &MixtureContext) -> GgufType {
        let GgufType::Blocks(base) = self.base else { return self.base };
        fitting(self.blocks_of(base, parameter, columns, model), columns)
    }

    fn blocks_of(self, base: BlockFormat, parameter: &str, columns: usize, model: &MixtureContext) -> BlockFormat {
        use BlockFormat::{Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        let layer = parameter.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        let (i, n) = (layer.unwrap_or(0), model.num_layers);
        let has_more = i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        let module = parameter.trim_end_matches(".weight").rsplit('.').next().unwrap_or_default();
        let is_head = module == "lm_head" || (module == "embed_tokens" && model.is_tied);
        let is_value = matches!(module, "v_proj" | "qkv_proj");
        // the second linear layer of the feed-forward part, by the names of the families
        let is_down = matches!(module, "down_proj" | "output_linear") || parameter.ends_with("mlp.c_proj.weight");
        let is_output = module == "o_proj";
        match self.rule {
            _ if is_head && base == Q8_0 => Q8_0,
            _ if is_head && !columns.is_multiple_of(base.len()) => Q8_0,
            _ if is_head => Q6K,
            Rule::More if (is_value || is_down) && has_more => Q6K,
            Rule::Q4KS if is_value && i < 4 => Q5K,
            Rule::Q4KS if is_down && i < n / 8 => Q5K,
            Rule::Q3KM if is_value && i < 2 => Q5K,
            Rule::Q3KM if is_down && i < n / 16 => Q5K,
            Rule::Q3KM if is_value || is_down || is_output => Q4K,
            Rule::Q3KL if is_value || is_down || is_output => Q5K,
            Rule::Q2K if is_value && model.group >= 4 => Q4K,
            Rule::Q2K if is_value || is_down || is_output => Q3K,
            Rule::Table if is_value && model.group >= 4 => Q5K,
            Rule::Table if is_down && i < n / 8 && !model.has_importance => Q5K,
            Rule::Base if is_down && i < n / 8 && model.has_importance && base == Q4_0 => Q4_1,
            Rule::Base if is_down && i < n / 8 && model.has_importance && base == Q5_0 => Q5_1,
            _ => base,
        }
    }
}

/// The format, or the next smaller one whose blocks fill rows of this length.
fn fitting(format: BlockFormat, columns: usize) -> GgufType {
    use BlockFormat::{IQ4NL, IQ4XS, Q2K, Q3K, Q4_0, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    if columns.is_multiple_of(format.len()) {
        return GgufType::Blocks(format);
    }
    let smaller = match format {
        Q2K | Q3K => Q4_0,
        Q4K => Q5_0,
        Q5K => Q5_1,
        Q6K => Q8_0,
        IQ4XS => IQ4NL,
        other => other,
    };
    if columns.is_multiple_of(smaller.len()) { GgufType::Blocks(smaller) } else { GgufType::F16 }
}
