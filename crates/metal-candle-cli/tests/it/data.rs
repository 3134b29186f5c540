//! `data check`.

use crate::fixture::Fixture;

#[test]
fn numbers_and_rows() {
    let fixture = Fixture::new();
    let ran = fixture.ok("data check data --model model --rows 2");
    for text in ["train.jsonl", "rows            40 (40 chat)", "row lengths", "assistant", "line 1 (", "line 2 ("] {
        assert!(ran.stdout.contains(text), "{text} is not in\n{}", ran.stdout);
    }
    // without a terminal what is trained stands between brackets
    assert!(ran.stdout.contains("⟦fn item_0() -> usize<|im_end|>"), "{}", ran.stdout);
    assert!(!ran.stdout.contains('\x1b'));
    let json = fixture.ok("data check data --model model --json").json();
    assert_eq!(json["files"][0]["rows"], 40);
    let rows = json["rows"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[2]["line"]), (3, &3.into()));
    assert!(rows[2]["text"].as_str().unwrap().contains("fn item_2()"), "{}", rows[2]);
    assert_eq!(rows[2]["ids"].as_array().unwrap().len(), rows[2]["trained"].as_array().unwrap().len());
    assert_eq!(json["leakage"]["count"], 0);
}

#[test]
fn a_folder_without_training_rows_is_enough_to_evaluate() {
    let fixture = Fixture::new();
    let remove = |name: &str| std::fs::remove_file(fixture.path(&format!("data/{name}.jsonl"))).unwrap();
    remove("train");
    for name in ["test", "valid"] {
        let found = fixture.ok("eval --model model --data data --json").json();
        assert_eq!(found["data"], format!("data/{name}.jsonl"));
        remove(name);
    }
    let ran = fixture.run("eval --model model --data data");
    assert!(ran.code == 1 && ran.stderr.contains("found none of them"), "{}", ran.stderr);
}

#[test]
fn duplicates_and_leakage_are_found() {
    let fixture = Fixture::new();
    let train = fixture.text("data/train.jsonl");
    let first = train.lines().next().unwrap();
    std::fs::write(fixture.path("data/train.jsonl"), format!("{train}{first}\n")).unwrap();
    std::fs::write(fixture.path("data/valid.jsonl"), format!("{first}\n")).unwrap();
    let json = fixture.ok("data check data --model model --json").json();
    assert_eq!(json["files"][0]["exact_duplicates"]["count"], 1);
    assert_eq!(json["leakage"]["count"], 1);
    let text = fixture.ok("data check data --model model").stdout;
    assert!(text.contains("line 41 is line 1"), "{text}");
}

#[test]
fn rows_that_cannot_be_used_are_listed_with_their_lines() {
    let fixture = Fixture::new();
    let rows = "{\"text\": \"fine\"}\n{\"wrong\": 1}\nnot json\n\n{\"messages\": []}\n";
    std::fs::write(fixture.path("bad.jsonl"), rows).unwrap();
    let ran = fixture.run("data check bad.jsonl --model model");
    assert_eq!(ran.code, 1);
    for line in ["bad.jsonl:2:", "bad.jsonl:3:", "bad.jsonl:5:"] {
        assert!(ran.stderr.contains(line), "{line} is not in\n{}", ran.stderr);
    }
    assert!(ran.stdout.contains("rows            1 "), "{}", ran.stdout);
    // a table of nothing helps no one
    std::fs::write(fixture.path("empty.jsonl"), "{\"wrong\": 1}\n").unwrap();
    let ran = fixture.run("data check empty.jsonl --model model");
    assert!(ran.code == 1 && ran.stdout.is_empty(), "{}", ran.stdout);
    assert!(ran.stderr.contains("empty.jsonl:1:"), "{}", ran.stderr);
}
