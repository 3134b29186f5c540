//! LoRA adapters on golden models: start, layout, scales, swapping, merging.

use crate::golden::{self, max_difference};
use candle_core::{DType, Tensor};
use metal_candle::adapters::{LoRAAdapter, LoRAAdapterConfig, TargetModule};
use metal_candle::data::Random;
use metal_candle::models::{Batch, Rows};
use metal_candle::ops::{Adapters, LowRank, LowRankUpdates};
use metal_candle::{Device, Error, Model};

fn logits(model: &Model, adapter: Option<&LoRAAdapter>) -> Tensor {
    let batch = Batch::from_sequences([vec![7_u32, 83, 25, 91, 52], vec![3, 9]]);
    let terms = adapter.map(|adapter| adapter.low_rank_updates().unwrap());
    model.forward(&batch, terms.as_ref(), None, Rows::All).unwrap()
}

fn config(modules: &[TargetModule]) -> LoRAAdapterConfig {
    LoRAAdapterConfig { rank: 4, alpha: 8.0, dropout: 0.0, target_modules: modules.to_vec() }
}

#[test]
fn new_adapter_changes_no_logit() {
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::new(&model, config(&TargetModule::ALL), &Device::CPU).unwrap();
    assert_eq!(max_difference(&logits(&model, None), &logits(&model, Some(&adapter))), 0.0);
    for module in adapter.modules() {
        let (a, b) = adapter.matrices(module).unwrap();
        assert_eq!(a.dims(), [4, module.in_features]);
        assert_eq!(b.dims(), [module.out_features, 4]);
        assert!(b.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|&value| value == 0.0));
        let bound = 1.0 / (module.in_features as f32).sqrt();
        let values = a.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|value| value.abs() <= bound));
        let largest = values.iter().copied().fold(0.0, |largest: f32, value| largest.max(value.abs()));
        assert!(largest > 0.9 * bound, "{largest} {bound}");
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.2 * bound, "{mean} {bound}");
    }
}

#[test]
fn parameters_are_one_flat_tensor() {
    let model = golden::model("models/gqa-tied");
    let adapter =
        LoRAAdapter::new(&model, config(&[TargetModule::QProj, TargetModule::DownProj]), &Device::CPU).unwrap();
    let expected: usize = adapter.modules().iter().map(|module| 4 * (module.in_features + module.out_features)).sum();
    assert_eq!(adapter.num_parameters(), expected);
    assert_eq!(adapter.parameters().dims(), [expected]);
    assert_eq!(adapter.modules().len(), 2 * model.config().num_hidden_layers);
    assert!(adapter.summary().contains(&format!("{expected} trained of")), "{}", adapter.summary());
    // the matrices follow the tensor they are views of
    let doubled = adapter.with_parameters((adapter.parameters() * 2.0).unwrap()).unwrap();
    let (a, _) = adapter.matrices(&adapter.modules()[3]).unwrap();
    let (twice, _) = doubled.matrices(&doubled.modules()[3]).unwrap();
    assert_eq!(max_difference(&(a * 2.0).unwrap(), &twice), 0.0);
}

#[test]
fn a_depends_on_seed_and_path_only() {
    let model = golden::model("models/gqa-tied");
    let build = |modules: &[TargetModule], seed| {
        LoRAAdapter::builder(&model).with_target_modules(modules.to_vec()).with_seed(seed).build().unwrap()
    };
    let first = |adapter: &LoRAAdapter, name: &str| {
        let module = adapter.modules().iter().find(|module| module.module == name && module.layer == Some(1)).unwrap();
        adapter.matrices(module).unwrap().0
    };
    let all = build(&TargetModule::ALL, 5);
    let some = build(&[TargetModule::VProj], 5);
    let other = build(&[TargetModule::VProj], 6);
    assert_eq!(max_difference(&first(&all, "v_proj"), &first(&some, "v_proj")), 0.0);
    assert!(max_difference(&first(&other, "v_proj"), &first(&some, "v_proj")) > 1e-3);
    assert!(max_difference(&first(&all, "v_proj"), &first(&all, "k_proj")) > 1e-3);
}

#[test]
fn builder_sets_layers_scales_and_ranks() {
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::builder(&model)
        .with_rank(16)
        .with_alpha(8.0)
        .with_rslora(true)
        .with_target_modules([TargetModule::QProj, TargetModule::UpProj])
        .with_module_rank(TargetModule::UpProj, 4)
        .with_module_alpha(TargetModule::UpProj, 3.0)
        .with_last_layers(2)
        .build()
        .unwrap();
    let found: Vec<_> = adapter
        .modules()
        .iter()
        .map(|module| (module.layer.unwrap(), module.module, module.rank, module.scale))
        .collect();
    assert_eq!(found, [(1, "q_proj", 16, 2.0), (1, "up_proj", 4, 1.5), (2, "q_proj", 16, 2.0), (2, "up_proj", 4, 1.5)]);
    let plain = LoRAAdapter::builder(&model).with_rank(16).with_alpha(8.0).with_layers([0]).build().unwrap();
    assert!(plain.modules().iter().all(|module| module.layer == Some(0) && module.scale == 0.5));
}

#[test]
fn settings_out_of_range_are_refused() {
    let model = golden::model("models/gqa-tied");
    let name = |result: metal_candle::Result<LoRAAdapter>| match result.unwrap_err() {
        Error::Argument { name, .. } => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(name(LoRAAdapter::builder(&model).with_rank(0).build()), "rank");
    assert_eq!(name(LoRAAdapter::builder(&model).with_rank(1025).build()), "rank");
    assert_eq!(name(LoRAAdapter::builder(&model).with_rank(usize::MAX / 8).build()), "rank");
    assert_eq!(name(LoRAAdapter::builder(&model).with_alpha(f64::NAN).build()), "alpha");
    assert_eq!(name(LoRAAdapter::builder(&model).with_dropout(1.0).build()), "dropout");
    assert_eq!(name(LoRAAdapter::builder(&model).with_target_modules([]).build()), "target_modules");
    assert_eq!(name(LoRAAdapter::builder(&model).with_layers([3]).build()), "layers");
    let modules = TargetModule::parse_list("q_proj,w_proj").unwrap();
    let error = LoRAAdapter::builder(&model).with_target_modules(modules).build().unwrap_err().to_string();
    assert!(error.contains("`w_proj` selects no layer of the model; its modules are `q_proj`, `k_proj`"), "{error}");
    let error = TargetModule::parse_list("(q_proj").unwrap_err().to_string();
    assert!(error.contains("`(q_proj` is neither the name of a module nor a supported regular expression"), "{error}");
}

#[test]
fn adapters_are_swapped_and_detached_on_a_live_model() {
    let model = golden::model("models/gqa-tied");
    let first = LoRAAdapter::load(&model, golden::path("lora/qv")).unwrap();
    let second = LoRAAdapter::load(&model, golden::path("lora/all-linear")).unwrap();
    let plain = logits(&model, None);
    let with_first = logits(&model, Some(&first));
    let with_second = logits(&model, Some(&second));
    assert!(max_difference(&plain, &with_first) > 0.1);
    assert!(max_difference(&with_first, &with_second) > 0.1);
    assert_eq!(max_difference(&with_first, &logits(&model, Some(&first))), 0.0);
    assert_eq!(max_difference(&plain, &logits(&model, None)), 0.0);
}

#[test]
fn attaching_finds_layers_by_path() {
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::load(&model, golden::path("lora/qv")).unwrap();
    let again = adapter.attach(&golden::model("models/gqa-tied")).unwrap();
    assert_eq!(max_difference(&logits(&model, Some(&adapter)), &logits(again.model(), Some(&again))), 0.0);
    let error = adapter.attach(&golden::model("models/untied")).unwrap_err().to_string();
    assert!(error.contains("model.layers."), "{error}");
}

#[test]
fn merged_and_unmerged_logits_agree() {
    for name in ["qv", "all-linear", "patterns", "all-linear-rslora"] {
        let golden = golden::json(&format!("lora/{name}.json"));
        let model = golden::model(golden["model"].as_str().unwrap());
        let adapter = LoRAAdapter::load(&model, golden::path(&format!("lora/{name}"))).unwrap();
        let merged = adapter.merge(&model).unwrap();
        let (unmerged_logits, merged_logits) = (logits(&model, Some(&adapter)), logits(&merged, None));
        let difference = max_difference(&unmerged_logits, &merged_logits);
        assert!(difference < 1e-4, "{name}: {difference}");
        let back = adapter.unmerge(&merged).unwrap();
        for ((path, before), (_, after)) in
            golden::parameters_of(&model).iter().zip(&crate::golden::parameters_of(&back))
        {
            assert!(max_difference(before, after) < 1e-6, "{name}: {path}");
        }
    }
}

#[test]
fn merging_keeps_the_dtype_of_the_weights() {
    let model = metal_candle::ModelLoader::new().with_dtype(DType::BF16).load(golden::path("models/gqa-tied")).unwrap();
    let adapter = LoRAAdapter::load(&model, golden::path("lora/qv")).unwrap();
    let merged = adapter.merge(&model).unwrap();
    assert_eq!(merged.dtype(), DType::BF16);
    let name = "model.layers.0.self_attn.q_proj.weight";
    let weight = |model: &Model| {
        let (_, tensor) = model.parameters().iter().find(|(path, _)| path == name).unwrap();
        tensor.to_dtype(DType::F32).unwrap()
    };
    let module = &adapter.modules()[0];
    assert_eq!(module.path, "model.layers.0.self_attn.q_proj");
    let (a, b) = adapter.matrices(module).unwrap();
    let expected = (weight(&model) + (b.matmul(&a).unwrap() * module.scale).unwrap()).unwrap();
    let expected = expected.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    assert_eq!(max_difference(&weight(&merged), &expected), 0.0);
}

/// Low-rank updates of every linear layer, drawn from `seed`.
fn drawn_terms(model: &Model, seed: u64) -> LowRankUpdates {
    let mut random = Random::new(seed);
    let mut terms = LowRankUpdates::new();
    for (id, linear) in model.linears().iter().enumerate() {
        let mut draw = |rows: usize, columns: usize| {
            let values: Vec<f32> = (0..rows * columns).map(|_| random.next_f32() - 0.5).collect();
            Tensor::from_vec(values, (rows, columns), &candle_core::Device::Cpu).unwrap()
        };
        terms.insert(id, LowRank::new(draw(3, linear.in_features), draw(linear.out_features, 3), 0.5));
    }
    terms
}

#[test]
fn sequences_with_different_adapters_have_the_bits_of_single_ones() {
    let model = golden::model("models/gqa-tied");
    let sets = [drawn_terms(&model, 1), drawn_terms(&model, 2)];
    let texts: [&[u32]; 5] = [&[1, 2, 3], &[4, 5], &[6], &[7, 8, 9, 10, 11, 12], &[13, 14]];
    let of_sequence = [Some(1), None, Some(0), Some(0), Some(1)];
    let bits = |logits: Tensor| -> Vec<u32> {
        logits.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|value| value.to_bits()).collect()
    };
    for rows in [Rows::All, Rows::Last] {
        let adapters = Adapters { sets: &sets, of_sequence: &of_sequence };
        let batch = Batch::from_sequences(texts);
        let found = bits(model.forward_adapted(&batch, adapters, None, rows).unwrap());
        let single = texts.iter().zip(of_sequence).flat_map(|(ids, index)| {
            let terms = index.map(|index: u32| &sets[index as usize]);
            bits(model.forward(&Batch::single(ids), terms, None, rows).unwrap())
        });
        assert_eq!(found, single.collect::<Vec<_>>());
    }
    let adapters = Adapters { sets: &sets, of_sequence: &[Some(2)] };
    assert!(model.forward_adapted(&Batch::single(&[1]), adapters, None, Rows::All).is_err());
}
