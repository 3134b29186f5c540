//! The methods beside plain LoRA against PEFT: starts, magnitudes, embeddings, modules trained as a whole, patterns.

use crate::golden::{self, max_difference};
use crate::training_trainer::{config, golden_samples};
use candle_core::{DType, Tensor};
use metal_candle::adapters::{LoRAAdapter, LoRAModule, Start, TargetModule, TrainedBiases};
use metal_candle::inference::{GenerationConfig, Generator};
use metal_candle::models::{Batch, GradientOf, LossOptions, Parameters, Rows, SafetensorsFile, Trainable};
use metal_candle::training::{LastLayers, Trained, Trainer};
use metal_candle::{Error, Model};
use serde_json::Value;

const CASES: [&str; 20] = [
    "dora-qv",
    "dora-all",
    "dora-embeddings",
    "embeddings-tied",
    "embeddings",
    "head",
    "saved",
    "saved-head-tied",
    "saved-embedding-tied",
    "saved-in-blocks",
    "patterns-by-path",
    "some-layers",
    "pissa",
    "olora",
    "olora-patterns",
    "tokens-tied",
    "tokens-and-head",
    "bias-all",
    "dora-bias",
    "saved-tied",
];
const SUBTRACTED: [&str; 4] = ["pissa", "pissa-rslora", "olora", "olora-patterns"];

struct Case {
    facts: Value,
    file: SafetensorsFile,
    model: Model,
    folder: std::path::PathBuf,
}

fn case(name: &str) -> Case {
    let facts = golden::json(&format!("methods/{name}.json"));
    let file = SafetensorsFile::open(golden::path(&format!("methods/{name}.safetensors"))).unwrap();
    let model = golden::model(facts["model"].as_str().unwrap());
    Case { facts, file, model, folder: golden::path(&format!("methods/{name}")) }
}

fn logits(adapter: &LoRAAdapter, ids: &[u32]) -> Tensor {
    adapter
        .run_model()
        .forward(&Batch::single(ids), Some(&adapter.low_rank_updates().unwrap()), None, Rows::All)
        .unwrap()
}

fn plain_logits(model: &Model, ids: &[u32]) -> Tensor {
    model.forward(&Batch::single(ids), None, None, Rows::All).unwrap()
}

fn norm(tensor: &Tensor) -> f64 {
    f64::from(tensor.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
}

/// The keys of a module's parts in a file of PEFT.
fn keys(module: &LoRAModule) -> [String; 3] {
    let leaves = match module.module {
        "embed_tokens" => ["lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"],
        _ => ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"],
    };
    leaves.map(|leaf| format!("base_model.model.{}.{leaf}", module.path))
}

/// Compares loss and gradients of everything that is trained with those of the golden file.
fn compare_gradients(name: &str, case: &Case, adapter: &LoRAAdapter) {
    let (batch, targets) = golden::batch(&case.facts["batch"]);
    let trained: f32 = targets.weights.iter().sum();
    let options = LossOptions { grad_scale: 1.0 / trained, ..LossOptions::default() };
    let terms = adapter.low_rank_updates().unwrap();
    let parameters = adapter.trainable();
    let rows = adapter.token_rows();
    let of_model: Vec<GradientOf> = parameters[parameters.len() - adapter.saved_parameters().len()..]
        .iter()
        .map(|parameter| parameter.gradient)
        .collect();
    let place = |of: &GradientOf| if let GradientOf::Parameter(place) = of { Some(*place) } else { None };
    let places: Vec<usize> = of_model.iter().filter_map(place).collect();
    let trainable = Trainable { low_rank: Some(&terms), parameters: Parameters::WithRows(&places, &rows) };
    let (losses, gradients) = adapter.run_model().loss_and_gradients(&batch, &targets, trainable, options).unwrap();
    let loss = losses.rows.iter().map(|&loss| f64::from(loss)).sum::<f64>() / f64::from(trained);
    assert!((loss - case.facts["loss"].as_f64().unwrap()).abs() < 1e-4, "{name}: {loss}");
    let mut expected: Vec<(GradientOf, String)> = Vec::new();
    for module in adapter.modules() {
        let [a, b, magnitude] = keys(module);
        expected.extend([(GradientOf::A(module.number), a), (GradientOf::B(module.number), b)]);
        if adapter.use_dora() {
            expected.push((GradientOf::Magnitude(module.number), magnitude));
        }
    }
    let saved = adapter.saved_parameters().iter().map(|saved| {
        let (path, leaf) = saved.name.rsplit_once('.').unwrap();
        let has_terms = adapter.modules().iter().any(|module| module.path == path);
        match (&saved.rows, leaf) {
            (Some(_), _) => format!("base_model.model.{path}.token_adapter.trainable_tokens_delta"),
            (None, "bias") if has_terms => format!("base_model.model.{path}.base_layer.bias"),
            _ => format!("base_model.model.{}", saved.name),
        }
    });
    expected.extend(of_model.into_iter().zip(saved));
    let in_file = case.file.entries().iter().filter(|entry| entry.name.starts_with("grad.")).count();
    assert_eq!(expected.len(), in_file, "{name}");
    assert_eq!(parameters.iter().map(|parameter| parameter.gradient).collect::<Vec<_>>().len(), in_file, "{name}");
    for (of, key) in expected {
        let wanted = case.file.tensor(&format!("grad.{key}")).unwrap();
        let found = gradients.get(of).unwrap_or_else(|| panic!("{name}: no gradient for {key}"));
        assert_eq!(found.dims(), wanted.dims(), "{name}: {key}");
        let error = norm(&(found - &wanted).unwrap()) / norm(&wanted);
        assert!(error < 1e-4, "{name}: {key}: {error}");
    }
}

#[test]
fn logits_of_folders_are_those_of_peft() {
    for name in CASES.into_iter().chain(["pissa-rslora"]) {
        let case = case(name);
        let adapter = LoRAAdapter::load(&case.model, &case.folder).unwrap();
        let ids = golden::ids(&case.facts["logits_ids"]);
        let wanted = case.file.tensor("logits").unwrap();
        let difference = max_difference(&logits(&adapter, &ids), &wanted);
        assert!(difference < 2e-4, "{name}: {difference}");

        // merged, and taken out again
        let merged = adapter.merge(&case.model).unwrap();
        let difference = max_difference(&plain_logits(&merged, &ids), &wanted);
        assert!(difference < 3e-4, "{name}: merged {difference}");
        let back = adapter.unmerge(&merged).unwrap();
        assert_eq!(back.parameters().len(), case.model.parameters().len(), "{name}");
        for ((path, before), (_, after)) in
            golden::parameters_of(&case.model).iter().zip(&crate::golden::parameters_of(&back))
        {
            assert!(max_difference(before, after) < 1e-5, "{name}: {path}");
        }

        // written and read
        let folder = tempfile::tempdir().unwrap();
        adapter.save(folder.path()).unwrap();
        let again = LoRAAdapter::load(&case.model, folder.path()).unwrap();
        assert_eq!(again.modules(), adapter.modules(), "{name}");
        assert_eq!(again.saved_parameters(), adapter.saved_parameters(), "{name}");
        assert_eq!(max_difference(again.parameters(), adapter.parameters()), 0.0, "{name}");
    }
}

#[test]
fn gradients_are_those_of_peft() {
    for name in CASES.into_iter().filter(|name| !SUBTRACTED.contains(name)) {
        let case = case(name);
        let adapter = LoRAAdapter::load(&case.model, &case.folder).unwrap();
        compare_gradients(name, &case, &adapter);
    }
}

/// A new adapter with the settings of a golden case that subtracts its start.
fn subtracting(name: &str, model: &Model) -> LoRAAdapter {
    use TargetModule::{DownProj, KProj, OProj, QProj};
    let builder = LoRAAdapter::builder(model);
    let builder = match name {
        "pissa" => builder.with_rank(4).with_alpha(8.0).with_target_modules(TargetModule::ALL),
        "pissa-rslora" => builder.with_rank(3).with_alpha(6.0).with_target_modules([QProj, DownProj]).with_rslora(true),
        "olora" => builder.with_rank(3).with_alpha(6.0).with_target_modules(TargetModule::ALL),
        _ => builder
            .with_rank(3)
            .with_alpha(6.0)
            .with_target_modules([KProj, OProj])
            .with_rank_pattern("o_proj", 2)
            .with_alpha_pattern("k_proj", 5.0),
    };
    let start = if name.starts_with("pissa") { Start::Pissa { iterations: None } } else { Start::Olora };
    builder.with_start(start).build().unwrap()
}

/// The parameters that a golden file holds under a prefix, in the order of the adapter.
fn golden_parameters(case: &Case, adapter: &LoRAAdapter, prefix: &str) -> Tensor {
    let mut parts = Vec::new();
    for module in adapter.modules() {
        for key in keys(module).into_iter().take(2) {
            parts.push(case.file.tensor(&format!("{prefix}.{key}")).unwrap().flatten_all().unwrap());
        }
    }
    Tensor::cat(&parts, 0).unwrap()
}

#[test]
fn starts_that_are_subtracted_are_those_of_peft() {
    for name in SUBTRACTED {
        let case = case(name);
        let adapter = subtracting(name, &case.model);
        let ids = golden::ids(&case.facts["logits_ids"]);
        assert!(max_difference(&logits(&adapter, &ids), &plain_logits(&case.model, &ids)) < 1e-4, "{name}");
        for module in adapter.modules() {
            let [a, b, _] = keys(module).map(|key| case.file.tensor(&format!("start.{key}")));
            let (wanted_a, wanted_b) = (a.unwrap(), b.unwrap());
            let (a, b) = adapter.matrices(module).unwrap();
            assert_eq!((a.dims(), b.dims()), (wanted_a.dims(), wanted_b.dims()), "{name}: {}", module.path);
            let (product, wanted) = (b.matmul(&a).unwrap(), wanted_b.matmul(&wanted_a).unwrap());
            let error = norm(&(product - &wanted).unwrap()) / norm(&wanted);
            assert!(error < 1e-4, "{name}: {}: {error}", module.path);
            // each vector may have the other sign of a singular vector; those of QR have no choice
            let compare = |left: &Tensor, right: &Tensor| {
                if name.starts_with("olora") {
                    max_difference(left, right)
                } else {
                    max_difference(&left.abs().unwrap(), &right.abs().unwrap())
                }
            };
            assert!(compare(&a, &wanted_a) < 2e-3, "{name}: {}: {}", module.path, compare(&a, &wanted_a));
            assert!(compare(&b, &wanted_b) < 2e-3, "{name}: {}: {}", module.path, compare(&b, &wanted_b));
        }
        // away from the start
        let moved = adapter.with_parameters(golden_parameters(&case, &adapter, "value")).unwrap();
        let difference = max_difference(&logits(&moved, &ids), &case.file.tensor("logits").unwrap());
        assert!(difference < 3e-4, "{name}: {difference}");
        compare_gradients(name, &case, &moved);
        let merged = moved.merge(&case.model).unwrap();
        assert!(max_difference(&plain_logits(&merged, &ids), &case.file.tensor("logits").unwrap()) < 3e-4, "{name}");

        // the folder holds the difference to the start, as PEFT converts it
        let folder = tempfile::tempdir().unwrap();
        moved.save(folder.path()).unwrap();
        let config = |folder: &std::path::Path| -> Value {
            serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (ours, theirs) = (config(folder.path()), config(&case.folder));
        for key in ["r", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora", "target_modules"] {
            assert_eq!(ours[key], theirs[key], "{name}: {key}");
        }
        assert!((ours["lora_alpha"].as_f64().unwrap() - theirs["lora_alpha"].as_f64().unwrap()).abs() < 1e-12);
        let written = LoRAAdapter::load(&case.model, folder.path()).unwrap();
        let difference = max_difference(&logits(&written, &ids), &case.file.tensor("logits").unwrap());
        assert!(difference < 3e-4, "{name}: {difference}");
        let back = adapter.load_values(folder.path()).unwrap();
        assert_eq!(max_difference(&back, moved.parameters()), 0.0, "{name}");
        assert!(adapter.load_values(&golden::path("lora/qv")).is_err());
    }
}

#[test]
fn folders_that_leave_the_start_in_the_weights_are_read() {
    for name in ["pissa", "olora"] {
        let case = case(name);
        let adapter = subtracting(name, &case.model);
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = Vec::new();
        for module in adapter.modules() {
            for key in keys(module).into_iter().take(2) {
                let value = case.file.tensor(&format!("value.{key}")).unwrap();
                tensors.push((key, value));
            }
        }
        metal_candle::models::write_safetensors(folder.path().join("adapter_model.safetensors"), &tensors, &[])
            .unwrap();
        let config = serde_json::json!({
            "peft_type": "LORA", "r": adapter.rank(), "lora_alpha": adapter.alpha(), "init_lora_weights": name,
            "target_modules": TargetModule::ALL.map(TargetModule::name),
        });
        std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let read = LoRAAdapter::load(&case.model, folder.path()).unwrap();
        let ids = golden::ids(&case.facts["logits_ids"]);
        let difference = max_difference(&logits(&read, &ids), &case.file.tensor("logits").unwrap());
        assert!(difference < 3e-4, "{name}: {difference}");
    }
}

#[test]
fn new_adapters_of_all_kinds_change_no_logit() {
    for name in ["models/gqa-tied", "models/untied"] {
        let model = golden::model(name);
        let ids: Vec<u32> = (0..20).map(|i| i * 7 % 97).collect();
        let plain = plain_logits(&model, &ids);
        let starts = ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"];
        for (start, use_dora) in starts.into_iter().flat_map(|start| [(start, false), (start, true)]) {
            let targets = TargetModule::ALL.into_iter().chain([TargetModule::LmHead]);
            let adapter = LoRAAdapter::builder(&model)
                .with_rank(4)
                .with_target_modules(targets)
                .with_start(start.parse().unwrap())
                .with_dora(use_dora)
                .with_modules_to_save(["model.norm", "embed_tokens"])
                .build()
                .unwrap();
            let difference = max_difference(&logits(&adapter, &ids), &plain);
            assert!(difference < 1e-4, "{name}: {start} {use_dora}: {difference}");
            let written = adapter.without_start().unwrap();
            let difference = max_difference(&logits(&written, &ids), &plain);
            assert!(difference < 1e-4, "{name}: {start} {use_dora}: {difference}");
        }
        let adapter = LoRAAdapter::builder(&model).with_target_modules([TargetModule::EmbedTokens]).build().unwrap();
        assert_eq!(max_difference(&logits(&adapter, &ids), &plain), 0.0);
        let (a, b) = adapter.matrices(&adapter.modules()[0]).unwrap();
        assert_eq!(norm(&a), 0.0);
        let deviation = norm(&b) / (b.elem_count() as f64).sqrt();
        assert!((deviation - 1.0).abs() < 0.2, "{deviation}");
    }
}

#[test]
fn loftq_rounds_the_weights_and_holds_what_that_takes_away() {
    let facts = golden::json("methods/loftq.json");
    let file = SafetensorsFile::open(golden::path("methods/loftq.safetensors")).unwrap();
    let model = golden::model("models/untied");
    let name = "model.layers.1.mlp.down_proj.weight";
    let weight =
        |model: &Model| model.parameters().iter().find(|(found, _)| found == name).unwrap().1.tensor().unwrap();
    assert_eq!(max_difference(&weight(&model), &file.tensor("weight").unwrap()), 0.0);
    for case in facts["cases"].as_array().unwrap() {
        let (bits, iterations) = (case["bits"].as_u64().unwrap(), case["iterations"].as_u64().unwrap());
        let adapter = LoRAAdapter::builder(&model)
            .with_rank(4)
            .with_alpha(12.0)
            .with_target_modules([TargetModule::DownProj])
            .with_layers([1])
            .with_start(Start::Loftq { bits: bits as usize, iterations: iterations as usize })
            .build()
            .unwrap();
        let base = file.tensor(&format!("base.{bits}.{iterations}")).unwrap();
        let far = (weight(adapter.model()) - &base).unwrap().abs().unwrap();
        // a value next to the middle of two levels may fall to either after some turns
        let others = far.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().filter(|&&far| far > 1e-5).count();
        assert!(others <= base.elem_count() / 200, "{bits} {iterations}: {others}");
        let (a, b) = adapter.matrices(&adapter.modules()[0]).unwrap();
        let change = (b.matmul(&a).unwrap() * adapter.modules()[0].scale).unwrap();
        let wanted = file.tensor(&format!("change.{bits}.{iterations}")).unwrap();
        let error = norm(&(&change - &wanted).unwrap()) / norm(&wanted);
        assert!(error < if others == 0 { 1e-4 } else { 0.1 }, "{bits} {iterations}: {error}");
        let whole = (weight(adapter.model()) + &change).unwrap();
        let error = norm(&(whole - weight(&model)).unwrap()) / norm(&weight(&model));
        assert!(error < 1.02 * case["error"].as_f64().unwrap(), "{bits} {iterations}: {error}");
        assert!(error < case["error_of_rounding"].as_f64().unwrap());
        // nothing else is rounded
        for ((path, before), (_, after)) in
            golden::parameters_of(&model).iter().zip(&crate::golden::parameters_of(adapter.model()))
        {
            assert!(path == name || max_difference(before, after) == 0.0, "{path}");
        }
    }
}

fn losses_of<T: Trained>(start: T) -> Vec<f64> {
    let (dataset, batches) = golden_samples(&golden::json("training/ten_steps.json")["batches"]);
    let metrics = Trainer::of(start, config(1, 1e-2)).unwrap().with_batches(batches).train(&dataset).unwrap();
    metrics.steps.iter().map(|step| step.loss).collect()
}

fn compare_losses(name: &str, found: &[f64], wanted: &Value) {
    compare_losses_within(5e-4, name, found, wanted);
}

fn compare_losses_within(tolerance: f64, name: &str, found: &[f64], wanted: &Value) {
    let wanted: Vec<f64> = wanted.as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
    assert_eq!(found.len(), wanted.len());
    for (step, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        assert!((found - wanted).abs() < tolerance, "{name}: step {step}: {found} {wanted}");
    }
}

#[test]
fn ten_steps_are_those_of_peft() {
    for name in ["dora-qv", "embeddings-tied", "saved-head-tied", "patterns-by-path"] {
        let case = case(name);
        let adapter = LoRAAdapter::load(&case.model, &case.folder).unwrap();
        compare_losses(name, &losses_of(adapter), &case.facts["losses"]);
    }
    let case = case("olora-patterns");
    let adapter = subtracting("olora-patterns", &case.model);
    let moved = adapter.with_parameters(golden_parameters(&case, &adapter, "value")).unwrap();
    compare_losses("olora-patterns", &losses_of(moved), &case.facts["losses"]);
}

#[test]
fn rows_of_tokens_and_biases_are_trained_as_peft_does() {
    // AdamW makes large steps of the tiny gradients of tokens that are rare, so rounding shows where all rows are trained
    for (name, tolerance) in [("tokens-tied", 1e-5), ("bias-all", 1e-5), ("dora-bias", 1e-5), ("saved-tied", 1e-4)] {
        let case = case(name);
        let adapter = LoRAAdapter::load(&case.model, &case.folder).unwrap();
        compare_losses_within(tolerance, name, &losses_of(adapter), &case.facts["losses"]);
    }
}

#[test]
fn only_the_rows_of_the_chosen_tokens_change() {
    let (dataset, batches) = golden_samples(&golden::json("training/ten_steps.json")["batches"]);
    // with and without a copy in f32 that the steps change in place
    for dtype in [DType::F32, DType::BF16] {
        let model = metal_candle::ModelLoader::new().with_dtype(dtype).load(golden::path("models/gqa-tied")).unwrap();
        let before = model.parameters()[0].1.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        let start = LoRAAdapter::builder(&model).with_trainable_tokens([40, 3]).with_bias(TrainedBiases::LoraOnly);
        let start = start.build().unwrap();
        // q_proj and v_proj of three blocks have biases
        assert_eq!(start.saved_parameters().len(), 1 + 6);
        let trainer = Trainer::of(start.clone(), config(1, 1e-2)).unwrap().with_batches(batches.clone());
        assert_eq!(trainer.plan(&dataset).unwrap().trained_blocks, 3);
        trainer.train(&dataset).unwrap();
        let trained = trainer.lora_adapter();
        let embedding = |adapter: &LoRAAdapter| {
            assert!(adapter.run_model().config().tie_word_embeddings);
            adapter.run_model().parameters()[0].1.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(embedding(&start), before);
        let changed: Vec<usize> = before
            .iter()
            .zip(embedding(&trained))
            .enumerate()
            .filter_map(|(id, (before, after))| (*before != after).then_some(id))
            .collect();
        assert_eq!(changed, [3, 40]);
        assert_eq!(model.parameters()[0].1.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap(), before);
        // what PEFT would read is what runs
        let folder = tempfile::tempdir().unwrap();
        trained.save(folder.path()).unwrap();
        let again = LoRAAdapter::load(&model, folder.path()).unwrap();
        assert_eq!(again.trainable(), trained.trainable());
        assert_eq!(max_difference(&logits(&again, &[1, 40, 7]), &logits(&trained, &[1, 40, 7])), 0.0);
        assert!(max_difference(&logits(&again, &[1, 40, 7]), &plain_logits(&model, &[1, 40, 7])) > 0.01);
    }
    for (ids, expected) in [(vec![103], "outside the vocabulary of 103"), (vec![5, 5], "twice")] {
        let model = golden::model("models/gqa-tied");
        let error = LoRAAdapter::builder(&model).with_trainable_tokens(ids).build().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_last_layers_are_trained_as_torch_does() {
    let facts = golden::json("methods/full.json");
    let model = golden::model("models/gqa-tied");
    compare_losses("last layer", &losses_of(LastLayers::new(&model, 1).unwrap()), &facts["last_layer"]);
    compare_losses("all", &losses_of(model.clone()), &facts["all"]);
    for wrong in [0, 4] {
        assert!(LastLayers::new(&model, wrong).is_err());
    }
}

#[test]
fn frozen_layers_may_be_in_half_precision() {
    let model = metal_candle::ModelLoader::new().with_dtype(DType::BF16).load(golden::path("models/gqa-tied")).unwrap();
    let found = losses_of(LastLayers::new(&model, 2).unwrap());
    assert!(found.iter().all(|loss| loss.is_finite()) && found[9] < found[0], "{found:?}");
    let adapter = LoRAAdapter::builder(&model)
        .with_modules_to_save(["lm_head", "model.norm"])
        .with_target_modules([TargetModule::QProj, TargetModule::EmbedTokens])
        .build()
        .unwrap();
    let found = losses_of(adapter);
    assert!(found.iter().all(|loss| loss.is_finite()) && found[9] < found[0], "{found:?}");
}

#[test]
fn patterns_give_ranks_and_alphas_by_path() {
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::builder(&model)
        .with_rank(4)
        .with_alpha(8.0)
        .with_target_modules([TargetModule::QProj, TargetModule::UpProj])
        .with_rank_pattern(r"layers\.0\..*", 2)
        .with_rank_pattern("q_proj", 6)
        .with_alpha_pattern(r"layers\.[12]\.mlp\.up_proj", 3.0)
        .build()
        .unwrap();
    let found: Vec<_> =
        adapter.modules().iter().map(|module| (module.layer, module.module, module.rank, module.alpha)).collect();
    let expected = [
        (Some(0), "q_proj", 2, 8.0),
        (Some(0), "up_proj", 2, 8.0),
        (Some(1), "q_proj", 6, 8.0),
        (Some(1), "up_proj", 4, 3.0),
        (Some(2), "q_proj", 6, 8.0),
        (Some(2), "up_proj", 4, 3.0),
    ];
    assert_eq!(found, expected);
    let error = LoRAAdapter::builder(&model).with_rank_pattern("gate_proj", 2).build().unwrap_err();
    assert!(matches!(&error, Error::Argument { name, .. } if name == "rank_pattern"), "{error}");
    let error = LoRAAdapter::builder(&model).with_modules_to_save(["no_such"]).build().unwrap_err();
    assert!(matches!(&error, Error::Argument { name, .. } if name == "modules_to_save"), "{error}");
}

#[test]
fn mlx_lm_folders_hold_magnitudes_and_embeddings() {
    for name in ["dora-qv", "dora-all", "embeddings", "head"] {
        let case = case(name);
        let adapter = LoRAAdapter::load(&case.model, &case.folder).unwrap();
        let folder = tempfile::tempdir().unwrap();
        adapter.save_mlx(folder.path()).unwrap();
        let again = LoRAAdapter::load(&case.model, folder.path()).unwrap();
        let ids = golden::ids(&case.facts["logits_ids"]);
        let difference = max_difference(&logits(&again, &ids), &case.file.tensor("logits").unwrap());
        assert!(difference < 2e-4, "{name}: {difference}");
    }
    for (name, expected) in [("embeddings-tied", "tied"), ("saved", "in full")] {
        let case = case(name);
        let adapter = LoRAAdapter::load(&case.model, &case.folder).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let error = adapter.save_mlx(folder.path()).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(message) if message.contains(expected)), "{error}");
    }
}

#[test]
fn generation_with_magnitudes_follows_the_forward_pass() {
    for name in ["dora-all", "dora-embeddings"] {
        let case = case(name);
        let adapter = LoRAAdapter::load(&case.model, &case.folder).unwrap();
        let mut ids = golden::ids(&case.facts["logits_ids"]);
        let config = GenerationConfig::default().with_max_tokens(6).with_ignore_eos(true);
        let mut generator = Generator::new(case.model.clone()).with_adapter(adapter.low_rank_updates().unwrap());
        for _ in 0..2 {
            let found = generator.generate(ids.clone(), &config).unwrap().tokens;
            assert_eq!(found.len(), 6);
            for id in found {
                let last = logits(&adapter, &ids).get(ids.len() - 1).unwrap();
                assert_eq!(
                    last.argmax(0).unwrap().to_scalar::<u32>().unwrap(),
                    id,
                    "{name} after {} tokens",
                    ids.len()
                );
                ids.push(id);
            }
        }
    }
}
