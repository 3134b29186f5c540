//! The model families: each file converts the keys of one `model_type` to a description.

mod arcee;
mod cohere;
mod common;
mod ernie4_5;
mod exaone4;
mod family;
mod gemma;
mod glm;
mod granite;
mod helium;
mod hunyuan_v1_dense;
mod jais2;
mod llama;
mod mistral;
mod olmo;
mod phi3;
mod qwen;
mod rotary;
mod seed_oss;
mod smollm3;
mod stablelm;
mod starcoder2;

pub(crate) use family::Family;

/// All supported families.
const FAMILIES: &[&Family] = &[
    &arcee::ARCEE,
    &cohere::COHERE,
    &cohere::COHERE2,
    &ernie4_5::ERNIE4_5,
    &exaone4::EXAONE4,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &glm::GLM,
    &glm::GLM4,
    &granite::GRANITE,
    &granite::GRANITE_HYBRID,
    &helium::HELIUM,
    &hunyuan_v1_dense::HUNYUAN,
    &jais2::JAIS2,
    &llama::LLAMA,
    &mistral::MINISTRAL,
    &mistral::MINISTRAL3,
    &mistral::MISTRAL,
    &olmo::OLMO,
    &olmo::OLMO2,
    &olmo::OLMO3,
    &phi3::PHI3,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &seed_oss::SEED_OSS,
    &smollm3::SMOLLM3,
    &stablelm::STABLELM,
    &starcoder2::STARCODER2,
];

/// Multimodal models whose text model can be loaded, and the default type of the text model.
const MULTIMODAL: &[(&str, &str)] = &[("gemma3", "gemma3_text"), ("mistral3", "mistral")];

/// The family with this `model_type`.
pub(crate) fn find(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.model_type == model_type)
}

/// The names of all families, for error messages.
pub(crate) fn names() -> String {
    FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join("`, `")
}

/// The default type of the text model of a multimodal model.
pub(crate) fn text_type(model_type: &str) -> Option<&'static str> {
    MULTIMODAL.iter().find(|(multimodal, _)| *multimodal == model_type).map(|(_, text)| *text)
}
