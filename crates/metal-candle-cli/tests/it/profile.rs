//! `train --profile`.

use crate::fixture::Fixture;
use serde_json::Value;

const SMALL: &str = "train --model model --data data --batch-tokens 128 --eval-interval 2 --test-samples 0 --profile";

/// The spans of `profile.json` in this run with this name.
fn spans(fixture: &Fixture, run: &str, name: &str) -> Vec<Value> {
    let trace: Value = serde_json::from_str(&fixture.text(&format!("{run}/profile.json"))).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    assert!(events.iter().all(|event| event["ph"] == "X" && event["ts"].is_f64() && event["dur"].is_f64()));
    events.iter().filter(|event| event["name"] == name).cloned().collect()
}

#[test]
fn steps_are_written_as_a_table_and_a_trace() {
    let fixture = Fixture::new();
    let ran = fixture.ok(&format!("{SMALL} --steps 5 --output run"));
    assert!(ran.stdout.is_empty(), "{}", ran.stdout);
    for text in [
        "time of the first 5 steps",
        "operation ",
        "step/forward/q_proj/product",
        "step/backward/down_proj/product",
        "step/forward/attention",
        "step/optimizer",
        "gemm",
        "run/profile.json",
    ] {
        assert!(ran.stderr.contains(text), "{text} is not in\n{}", ran.stderr);
    }
    assert_eq!((spans(&fixture, "run", "step").len(), spans(&fixture, "run", "optimizer").len()), (5, 5));
    // nothing of the evaluations: each product is a part of a step
    let time = |span: &Value, key: &str| span[key].as_f64().unwrap();
    let steps: Vec<_> = spans(&fixture, "run", "step")
        .iter()
        .map(|step| (time(step, "ts"), time(step, "ts") + time(step, "dur")))
        .collect();
    let products = spans(&fixture, "run", "product");
    assert!(products.len() > 5 * 2 * 7 * 2, "{}", products.len());
    for product in products {
        let begin = time(&product, "ts");
        assert!(steps.iter().any(|step| step.0 <= begin && begin <= step.1), "{product}");
    }
    assert!(!fixture.text("run/config.toml").contains("profile"));
}

#[test]
fn only_the_first_steps_are_recorded_and_a_run_may_go_on_with_it() {
    let fixture = Fixture::new();
    let ran = fixture.ok(&format!("{SMALL} --steps 23 --output run --json"));
    assert_eq!(ran.json()["profile"], "run/profile.json");
    assert!(!ran.stderr.contains("step/forward"), "{}", ran.stderr);
    assert_eq!(spans(&fixture, "run", "step").len(), 20);

    let ran = fixture.ok(&format!("{SMALL} --steps 2 --output quiet --quiet"));
    assert_eq!((ran.stdout.as_str(), ran.stderr.contains("step/forward")), ("", false), "{}", ran.stderr);
    assert_eq!(spans(&fixture, "quiet", "step").len(), 2);
    // the run is over: nothing is recorded, and what there is stays
    let ran = fixture.ok("train --resume quiet --profile --json");
    assert!(ran.json().get("profile").is_none());
    assert_eq!(spans(&fixture, "quiet", "step").len(), 2);
}
