//! Compares tiny models of every family with transformers and PEFT: logits, losses, gradients, adapters, greedy tokens
//! and files.

use super::decoder::{self, Tensors, max_difference, values};
use super::inference_bits;
use candle_core::{DType, Tensor};
use metal_candle::inference::{GenerationConfig, Generator};
use metal_candle::models::{
    Batch, GradientOf, LossOptions, Model, Rows, SafetensorsFile, Targets, Trainable, save_model, write_safetensors,
};
use metal_candle::ops::{LowRank, LowRankUpdates};
use metal_candle::training::LoRAAdapter;
use metal_candle::{Device, ModelLoader};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The models that run on an accelerator: one for each feature.
#[cfg(any(feature = "metal", feature = "cuda"))]
const ON_ACCELERATORS: [&str; 14] = [
    "cohere",       // parallel branches, LayerNorm, adjacent pairs, norms of q and k with one weight per head
    "gemma2",       // norms with an offset, soft caps, GELU, four norms per layer
    "gemma3-text",  // two rotary tables
    "glm4",         // adjacent pairs in half of a head, fused gate and up
    "granite",      // multipliers
    "llama-llama3", // biases of all linear layers, llama3 frequencies
    "ministral3",   // yarn, queries scaled by position
    "olmo",         // norms without weights, clipped q, k and v
    "olmo2",        // norms after the branches, a norm of q and k over all heads
    "phi3-short",   // fused q, k and v, longrope of a part of each head
    "qwen2-window", // biases of q, k and v, a window
    "qwen3",        // a norm of q and k per head
    "smollm3",      // a layer without positions
    "starcoder2",   // LayerNorm with bias, an MLP without a gate
];

/// Models whose rotary frequencies depend on the sequence length, so that splitting a text changes the results.
const CHANGES_WITH_LENGTH: [&str; 2] = ["llama-dynamic", "phi3-long"];

/// The maximum difference of logits and gradients, relative to the largest expected value.
const TOLERANCE: f32 = 1e-4;
const PROMPT: usize = 8;

/// A golden file, and a model folder created from it.
struct Case {
    name: String,
    golden: Tensors,
    folder: tempfile::TempDir,
}

impl Case {
    fn open(name: &str) -> Self {
        let path = format!("families/{name}.safetensors");
        let file = SafetensorsFile::open(decoder::golden(&path)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), &file.metadata()["config.json"]).unwrap();
        let weights = file.entries().iter().filter_map(|entry| {
            Some((entry.name.strip_prefix("weight.")?.to_string(), file.tensor(&entry.name).unwrap()))
        });
        let weights: Vec<(String, Tensor)> = weights.collect();
        write_safetensors(folder.path().join("model.safetensors"), &weights, &[("format", "pt")]).unwrap();
        Self { name: name.to_string(), golden: Tensors::open(&path).renamed(own_name), folder }
    }

    /// All cases.
    fn all() -> impl Iterator<Item = Self> {
        names().into_iter().map(|name| Self::open(&name))
    }

    /// The cases that run on a device; all run on the CPU.
    fn on(device: Device) -> impl Iterator<Item = Self> {
        #[cfg(any(feature = "metal", feature = "cuda"))]
        let is_chosen = move |name: &str| device == Device::CPU || ON_ACCELERATORS.contains(&name);
        #[cfg(not(any(feature = "metal", feature = "cuda")))]
        let is_chosen = move |_: &str| device == Device::CPU;
        Self::all().filter(move |case| is_chosen(&case.name))
    }

    fn model(&self, device: Device) -> Model {
        let loader = ModelLoader::new().with_device(device).with_dtype(DType::F32);
        loader.load(self.folder.path()).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    fn ids(&self, key: &str) -> Vec<u32> {
        self.golden.get(key).to_vec1().unwrap()
    }

    /// The tensors with the prefix `prefix`, by the rest of their names.
    fn below(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let file = SafetensorsFile::open(decoder::golden(&format!("families/{}.safetensors", self.name))).unwrap();
        let names = file.entries().iter().filter_map(|entry| entry.name.strip_prefix(prefix));
        names.map(|name| (own_name(name), self.golden.get(&own_name(&format!("{prefix}{name}"))).clone())).collect()
    }

    /// The golden LoRA, rank 2 and alpha 4.
    fn terms(&self, model: &Model) -> LowRankUpdates {
        let mut terms = LowRankUpdates::new();
        for (id, linear) in model.linears().iter().enumerate().filter(|(_, linear)| linear.layer.is_some()) {
            let factor = |letter: &str| {
                let tensor = self.golden.get(&format!("lora_{letter}.{}", linear.path));
                tensor.to_device(&model.device().candle()).unwrap()
            };
            terms.insert(id, LowRank::new(factor("a"), factor("b"), 2.0));
        }
        terms
    }

    /// Each token except the last predicts the next one.
    fn batch(&self) -> (Batch, Targets) {
        let ids = self.ids("ids");
        let mut weights = vec![1.0; ids.len()];
        weights[ids.len() - 1] = 0.0;
        let mut targets = ids.clone();
        targets.rotate_left(1);
        (Batch::single(&ids), Targets { ids: targets, weights })
    }

    /// The keys of the golden weights that the model uses.
    fn weight_names(&self) -> BTreeSet<String> {
        let is_text = |name: &String| !name.starts_with("vision_tower") && !name.starts_with("multi_modal_projector");
        self.below("weight.").into_keys().filter(is_text).collect()
    }
}

/// The name of a multimodal model's tensor in its text model.
fn own_name(name: &str) -> String {
    name.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
}

/// The golden files, by name.
fn names() -> BTreeSet<String> {
    let files = std::fs::read_dir(decoder::golden("families")).unwrap();
    let names =
        files.map(|file| PathBuf::from(file.unwrap().file_name()).file_stem().unwrap().to_str().unwrap().into());
    names.collect()
}

/// The maximum difference, relative to the largest expected value.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    max_difference(found, expected) / expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()))
}

fn logits(model: &Model, ids: &[u32], terms: Option<&LowRankUpdates>) -> Vec<f32> {
    values(&model.forward(&Batch::single(ids), terms, None, Rows::All).unwrap())
}

on_each_device! {
    logits_and_losses_equal_transformers,
    gradients_of_every_linear_equal_peft,
    greedy_tokens_equal_transformers,
}

fn logits_and_losses_equal_transformers(device: Device) {
    for case in Case::on(device) {
        check_logits(&case, &case.model(device));
    }
}

fn check_logits(case: &Case, model: &Model) {
    let found = logits(model, &case.ids("ids"), None);
    let difference = relative(&found, &case.golden.values("logits"));
    assert!(difference < TOLERANCE, "{}: logits differ by {difference}", case.name);
    let (batch, targets) = case.batch();
    for (key, terms) in [("loss", None), ("lora_loss", Some(case.terms(model)))] {
        let rows = model.loss(&batch, &targets, terms.as_ref(), 0.0).unwrap().rows;
        let loss = rows.iter().sum::<f32>() / (rows.len() - 1) as f32;
        let expected = case.golden.values(key)[0];
        assert!((loss - expected).abs() < TOLERANCE * expected, "{}: {key} {loss}, not {expected}", case.name);
    }
}

fn gradients_of_every_linear_equal_peft(device: Device) {
    for case in Case::on(device) {
        check_gradients(&case, &case.model(device));
    }
}

fn check_gradients(case: &Case, model: &Model) {
    let in_layers = model.linears().iter().filter(|linear| linear.layer.is_some());
    let found: BTreeSet<String> = in_layers.map(|linear| linear.path.clone()).collect();
    assert_eq!(found, case.below("lora_a.").into_keys().collect(), "{}: all-linear", case.name);
    let terms = case.terms(model);
    let (batch, targets) = case.batch();
    let options = LossOptions { grad_scale: 1.0 / targets.weights.iter().sum::<f32>(), ..LossOptions::default() };
    let (_, gradients) = model.loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), options).unwrap();
    for (id, _) in terms.iter() {
        for (of, letter) in [(GradientOf::A(id), "a"), (GradientOf::B(id), "b")] {
            let key = format!("grad_{letter}.{}", model.linears()[id].path);
            let found = gradients.get(of).unwrap_or_else(|| panic!("{}: no {key}", case.name));
            let found = values(found);
            let difference = relative(&found, &case.golden.values(&key));
            assert!(difference < TOLERANCE, "{}: {key} differs by {difference}", case.name);
        }
    }
}

#[test]
fn cached_logits_equal_uncached() {
    for case in Case::all().filter(|case| !CHANGES_WITH_LENGTH.contains(&case.name.as_str())) {
        let model = case.model(Device::CPU);
        let ids = case.ids("ids");
        let expected = logits(&model, &ids, None);
        let mut cache = decoder::cache(&model, ids.len(), 3, DType::F32);
        let (mut found, mut start) = (Vec::new(), 0);
        for size in [5, 1, 1, 9, 1, 7] {
            let mut batch = Batch::new();
            // another sequence of a different length
            batch.push(&ids[..2], cache.len(0), 0);
            batch.push(&ids[start..start + size], start, 2);
            let logits = model.forward(&batch, None, Some(&mut cache), Rows::All).unwrap();
            found.extend(values(&logits.narrow(0, 2, size).unwrap()));
            start += size;
        }
        assert_eq!(start, ids.len());
        let difference = relative(&found, &expected);
        assert!(difference < TOLERANCE, "{}: {difference}", case.name);
    }
}

#[test]
fn splitting_a_text_does_not_change_its_bits() {
    // the longer texts of phi3-short use the frequencies of phi3-long
    let changes = |name: &str| CHANGES_WITH_LENGTH.contains(&name) || name == "phi3-short";
    for case in Case::all().filter(|case| !changes(&case.name)) {
        let model = case.model(Device::CPU);
        let length = model.config().max_sequence_length().min(150);
        let text: Vec<u32> = case.ids("ids").into_iter().cycle().take(length).collect();
        inference_bits::check(&case.name, &model, Some(&case.terms(&model)), &text);
    }
}

#[test]
fn texts_in_a_batch_equal_single_texts() {
    for case in Case::all() {
        let model = case.model(Device::CPU);
        let ids = case.ids("ids");
        let texts = [&ids[..7], &ids[..], &ids[3..20], &ids[9..10]];
        let found = values(&model.forward(&Batch::from_sequences(texts), None, None, Rows::All).unwrap());
        let expected: Vec<f32> = texts.iter().flat_map(|ids| logits(&model, ids, None)).collect();
        let difference = relative(&found, &expected);
        assert!(difference < TOLERANCE, "{}: {difference}", case.name);
    }
}

fn greedy_tokens_equal_transformers(device: Device) {
    for case in Case::on(device) {
        check_greedy(&case, case.model(device));
    }
}

fn check_greedy(case: &Case, model: Model) {
    let expected = case.ids("greedy");
    let config = GenerationConfig::default().with_max_tokens(expected.len()).with_ignore_eos(true);
    let prompt = case.ids("ids")[..PROMPT].to_vec();
    let mut generator = Generator::new(model);
    let found = generator.generate(&prompt, &config).unwrap();
    assert_eq!(found.tokens, expected, "{}", case.name);
    // together with a text of another length
    let other = case.ids("ids")[..3].to_vec();
    let found = generator.generate_batch(&[other, prompt], &[config.clone(), config.clone()]).unwrap();
    assert_eq!(found[1].tokens, expected, "{}, in a batch", case.name);
}

#[test]
fn a_saved_model_is_the_same_checkpoint() {
    for case in Case::all() {
        let model = case.model(Device::CPU);
        let folder = tempfile::tempdir().unwrap();
        save_model(&model, folder.path()).unwrap();
        let saved = SafetensorsFile::open(folder.path().join("model.safetensors")).unwrap();
        let names: BTreeSet<String> = saved.entries().iter().map(|entry| entry.name.clone()).collect();
        assert_eq!(names, case.weight_names(), "{}", case.name);
        for name in names {
            let expected = case.golden.values(&format!("weight.{name}"));
            assert_eq!(values(&saved.tensor(&name).unwrap()), expected, "{}: {name}", case.name);
        }
        let again = ModelLoader::new().load(folder.path()).unwrap();
        let written = |model: &Model| model.config().to_json(model.dtype());
        assert_eq!(written(&again), written(&model), "{}", case.name);
        let ids = case.ids("ids");
        assert_eq!(logits(&again, &ids, None), logits(&model, &ids, None), "{}", case.name);
    }
}

/// Writes the golden LoRA as PEFT does, and returns its tensors.
fn write_adapter(case: &Case, folder: &Path) -> BTreeMap<String, Tensor> {
    let config =
        r#"{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let mut tensors = BTreeMap::new();
    for letter in ["a", "b"] {
        for (path, tensor) in case.below(&format!("lora_{letter}.")) {
            tensors.insert(format!("base_model.model.{path}.lora_{}.weight", letter.to_uppercase()), tensor);
        }
    }
    if case.name.ends_with("-multimodal") {
        let of_multimodal = |name: String| name.replace("model.layers", "model.language_model.layers");
        tensors = tensors.into_iter().map(|(name, tensor)| (of_multimodal(name), tensor)).collect();
    }
    let list: Vec<(String, Tensor)> = tensors.clone().into_iter().collect();
    write_safetensors(folder.join("adapter_model.safetensors"), &list, &[("format", "pt")]).unwrap();
    tensors
}

/// Without `partial_rotary_factor`, transformers rotates the family's share of each head.
#[test]
fn an_absent_partial_rotary_factor_is_the_default_of_the_family() {
    for (name, expected) in [("glm", 0.5), ("glm4", 0.5), ("stablelm-parallel", 0.25)] {
        let case = Case::open(name);
        let path = case.folder.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let share = config["rope_parameters"].as_object_mut().unwrap().remove("partial_rotary_factor");
        assert_eq!(share, Some(serde_json::json!(expected)), "{name}");
        std::fs::write(&path, config.to_string()).unwrap();
        let found = logits(&case.model(Device::CPU), &case.ids("ids"), None);
        let difference = relative(&found, &case.golden.values("logits"));
        assert!(difference < TOLERANCE, "{name}: {difference}");
    }
}

/// With a null `partial_rotary_factor`, transformers rotates whole heads in these families.
#[test]
fn a_null_partial_rotary_factor_is_one() {
    for name in ["glm", "glm4"] {
        let case = Case::open(name);
        let path = case.folder.path().join("config.json");
        let config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let with = |factor: serde_json::Value| {
            let mut config = config.clone();
            config["rope_parameters"].as_object_mut().unwrap().remove("partial_rotary_factor");
            config["partial_rotary_factor"] = factor;
            std::fs::write(&path, config.to_string()).unwrap();
            logits(&case.model(Device::CPU), &case.ids("ids"), None)
        };
        assert_eq!(with(serde_json::Value::Null), with(serde_json::json!(1.0)), "{name}");
        assert_ne!(with(serde_json::Value::Null), with(serde_json::json!(0.5)), "{name}");
    }
}

#[test]
fn an_adapter_of_peft_is_read_and_written() {
    for case in Case::all() {
        let model = case.model(Device::CPU);
        let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let expected = write_adapter(&case, folder.path());
        let adapter = LoRAAdapter::load(&model, folder.path()).unwrap();
        let ids = case.ids("ids");
        let with_terms = logits(&model, &ids, Some(&case.terms(&model)));
        let loaded = logits(&model, &ids, Some(&adapter.low_rank_updates().unwrap()));
        assert_eq!(loaded, with_terms, "{}", case.name);
        adapter.save(out.path()).unwrap();
        let saved = SafetensorsFile::open(out.path().join("adapter_model.safetensors")).unwrap();
        let names: Vec<&String> = saved.entries().iter().map(|entry| &entry.name).collect();
        assert_eq!(names.iter().copied().collect::<BTreeSet<_>>(), expected.keys().collect(), "{}", case.name);
        for name in names {
            assert_eq!(values(&saved.tensor(name).unwrap()), values(&expected[name]), "{}: {name}", case.name);
        }
    }
}
