//! Adapters in one batch, replaced and unloaded while they run.

use crate::running::{MODEL, Running, chat};
use candle_core::{Device, Tensor};
use metal_candle::adapters::{LoRAAdapter, LoRAAdapterConfig, TargetModule};
use metal_candle_server::ServerConfig;
use serde_json::json;
use std::path::Path;

/// Writes an adapter with values that change every answer.
pub(crate) fn write(folder: &Path, rank: usize, target: TargetModule) {
    let config = LoRAAdapterConfig { rank, alpha: 8.0, dropout: 0.0, target_modules: vec![target] };
    let adapter = LoRAAdapter::new(&MODEL, config, &metal_candle::Device::CPU).unwrap();
    let count = adapter.num_parameters();
    let values: Vec<f32> = (0..count).map(|index| ((index * 7919 + rank) % 211) as f32 / 211.0 - 0.5).collect();
    let values = Tensor::from_vec(values, count, &Device::Cpu).unwrap();
    adapter.with_parameters(values).unwrap().save(folder).unwrap();
}

#[test]
fn adapters_are_chosen_replaced_and_unloaded() {
    let root = tempfile::tempdir().unwrap();
    for (name, rank, target) in [("a", 2, TargetModule::QProj), ("b", 5, TargetModule::VProj)] {
        write(&root.path().join(name), rank, target);
    }
    let outside = tempfile::tempdir().unwrap();
    write(outside.path(), 2, TargetModule::QProj);
    #[cfg(unix)]
    std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
    let config = ServerConfig { adapter_root: Some(root.path().into()), max_adapters: 2, ..Running::small() };
    let server = Running::with_adapters(config, &[("first", &root.path().join("a"))]);
    let text = |model: &str| {
        let mut body = chat("Returns", 12);
        body["model"] = model.into();
        let answer = server.ok("/v1/chat/completions", &body);
        (
            answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
            answer["usage"]["prompt_tokens_details"]["cached_tokens"].clone(),
        )
    };
    let load = |body: serde_json::Value| server.post("/v1/adapters", &body);
    let (base, first) = (text("nano").0, text("first").0);
    assert_ne!(base, first);
    for path in ["../a", "/etc", "a/../../x", "nothing", "link", ""] {
        let (status, value) = load(json!({"name": "x", "path": path}));
        assert_eq!((status, &value["error"]["param"]), (400, &json!("path")), "{path}: {value}");
        assert!(!value.to_string().contains(&*root.path().to_string_lossy()), "{value}");
    }
    assert_eq!(load(json!({"name": "a/b", "path": "b"})).0, 400);
    let (status, second) = load(json!({"name": "second", "path": "b"}));
    assert_eq!((status, &second["rank"], &second["method"]), (201, &json!(5), &json!("lora")));
    assert_eq!(load(json!({"name": "third", "path": "b"})).0, 409);
    assert_eq!(load(json!({"name": "first", "path": "b"})).0, 409);
    assert_eq!(load(json!({"name": "first", "path": "b", "expected_generation": 77})).0, 409);
    let of_second = text("second").0;
    assert!(of_second != base && of_second != first);
    // by its number, as llama.cpp names it
    let numbers = server.get("/lora-adapters").1;
    let number = |name: &str| {
        let entry = numbers.as_array().unwrap().iter().find(|entry| entry["path"] == name).unwrap();
        assert_eq!(entry["scale"], 0.0);
        entry["id"].clone()
    };
    let complete = |body: serde_json::Value| {
        let mut body = body;
        (body["prompt"], body["temperature"], body["n_predict"]) = (json!("fn main() {"), json!(0), json!(12));
        body
    };
    let written = |body| server.ok("/completion", &complete(body))["content"].clone();
    for name in ["first", "second"] {
        let lora = json!([{"id": number(name), "scale": 1.0}, {"id": number("first"), "scale": 0}]);
        assert_eq!(written(json!({"lora": lora})), written(json!({"model": name})));
    }
    assert_eq!(written(json!({"lora": [{"id": number("first"), "scale": 0}]})), written(json!({})));
    let one = |name: &str| json!({"id": number(name), "scale": 1});
    let (half, unknown) = (json!({"id": number("first"), "scale": 0.5}), json!({"id": 999, "scale": 1}));
    for (lora, expected) in [
        (json!([half]), "lora[0].scale"),
        (json!([one("first"), one("second")]), "lora[1].scale"),
        (json!([unknown]), "lora[0].id"),
        (json!([{"scale": 1}]), "lora[0].id"),
    ] {
        let (status, param, _) = server.refusal("/completion", &complete(json!({"lora": lora})));
        assert_eq!((status, param.as_str()), (400, expected));
    }
    let contradiction = json!({"lora": [one("first")], "model": "second"});
    assert_eq!(server.refusal("/completion", &complete(contradiction)).1, "lora");
    // all at once, each as it is alone
    std::thread::scope(|scope| {
        for _ in 0..4 {
            for (model, expected) in [("nano", &base), ("first", &first), ("second", &of_second)] {
                scope.spawn(move || assert_eq!(&text(model).0, expected));
            }
        }
    });
    // a replaced adapter does not answer from the old one's cache
    let (status, replaced) = load(json!({"name": "first", "path": "b", "replace": true}));
    assert_eq!(status, 201);
    assert_eq!(text("first").0, of_second);
    let pinned = json!({"name": "first", "generation": replaced["generation"].as_u64().unwrap() - 1});
    let mut body = chat("Returns", 1);
    body["adapter"] = pinned;
    assert_eq!(server.post("/v1/chat/completions", &body).0, 409);
    assert_eq!(server.get("/v1/models").1["data"].as_array().unwrap().len(), 3);
    assert_eq!(server.delete("/v1/adapters/second").1["deleted"], true);
    assert_eq!(server.delete("/v1/adapters/second").0, 404);
    body = chat("Returns", 1);
    body["model"] = "second".into();
    assert_eq!(server.post("/v1/chat/completions", &body).0, 404);
    assert_eq!(text("nano").0, base);
}
