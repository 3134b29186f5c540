//! Downloads from a stand-in for the Hub.

use crate::stand_in_hub::{Behaviour, COMMIT, StandInHub};
use metal_candle::Error;
use metal_candle::models::{Hub, HubName};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn weights() -> Vec<u8> {
    (0..700_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn behaviour() -> Behaviour {
    let files = HashMap::from([
        ("config.json".to_owned(), b"{}".to_vec()),
        ("tokenizer.json".to_owned(), b"{\"a\": 1}".to_vec()),
        ("model.safetensors".to_owned(), weights()),
    ]);
    Behaviour { files, ranges: true, redirect: true, ..Behaviour::default() }
}

fn name() -> HubName {
    "org/model".parse().unwrap()
}

fn fetch(hub: &Hub) -> metal_candle::Result<PathBuf> {
    hub.fetch_model(&name(), &mut |_| ())
}

fn check(folder: &Path) {
    assert!(folder.ends_with(format!("models--org--model/snapshots/{COMMIT}")), "{}", folder.display());
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{}");
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert!(!folder.join("generation_config.json").exists());
}

#[test]
fn files_land_where_other_programs_look_for_them() {
    let cache = tempfile::tempdir().unwrap();
    let server = StandInHub::start(behaviour());
    let hub = Hub::new(&server.endpoint, cache.path());
    let mut most = HashMap::new();
    let mut on_progress = |progress: metal_candle::models::DownloadProgress| {
        most.insert(progress.file.to_owned(), (progress.num_bytes, progress.total_bytes));
    };
    let folder = hub.fetch_model(&name(), &mut on_progress).unwrap();
    check(&folder);
    assert_eq!(most["model.safetensors"], (700_000, Some(700_000)));
    let model = cache.path().join("models--org--model");
    assert_eq!(std::fs::read_to_string(model.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(std::fs::read_dir(model.join("blobs")).unwrap().count(), 3);

    // a second time one question is asked: which commit is it now
    let before = server.requests().len();
    check(&fetch(&hub).unwrap());
    assert_eq!(server.requests().len(), before + 1);
    // and none where the commit is given, or the network is not to be used
    let by_commit: HubName = format!("org/model@{COMMIT}").parse().unwrap();
    check(&hub.fetch_model(&by_commit, &mut |_| ()).unwrap());
    check(&fetch(&hub.clone().with_offline(true)).unwrap());
    assert_eq!(server.requests().len(), before + 1);
    // nor is the cache of no use when the Hub does not answer
    check(&fetch(&Hub::new("http://127.0.0.1:1", cache.path())).unwrap());
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_stopped() {
    let cache = tempfile::tempdir().unwrap();
    let server = StandInHub::start(Behaviour { break_off_after: Some(300_000), breaks_left: 2, ..behaviour() });
    check(&fetch(&Hub::new(&server.endpoint, cache.path())).unwrap());
    let ranges: Vec<_> = server.requests().into_iter().filter(|r| r.contains("bytes=")).collect();
    assert_eq!(
        ranges,
        ["GET /storage/model.safetensors bytes=300000-", "GET /storage/model.safetensors bytes=600000-"]
    );
}

#[test]
fn an_earlier_partial_file_is_taken_up() {
    for (ranges, kept) in [(true, 250_000), (true, 700_000), (true, 900_000), (false, 250_000)] {
        let cache = tempfile::tempdir().unwrap();
        let server = StandInHub::start(Behaviour { ranges, ..behaviour() });
        let hub = Hub::new(&server.endpoint, cache.path());
        let folder = fetch(&hub).unwrap();
        let link = folder.join("model.safetensors");
        let blob = std::fs::canonicalize(&link).unwrap();
        let mut bytes = weights();
        bytes.resize(kept, 0);
        std::fs::write(blob.with_file_name(format!("{}.incomplete", blob.file_name().unwrap().display())), bytes)
            .unwrap();
        std::fs::remove_file(&blob).unwrap();
        check(&fetch(&hub).unwrap());
    }
}

#[test]
fn without_ranges_a_broken_download_starts_afresh() {
    let cache = tempfile::tempdir().unwrap();
    let broken =
        Behaviour { ranges: false, redirect: false, break_off_after: Some(300_000), breaks_left: 1, ..behaviour() };
    let server = StandInHub::start(broken);
    check(&fetch(&Hub::new(&server.endpoint, cache.path())).unwrap());
}

#[test]
fn shards_are_found_by_their_index() {
    let cache = tempfile::tempdir().unwrap();
    let mut state = behaviour();
    state.files.remove("model.safetensors");
    let index =
        br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    state.files.insert("model.safetensors.index.json".into(), index.to_vec());
    state.files.insert("model-1.safetensors".into(), vec![1; 10]);
    let server = StandInHub::start(state);
    let hub = Hub::new(&server.endpoint, cache.path());
    let error = fetch(&hub).unwrap_err().to_string();
    assert!(error.contains("no `model-2.safetensors`"), "{error}");
    // nothing incomplete is taken for a model
    assert!(fetch(&hub.clone().with_offline(true)).is_err());

    let cache = tempfile::tempdir().unwrap();
    server.behaviour.lock().unwrap().files.insert("model-2.safetensors".into(), vec![2; 10]);
    let folder = fetch(&Hub::new(&server.endpoint, cache.path())).unwrap();
    assert_eq!(std::fs::read(folder.join("model-2.safetensors")).unwrap(), vec![2; 10]);

    let evil = br#"{"weight_map": {"a": "../../evil.safetensors"}}"#;
    server.behaviour.lock().unwrap().files.insert("model.safetensors.index.json".into(), evil.to_vec());
    let cache = tempfile::tempdir().unwrap();
    let error = fetch(&Hub::new(&server.endpoint, cache.path())).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let server = StandInHub::start(Behaviour { token: Some("secret".into()), ..behaviour() });
    let hub = Hub::new(&server.endpoint, cache.path());
    let message = |hub: &Hub, name: &str| match hub.fetch_model(&name.parse().unwrap(), &mut |_| ()) {
        Err(Error::Hub(message)) => message,
        other => panic!("expected an error of the hub, found {other:?}"),
    };
    assert!(message(&hub, "org/model").contains("set `HF_TOKEN` (status 401)"));
    assert!(message(&hub.clone().with_token(Some("wrong".into())), "org/model").contains("the token has no access"));
    let hub = hub.with_token(Some(" secret\n".into()));
    assert!(message(&hub, "org/other").contains("there is no model `org/other`"));
    assert!(message(&hub, "org/model@v2").contains("has no revision `v2`"));
    assert!(message(&hub.clone().with_offline(true), "org/model").contains("HF_HUB_OFFLINE"));
    assert!(message(&Hub::new("http://127.0.0.1:1", cache.path()), "org/model").contains("cannot be reached"));
    server.behaviour.lock().unwrap().files.remove("model.safetensors");
    assert!(message(&hub, "org/model").contains("neither `model.safetensors` nor"));
    server.behaviour.lock().unwrap().files.clear();
    let cache = tempfile::tempdir().unwrap();
    let fresh = Hub::new(&server.endpoint, cache.path()).with_token(Some("secret".into()));
    assert!(message(&fresh, "org/model").contains("has no `config.json`"));
}
