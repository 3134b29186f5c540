//! Adapters in the formats of PEFT and mlx-lm, good and bad.

use crate::golden::{self, max_difference};
use candle_core::{DType, Tensor};
use metal_candle::adapters::{LoRAAdapter, TargetModule};
use metal_candle::models::{Batch, Rows, SafetensorsFile, write_safetensors};
use metal_candle::training::{CheckpointMetadata, Trainer, TrainingConfig, load_checkpoint, save_checkpoint};
use metal_candle::{Error, Model};
use serde_json::{Value, json};
use std::path::Path;

fn logits(model: &Model, adapter: &LoRAAdapter, ids: &[u32]) -> Tensor {
    model.forward(&Batch::single(ids), Some(&adapter.low_rank_updates().unwrap()), None, Rows::All).unwrap()
}

/// A copy of a golden PEFT folder that tests may spoil.
fn copied(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden::path(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
}

fn tensors_of(path: &Path) -> Vec<(String, Tensor)> {
    let file = SafetensorsFile::open(path).unwrap();
    file.entries().iter().map(|entry| (entry.name.clone(), file.tensor(&entry.name).unwrap())).collect()
}

fn problems(error: Error) -> Vec<String> {
    match error {
        Error::Tensors { problems, .. } => problems,
        other => panic!("{other:?}"),
    }
}

#[test]
fn folders_of_peft_give_the_logits_of_peft() {
    for name in ["qv", "all-linear", "all-linear-rslora", "patterns"] {
        let golden = golden::json(&format!("lora/{name}.json"));
        let model = golden::model(golden["model"].as_str().unwrap());
        let adapter = LoRAAdapter::load(&model, golden::path(&format!("lora/{name}"))).unwrap();
        let file = SafetensorsFile::open(golden::path(&format!("lora/{name}.safetensors"))).unwrap();
        let ids = golden::ids(&golden["logits_ids"]);
        let difference = max_difference(&logits(&model, &adapter, &ids), &file.tensor("logits").unwrap());
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn folders_of_mlx_lm_give_the_same_logits() {
    for name in ["qv", "all-linear"] {
        let golden = golden::json(&format!("lora/{name}.json"));
        let model = golden::model(golden["model"].as_str().unwrap());
        let adapter = LoRAAdapter::load(&model, golden::path(&format!("mlx/{name}"))).unwrap();
        let file = SafetensorsFile::open(golden::path(&format!("lora/{name}.safetensors"))).unwrap();
        let ids = golden::ids(&golden["logits_ids"]);
        let difference = max_difference(&logits(&model, &adapter, &ids), &file.tensor("logits").unwrap());
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn mlx_round_trip_writes_the_tensors_of_mlx_lm() {
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::load(&model, golden::path("lora/all-linear")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    adapter.save_mlx(folder.path()).unwrap();
    let mut expected = tensors_of(&golden::path("mlx/all-linear/adapters.safetensors"));
    let found = tensors_of(&folder.path().join("adapters.safetensors"));
    expected.sort_by(|left, right| left.0.cmp(&right.0));
    assert_eq!(found.len(), expected.len());
    for ((name, found), (expected_name, expected)) in found.iter().zip(&expected) {
        assert_eq!(name, expected_name);
        assert_eq!(max_difference(found, expected), 0.0, "{name}");
    }
    let again = LoRAAdapter::load(&model, folder.path()).unwrap();
    assert_eq!(max_difference(adapter.parameters(), again.parameters()), 0.0);
    assert!(adapter.modules().iter().zip(again.modules()).all(|(left, right)| left.scale == right.scale));

    let patterns = LoRAAdapter::load(&model, golden::path("lora/patterns")).unwrap();
    // ranks 3, 2 and 5 with scales 2, 20 / 3, 1.5 and 6 / 5, in two of three layers
    patterns.save_mlx(folder.path()).unwrap();
    let again = LoRAAdapter::load(&model, folder.path()).unwrap();
    assert!(again.modules().iter().all(|module| module.rank == 5 && module.scale == again.modules()[0].scale));
    let difference = max_difference(&logits(&model, &patterns, &[1, 5, 9]), &logits(&model, &again, &[1, 5, 9]));
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn peft_folder_is_written_to_the_byte_rules() {
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::builder(&model)
        .with_rank(2)
        .with_alpha(4.0)
        .with_target_modules([TargetModule::VProj, TargetModule::QProj])
        .with_layers([1])
        .with_base_model("some/model")
        .build()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let nested = folder.path().join("a/b");
    adapter.save(&nested).unwrap();
    let text = std::fs::read_to_string(nested.join("adapter_config.json")).unwrap();
    let expected = r#"{
  "alpha_pattern": {},
  "base_model_name_or_path": "some/model",
  "bias": "none",
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "layers_pattern": "layers",
  "layers_to_transform": [
    1
  ],
  "lora_alpha": 4,
  "lora_dropout": 0.0,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 2,
  "rank_pattern": {},
  "revision": null,
  "target_modules": [
    "q_proj",
    "v_proj"
  ],
  "task_type": "CAUSAL_LM",
  "use_dora": false,
  "use_rslora": false
}"#;
    assert_eq!(text, expected);
    let file = SafetensorsFile::open(nested.join("adapter_model.safetensors")).unwrap();
    assert_eq!(file.metadata().iter().collect::<Vec<_>>(), [(&"format".to_string(), &"pt".to_string())]);
    let names: Vec<_> = file.entries().iter().map(|entry| (entry.name.as_str(), entry.dtype)).collect();
    let path = "base_model.model.model.layers.1.self_attn";
    let expected: Vec<String> = ["q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B"]
        .iter()
        .map(|leaf| format!("{path}.{leaf}.weight"))
        .collect();
    assert_eq!(names, expected.iter().map(|name| (name.as_str(), "F32")).collect::<Vec<_>>());
}

#[test]
fn peft_round_trip_keeps_ranks_scales_and_bits() {
    for name in ["qv", "all-linear-rslora", "patterns"] {
        let golden = golden::json(&format!("lora/{name}.json"));
        let model = golden::model(golden["model"].as_str().unwrap());
        let adapter = LoRAAdapter::load(&model, golden::path(&format!("lora/{name}"))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        adapter.save(folder.path()).unwrap();
        let again = LoRAAdapter::load(&model, folder.path()).unwrap();
        assert_eq!(adapter.modules(), again.modules(), "{name}");
        assert_eq!(max_difference(adapter.parameters(), again.parameters()), 0.0, "{name}");
    }
}

#[test]
fn irregular_sets_of_layers_are_written_as_paths() {
    let model = golden::model("models/gqa-tied");
    let folder = copied("lora/qv");
    edit_config(folder.path(), |config| {
        config["target_modules"] = json!(["layers.0.self_attn.q_proj", "layers.2.self_attn.v_proj"]);
    });
    let path = folder.path().join("adapter_model.safetensors");
    let mut tensors = tensors_of(&path);
    tensors.retain(|(name, _)| name.contains("0.self_attn.q_proj") || name.contains("2.self_attn.v_proj"));
    write_safetensors(&path, &tensors, &[]).unwrap();
    let adapter = LoRAAdapter::load(&model, folder.path()).unwrap();
    assert_eq!(adapter.modules().len(), 2);
    adapter.save(folder.path()).unwrap();
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("adapter_config.json")).unwrap()).unwrap();
    let expected = ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.v_proj"];
    assert_eq!(config["target_modules"], json!(expected));
    assert_eq!(LoRAAdapter::load(&model, folder.path()).unwrap().modules(), adapter.modules());
}

#[test]
fn targets_are_chosen_by_the_rules_of_peft() {
    let model = golden::model("models/gqa-tied");
    // the tensors of the golden adapter do not matter here: the missing tensors show the selected layers
    let chosen = |settings: Value| -> Vec<String> {
        let folder = copied("lora/qv");
        write_safetensors::<&str>(folder.path().join("adapter_model.safetensors"), &[], &[]).unwrap();
        edit_config(folder.path(), |config| {
            for (key, value) in settings.as_object().unwrap() {
                config[key] = value.clone();
            }
        });
        match LoRAAdapter::load(&model, folder.path()).unwrap_err() {
            Error::Tensors { problems, .. } => problems
                .iter()
                .filter(|problem| problem.contains("lora_A"))
                .map(|problem| {
                    problem.split("model.model.layers.").nth(1).unwrap().split(".lora_A").next().unwrap().into()
                })
                .collect(),
            other => panic!("{settings}: {other}"),
        }
    };
    assert_eq!(
        chosen(json!({"target_modules": "all-linear", "layers_to_transform": 1})),
        [
            "1.self_attn.q_proj",
            "1.self_attn.k_proj",
            "1.self_attn.v_proj",
            "1.self_attn.o_proj",
            "1.mlp.gate_proj",
            "1.mlp.up_proj",
            "1.mlp.down_proj"
        ]
    );
    assert_eq!(
        chosen(json!({"target_modules": r"model\.layers\.[02]\.self_attn\.(q|k)_proj"})),
        ["0.self_attn.q_proj", "0.self_attn.k_proj", "2.self_attn.q_proj", "2.self_attn.k_proj"]
    );
    assert_eq!(
        chosen(json!({"target_modules": ["mlp.up_proj", "q_proj"], "exclude_modules": ["0.self_attn.q_proj"],
            "layers_to_transform": [0, 2], "layers_pattern": ["layers"]})),
        ["0.mlp.up_proj", "2.self_attn.q_proj", "2.mlp.up_proj"]
    );
    assert_eq!(
        chosen(json!({"target_modules": null, "layers_to_transform": [2]})),
        ["2.self_attn.q_proj", "2.self_attn.v_proj"]
    );
    assert_eq!(
        chosen(json!({"target_modules": r"(?!.*mlp).*\.(?P<layer>[12])\.self_attn\.v_proj\Z"})),
        ["1.self_attn.v_proj", "2.self_attn.v_proj"]
    );
    // `proj` alone is no part between dots
    let folder = copied("lora/qv");
    write_safetensors::<&str>(folder.path().join("adapter_model.safetensors"), &[], &[]).unwrap();
    edit_config(folder.path(), |config| config["target_modules"] = json!(["proj", "_proj"]));
    let error = LoRAAdapter::load(&model, folder.path()).unwrap_err().to_string();
    assert!(error.contains("matches no linear layer"), "{error}");
}

#[test]
fn first_matching_pattern_counts_and_scales_follow() {
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::load(&model, golden::path("lora/patterns")).unwrap();
    let found: Vec<_> = adapter
        .modules()
        .iter()
        .map(|module| (module.layer.unwrap(), module.module, module.rank, module.alpha, module.scale))
        .collect();
    assert_eq!(
        found,
        [
            (1, "q_proj", 2, 3.0, 1.5),
            (1, "o_proj", 3, 20.0, 20.0 / 3.0),
            (1, "down_proj", 5, 6.0, 1.2),
            (2, "q_proj", 3, 6.0, 2.0),
            (2, "o_proj", 3, 20.0, 20.0 / 3.0),
            (2, "down_proj", 5, 6.0, 1.2),
        ]
    );
}

#[test]
fn what_cannot_be_applied_is_named() {
    let model = golden::model("models/gqa-tied");
    let cases = [
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("some")),
        ("lora_bias", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("target_parameters", json!(["mlp.experts"])),
        ("alora_invocation_tokens", json!([1, 2])),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("peft_type", json!("IA3")),
        ("target_modules", json!("(q_proj")),
    ];
    for (key, value) in cases {
        let folder = copied("lora/qv");
        edit_config(folder.path(), |config| config[key] = value);
        match LoRAAdapter::load(&model, folder.path()).unwrap_err() {
            Error::Unsupported(message) => assert!(message.contains(&format!("`{key}`")), "{message}"),
            other => panic!("{key}: {other:?}"),
        }
    }
    for (key, value) in [("r", json!(-1)), ("r", json!("x")), ("rank_pattern", json!([1])), ("lora_alpha", json!([]))] {
        let folder = copied("lora/qv");
        edit_config(folder.path(), |config| config[key] = value.clone());
        let error = LoRAAdapter::load(&model, folder.path()).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{key} {value}: {error:?}");
        assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
    }
    let folder = copied("lora/qv");
    for (rank, expected) in [(u64::MAX, "too large"), (0, "found 0")] {
        edit_config(folder.path(), |config| config["r"] = json!(rank));
        let error = LoRAAdapter::load(&model, folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("adapter_config.json"), "{error}");
    }
    edit_config(folder.path(), |config| config["r"] = json!(1_u64 << 40));
    assert_eq!(problems(LoRAAdapter::load(&model, folder.path()).unwrap_err()).len(), 12);
}

#[test]
fn all_wrong_tensors_are_told_at_once() {
    let model = golden::model("models/gqa-tied");
    let folder = copied("lora/qv");
    let path = folder.path().join("adapter_model.safetensors");
    let mut tensors = tensors_of(&path);
    tensors.sort_by(|left, right| left.0.cmp(&right.0));
    tensors[0].0.push_str("_renamed");
    tensors[1].1 = tensors[1].1.t().unwrap().contiguous().unwrap();
    tensors[2].1 = tensors[2].1.to_dtype(DType::U32).unwrap();
    let marked = Tensor::full(1234.5_f32, tensors[3].1.shape(), &candle_core::Device::Cpu).unwrap();
    let nan = Tensor::full(f32::NAN, tensors[3].1.shape(), &candle_core::Device::Cpu).unwrap();
    tensors[3].1 = nan;
    let error = write_safetensors(&path, &tensors, &[]).unwrap_err().to_string();
    assert!(error.contains("v_proj.lora_B.weight") && error.contains("not finite"), "{error}");
    tensors[3].1 = marked;
    write_safetensors(&path, &tensors, &[]).unwrap();
    // no writer leaves such a value in a file, so it is put there by hand
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|window| window == 1234.5_f32.to_le_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let found = problems(LoRAAdapter::load(&model, folder.path()).unwrap_err());
    assert_eq!(found.len(), 5, "{found:?}");
    let prefix = "`base_model.model.model.layers.0.self_attn";
    assert_eq!(found[0], format!("{prefix}.q_proj.lora_A.weight` is missing"));
    assert_eq!(found[1], format!("{prefix}.q_proj.lora_B.weight`: expected shape [56, 4], found [4, 56]"));
    assert_eq!(found[2], format!("{prefix}.v_proj.lora_A.weight`: expected f32, f16 or bf16, found U32"));
    assert_eq!(found[3], format!("{prefix}.v_proj.lora_B.weight` contains a value that is not finite"));
    assert_eq!(found[4], format!("{prefix}.q_proj.lora_A.weight_renamed` is not expected"));
}

#[test]
fn half_precision_is_widened() {
    let model = golden::model("models/gqa-tied");
    for dtype in [DType::F16, DType::BF16] {
        let folder = copied("lora/qv");
        let path = folder.path().join("adapter_model.safetensors");
        let tensors: Vec<_> =
            tensors_of(&path).into_iter().map(|(name, tensor)| (name, tensor.to_dtype(dtype).unwrap())).collect();
        write_safetensors(&path, &tensors, &[]).unwrap();
        let adapter = LoRAAdapter::load(&model, folder.path()).unwrap();
        let (a, _) = adapter.matrices(&adapter.modules()[0]).unwrap();
        let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        let (_, expected) = tensors.iter().find(|(found, _)| found == name).unwrap();
        assert_eq!(max_difference(&a, &expected.to_dtype(DType::F32).unwrap()), 0.0);
    }
}

#[test]
fn damaged_folders_give_errors() {
    let model = golden::model("models/gqa-tied");
    let folder = copied("lora/qv");
    let path = folder.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for length in (0..bytes.len()).step_by(97) {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert!(LoRAAdapter::load(&model, folder.path()).is_err(), "cut to {length}");
    }
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for position in 0..8 + header {
        let mut flipped = bytes.clone();
        flipped[position] ^= 0x11;
        std::fs::write(&path, &flipped).unwrap();
        // spaces and the like may change without harm: what matters is that nothing panics
        if let Err(error) = LoRAAdapter::load(&model, folder.path()) {
            assert!(!error.to_string().is_empty());
        }
    }
    for lie in [u64::MAX, u64::MAX / 2, 1 << 40, 0] {
        let mut forged = bytes.clone();
        forged[..8].copy_from_slice(&lie.to_le_bytes());
        std::fs::write(&path, &forged).unwrap();
        assert!(matches!(LoRAAdapter::load(&model, folder.path()).unwrap_err(), Error::Format { .. }));
    }
    std::fs::rename(&path, folder.path().join("adapter_model.bin")).unwrap();
    let error = LoRAAdapter::load(&model, folder.path()).unwrap_err();
    assert!(matches!(&error, Error::Format { path, .. } if path.ends_with("adapter_model.bin")), "{error}");
    std::fs::remove_file(folder.path().join("adapter_model.bin")).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    for text in ["", "[1]", "{", "{}", "{\"peft_type\": 3}"] {
        std::fs::write(folder.path().join("adapter_config.json"), text).unwrap();
        let error = LoRAAdapter::load(&model, folder.path()).unwrap_err();
        assert!(error.to_string().contains("adapter_config.json"), "{text}: {error}");
    }
    std::fs::remove_file(folder.path().join("adapter_config.json")).unwrap();
    assert!(matches!(LoRAAdapter::load(&model, folder.path()).unwrap_err(), Error::Read { .. }));
}

#[test]
fn copies_of_the_base_are_accepted_and_another_head_is_used() {
    let model = golden::model("models/gqa-tied");
    let ids = [1, 5, 9];
    let plain = logits(&model, &LoRAAdapter::load(&model, golden::path("lora/qv")).unwrap(), &ids);
    let folder = copied("lora/qv");
    let path = folder.path().join("adapter_model.safetensors");
    let original = tensors_of(&path);
    let name = "model.embed_tokens.weight";
    let embedding = model.parameters().iter().find(|(found, _)| found == name).unwrap().1.tensor().unwrap();
    for copy in [embedding.clone(), embedding.to_dtype(DType::BF16).unwrap(), embedding.to_dtype(DType::F16).unwrap()] {
        let mut tensors = original.clone();
        tensors.push((format!("base_model.model.{name}"), copy));
        write_safetensors(&path, &tensors, &[]).unwrap();
        let adapter = LoRAAdapter::load(&model, folder.path()).unwrap();
        assert!(adapter.saved_parameters().is_empty());
        assert_eq!(max_difference(&logits(&model, &adapter, &ids), &plain), 0.0);
    }
    // PEFT changes embedding and head of a tied model together
    let mut tensors = original.clone();
    let doubled = (&embedding * 2.0).unwrap();
    tensors.push((format!("base_model.model.{name}"), doubled.clone()));
    write_safetensors(&path, &tensors, &[]).unwrap();
    let adapter = LoRAAdapter::load(&model, folder.path()).unwrap();
    let names: Vec<_> = adapter.saved_parameters().iter().map(|saved| saved.name.as_str()).collect();
    assert_eq!(names, [name, "lm_head.weight"]);
    for saved in adapter.saved_parameters() {
        assert_eq!(max_difference(&adapter.saved_tensor(saved).unwrap(), &doubled), 0.0);
    }
    // rows of single tokens
    let mut tensors = original.clone();
    let rows = Tensor::full(0.25_f32, (2, embedding.dim(1).unwrap()), &candle_core::Device::Cpu).unwrap();
    let delta = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
    tensors.push((delta.into(), rows.clone()));
    write_safetensors(&path, &tensors, &[]).unwrap();
    for indices in [json!([3, 9]), json!({"embed_tokens": [3, 9]})] {
        edit_config(folder.path(), |config| config["trainable_token_indices"] = indices);
        let adapter = LoRAAdapter::load(&model, folder.path()).unwrap();
        let saved = &adapter.saved_parameters()[0];
        assert_eq!((saved.shape.as_slice(), saved.rows.as_deref()), (rows.dims(), Some(&[3, 9][..])));
        assert!(adapter.run_model().config().tie_word_embeddings);
        let whole = &adapter.run_model().parameters()[0].1;
        let rows: Vec<Vec<f32>> = whole.to_dtype(DType::F32).unwrap().to_vec2().unwrap();
        let before: Vec<Vec<f32>> = embedding.to_dtype(DType::F32).unwrap().to_vec2().unwrap();
        for (token, (row, before)) in rows.iter().zip(&before).enumerate() {
            assert!(if token == 3 || token == 9 { row.iter().all(|value| *value == 0.25) } else { row == before });
        }
    }
    edit_config(folder.path(), |config| config["trainable_token_indices"] = json!([3, 1_000_000]));
    assert!(problems(LoRAAdapter::load(&model, folder.path()).unwrap_err())[0].contains("token 1000000"));
}

#[test]
fn tensors_that_peft_writes_more_than_once_are_compared() {
    // with `save_embedding_layers`, and for biases of modules that are trained as a whole
    let model = golden::model("models/gqa-tied");
    let folder = copied("methods/saved-embedding-tied");
    let path = folder.path().join("adapter_model.safetensors");
    let original = tensors_of(&path);
    let embedding = original.iter().find(|(name, _)| name.ends_with("embed_tokens.weight")).unwrap().1.clone();
    let with = |extra: &[(&str, &Tensor)]| {
        let mut tensors = original.clone();
        let named = |(name, tensor): &(&str, &Tensor)| (format!("base_model.model.{name}"), (*tensor).clone());
        tensors.extend(extra.iter().map(named));
        write_safetensors(&path, &tensors, &[]).unwrap();
        LoRAAdapter::load(&model, folder.path())
    };
    let ids = [1, 5, 9];
    let run = |adapter: &LoRAAdapter| {
        let terms = adapter.low_rank_updates().unwrap();
        adapter.run_model().forward(&Batch::single(&ids), Some(&terms), None, Rows::All).unwrap()
    };
    let apart = run(&with(&[]).unwrap());
    let (copy, before) = ("model.embed_tokens.modules_to_save.weight", "model.embed_tokens.original_module.weight");
    let doubled = (&embedding * 2.0).unwrap();
    let adapter = with(&[(copy, &embedding), (before, &doubled)]).unwrap();
    assert_eq!(max_difference(&run(&adapter), &apart), 0.0);
    let error = problems(with(&[(copy, &doubled)]).unwrap_err());
    assert!(error[0].contains("modules_to_save.weight` differs from"), "{error:?}");

    // PEFT writes the head, too, where it keeps it tied
    edit_config(folder.path(), |config| config["ensure_weight_tying"] = json!(true));
    let adapter = with(&[("lm_head.weight", &embedding)]).unwrap();
    assert_eq!(adapter.saved_parameters().len(), 1);
    assert!(adapter.run_model().config().tie_word_embeddings);
    assert!(max_difference(&run(&adapter), &apart) > 0.1);
    assert!(adapter.merge(&model).unwrap().config().tie_word_embeddings);
    let written = tempfile::tempdir().unwrap();
    adapter.save(written.path()).unwrap();
    let again = LoRAAdapter::load(&model, written.path()).unwrap();
    assert!(again.ensure_weight_tying());
    assert_eq!(max_difference(&run(&again), &run(&adapter)), 0.0);
    let error = problems(with(&[("lm_head.weight", &doubled)]).unwrap_err());
    assert!(error[0].contains("lm_head.weight` differs from"), "{error:?}");
}

#[test]
fn adapters_that_bring_another_head_are_not_trained() {
    let model = golden::model("models/untied");
    let folder = copied("methods/head");
    let path = folder.path().join("adapter_model.safetensors");
    let mut tensors = tensors_of(&path);
    let name = "model.embed_tokens.weight";
    let embedding = model.parameters().iter().find(|(found, _)| found == name).unwrap().1.tensor().unwrap();
    tensors.push((format!("base_model.model.{name}"), (embedding * 2.0).unwrap()));
    write_safetensors(&path, &tensors, &[]).unwrap();
    let adapter = LoRAAdapter::load(&model, folder.path()).unwrap();
    let error = Trainer::new(adapter, TrainingConfig::default()).err().unwrap().to_string();
    assert!(error.contains("replaces `model.embed_tokens.weight`"), "{error}");
}

#[test]
fn mlx_kinds_that_are_no_lora_are_refused() {
    let model = golden::model("models/gqa-tied");
    let cases = [
        ("fine_tune_type", json!("full"), "fine_tune_type"),
        ("fine_tune_type", json!("dora"), "q_proj.m` is missing"),
        ("lora_parameters", json!({"rank": 4, "scale": 4.0, "keys": ["self_attn.x_proj"]}), "self_attn.x_proj"),
        ("lora_parameters", json!({"scale": 4.0}), "rank"),
        ("num_layers", json!("all"), "num_layers"),
    ];
    for (key, value, expected) in cases {
        let folder = copied("mlx/qv");
        edit_config(folder.path(), |config| config[key] = value);
        let error = LoRAAdapter::load(&model, folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn one_file_holds_adapter_and_metadata() {
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::load(&model, golden::path("lora/patterns")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let metadata =
        CheckpointMetadata { step: Some(70), epoch: Some(2), loss: Some(0.1 + 0.2), note: Some("a \"note\"".into()) };
    save_checkpoint(&adapter, &path, Some(&metadata)).unwrap();
    let (again, found) = load_checkpoint(&model, &path).unwrap();
    assert_eq!(found, metadata);
    assert_eq!(again.modules(), adapter.modules());
    assert_eq!(max_difference(again.parameters(), adapter.parameters()), 0.0);
    let first = std::fs::read(&path).unwrap();
    save_checkpoint(&adapter, &path, None).unwrap();
    assert_ne!(std::fs::read(&path).unwrap(), first);
    let by_load = LoRAAdapter::load(&model, &path).unwrap();
    assert_eq!(by_load.modules(), adapter.modules());
    let error = load_checkpoint(&model, golden::path("lora/qv/adapter_model.safetensors")).unwrap_err().to_string();
    assert!(error.contains("adapter_config"), "{error}");
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["checkpoint.safetensors"]);
}
