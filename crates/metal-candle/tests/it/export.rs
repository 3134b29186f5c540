//! Writes models and adapters as GGUF files, quantizes models, and measures how much of an adapter survives rounding.

use crate::golden::{self, max_difference};
use candle_core::{DType, Tensor};
use metal_candle::adapters::{LoRAAdapter, TargetModule};
use metal_candle::data::Sample;
use metal_candle::files::{GgufFile, GgufType};
use metal_candle::inference::Divergence;
use metal_candle::models::{
    Batch, GgufExport, Importance, Model, Quantization, QuantizationMixture, Rows, SafetensorsFile, write_safetensors,
};
use metal_candle::ops::BlockFormat;
use metal_candle::{Device, ModelConfig, ModelLoader};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

const IDS: [u32; 9] = [1, 5, 9, 2, 7, 3, 8, 4, 6];

fn logits(model: &Model) -> Tensor {
    model.forward(&Batch::single(&IDS), None, None, Rows::All).unwrap()
}

/// A small model with random weights, whose rows are whole blocks of 32.
fn small(family: &str) -> Model {
    let other = if family == "qwen2" { 128 } else { 64 };
    let config = json!({
        "model_type": family, "vocab_size": 97, "hidden_size": other, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let config = ModelConfig::from_json(folder.path().join("config.json")).unwrap();
    Model::initialize(config, 7, Device::CPU).unwrap()
}

/// An adapter whose B is not 0.
fn adapter_on(model: &Model, use_rslora: bool) -> LoRAAdapter {
    let modules = [TargetModule::QProj, TargetModule::KProj, TargetModule::OProj, TargetModule::DownProj];
    let builder = LoRAAdapter::builder(model).with_rank(3).with_alpha(5.0).with_target_modules(modules);
    let adapter = builder.with_rslora(use_rslora).build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    let path = folder.path().join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let mut tensors = Vec::new();
    for (index, entry) in file.entries().iter().enumerate() {
        let count = entry.shape.iter().product::<usize>();
        let values = (0..count).map(|i| ((i * 7 + index * 13) % 29) as f32 / 29.0 - 0.5).collect();
        tensors.push((
            entry.name.clone(),
            Tensor::from_vec(values, entry.shape.clone(), &candle_core::Device::Cpu).unwrap(),
        ));
    }
    drop(file);
    write_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
    LoRAAdapter::load(model, folder.path()).unwrap()
}

/// The model of a family's golden file.
fn family(name: &str, folder: &Path) -> Model {
    let file = SafetensorsFile::open(golden::path(&format!("families/{name}.safetensors"))).unwrap();
    std::fs::write(folder.join("config.json"), &file.metadata()["config.json"]).unwrap();
    let weights = file
        .entries()
        .iter()
        .filter_map(|entry| Some((entry.name.strip_prefix("weight.")?.to_string(), file.tensor(&entry.name).unwrap())));
    let weights: Vec<(String, Tensor)> = weights.collect();
    write_safetensors(folder.join("model.safetensors"), &weights, &[]).unwrap();
    ModelLoader::new().with_dtype(DType::F32).load(folder).unwrap()
}

fn family_names() -> Vec<String> {
    let files = std::fs::read_dir(golden::path("families")).unwrap();
    let mut names: Vec<String> =
        files.map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_string()).collect();
    names.sort();
    names
}

/// The properties of the families' models that a GGUF file cannot express, by model.
const REFUSED: &[(&str, &str)] = &[
    ("arcee", "`blk.0.attn_output.bias`"),
    ("ernie4_5", "`blk.0.attn_q.bias`"),
    ("exaone4", "`exaone4.attention.head_count`"),
    ("gemma2", "its attention scale"),
    ("gemma3-multimodal", "its attention scale"),
    ("gemma3-text", "its attention scale"),
    ("glm", "`chatglm.attention.head_count`"),
    ("granitemoehybrid-nope", "its rotary positions"),
    ("helium", "a model of type `helium`"),
    ("hunyuan_v1_dense", "`blk.0.attn_output.bias`"),
    ("llama-dynamic", "its rotary positions"),
    ("llama-yarn", "its rotary positions"),
    ("ministral", "its attention windows"),
    ("ministral3", "its rotary positions"),
    ("ministral3-window", "its attention windows"),
    ("olmo2", "its biases"),
    ("olmo3", "its biases"),
    ("qwen2-window", "its attention windows"),
    ("qwen2-yarn", "its rotary positions"),
    ("qwen3", "its attention windows"),
    ("seed_oss", "`blk.0.attn_output.bias`"),
    ("smollm3", "its attention windows"),
];

#[test]
fn a_model_is_read_as_it_was_written_or_refused() {
    let (mut refused, mut wrong) = (BTreeMap::new(), Vec::new());
    for name in family_names() {
        let folder = tempfile::tempdir().unwrap();
        let model = family(&name, folder.path());
        let path = folder.path().join("model.gguf");
        match GgufExport::new(&model) {
            Ok(export) => {
                export.write(&path, None, |_| ()).unwrap();
                let read = ModelLoader::new().load(&path).unwrap();
                let (expected, found) = (logits(&model), logits(&read));
                let largest = expected.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
                let difference = max_difference(&found, &expected) / largest.to_scalar::<f32>().unwrap();
                if difference >= 1e-5 {
                    wrong.push((name, difference));
                }
            }
            Err(error) => {
                assert!(!path.exists());
                refused.insert(name, error.to_string());
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    let parts: BTreeMap<&str, &str> = REFUSED.iter().copied().collect();
    assert_eq!(refused.keys().collect::<Vec<_>>(), parts.keys().collect::<Vec<_>>(), "{refused:#?}");
    for ((name, error), part) in refused.iter().zip(parts.values()) {
        assert!(error.contains(part), "{name}: {error}");
    }
}

#[test]
fn metadata_and_blocks_of_a_file_are_copied() {
    let source = GgufFile::open(golden::path("gguf/llama-tied.gguf")).unwrap();
    let model = ModelLoader::new().load(source.path()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut export = GgufExport::new(&model).unwrap();
    export.copy_metadata(&source);
    let paths = export.write(&folder.path().join("copy.gguf"), Some(20_000), |_| ()).unwrap();
    assert!(paths.len() > 1, "{paths:?}");
    let copy = GgufFile::open(&paths[0]).unwrap();
    for (key, value) in source.metadata() {
        assert_eq!(copy.metadata().get(key), Some(value), "{key}");
    }
    let names = |file: &GgufFile| {
        file.tensors().map(|tensor| (tensor.name.clone(), tensor.ggml_type, tensor.shape.clone())).collect::<Vec<_>>()
    };
    assert_eq!(names(&copy), names(&source));
    let read = ModelLoader::new().load(&paths[0]).unwrap();
    for ((name, own), (_, read)) in model.parameters().iter().zip(read.parameters()) {
        assert_eq!(own.block_format(), read.block_format(), "{name}");
        let values =
            |tensor: Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(own.tensor().unwrap()), values(read.tensor().unwrap()), "{name}");
    }
}

/// The types that `llama-quantize` chose for a model of 24 layers with a tied head and 7 query heads for each key/value head.
#[test]
fn mixtures_are_those_of_llama_cpp() {
    let config = r#"{"model_type": "llama", "vocab_size": 32, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": true}"#;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let config = ModelConfig::from_json(folder.path().join("config.json")).unwrap();
    let model = Model::initialize(config, 0, Device::CPU).unwrap();
    let layers = |mixture: &str, module: &str, kind: &str| -> Vec<usize> {
        let types = Quantization::from(QuantizationMixture::from_name(mixture).unwrap()).types(&model).unwrap();
        let is = |layer: &usize| types[&format!("model.layers.{layer}.{module}.weight")].name() == kind;
        (0..24).filter(is).collect()
    };
    let more = vec![0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23];
    for mixture in ["q4_k_m", "q5_k_m"] {
        assert_eq!(layers(mixture, "self_attn.v_proj", "q6_k"), more);
        assert_eq!(layers(mixture, "mlp.down_proj", "q6_k"), more);
    }
    assert_eq!(layers("q4_k_m", "self_attn.o_proj", "q4_k").len(), 24);
    assert_eq!(layers("q4_k_s", "self_attn.v_proj", "q5_k"), [0, 1, 2, 3]);
    assert_eq!(layers("q4_k_s", "mlp.down_proj", "q5_k"), [0, 1, 2]);
    assert_eq!(layers("q3_k_m", "self_attn.v_proj", "q5_k"), [0, 1]);
    assert_eq!(layers("q3_k_m", "mlp.down_proj", "q5_k"), [0]);
    assert_eq!(layers("q3_k_m", "self_attn.o_proj", "q4_k").len(), 24);
    assert_eq!(layers("q2_k", "self_attn.v_proj", "q4_k").len(), 24);
    assert_eq!(layers("iq4_xs", "mlp.down_proj", "q5_k"), [0, 1, 2]);
    for mixture in QuantizationMixture::ALL.iter().filter(|mixture| mixture.base.dtype().is_none()) {
        let types = Quantization::from(*mixture).types(&model).unwrap();
        let head = if mixture.name == "q8_0" { "q8_0" } else { "q6_k" };
        assert_eq!(types["model.embed_tokens.weight"].name(), head, "{}", mixture.name);
    }
}

#[test]
fn rows_that_are_not_whole_superblocks_get_smaller_blocks() {
    let model = small("llama");
    let folder = tempfile::tempdir().unwrap();
    for (mixture, expected) in
        [("q4_k_m", "q5_0"), ("q5_k_s", "q5_1"), ("q6_k", "q8_0"), ("q2_k", "q4_0"), ("iq4_xs", "iq4_nl")]
    {
        let quantization = Quantization::from(QuantizationMixture::from_name(mixture).unwrap());
        let types = quantization.types(&model).unwrap();
        assert_eq!(types["model.layers.0.self_attn.q_proj.weight"].name(), expected, "{mixture}");
        let mut seen = 0;
        let quantized = model.quantize(&quantization, |progress| seen = progress.elements).unwrap();
        let count: usize = model
            .parameters()
            .iter()
            .filter(|(_, weight)| weight.dims().len() == 2)
            .map(|(_, weight)| weight.elem_count())
            .sum();
        assert_eq!(seen, count);
        let path = folder.path().join(format!("{mixture}.gguf"));
        GgufExport::new(&quantized).unwrap().write(&path, None, |_| ()).unwrap();
        let read = ModelLoader::new().load(&path).unwrap();
        assert_eq!(logits(&read).to_vec2::<f32>().unwrap(), logits(&quantized).to_vec2::<f32>().unwrap(), "{mixture}");
        // quantizing a quantized model changes nothing
        let again = quantized.quantize(&quantization, |_| ()).unwrap();
        assert_eq!(logits(&again).to_vec2::<f32>().unwrap(), logits(&quantized).to_vec2::<f32>().unwrap(), "{mixture}");
    }
}

#[test]
fn tensors_can_have_their_own_types() {
    let model = small("llama");
    let base = || Quantization::from(QuantizationMixture::from_name("q4_0").unwrap());
    let types = base()
        .with_type(r"ffn_down", GgufType::from_name("q8_0").unwrap())
        .and_then(|quantization| quantization.with_type(r"layers\.1\.", GgufType::F16))
        .and_then(|quantization| quantization.types(&model))
        .unwrap();
    assert_eq!(types["model.layers.1.mlp.down_proj.weight"].name(), "q8_0");
    assert_eq!(types["model.layers.1.mlp.up_proj.weight"].name(), "f16");
    assert_eq!(types["model.layers.0.mlp.up_proj.weight"].name(), "q4_0");
    assert!(base().with_type("(", GgufType::F16).unwrap_err().to_string().contains("regular expression"));
    let wide = base().with_type("up_proj", GgufType::Blocks(BlockFormat::Q6K)).unwrap().types(&model).unwrap_err();
    assert!(wide.to_string().contains("expected rows of blocks of 256 (q6_k), found rows of"), "{wide}");
}

#[test]
fn larger_types_round_less() {
    for kind in GgufType::all() {
        let mut steps = 0;
        let mut now = kind;
        while let Some(next) = now.with_more_bits() {
            let bits = |kind: GgufType| kind.num_bytes(&[256]).unwrap();
            assert!(bits(next) > bits(now), "{} to {}", now.name(), next.name());
            (now, steps) = (next, steps + 1);
            assert!(steps < 12, "{}", kind.name());
        }
        assert_eq!(now, GgufType::F32);
    }
}

#[test]
fn an_importance_matrix_is_the_mean_square_of_inputs() {
    let model = small("llama");
    let batches = [Batch::single(&IDS), Batch::single(&[3, 1])];
    let importance = Importance::measure(&model, &batches).unwrap().with_source("a text");
    let blocks = model.linears().iter().filter(|linear| linear.layer.is_some());
    assert_eq!(importance.len(), blocks.count());
    // q, k and v have the same input
    let of = |module: &str| importance.of(&format!("model.layers.0.self_attn.{module}.weight")).unwrap();
    assert_eq!(of("q_proj"), of("k_proj"));
    // the input of the first layer is the normed embedding
    let parameter = |name: &str| {
        let (_, weight) = model.parameters().iter().find(|(known, _)| known == name).unwrap();
        weight.to_dtype(DType::F32).unwrap()
    };
    let (embedding, norm) =
        (parameter("model.embed_tokens.weight"), parameter("model.layers.0.input_layernorm.weight"));
    let ids: Vec<u32> = IDS.into_iter().chain([3, 1]).collect();
    let rows = embedding.index_select(&Tensor::new(ids.as_slice(), &candle_core::Device::Cpu).unwrap(), 0).unwrap();
    let mean = rows.sqr().unwrap().mean_keepdim(1).unwrap();
    let normed = rows.broadcast_div(&(mean + model.config().rms_norm_eps).unwrap().sqrt().unwrap()).unwrap();
    let normed = normed.broadcast_mul(&norm).unwrap();
    let expected = normed.sqr().unwrap().mean(0).unwrap().to_vec1::<f32>().unwrap();
    for (found, expected) in of("q_proj").iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-5 * expected.abs().max(1e-3), "{found} {expected}");
    }

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("imatrix.gguf");
    importance.save(&path, &model).unwrap();
    let read = Importance::read(&path, &model).unwrap();
    for linear in model.linears().iter().filter(|linear| linear.layer.is_some()) {
        let name = format!("{}.weight", linear.path);
        for (own, read) in importance.of(&name).unwrap().iter().zip(read.of(&name).unwrap()) {
            assert!((own - read).abs() <= 1e-6 * own.abs(), "{name}");
        }
    }
    let other = small("qwen2");
    assert!(Importance::read(&path, &other).unwrap_err().to_string().contains("expected"), "another model");

    // the older format: entries with a name, a number of calls and sums
    let columns = of("q_proj").len();
    let entry = |name: &str, calls: i32, sum: f32, columns: usize| {
        let mut bytes = (name.len() as i32).to_le_bytes().to_vec();
        bytes.extend(name.as_bytes());
        bytes.extend(calls.to_le_bytes());
        bytes.extend((columns as i32).to_le_bytes());
        bytes.extend(vec![sum; columns].iter().flat_map(|value| value.to_le_bytes()));
        bytes
    };
    let dat = folder.path().join("imatrix.dat");
    let write = |entries: &[Vec<u8>]| {
        std::fs::write(&dat, [&(entries.len() as i32).to_le_bytes()[..], &entries.concat()].concat()).unwrap();
        Importance::read(&dat, &model)
    };
    let read = write(&[entry("blk.0.attn_q.weight", 4, 6.0, columns)]).unwrap();
    assert_eq!(read.of("model.layers.0.self_attn.q_proj.weight"), Some(vec![1.5; columns].as_slice()));
    for wrong in [
        vec![entry("blk.9.attn_q.weight", 4, 6.0, columns)],
        vec![entry("blk.0.attn_q.weight", 4, 6.0, columns + 1)],
        vec![entry("blk.0.attn_q.weight", 4, f32::NAN, columns)],
        vec![entry("blk.0.attn_q.weight", 4, -1.0, columns)],
        vec![entry("blk.0.attn_q.weight", 4, 6.0, columns)[..20].to_vec()],
        vec![],
    ] {
        assert!(write(&wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn quantizing_by_importance_lowers_the_weighted_error() {
    let model = small("llama");
    let importance = Importance::measure(&model, &[Batch::single(&IDS)]).unwrap();
    let plain = Quantization::from(QuantizationMixture::from_name("q4_0").unwrap());
    let error = |quantization: &Quantization| {
        let quantized = model.quantize(quantization, |_| ()).unwrap();
        let mut sum = 0.0;
        for ((name, own), (_, other)) in model.parameters().iter().zip(quantized.parameters()) {
            let Some(weights) = importance.of(name) else { continue };
            let rows = |weight: Tensor| weight.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            for (own, other) in rows(own.tensor().unwrap()).iter().zip(rows(other.tensor().unwrap())) {
                sum += own.iter().zip(other).zip(weights).map(|((a, b), w)| w * (a - b).powi(2)).sum::<f32>();
            }
        }
        sum
    };
    let (without, with) = (error(&plain), error(&plain.clone().with_importance(importance.clone())));
    assert!(with < 0.95 * without, "{with} {without}");
}

#[test]
fn a_small_change_does_not_survive_bf16() {
    let model = small("llama");
    let model = model.to_dtype(DType::BF16).unwrap();
    let small = scaled(&adapter_on(&model, false), 1e-3);
    let least = |merged: &Model| {
        let survivals = small.survival(&model, merged).unwrap();
        assert_eq!(survivals.len(), small.modules().len());
        survivals.iter().map(|one| one.share).fold(f64::INFINITY, f64::min)
    };
    let rounded = small.merge(&model).unwrap();
    assert!(least(&rounded) < 0.9, "{}", least(&rounded));
    assert!(least(&small.merge_in(&model, DType::F32).unwrap()) > 0.999);
    let random = small.merge_stochastically(&model, 1).unwrap();
    let mean = |merged: &Model| {
        let survivals = small.survival(&model, merged).unwrap();
        survivals.iter().map(|one| one.share).sum::<f64>() / survivals.len() as f64
    };
    assert!((mean(&random) - 1.0).abs() < 0.3, "{}", mean(&random));
    let again = small.merge_stochastically(&model, 1).unwrap();
    assert_eq!(logits(&random).to_vec2::<f32>().unwrap(), logits(&again).to_vec2::<f32>().unwrap());
}

/// The adapter with its change multiplied by a factor.
fn scaled(adapter: &LoRAAdapter, factor: f64) -> LoRAAdapter {
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    let path = folder.path().join("adapter_config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["lora_alpha"] = (config["lora_alpha"].as_f64().unwrap() * factor).into();
    std::fs::write(&path, config.to_string()).unwrap();
    LoRAAdapter::load(adapter.model(), folder.path()).unwrap()
}

#[test]
fn divergence_is_zero_of_a_model_from_itself_and_grows_with_rounding() {
    let model = small("llama");
    let sample = Sample { ids: IDS.to_vec(), trained: vec![true; IDS.len()], source: None };
    let measure =
        |result: &Model| Divergence::measure((&model, None), (result, None), std::slice::from_ref(&sample)).unwrap();
    let same = measure(&model);
    assert_eq!((same.tokens, same.mean_kl, same.top1_agreement), (IDS.len() - 1, 0.0, 1.0));
    assert!((same.source_perplexity - same.result_perplexity).abs() < 1e-9);
    let mut last = 0.0;
    for mixture in ["q8_0", "q5_0", "q4_0"] {
        let mixture = QuantizationMixture::from_name(mixture).unwrap();
        let found = measure(&model.quantize(&mixture.into(), |_| ()).unwrap());
        assert!(found.mean_kl > last && found.max_kl >= found.mean_kl, "{}: {found:?}", mixture.name);
        last = found.mean_kl;
    }
    let untrained = Sample { trained: vec![false; IDS.len()], ..sample };
    assert!(Divergence::measure((&model, None), (&model, None), &[untrained]).is_err());
}

#[test]
fn adapters_are_written_as_gguf() {
    let more = ["arcee", "ernie4_5", "exaone4", "glm", "hunyuan_v1_dense", "ministral3", "seed_oss"];
    let more = more.map(|family| (family, false));
    for (family, use_rslora) in [("llama", false), ("llama", true), ("qwen2", false)].into_iter().chain(more) {
        let model = small(family);
        let adapter = adapter_on(&model, use_rslora);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter.gguf");
        adapter.save_gguf(&path).unwrap();
        let read = LoRAAdapter::load(&model, &path).unwrap();
        assert_eq!(read.modules().len(), adapter.modules().len());
        let with = |adapter: &LoRAAdapter| {
            model.forward(&Batch::single(&IDS), Some(&adapter.low_rank_updates().unwrap()), None, Rows::All).unwrap()
        };
        let difference = max_difference(&with(&read), &with(&adapter));
        assert!(difference < 1e-4, "{family}: {difference}");
        assert!(max_difference(&with(&adapter), &logits(&model)) > 0.1);
        // it is refused as a model, and for another model
        let error = ModelLoader::new().load(&path).unwrap_err().to_string();
        assert!(error.contains("expected a model, found a file of type `adapter`"), "{error}");
        let other = small(if family == "llama" { "qwen2" } else { "llama" });
        let error = LoRAAdapter::load(&other, &path).unwrap_err().to_string();
        assert!(error.contains("`general.architecture`: expected"), "{error}");
    }
    let error = LoRAAdapter::load(&small("qwen2"), golden::path("gguf/qwen2.gguf")).unwrap_err().to_string();
    assert!(error.contains("`general.type`: expected `adapter`, found `model`"), "{error}");
}

#[test]
fn adapters_that_gguf_cannot_express_are_refused() {
    let model = small("llama");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.gguf");
    let refused = |adapter: &LoRAAdapter, part: &str| {
        let error = adapter.save_gguf(&path).unwrap_err().to_string();
        assert!(error.contains(part) && !path.exists(), "{error}");
    };
    let builder = || LoRAAdapter::builder(&model).with_rank(2).with_target_modules([TargetModule::QProj]);
    refused(&builder().with_dora(true).build().unwrap(), "DoRA magnitudes");
    refused(&builder().with_modules_to_save(["lm_head".to_string()]).build().unwrap(), "trained in full");
}

/// A file whose layers have matrices of `iq3_s` blocks, which have the size of `q3_k` blocks.
fn with_codebooks(path: &Path) {
    let config = json!({
        "model_type": "llama", "vocab_size": 97, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05,
    });
    let model = Model::initialize(ModelConfig::from_json_str(&config.to_string()).unwrap(), 7, Device::CPU).unwrap();
    let quantization = Quantization::from(QuantizationMixture::from_name("q8_0").unwrap());
    let quantization = quantization.with_type("_proj", GgufType::Blocks(BlockFormat::Q3K)).unwrap();
    let model = model.quantize(&quantization, |_| ()).unwrap();
    GgufExport::new(&model).unwrap().write(path, None, |_| ()).unwrap();

    let file = GgufFile::open(path).unwrap();
    let tensors: Vec<_> =
        file.tensors().map(|tensor| (tensor.name.clone(), tensor.ggml_type, tensor.shape.clone())).collect();
    drop(file);
    let mut bytes = std::fs::read(path).unwrap();
    let (mut changed, mut end) = (Vec::new(), 0);
    for (name, kind, shape) in tensors {
        let named: Vec<u8> = (name.len() as u64).to_le_bytes().into_iter().chain(name.bytes()).collect();
        let at = bytes.windows(named.len()).position(|window| window == named).unwrap() + named.len();
        // the number of dimensions, the dimensions, the type, the offset
        let at = at + 4 + 8 * shape.len();
        end = end.max(at + 12);
        if kind == BlockFormat::Q3K.ggml_type() {
            bytes[at] = BlockFormat::IQ3S.ggml_type() as u8;
            let offset = u64::from_le_bytes(bytes[at + 4..at + 12].try_into().unwrap()) as usize;
            changed.push((offset, shape.iter().product::<usize>() / 256));
        }
    }
    assert_eq!(changed.len(), 7);
    for (offset, count) in changed {
        let start = end.next_multiple_of(32) + offset;
        for block in bytes[start..start + 110 * count].chunks_exact_mut(110) {
            block[..2].copy_from_slice(&half::f16::from_f32(5e-4).to_le_bytes());
        }
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn types_with_codebooks_can_only_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    with_codebooks(&path);
    let model = ModelLoader::new().load(&path).unwrap();
    let formats = model.parameters().iter().filter_map(|(_, weight)| weight.block_format());
    assert_eq!(formats.filter(|format| *format == BlockFormat::IQ3S).count(), 7);
    let dense = ModelLoader::new().with_dtype(DType::F32).load(&path).unwrap();
    assert!(dense.parameters().iter().all(|(_, weight)| weight.block_format().is_none()));
    // the embedding, which is also the head, has 8 bits: its activations are rounded
    let difference = max_difference(&logits(&model), &logits(&dense));
    let largest = logits(&dense).abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(largest > 0.1 && difference < 0.02 * largest, "{difference} of {largest}");
    let hidden = |model: &Model| model.hidden_states(&Batch::single(&IDS), None, None, Rows::All).unwrap();
    assert!(max_difference(&hidden(&model), &hidden(&dense)) < 1e-4);
    let together = Batch::from_sequences([&IDS[..], &IDS[3..]]);
    let together = model.forward(&together, None, None, Rows::All).unwrap().narrow(0, 0, IDS.len()).unwrap();
    assert_eq!(together.to_vec2::<f32>().unwrap(), logits(&model).to_vec2::<f32>().unwrap());

    // blocks are copied, or converted to other types
    let copy = folder.path().join("copy.gguf");
    GgufExport::new(&model).unwrap().write(&copy, None, |_| ()).unwrap();
    let read = ModelLoader::new().load(&copy).unwrap();
    assert_eq!(logits(&read).to_vec2::<f32>().unwrap(), logits(&model).to_vec2::<f32>().unwrap());
    let quantization = Quantization::from(QuantizationMixture::from_name("q8_0").unwrap());
    let other = model.quantize(&quantization, |_| ()).unwrap();
    assert!(max_difference(&logits(&other), &logits(&model)) < 0.02 * largest);

    let iq3_s = GgufType::from_name("iq3_s").unwrap();
    let error = quantization.clone().with_type("q_proj", iq3_s).unwrap_err().to_string();
    assert!(error.contains("`iq3_s` can only be read; expected one of `f32`, `f16`"), "{error}");
    let quantization = quantization.with_type_of("model.layers.0.self_attn.q_proj.weight", iq3_s);
    let error = other.quantize(&quantization, |_| ()).unwrap_err().to_string();
    assert!(error.contains("q_proj") && error.contains("`iq3_s`, which is read-only"), "{error}");
}
