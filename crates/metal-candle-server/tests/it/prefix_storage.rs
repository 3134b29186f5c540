//! Prefixes survive a restart of the server, for equal models, adapters and keys only.

use crate::adapters::write;
use crate::running::{Running, answer};
use metal_candle::adapters::TargetModule;
use metal_candle::inference::PrefixStorage;
use metal_candle_server::{ApiKey, ServerConfig};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A prompt of more than 600 tokens.
fn prompt() -> String {
    (0..120).map(|i| format!("let value_{i} = {};\n", i * i)).collect::<Vec<_>>().concat()
}

/// A server with one key per letter.
fn config(folder: &Path, keys: &str) -> ServerConfig {
    let key = |name: char| ApiKey {
        name: name.into(),
        secret: format!("secret-of-{name}"),
        is_admin: true,
        max_running: 0,
        tokens_per_minute: 0,
    };
    ServerConfig {
        prefix_storage: Some(PrefixStorage { folder: folder.join("prefixes"), max_bytes: 1 << 30 }),
        context: 2048,
        slots: 2,
        metrics: true,
        keys: keys.chars().map(key).collect(),
        ..Running::small()
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder.join("prefixes")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Text and log-probabilities of an answer, and the numbers of cached tokens and of those read from files.
fn complete(server: &Running, key: &str, fields: &Value) -> (Value, u64, u64) {
    let mut body = json!({"prompt": prompt(), "max_tokens": 12, "temperature": 1.0, "seed": 5, "logprobs": 3});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let request = ureq::post(&format!("{}/v1/completions", server.url)).set("content-type", "application/json");
    let (status, value) = answer(request.set("x-api-key", &format!("secret-of-{key}")).send_string(&body.to_string()));
    assert_eq!(status, 200, "{value}");
    let metrics =
        answer(ureq::get(&format!("{}/metrics", server.url)).set("x-api-key", &format!("secret-of-{key}")).call()).1;
    let count = |name: &str| -> u64 {
        let line = metrics.as_str().unwrap().lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    };
    let cached = value["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(value["usage"]["prompt_tokens"].as_u64().unwrap() > 600);
    (value["choices"].clone(), cached, count("metal_candle_prefix_cache_disk_hits_total "))
}

#[test]
fn a_server_continues_prompts_of_an_earlier_one() {
    let folder = tempfile::tempdir().unwrap();
    let first = Running::start(config(folder.path(), "ab"));
    let (text, cached, read) = complete(&first, "a", &json!({}));
    assert_eq!((cached, read), (0, 0));
    drop(first);
    assert_eq!(files(folder.path()).len(), 1);

    // the keys in another order
    let second = Running::start(config(folder.path(), "ba"));
    let (found, cached, read) = complete(&second, "a", &json!({}));
    assert_eq!(found, text);
    assert!(cached > 600 && read == cached, "{cached} {read}");
    // another key, another salt
    for (key, fields) in [("b", json!({})), ("a", json!({"cache_salt": "x"}))] {
        let (found, cached, total) = complete(&second, key, &fields);
        assert_eq!((found, cached, total), (text.clone(), 0, read));
    }
    drop(second);
    // all keys by request, and none
    for config in [
        ServerConfig { share_prefixes: true, ..config(folder.path(), "ab") },
        ServerConfig { keys: Vec::new(), ..config(folder.path(), "ab") },
    ] {
        let (found, cached, read) = complete(&Running::start(config), "a", &json!({}));
        assert_eq!((found, cached, read), (text.clone(), 0, 0));
    }
    let shared = Running::start(ServerConfig { share_prefixes: true, ..config(folder.path(), "ab") });
    assert!(complete(&shared, "b", &json!({})).2 > 600);
    drop(shared);

    for path in files(folder.path()) {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(path, bytes).unwrap();
    }
    let (found, cached, read) = complete(&Running::start(config(folder.path(), "a")), "a", &json!({}));
    assert_eq!((found, cached, read), (text, 0, 0));
}

#[test]
fn prefixes_of_an_adapter_are_found_by_its_contents() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = |name: &str| folder.path().join(name);
    for (name, rank, target) in [("one", 2, TargetModule::QProj), ("other", 2, TargetModule::VProj)] {
        write(&adapter(name), rank, target);
    }
    let of = |name: &str| json!({"model": name});
    let server = Running::with_adapters(config(folder.path(), "a"), &[("x", &adapter("one"))]);
    let (text, _, read) = complete(&server, "a", &of("x"));
    assert_eq!(read, 0);
    drop(server);
    // the same contents under another name, and other contents under the same name
    let adapters = [("x", &*adapter("other")), ("y", &*adapter("one"))];
    let server = Running::with_adapters(config(folder.path(), "a"), &adapters);
    assert_eq!(complete(&server, "a", &of("x")).2, 0);
    assert_eq!(complete(&server, "a", &of("default")).2, 0);
    let (found, cached, read) = complete(&server, "a", &of("y"));
    assert_eq!(found, text);
    assert!(cached > 600 && read == cached, "{cached} {read}");
}
