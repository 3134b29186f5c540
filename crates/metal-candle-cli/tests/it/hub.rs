//! Models from a stand-in for the Hub.

use crate::fixture::{Fixture, Ran};
use crate::stand_in_hub::{Behaviour, COMMIT, StandInHub};
use std::collections::HashMap;

fn run(fixture: &Fixture, server: &StandInHub, words: &str, variables: &[(&str, &str)]) -> Ran {
    let mut command = fixture.command();
    command.args(words.split(' ')).env("HF_ENDPOINT", &server.endpoint).envs(variables.iter().copied());
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn a_hub_name_is_downloaded_once_and_used_like_a_folder() {
    let fixture = Fixture::new();
    let names =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let files: HashMap<_, _> =
        names.iter().map(|name| ((*name).to_owned(), fixture.read(&format!("model/{name}")))).collect();
    let server = StandInHub::start(Behaviour {
        files,
        token: Some("secret".into()),
        ranges: true,
        redirect: true,
        break_off_after: Some(100_000),
        breaks_left: 1,
    });
    let words = "generate --model org/model --prompt hi --temperature 0 --max-tokens 4";
    let ran = run(&fixture, &server, words, &[]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("HF_TOKEN") && ran.stderr.contains("401"), "{}", ran.stderr);

    let ran = run(&fixture, &server, words, &[("HF_TOKEN", "secret")]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let from_folder = fixture.ok("generate --model model --prompt hi --temperature 0 --max-tokens 4");
    assert_eq!(ran.stdout, from_folder.stdout);
    assert!(server.requests().iter().any(|request| request.contains("bytes=100000-")), "{:?}", server.requests());
    let snapshot = format!("hub/hub/models--org--model/snapshots/{COMMIT}/model.safetensors");
    assert_eq!(fixture.read(&snapshot), fixture.read("model/model.safetensors"));

    // from the cache, without a connection
    let asked = server.requests().len();
    let ran = run(&fixture, &server, words, &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(ran.stdout, from_folder.stdout);
    assert_eq!(server.requests().len(), asked);

    // a model without weights is named as such
    server.behaviour.lock().unwrap().files.remove("model.safetensors");
    let fresh = fixture.path("fresh").display().to_string();
    let ran = run(&fixture, &server, words, &[("HF_TOKEN", "secret"), ("HF_HUB_CACHE", &fresh)]);
    assert!(ran.stderr.contains("neither `model.safetensors` nor"), "{}", ran.stderr);
    let weights = fixture.read("model/model.safetensors");
    server.behaviour.lock().unwrap().files.insert("model.safetensors".into(), weights);

    let ran = run(&fixture, &server, "info --model org/other", &[("HF_TOKEN", "secret")]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("there is no model `org/other`"), "{}", ran.stderr);
    let cache = fixture.path("elsewhere").display().to_string();
    let variables = [("HF_TOKEN", "secret"), ("HF_HUB_CACHE", cache.as_str())];
    assert_eq!(run(&fixture, &server, &format!("info --model org/model@{COMMIT}"), &variables).code, 0);
    assert!(fixture.path("elsewhere/models--org--model").exists());
}
