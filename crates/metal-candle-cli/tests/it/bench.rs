//! `bench`, alone and beside a stand-in for another program.

use crate::fixture::{Fixture, nano};
use serde_json::Value;

/// Little of everything.
const LITTLE: &str = "--device cpu --prefill 24,40 --decode-batch 1,3 --context 8 --decode-tokens 9 --train-batch 2x16 \
                      --rank 4 --repeats 2";

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"))
}

/// Work, sequences, length and tokens of a row, whose speed must follow from its time.
fn checked(row: &Value) -> (&str, Option<u64>, u64, u64) {
    let (seconds, speed) = (number(row, "seconds"), number(row, "tokens_per_second"));
    assert!(seconds > 0.0 && (number(row, "tokens") / seconds / speed - 1.0).abs() < 1e-9, "{row}");
    assert!(number(row, "fastest_seconds") <= seconds && seconds <= number(row, "slowest_seconds"), "{row}");
    if cfg!(target_os = "linux") {
        assert!(number(row, "peak_memory_bytes") > 1e6, "{row}");
    }
    let size = |key: &str| row[key].as_u64();
    (row["work"].as_str().unwrap(), size("sequences"), size("length").unwrap(), size("tokens").unwrap())
}

#[test]
fn each_row_is_measured() {
    let fixture = Fixture::new();
    let report = fixture.ok(&format!("bench --model {} --json {LITTLE}", nano().display())).json();
    assert_eq!((&report["device"], &report["dtype"]), (&"cpu".into(), &"bf16".into()));
    assert_eq!(report["num_parameters"], 5_608_896);
    let rows = report["rows"].as_array().unwrap();
    let found: Vec<_> = rows.iter().map(checked).collect();
    let wanted = [
        ("prefill", None, 24, 24),
        ("prefill", None, 40, 40),
        ("decode", Some(1), 8, 1),
        ("decode", Some(3), 8, 3),
        ("train", Some(2), 16, 32),
    ];
    assert_eq!(found, wanted);
    // four of nine steps warm up
    let repeats: Vec<u64> = rows.iter().map(|row| row["repeats"].as_u64().unwrap()).collect();
    assert_eq!(repeats, [2, 2, 5, 5, 2]);
}

#[test]
fn parts_are_skipped_and_sizes_refused() {
    let fixture = Fixture::new();
    let ran = fixture.ok(&format!("bench --model model --skip prefill,train {LITTLE}"));
    assert!(ran.stdout.contains("decode 3, after 8") && !ran.stdout.contains("prefill"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("LoRA"), "{}", ran.stdout);
    for (flags, expected) in [
        ("--prefill 512", "`--prefill`: expected 1 to 511, found 512"),
        ("--decode-batch 33", "`--decode-batch`: expected 1 to 32, found 33"),
        ("--context 510", "`--context`: expected 1 to 448, found 510"),
        ("--train-batch 8", "such as `8x1024`"),
        ("--repeats 0", "`--repeats`: expected 1 to 1000, found 0"),
        ("--shape qwen2.5-7b", "cannot be used with"),
    ] {
        let ran = fixture.run(&format!("bench --device cpu --model model {flags}"));
        assert!(ran.code == 1 && ran.stderr.contains(expected), "{flags}: {}", ran.stderr);
    }
    // before any weights exist
    let ran = fixture.run("bench --device cpu --shape qwen2.5-0.5b --quantize q8_0 --decode-batch 33");
    assert!(ran.code == 1 && !ran.stderr.contains("random weights"), "{}", ran.stderr);
}

#[test]
fn another_program_that_is_not_there_is_said() {
    let fixture = Fixture::new();
    let ran = fixture.run("bench --model model --device cpu --against mlx-lm --python no-such-python");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("cannot run `no-such-python`") && ran.stderr.contains("--python"), "{}", ran.stderr);
}

/// A program that takes the place of Python.
#[cfg(unix)]
fn stand_in(fixture: &Fixture, script: &str) {
    use std::os::unix::fs::PermissionsExt;
    let path = fixture.path("python");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[cfg(unix)]
#[test]
fn a_python_without_the_packages_is_told_what_to_install() {
    let fixture = Fixture::new();
    stand_in(&fixture, r#"echo '{"missing": "No module named mlx"}'"#);
    let ran = fixture.run("bench --model model --device cpu --against mlx-lm --python ./python");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("hint: ./python -m pip install") && ran.stderr.contains("mlx-lm"), "{}", ran.stderr);
    stand_in(&fixture, "echo 'something broke' >&2; exit 3");
    let ran = fixture.run("bench --model model --device cpu --against transformers --python ./python");
    assert!(ran.code == 1 && ran.stderr.contains("something broke"), "{}", ran.stderr);
}

#[cfg(unix)]
#[test]
fn another_program_is_measured_beside_with_the_same_work() {
    let fixture = Fixture::new();
    stand_in(
        &fixture,
        r#"echo "$3 $4" > arguments
echo '{"name": "abacus 1"}'
while read -r line; do
    echo "$line" >> requests
    case "$line" in
    *train*) echo '{"error": "no beads left"}' ;;
    *) echo '{"seconds": [0.5, 0.25, 4.0], "peak_memory_bytes": 1000}' ;;
    esac
done"#,
    );
    let report = fixture
        .ok(&format!("bench --model model --json --against mlx-lm --python ./python --decode-rank 2 {LITTLE}"))
        .json();
    assert_eq!(fixture.text("arguments"), "mlx-lm cpu\n");
    assert_eq!(report["peer"], "abacus 1");
    let rows = report["rows"].as_array().unwrap();
    for row in &rows[..4] {
        assert_eq!(row["peer"]["seconds"], 0.5);
        let theirs = number(&row["peer"], "tokens_per_second");
        assert!((theirs / (2.0 * number(row, "tokens")) - 1.0).abs() < 1e-9, "{row}");
        let ratio = number(row, "tokens_per_second") / theirs;
        assert!((number(row, "ratio") / ratio - 1.0).abs() < 1e-9, "{row}");
    }
    assert!(rows[4]["ratio"].is_null() && rows[4]["peer"]["seconds"].is_null(), "{}", rows[4]);
    assert!(rows[4]["peer"]["remark"].as_str().unwrap().contains("no beads left"), "{}", rows[4]);
    let requests: Vec<Value> =
        fixture.text("requests").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(requests[0], serde_json::json!({"work": "load", "folder": "model", "dtype": "f32"}));
    assert_eq!(requests[1], serde_json::json!({"work": "prefill", "length": 24, "repeats": 2}));
    assert_eq!(requests[4], serde_json::json!({"work": "decode", "sequences": 3, "length": 8, "steps": 9, "rank": 2}));
    assert_eq!(requests.len(), 6);
}
