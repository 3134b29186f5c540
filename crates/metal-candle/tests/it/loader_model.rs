//! Loads models from files, indexes and folders, and saves them.

use candle_core::{DType, Tensor};
use metal_candle::models::{Batch, Model, Rows, SafetensorsFile, save_model, write_safetensors};
use metal_candle::{Device, Error, ModelConfig, ModelLoader};
use std::path::Path;

const TIED: &str = r#"{"model_type": "qwen2", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,
    "eos_token_id": 3, "rope_theta": 10000.0, "max_position_embeddings": 64}"#;

type Tensors = Vec<(String, Tensor)>;

fn config(tied: bool) -> ModelConfig {
    let text = if tied { TIED.to_string() } else { TIED.replace("\"tie_word_embeddings\": true,", "") };
    ModelConfig::from_json_str(&text).unwrap()
}

fn tensors(config: &ModelConfig, dtype: DType) -> Tensors {
    Model::parameter_shapes(config)
        .into_iter()
        .enumerate()
        .map(|(number, (name, shape))| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|i| ((i * 31 + number * 17) % 64) as f32 / 32.0 - 1.0).collect();
            let tensor = Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap();
            (name, tensor.to_dtype(dtype).unwrap())
        })
        .collect()
}

/// A folder with `config.json` and the tensors as `model.safetensors`.
fn folder(config_text: &str, tensors: &[(String, Tensor)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config_text).unwrap();
    write_safetensors(folder.path().join("model.safetensors"), tensors, &[("format", "pt")]).unwrap();
    folder
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

fn assert_holds(model: &Model, expected: &[(String, Tensor)]) {
    assert_eq!(model.parameters().len(), expected.len());
    for ((name, found), (expected_name, expected)) in crate::golden::parameters_of(model).iter().zip(expected) {
        assert_eq!(name, expected_name);
        assert_eq!(found.dims(), expected.dims(), "{name}");
        assert_eq!(values(found), values(expected), "{name}");
    }
}

fn problems(error: Error) -> Vec<String> {
    match error {
        Error::Tensors { problems, .. } => problems,
        other => panic!("expected tensor problems, found {other:?}"),
    }
}

/// Two shards and their index.
fn sharded(folder: &Path, tensors: &[(String, Tensor)]) -> serde_json::Value {
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut weight_map = serde_json::Map::new();
    for (name, part) in names.iter().zip([first, second]) {
        write_safetensors(folder.join(name), part, &[]).unwrap();
        for (tensor, _) in part {
            weight_map.insert(tensor.clone(), (*name).into());
        }
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    write_index(folder, &index);
    index
}

fn write_index(folder: &Path, index: &serde_json::Value) {
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn a_file_a_folder_and_an_index_load_the_same_model() {
    let expected = tensors(&config(true), DType::F32);
    let single = folder(TIED, &expected);
    assert_holds(&ModelLoader::new().load(single.path()).unwrap(), &expected);
    assert_holds(&ModelLoader::new().load(single.path().join("model.safetensors")).unwrap(), &expected);

    let parts = tempfile::tempdir().unwrap();
    sharded(parts.path(), &expected);
    std::fs::write(parts.path().join("config.json"), TIED).unwrap();
    assert_holds(&ModelLoader::new().load(parts.path()).unwrap(), &expected);
    let index = parts.path().join("model.safetensors.index.json");
    assert_holds(&ModelLoader::new().load(&index).unwrap(), &expected);
    assert_eq!(ModelLoader::new().load_weights(&index).unwrap().len(), expected.len());
}

#[test]
fn each_dtype_becomes_each_other() {
    for from in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        let expected = tensors(&config(false), from);
        let text = TIED.replace("\"tie_word_embeddings\": true,", "");
        let saved = folder(&text, &expected);
        let kept = ModelLoader::new().load(saved.path()).unwrap();
        assert_eq!(kept.dtype(), if from == DType::F64 { DType::F32 } else { from });
        for to in [DType::F32, DType::F16, DType::BF16] {
            let model = ModelLoader::new().with_dtype(to).load(saved.path()).unwrap();
            assert_eq!(model.dtype(), to);
            assert!(model.parameters().iter().all(|(_, tensor)| tensor.dtype() == to));
            assert_holds(&model, &expected);
        }
    }
    let saved = folder(TIED, &tensors(&config(true), DType::F32));
    let error = ModelLoader::new().with_dtype(DType::U8).load(saved.path()).unwrap_err();
    assert!(matches!(&error, Error::Argument { name, .. } if name == "dtype"), "{error:?}");
}

#[test]
fn mixed_dtypes_become_the_dtype_of_most_bytes() {
    let mut mixed = tensors(&config(true), DType::BF16);
    for (name, tensor) in &mut mixed {
        if name.contains("norm") {
            *tensor = tensor.to_dtype(DType::F32).unwrap();
        }
    }
    let saved = folder(TIED, &mixed);
    let model = ModelLoader::new().load(saved.path()).unwrap();
    assert_eq!(model.dtype(), DType::BF16);
    assert_holds(&model, &mixed);
}

#[test]
fn all_problems_are_in_one_error() {
    let config = config(false);
    let mut wrong = tensors(&config, DType::F32);
    wrong.retain(|(name, _)| name != "model.norm.weight" && name != "model.layers.1.self_attn.k_proj.bias");
    let (_, up) = wrong.iter_mut().find(|(name, _)| name == "model.layers.0.mlp.up_proj.weight").unwrap();
    *up = up.t().unwrap().contiguous().unwrap();
    let (_, gate) = wrong.iter_mut().find(|(name, _)| name == "model.layers.0.mlp.gate_proj.weight").unwrap();
    *gate = gate.to_dtype(DType::U8).unwrap();
    wrong.push((
        "model.layers.2.mlp.up_proj.weight".into(),
        Tensor::zeros(3, DType::F32, &candle_core::Device::Cpu).unwrap(),
    ));
    let saved = folder(&TIED.replace("\"tie_word_embeddings\": true,", ""), &wrong);
    let error = ModelLoader::new().load(saved.path()).unwrap_err();
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    assert_eq!(
        problems(error),
        [
            "`model.layers.0.mlp.gate_proj.weight`: expected dtype F32, F16, BF16 or F64, found U8",
            "`model.layers.0.mlp.up_proj.weight`: expected [24, 16], found [16, 24]",
            "`model.layers.1.self_attn.k_proj.bias`: expected [8], found no such tensor",
            "`model.layers.2.mlp.up_proj.weight`: expected no such tensor, found [3]",
            "`model.norm.weight`: expected [16], found no such tensor",
        ]
    );
    let error = ModelLoader::new().load_weights(saved.path()).unwrap_err();
    assert_eq!(
        problems(error),
        ["`model.layers.0.mlp.gate_proj.weight`: expected dtype F32, F16, BF16 or F64, found U8"]
    );
}

#[test]
fn ignored_tensors_and_names_without_prefix() {
    let expected = tensors(&config(true), DType::F32);
    let cpu = candle_core::Device::Cpu;
    let mut extras = expected.clone();
    let embedding = expected.iter().find(|(name, _)| name == "model.embed_tokens.weight").unwrap().1.clone();
    extras.push(("lm_head.weight".into(), embedding));
    extras.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), Tensor::zeros(2, DType::F32, &cpu).unwrap()));
    extras.push(("model.rotary_emb.inv_freq".into(), Tensor::zeros(2, DType::F32, &cpu).unwrap()));
    assert_holds(&ModelLoader::new().load(folder(TIED, &extras).path()).unwrap(), &expected);

    // a head that differs from the embedding is used, as in transformers 5
    extras[expected.len()].1 = Tensor::zeros((23, 16), DType::F32, &cpu).unwrap();
    let untied = ModelLoader::new().load(folder(TIED, &extras).path()).unwrap();
    assert!(!untied.config().tie_word_embeddings);
    assert_eq!(untied.parameters().len(), expected.len() + 1);

    let bare: Tensors = expected.iter().map(|(name, t)| (name.replacen("model.", "", 1), t.clone())).collect();
    assert_holds(&ModelLoader::new().load(folder(TIED, &bare).path()).unwrap(), &expected);

    // a single name with the prefix: nothing is guessed
    let mut half = bare.clone();
    half[0].0.insert_str(0, "model.");
    let listed = problems(ModelLoader::new().load(folder(TIED, &half).path()).unwrap_err());
    assert_eq!(listed.len(), 2 * (expected.len() - 1), "{listed:?}");
}

#[test]
fn invalid_indexes_are_refused() {
    let expected = tensors(&config(true), DType::F32);
    let parts = tempfile::tempdir().unwrap();
    let index = sharded(parts.path(), &expected);
    std::fs::write(parts.path().join("config.json"), TIED).unwrap();
    let load = || ModelLoader::new().load(parts.path()).unwrap_err();
    let with_map = |change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let mut changed = index.clone();
        change(changed["weight_map"].as_object_mut().unwrap());
        write_index(parts.path(), &changed);
    };
    for escape in
        ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors", "", "./x.safetensors"]
    {
        with_map(&|map| {
            map.insert("model.norm.weight".into(), escape.into());
        });
        let text = load().to_string();
        assert!(text.contains("in the folder of the index") && text.contains("index.json"), "{escape}: {text}");
    }
    with_map(&|map| {
        map.insert("model.norm.weight".into(), "model-00003-of-00002.safetensors".into());
    });
    let text = load().to_string();
    assert!(text.contains("`model-00003-of-00002.safetensors`") && text.contains("missing"), "{text}");

    with_map(&|map| {
        map.insert("model.extra.weight".into(), "model-00001-of-00002.safetensors".into());
        map.insert("model.norm.weight".into(), "model-00001-of-00002.safetensors".into());
    });
    assert_eq!(
        problems(load()),
        [
            "`model.extra.weight`: expected in `model-00001-of-00002.safetensors`, found nowhere",
            "`model.norm.weight`: expected in `model-00001-of-00002.safetensors`, found in `model-00002-of-00002.safetensors`",
        ]
    );
    for (text, word) in [
        ("{}", "weight_map"),
        (r#"{"weight_map": {}}"#, "weight_map"),
        (r#"{"weight_map": {"a": 3}}"#, "weight_map"),
        (r#"{"weight_map": {"a": "x"}, "weight_map": {"a": "y"}}"#, "twice"),
        ("", "EOF"),
        ("<html>", "index of shards"),
    ] {
        std::fs::write(parts.path().join("model.safetensors.index.json"), text).unwrap();
        let error = load().to_string();
        assert!(error.contains(word) && error.contains("index.json"), "{text}: {error}");
    }

    write_index(parts.path(), &index);
    let second = parts.path().join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..bytes.len() - 5]).unwrap();
    let text = load().to_string();
    assert!(text.contains("model-00002-of-00002.safetensors") && text.contains("truncated"), "{text}");
    write_safetensors(&second, &expected, &[]).unwrap();
    let listed = problems(load());
    assert_eq!(listed.len(), expected.len() / 2);
    assert!(
        listed
            .iter()
            .all(|line| line.ends_with("expected in one shard, found also in `model-00002-of-00002.safetensors`"))
    );
    std::fs::remove_file(&second).unwrap();
    assert!(load().to_string().contains("`model-00002-of-00002.safetensors`"));
}

#[test]
fn folders_without_one_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let load = || ModelLoader::new().load(place.path()).unwrap_err().to_string();
    let put = |name: &str| std::fs::write(place.path().join(name), b"x").unwrap();
    assert!(load().contains("neither `model.safetensors`"));
    put("model.gguf");
    assert!(load().contains("GGUF"));
    put("pytorch_model.bin");
    assert!(load().contains("PyTorch"));
    put("adapter_model.safetensors");
    assert!(load().contains("adapter"));
    put("one.safetensors");
    assert!(load().contains("one.safetensors"));
    put("two.safetensors");
    let text = load();
    assert!(text.contains("`one.safetensors`, `two.safetensors`"), "{text}");
    let absent = place.path().join("absent");
    let error = ModelLoader::new().load(&absent).unwrap_err();
    assert!(matches!(error, Error::Read { path, .. } if path == absent));
}

#[test]
fn a_config_is_required_and_can_be_passed() {
    let expected = tensors(&config(true), DType::F32);
    let saved = folder(TIED, &expected);
    let file = saved.path().join("model.safetensors");
    let text = ModelLoader::new().load(saved.path().join("config.json")).unwrap_err().to_string();
    assert!(text.contains("config.json") && text.contains("weight_map"), "{text}");
    std::fs::remove_file(saved.path().join("config.json")).unwrap();
    let text = ModelLoader::new().load(&file).unwrap_err().to_string();
    assert!(text.contains("config.json") && text.contains("with_config"), "{text}");
    assert_holds(&ModelLoader::new().with_config(config(true)).load(&file).unwrap(), &expected);

    let mut broken = config(true);
    broken.num_hidden_layers = usize::MAX;
    let error = ModelLoader::new().with_config(broken).load(&file).unwrap_err();
    assert!(matches!(&error, Error::Argument { name, .. } if name == "num_hidden_layers"), "{error:?}");
}

#[test]
fn progress_counts_every_tensor_and_byte() {
    let expected = tensors(&config(true), DType::F16);
    let saved = folder(TIED, &expected);
    let mut steps = Vec::new();
    ModelLoader::new().load_with_progress(saved.path(), |step| steps.push(step)).unwrap();
    assert_eq!(steps.len(), expected.len());
    assert!(steps.windows(2).all(|pair| pair[1].tensors == pair[0].tensors + 1 && pair[1].bytes > pair[0].bytes));
    let last = steps.last().unwrap();
    assert_eq!((last.tensors, last.bytes), (last.num_tensors, last.num_bytes));
    assert_eq!(last.num_bytes, config(true).num_bytes(DType::F16));
}

#[test]
fn a_saved_model_is_the_same_model() {
    for (tied, dtype) in [(true, DType::BF16), (false, DType::F32)] {
        let text = if tied { TIED.to_string() } else { TIED.replace("\"tie_word_embeddings\": true,", "") };
        let expected = tensors(&config(tied), dtype);
        let saved = folder(&text, &expected);
        let generation = r#"{"eos_token_id": [3, 5], "temperature": 0.7, "top_k": 20, "do_sample": true}"#;
        std::fs::write(saved.path().join("generation_config.json"), generation).unwrap();
        let model = ModelLoader::new().load(saved.path()).unwrap();
        assert_eq!(model.config().eos_token_ids, [3, 5]);

        let copy = tempfile::tempdir().unwrap();
        let target = copy.path().join("deep/folder");
        save_model(&model, &target).unwrap();
        let again = ModelLoader::new().load(&target).unwrap();
        assert_holds(&again, &expected);
        assert_eq!(again.config(), model.config());
        assert_eq!(again.dtype(), dtype);
        let file = SafetensorsFile::open(target.join("model.safetensors")).unwrap();
        assert_eq!(file.metadata().get("format").map(String::as_str), Some("pt"));
        assert_eq!(file.entries().len(), expected.len());
    }
}

fn logits(model: &Model) -> metal_candle::Result<Vec<u32>> {
    let batch = Batch::from_sequences([[1, 2, 3, 5, 8, 13], [22, 0, 1, 2, 3, 4]]);
    Ok(values(&model.forward(&batch, None, None, Rows::All)?).into_iter().map(f32::to_bits).collect())
}

/// Mapped weights return the same bits as weights in memory. They are copied if the file does not align them.
#[test]
fn mapped_weights_compute_what_copies_do() {
    for (tied, dtype) in [(true, DType::BF16), (false, DType::F16), (true, DType::F32)] {
        let text = if tied { TIED.to_string() } else { TIED.replace("\"tie_word_embeddings\": true,", "") };
        let saved = folder(&text, &tensors(&config(tied), dtype));
        let copies = ModelLoader::new().load_weights(saved.path()).unwrap();
        let copies = Model::from_tensors(config(tied), copies, Device::CPU).unwrap();
        let expected = logits(&copies).unwrap();
        let mapped = ModelLoader::new().load(saved.path()).unwrap();
        assert_eq!(logits(&mapped).unwrap(), expected, "{dtype:?}");

        // one more space after the header: every tensor starts at an odd byte
        let path = saved.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        bytes[..8].copy_from_slice(&(length + 1).to_le_bytes());
        bytes.insert(8 + length as usize, b' ');
        std::fs::write(saved.path().join("odd.safetensors"), bytes).unwrap();
        let odd = ModelLoader::new().load(saved.path().join("odd.safetensors")).unwrap();
        assert_eq!(logits(&odd).unwrap(), expected, "{dtype:?}");
    }
}

/// A file that is replaced by renaming does not affect a loaded model. One that is truncated or overwritten in place
/// causes errors, never other results, and does not end the process.
#[test]
fn a_file_that_changes_under_a_model() {
    let saved = folder(TIED, &tensors(&config(true), DType::BF16));
    let path = saved.path().join("model.safetensors");
    // so that the writes below are detected, whatever the resolution of the file system's clock
    let past = std::time::SystemTime::now() - std::time::Duration::from_mins(1);
    let load = || {
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(past).unwrap();
        ModelLoader::new().load(saved.path()).unwrap()
    };
    let model = load();
    let expected = logits(&model).unwrap();
    let zeros: Tensors = tensors(&config(true), DType::BF16)
        .into_iter()
        .map(|(name, tensor)| (name, tensor.zeros_like().unwrap()))
        .collect();
    write_safetensors(&path, &zeros, &[]).unwrap();
    assert_eq!(logits(&model).unwrap(), expected);

    let fails = |model: &Model| {
        let message = logits(model).unwrap_err().to_string();
        assert!(message.contains("model.safetensors") && message.contains("truncated or overwritten"), "{message}");
        assert!(save_model(model, saved.path().join("copy")).is_err());
    };
    let model = load();
    logits(&model).unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(100).unwrap();
    fails(&model);
    // the same length, but other contents
    file.set_len(length).unwrap();
    fails(&model);

    write_safetensors(&path, &zeros, &[]).unwrap();
    let model = load();
    logits(&model).unwrap();
    let mut file = std::fs::File::options().write(true).open(&path).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(-64)).unwrap();
    std::io::Write::write_all(&mut file, &[0x3f; 64]).unwrap();
    fails(&model);
}

/// A model in long use copies its files: results have the same bits, and the files are no longer needed.
#[test]
fn a_model_in_long_use_does_not_need_its_file() {
    let saved = folder(TIED, &tensors(&config(true), DType::BF16));
    let path = saved.path().join("model.safetensors");
    let model = ModelLoader::new().load(saved.path()).unwrap();
    let expected = logits(&model).unwrap();
    for pass in 0..40 {
        assert_eq!(logits(&model).unwrap(), expected, "pass {pass}");
    }
    std::fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    assert_eq!(logits(&model).unwrap(), expected);
    save_model(&model, saved.path().join("copy")).unwrap();
    let copy = ModelLoader::new().load(saved.path().join("copy")).unwrap();
    assert_eq!(logits(&copy).unwrap(), expected);
}
