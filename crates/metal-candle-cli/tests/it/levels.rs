//! Instruction sets: each level of the machine, chosen by `METAL_CANDLE_ISA`.

use crate::fixture::Fixture;
use serde_json::Value;

fn run(fixture: &Fixture, level: &str, words: &[&str]) -> (Option<i32>, String, String) {
    let output = fixture.command().env("METAL_CANDLE_ISA", level).args(words).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn every_level_of_the_machine_gives_the_same_text() {
    let fixture = Fixture::new();
    let (mut texts, mut kernels) = (Vec::new(), Vec::new());
    for level in ["", "baseline", "avx2", "avx-vnni", "avx512", "avx512-vnni", "avx512-bf16", "amx"] {
        let (code, out, err) = run(&fixture, level, &["info", "--json"]);
        if code != Some(0) {
            assert!(code == Some(1) && err.contains("METAL_CANDLE_ISA"), "{level}: {err}");
            continue;
        }
        let info: Value = serde_json::from_str(&out).unwrap();
        kernels.push(info["cpu"]["kernels"].to_string());
        let words = ["generate", "--prompt", "fn main() {", "--max-tokens", "24", "--temperature", "0", "--quiet"];
        let (code, out, err) = run(&fixture, level, &words);
        assert_eq!(code, Some(0), "{level}: {err}");
        texts.push(out);
    }
    // without the variable it is the highest level; each other one has kernels of its own
    assert_eq!(Some(&kernels[0]), kernels.last());
    assert!(kernels[1..].windows(2).all(|pair| pair[0] != pair[1]), "{kernels:?}");
    assert!(texts.iter().all(|text| *text == texts[0] && !text.is_empty()), "{texts:?}");
}

#[test]
fn an_unknown_level_is_refused() {
    let (code, _, err) = run(&Fixture::new(), "avx9", &["info"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("`METAL_CANDLE_ISA`: expected one of") && err.contains("found `avx9`"), "{err}");
}
