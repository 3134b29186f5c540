//! Compares the decoder with transformers and PEFT: logits, losses and gradients.

use candle_core::{DType, Tensor};
use metal_candle::models::{
    Batch, GradientOf, KVCache, KVCacheConfig, KVCacheType, LossOptions, Model, Rows, SafetensorsFile, Targets,
    Trainable,
};
use metal_candle::ops::{LowRank, LowRankUpdates};
use metal_candle::{Device, ModelLoader};
use serde_json::Value;
use std::path::PathBuf;

pub fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

pub fn json(path: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(path)).unwrap()).unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

pub struct Tensors(std::collections::HashMap<String, Tensor>);

impl Tensors {
    pub fn open(path: &str) -> Self {
        Self(candle_core::safetensors::load(golden(path), &candle_core::Device::Cpu).unwrap())
    }

    pub fn renamed(self, rename: impl Fn(&str) -> String) -> Self {
        Self(self.0.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect())
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no golden tensor `{name}`"))
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        values(self.get(name))
    }
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}

/// The norm of the difference, relative to the norm of the expected values.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |v: f64| v * v;
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| square(f64::from(a - b))).sum();
    (difference / expected.iter().map(|v| square(f64::from(*v))).sum::<f64>()).sqrt()
}

pub fn model(name: &str, dtype: DType) -> Model {
    ModelLoader::new().with_dtype(dtype).load(golden(&format!("models/{name}"))).unwrap()
}

pub const MODELS: [&str; 3] = ["gqa-tied", "untied", "sharded"];

fn arg_max(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    u32::try_from(best.0).unwrap()
}

#[test]
fn logits_equal_transformers() {
    for name in MODELS {
        let model = model(name, DType::F32);
        let (cases, tensors) =
            (json(&format!("logits/{name}.json")), Tensors::open(&format!("logits/{name}.safetensors")));
        assert_eq!(model.config().num_parameters() as u64, cases["parameters"].as_u64().unwrap(), "{name}");
        for case in cases["cases"].as_array().unwrap() {
            let ids = ids(&case["ids"]);
            let logits = model.forward(&Batch::single(&ids), None, None, Rows::All).unwrap();
            let difference = max_difference(&values(&logits), &tensors.values(&format!("logits.{}", ids.len())));
            assert!(difference < 1e-4, "{name}, {} tokens: {difference}", ids.len());
        }
    }
}

#[test]
fn half_precision_weights_agree_with_transformers() {
    for name in MODELS {
        let (cases, tensors) =
            (json(&format!("logits/{name}.json")), Tensors::open(&format!("logits/{name}.safetensors")));
        let (bf16, f16) = (model(name, DType::BF16), model(name, DType::F16));
        for case in cases["cases"].as_array().unwrap() {
            let batch = Batch::single(&ids(&case["ids"]));
            let logits = bf16.forward(&batch, None, None, Rows::All).unwrap();
            let expected = tensors.values(&format!("logits_bf16_weights.{}", batch.num_tokens()));
            let difference = max_difference(&values(&logits), &expected);
            assert!(difference < 1e-4, "{name}: {difference}");
            let vocab = model(name, DType::BF16).config().vocab_size;
            let top: Vec<u32> = values(&logits).chunks(vocab).map(arg_max).collect();
            let wanted = ids_of(case, "top1_bf16_weights_f32_arithmetic");
            assert_eq!(top, wanted, "{name}");
            // f16 has three more mantissa bits than bf16, so it is closer to f32
            let logits = f16.forward(&batch, None, None, Rows::All).unwrap();
            let full = tensors.values(&format!("logits.{}", batch.num_tokens()));
            assert!(max_difference(&values(&logits), &full) < max_difference(&expected, &full), "{name}");
        }
    }
}

fn ids_of(case: &Value, key: &str) -> Vec<u32> {
    ids(&case[key])
}

/// A cache for this model.
pub fn cache(model: &Model, max_seq_len: usize, slots: usize, dtype: DType) -> KVCache {
    let config = model.config();
    let config = KVCacheConfig {
        max_seq_len,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: slots,
    };
    KVCache::with_dtype(config, &Device::CPU, dtype).unwrap()
}

#[test]
fn greedy_continuation_equals_transformers() {
    for name in MODELS {
        let model = model(name, DType::F32);
        let greedy = &json(&format!("logits/{name}.json"))["greedy"];
        let prompt = ids(&greedy["prompt"]);
        let wanted = ids_of(greedy, "continuation");
        let mut cache = cache(&model, 256, 1, DType::F32);
        let (mut next, mut found) = (prompt, Vec::new());
        while found.len() < wanted.len() {
            let mut batch = Batch::new();
            batch.push(&next, cache.len(0), 0);
            let logits = model.forward(&batch, None, Some(&mut cache), Rows::Last).unwrap();
            next = vec![arg_max(&values(&logits))];
            found.push(next[0]);
        }
        assert_eq!(found, wanted, "{name}");
    }
}

#[test]
fn cached_and_uncached_logits_agree() {
    for name in MODELS {
        let model = model(name, DType::F32);
        let all: Vec<u32> = (0..150).map(|i| (i * 37 + 11) % 97).collect();
        let whole = values(&model.forward(&Batch::single(&all), None, None, Rows::All).unwrap());
        // chunks of many sizes, and two slots of different lengths
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 5e-2)] {
            let mut cache = cache(&model, 160, 3, dtype);
            let mut found = Vec::new();
            let mut at = 0;
            for size in [70, 1, 1, 5, 64, 1, 8] {
                let mut batch = Batch::new();
                batch.push(&all[..3], cache.len(0), 0);
                batch.push(&all[at..at + size], at, 2);
                let logits = model.forward(&batch, None, Some(&mut cache), Rows::All).unwrap();
                found.extend(values(&logits.narrow(0, 3, size).unwrap()));
                at += size;
            }
            assert_eq!((at, cache.len(2), cache.len(0), cache.len(1)), (150, 150, 21, 0));
            let difference = max_difference(&found, &whole);
            assert!(difference < tolerance, "{name} {dtype:?}: {difference}");
            cache.truncate(2, 100);
            cache.copy_slot(2, 1).unwrap();
            let mut batch = Batch::new();
            batch.push(&all[100..], 100, 1);
            let again = values(&model.forward(&batch, None, Some(&mut cache), Rows::Last).unwrap());
            let vocab = model.config().vocab_size;
            assert!(max_difference(&again, &whole[149 * vocab..]) < tolerance);
        }
    }
}

#[test]
fn a_batch_equals_its_sequences_one_by_one() {
    let model = model("gqa-tied", DType::F32);
    let sequences: Vec<Vec<u32>> =
        [1usize, 65, 2, 130, 17].iter().map(|n| (0..*n as u32).map(|i| (i * 7 + 3) % 103).collect()).collect();
    let together = values(&model.forward(&Batch::from_sequences(&sequences), None, None, Rows::All).unwrap());
    let mut apart = Vec::new();
    for ids in &sequences {
        apart.extend(values(&model.forward(&Batch::single(ids), None, None, Rows::All).unwrap()));
    }
    assert!(max_difference(&together, &apart) < 2e-5);
}

#[test]
fn the_cache_stores_key_and_value_heads_only() {
    let config = KVCacheConfig { max_seq_len: 2048, num_layers: 24, num_heads: 2, head_dim: 64, batch_size: 1 };
    assert_eq!(config.num_bytes(KVCacheType::F16), 25_165_824);
    let small = KVCacheConfig { max_seq_len: 8, ..config };
    assert_eq!(KVCache::with_dtype(small, &Device::CPU, DType::F16).unwrap().num_bytes(), 98_304);
}

#[test]
fn wrong_input_is_refused() {
    let model = model("untied", DType::F32);
    let mut cache = cache(&model, 8, 2, DType::F32);
    let error = |batch: &Batch, cache: Option<&mut KVCache>| {
        model.forward(batch, None, cache, Rows::All).unwrap_err().to_string()
    };
    assert!(error(&Batch::single(&[97]), None).contains("97"), "a token id outside the vocabulary");
    assert!(error(&Batch::new(), None).contains("at least one token"));
    let mut gap = Batch::new();
    gap.push(&[1, 2], 3, 1);
    assert!(error(&gap, None).contains("position 0"));
    assert!(error(&gap, Some(&mut cache)).contains("slot 1 contains 0"));
    assert!(error(&Batch::single(&[1; 9]), Some(&mut cache)).contains("9 tokens do not fit"));
    assert!(error(&Batch::from_sequences([[1], [1], [1]]), Some(&mut cache)).contains("slots below 2"));
    let mut twice = Batch::new();
    twice.push(&[1], 0, 0);
    twice.push(&[2], 0, 0);
    assert!(error(&twice, Some(&mut cache)).contains("twice"));
    assert!(cache.is_empty(), "a refused batch must not change the cache");
    let long = vec![1; model.config().max_position_embeddings + 1];
    assert!(error(&Batch::single(&long), None).contains("longer than the model's"));
}

pub fn batch_of(value: &Value) -> (Batch, Targets) {
    let sequences: Vec<Vec<u32>> = value["sequences"].as_array().unwrap().iter().map(ids).collect();
    (Batch::from_sequences(&sequences), Targets { ids: ids(&value["targets"]), weights: numbers(&value["weights"]) })
}

/// The low-rank updates of a PEFT folder, read from its tensors.
pub fn terms(model: &Model, folder: &str) -> LowRankUpdates {
    let config = json(&format!("{folder}/adapter_config.json"));
    let file = SafetensorsFile::open(golden(&format!("{folder}/adapter_model.safetensors"))).unwrap();
    drop(file);
    let tensors = Tensors::open(&format!("{folder}/adapter_model.safetensors"));
    let mut terms = LowRankUpdates::new();
    for (number, linear) in model.linears().iter().enumerate() {
        let path = format!("base_model.model.{}", linear.path);
        let Some(a) = tensors.0.get(&format!("{path}.lora_A.weight")) else { continue };
        let b = tensors.get(&format!("{path}.lora_B.weight"));
        let alpha = config["lora_alpha"].as_f64().unwrap();
        let rank = a.dim(0).unwrap() as f64;
        let rank = if config["use_rslora"].as_bool() == Some(true) { rank.sqrt() } else { rank };
        let [a, b] = [a, b].map(|tensor| tensor.to_device(&model.device().candle()).unwrap());
        terms.insert(number, LowRank::new(a, b, (alpha / rank) as f32));
    }
    terms
}

#[test]
fn lora_logits_losses_and_gradients_equal_peft() {
    for name in ["qv", "all-linear", "all-linear-rslora"] {
        let case = json(&format!("lora/{name}.json"));
        let tensors = Tensors::open(&format!("lora/{name}.safetensors"));
        let model = ModelLoader::new().load(golden(case["model"].as_str().unwrap())).unwrap();
        let terms = terms(&model, &format!("lora/{name}"));

        let logits = model.forward(&Batch::single(&ids(&case["logits_ids"])), Some(&terms), None, Rows::All).unwrap();
        assert!(max_difference(&values(&logits), &tensors.values("logits")) < 1e-4, "{name}");

        let (batch, targets) = batch_of(&case["batch"]);
        let trained: f32 = targets.weights.iter().sum();
        let options = LossOptions { grad_scale: 1.0 / trained, ..LossOptions::default() };
        let (losses, gradients) =
            model.loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), options).unwrap();
        assert!(max_difference(&losses.rows, &tensors.values("loss_rows")) < 1e-4, "{name}");
        let loss = losses.rows.iter().map(|v| f64::from(*v)).sum::<f64>() / f64::from(trained);
        assert!((loss - case["loss"].as_f64().unwrap()).abs() < 1e-5, "{name}");
        assert_eq!(model.loss(&batch, &targets, Some(&terms), 0.0).unwrap(), losses);

        let mut compared = 0;
        for (number, linear) in model.linears().iter().enumerate() {
            for (of, letter) in [(GradientOf::A(number), "A"), (GradientOf::B(number), "B")] {
                let found = gradients.get(of);
                assert_eq!(found.is_some(), terms.get(number).is_some(), "{}", linear.path);
                if let Some(found) = found {
                    let key = format!("grad.base_model.model.{}.lora_{letter}.weight", linear.path);
                    let error = relative_error(&values(found), &tensors.values(&key));
                    assert!(error < 1e-4, "{name} {key}: {error}");
                    assert!(found.dtype() == DType::F32 && found.dims() == tensors.get(&key).dims());
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 2 * terms.iter().count());
    }
}

#[test]
fn gradients_of_all_parameters_equal_torch() {
    for (name, kinds) in [("gqa-tied", vec!["plain", "smoothed"]), ("untied", vec!["plain"])] {
        let case = json(&format!("full/{name}.json"));
        let tensors = Tensors::open(&format!("full/{name}.safetensors"));
        let model = model(name, DType::F32);
        let (batch, targets) = batch_of(&case["batch"]);
        let trained: f32 = targets.weights.iter().sum();
        for kind in kinds {
            let label_smoothing = if kind == "smoothed" { 0.1 } else { 0.0 };
            let options = LossOptions { grad_scale: 1.0 / trained, label_smoothing, ..LossOptions::default() };
            let (losses, gradients) = model.loss_and_gradients(&batch, &targets, Trainable::all(), options).unwrap();
            assert!(max_difference(&losses.rows, &tensors.values(&format!("{kind}.loss_rows"))) < 1e-4);
            for ((parameter, _), found) in model.parameters().iter().zip(&gradients.parameters) {
                let found = found.as_ref().unwrap_or_else(|| panic!("no gradient of `{parameter}`"));
                let expected = tensors.values(&format!("{kind}.grad.{parameter}"));
                // the true gradient of a key bias is 0: softmax ignores what all scores have in common
                let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let found = values(found);
                let error = relative_error(&found, &expected);
                assert!(
                    error < 1e-4 || scale < 1e-6 && max_difference(&found, &expected) < 1e-6,
                    "{name} {kind} {parameter}: {error}"
                );
            }
        }
    }
}

#[test]
fn blocks_below_the_lowest_update_save_nothing() {
    let model = model("gqa-tied", DType::F32);
    let all = terms(&model, "lora/all-linear");
    let mut top = LowRankUpdates::new();
    for (number, term) in all.iter().filter(|(number, _)| model.linears()[*number].layer == Some(2)) {
        top.insert(number, term.clone());
    }
    let (batch, targets) = batch_of(&json("lora/all-linear.json")["batch"]);
    let run = |terms: &LowRankUpdates| {
        model.loss_and_gradients(&batch, &targets, Trainable::low_rank(terms), LossOptions::default()).unwrap().1
    };
    let (of_all, of_top) = (run(&all), run(&top));
    assert_eq!(of_all.iter().count(), 42);
    assert_eq!(of_top.iter().count(), 14);
    assert!(of_top.saved_bytes * 2 < of_all.saved_bytes);
}

#[test]
fn gradients_of_bf16_weights_are_as_precise_as_the_weights() {
    let case = json("lora/all-linear.json");
    let (rounded, narrow) = (model("gqa-tied", DType::BF16), model("gqa-tied", DType::BF16));
    let tensors =
        rounded.parameters().iter().map(|(name, t)| (name.clone(), t.to_dtype(DType::F32).unwrap())).collect();
    let wide = Model::from_tensors(rounded.config().clone(), tensors, Device::CPU).unwrap();
    let terms = terms(&wide, "lora/all-linear");
    let (batch, targets) = batch_of(&case["batch"]);
    let run = |model: &Model| {
        model.loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), LossOptions::default()).unwrap()
    };
    let ((wide_losses, wide_gradients), (losses, gradients)) = (run(&wide), run(&narrow));
    assert!(max_difference(&wide_losses.rows, &losses.rows) < 1e-5);
    for (a, b) in wide_gradients.iter().zip(gradients.iter()) {
        // gate and up are saved in bf16, with a rounding error of 2^-9
        let error = relative_error(&values(b), &values(a));
        assert!(error < 1e-2, "{error}");
    }
}

#[test]
fn dropout_depends_on_the_seed_and_matches_finite_differences() {
    let model = model("untied", DType::F32);
    let case = json("lora/all-linear-rslora.json");
    let mut terms = terms(&model, "lora/all-linear-rslora");
    for (number, term) in terms.clone().iter() {
        terms.insert(number, LowRank { dropout: 0.3, ..term.clone() });
    }
    let (batch, targets) = batch_of(&case["batch"]);
    let run = |terms: &LowRankUpdates, dropout_seed: u64| {
        let options = LossOptions { dropout_seed, ..LossOptions::default() };
        let (losses, gradients) =
            model.loss_and_gradients(&batch, &targets, Trainable::low_rank(terms), options).unwrap();
        (losses.rows.iter().map(|v| f64::from(*v)).sum::<f64>(), gradients)
    };
    let (loss, gradients) = run(&terms, 5);
    assert_eq!(loss.to_bits(), run(&terms, 5).0.to_bits());
    assert!((loss - run(&terms, 6).0).abs() > 1e-3);
    // along the gradient of one B, the loss changes by the gradient's squared norm
    for number in [0, 3, 6, 9] {
        let gradient = gradients.get(GradientOf::B(number)).unwrap();
        let squared: f64 = values(gradient).iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        let step = 1e-3 / squared.sqrt();
        let moved = |step: f64| {
            let mut moved = terms.clone();
            let mut term = terms.get(number).unwrap().clone();
            term.b = (&term.b + gradient.affine(step, 0.0).unwrap()).unwrap();
            moved.insert(number, term);
            run(&moved, 5).0
        };
        let slope = (moved(step) - moved(-step)) / (2.0 * step);
        assert!((slope / squared - 1.0).abs() < 2e-2, "linear {number}: {slope} {squared}");
    }
}

/// The logits of a sequence depend neither on the other sequences of its batch nor on how its prompt is split, bit for
/// bit.
#[test]
fn a_sequence_has_the_same_bits_alone_and_in_any_batch() {
    let long: Vec<u32> = (0..150).map(|i| (i * 7 + 3) % 90).collect();
    let others: Vec<Vec<u32>> = (1..8).map(|n| (0..n * 9).map(|i| (i * 5 + n) % 90).collect()).collect();
    for (name, dtype) in [("models/gqa-tied", DType::F32), ("models/untied", DType::BF16)] {
        let model = ModelLoader::new().with_dtype(dtype).load(golden(name)).unwrap();
        let linears = model.linears();
        let mut terms = LowRankUpdates::new();
        for (id, linear) in linears.iter().enumerate() {
            let matrix = |rows: usize, columns: usize| {
                let values: Vec<f32> =
                    (0..rows * columns).map(|i| ((i * 37 + id) % 41) as f32 / 400.0 - 0.05).collect();
                Tensor::from_vec(values, (rows, columns), &candle_core::Device::Cpu).unwrap()
            };
            terms.insert(id, LowRank::new(matrix(5, linear.in_features), matrix(linear.out_features, 5), 0.7));
        }
        for terms in [None, Some(&terms)] {
            let bits = |logits: Tensor, row: usize| -> Vec<u32> {
                values(&logits.get(row).unwrap()).into_iter().map(f32::to_bits).collect()
            };
            // the last tokens one at a time, after a prompt in chunks of these lengths
            let run = |parts: &[usize], others: &[Vec<u32>]| -> Vec<Vec<u32>> {
                let mut cache = cache(&model, 160, 1 + others.len(), DType::F32);
                let (mut start, mut found) = (0, Vec::new());
                for (step, &len) in parts.iter().chain(&[1; 4]).enumerate() {
                    let mut batch = Batch::new();
                    batch.push(&long[start..start + len], start, 0);
                    for (slot, other) in others.iter().enumerate() {
                        // each of the other sequences enters at its own step, and continues with one token per step
                        match step.checked_sub(slot % 3) {
                            Some(0) => batch.push(other, 0, slot + 1),
                            Some(n) => batch.push(&[n as u32], other.len() + n - 1, slot + 1),
                            None => {}
                        }
                    }
                    let logits = model.forward(&batch, terms, Some(&mut cache), Rows::Last).unwrap();
                    start += len;
                    if start > 140 {
                        found.push(bits(logits, 0));
                    }
                }
                found
            };
            let alone = run(&[146], &[]);
            assert_eq!(alone.len(), 5);
            assert!(run(&[146], &others) == alone, "{name}: in a batch");
            assert!(run(&[70, 76], &others[..3]) == alone, "{name}: in two parts");
            assert!(run(&[1, 128, 17], &others[2..]) == alone, "{name}: in three parts");
        }
    }
}
