//! Tests `runs`: listing and comparing runs, and the reports of a running run.

use crate::fixture::Fixture;
use serde_json::Value;
use std::process::Stdio;
use std::time::{Duration, Instant};

const SMALL: &str = "train --model model --data data --steps 8 --batch-tokens 128 --test-samples 0";

fn list(fixture: &Fixture, words: &str) -> Vec<Value> {
    serde_json::from_str(&fixture.ok(&format!("runs {words} --json")).stdout).unwrap()
}

fn names(runs: &[Value]) -> Vec<&str> {
    runs.iter().map(|run| run["run"].as_str().unwrap()).collect()
}

#[test]
fn runs_are_listed_sorted_and_compared() {
    let fixture = Fixture::new();
    let none = fixture.ok("runs");
    assert!(none.stdout.is_empty() && none.stderr.contains("no runs in `runs`"), "{}", none.stderr);
    assert_eq!(fixture.ok("runs --json").stdout, "[]\n");

    let trained = fixture.ok(&format!("{SMALL} --learning-rate 0.02 --json")).json();
    fixture.ok(&format!("{SMALL} --learning-rate 0.0001 --rank 2 --schedule constant"));
    let text = fixture.ok("runs").stdout;
    for part in ["in all runs: model model, data data", "optimizer adamw", "runs/001  done", "rank 2 alpha 4", "8/8"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let runs = list(&fixture, "");
    assert_eq!(names(&runs), ["runs/001", "runs/002"]);
    assert_eq!(runs[0]["valid_loss_last"], trained["valid_loss_after"]);
    assert_eq!(runs[0]["valid_loss_best"], trained["best_valid_loss"]);
    assert_eq!((&runs[0]["final_loss"], &runs[0]["steps"]), (&trained["final_loss"], &Value::from(8)));
    assert_eq!(runs[0]["settings"]["rank"], 8);
    assert!(runs[0]["seconds"].as_f64().unwrap() > 0.0 && runs[0]["tokens_per_second"].as_f64().unwrap() > 0.0);
    // the higher learning rate learns more here
    assert_eq!(names(&list(&fixture, "--sort held-out")), ["runs/001", "runs/002"]);
    assert_eq!(names(&list(&fixture, "--sort valid --reverse")), ["runs/002", "runs/001"]);
    assert_eq!(names(&list(&fixture, "runs/002 runs/001 --sort learning-rate")), ["runs/002", "runs/001"]);

    let ran = fixture.ok("runs compare runs/001 runs/002 --html page.html");
    for part in ["settings that differ", "learning_rate", "schedule", "validation loss, best", "trained parameters"] {
        assert!(ran.stdout.contains(part), "{part} is not in\n{}", ran.stdout);
    }
    assert!(!ran.stdout.contains("batch_tokens"), "what is the same is left out\n{}", ran.stdout);
    let page = fixture.text("page.html");
    assert!(page.starts_with("<!doctype html>") && page.contains("runs/002") && page.contains("<polyline"));

    let ran = fixture.run("runs compare runs/001 data");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("`data` is not a run folder"), "{}", ran.stderr);
    let ran = fixture.run("runs nowhere");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("`nowhere`"), "{}", ran.stderr);
}

#[test]
fn broken_folders_are_listed_with_what_is_wrong() {
    let fixture = Fixture::new();
    fixture.ok(SMALL);
    let runs = fixture.path("runs");
    std::fs::create_dir(runs.join("empty")).unwrap();
    std::fs::create_dir(runs.join("garbage")).unwrap();
    std::fs::write(runs.join("garbage/metrics.jsonl"), [0xff, 0x00, b'\n', b'{']).unwrap();
    std::fs::write(runs.join("garbage/run.json"), "{\"outcome\":").unwrap();
    let text = fixture.ok("runs --html page.html").stdout;
    for part in ["runs/001", "runs/empty: not a run", "runs/garbage: run.json: ", "metrics.jsonl: cannot read 2 lines"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(fixture.text("page.html").contains("cannot read 2 lines"));
    // lines that are cut off are one thing, the rest another
    let metrics = fixture.text("runs/001/metrics.jsonl");
    std::fs::write(runs.join("001/metrics.jsonl"), &metrics[..metrics.len() - 9]).unwrap();
    let listed = list(&fixture, "runs/001");
    assert!(listed[0]["problems"][0].as_str().unwrap().contains("cannot read a line"), "{}", listed[0]);
    assert!(listed[0]["train_loss"].is_f64());
}

#[test]
fn a_run_that_goes_on_is_told_from_one_that_was_killed() {
    let fixture = Fixture::new();
    let words = "train --model model --data data --steps 100000 --batch-tokens 256 --output cut --test-samples 0";
    let mut command = fixture.command();
    command.args(words.split_whitespace()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_mins(1);
    let steps = || std::fs::read_to_string(fixture.path("cut/metrics.jsonl")).unwrap_or_default().lines().count();
    while steps() < 3 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let running = list(&fixture, "cut");
    let second = fixture.run("train --resume cut");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((&running[0]["state"], &running[0]["total_steps"]), (&Value::from("running"), &Value::from(100_000)));
    assert_eq!(second.code, 1);
    assert!(second.stderr.contains("is being trained by another process"), "{}", second.stderr);
    assert_eq!(list(&fixture, "cut")[0]["state"], "killed");
}

#[test]
fn failures_and_warnings_are_recorded() {
    let fixture = Fixture::new();
    // the validation rows are also training rows, and the random model was not trained on a template
    std::fs::copy(fixture.path("data/train.jsonl"), fixture.path("data/valid.jsonl")).unwrap();
    let ran = fixture.ok(&format!("{SMALL} --output warned"));
    assert!(ran.stderr.contains("warning: 40 of 40 validation rows are also training rows"), "{}", ran.stderr);
    assert!(ran.stderr.contains("warning: the model was probably not trained on its chat template"), "{}", ran.stderr);
    let run = &list(&fixture, "warned")[0];
    let kinds: Vec<_> = run["warnings"].as_array().unwrap().iter().map(|warning| warning["kind"].as_str()).collect();
    assert!(kinds.contains(&Some("leaked rows")) && kinds.contains(&Some("unknown template")), "{run}");
    assert!(fixture.ok("runs warned").stdout.contains("warnings: unknown template, leaked rows"));

    let ran =
        fixture.run(&format!("{SMALL} --output failed --learning-rate 1e30 --max-grad-norm 0 --schedule constant"));
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let run = &list(&fixture, "failed")[0];
    assert_eq!(run["state"], "failed");
    assert!(run["problems"][0].as_str().unwrap().contains("the loss of an evaluation is NaN"), "{run}");
}

#[test]
fn a_dashboard_needs_a_terminal() {
    let fixture = Fixture::new();
    let ran = fixture.run(&format!("{SMALL} --tui --output run"));
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("`--tui` needs a terminal"), "{}", ran.stderr);
    assert!(!fixture.path("run").exists());
}
