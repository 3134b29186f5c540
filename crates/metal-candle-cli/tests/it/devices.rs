//! Training on several devices, which are processes of the CPU here.

use crate::fixture::Fixture;
use serde_json::Value;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const WORDS: &str = "train --model model --data data --device cpu --steps 20 --batch-tokens 512 --save-interval 5 \
                     --eval-interval 5 --learning-rate 0.01 --test-samples 0";

fn metrics(fixture: &Fixture, run: &str) -> Vec<Value> {
    fixture.text(&format!("{run}/metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn two_processes_train_as_one() {
    let fixture = Fixture::new();
    let alone = fixture.ok(&format!("{WORDS} --output alone --json")).json();
    let ran = fixture.ok(&format!("{WORDS} --output both --num-devices 2 --json"));
    assert!(ran.stderr.contains("on 2 x cpu"), "{}", ran.stderr);
    let both = ran.json();
    for key in ["steps", "stop_reason"] {
        assert_eq!(alone[key], both[key], "{key}");
    }
    let (expected, found) = (metrics(&fixture, "alone"), metrics(&fixture, "both"));
    assert_eq!(expected.len(), found.len());
    for (expected, found) in expected.iter().zip(&found) {
        let [expected_loss, loss] = [expected, found].map(|row| row["loss"].as_f64().unwrap());
        assert!((expected_loss - loss).abs() < 1e-5, "{expected} {found}");
        for key in ["event", "step", "tokens", "trained_tokens", "learning_rate"] {
            assert_eq!(expected[key], found[key], "{key}");
        }
    }
    let record: Value = serde_json::from_str(&fixture.text("both/run.json")).unwrap();
    assert_eq!((&record["outcome"], &record["device"]), (&"done".into(), &"2 x cpu".into()));
    let refused = fixture.run("train --num-devices 2 --device metal");
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("there is one Metal device"), "{}", refused.stderr);
    assert_eq!(fixture.run("train --num-devices 0").code, 1);
    // an error of both processes is reported once, by the first
    let refused = fixture.run("train --model model --data nowhere --num-devices 2 --device cpu");
    assert_eq!((refused.code, refused.stderr.matches("nowhere").count()), (1, 1), "{}", refused.stderr);
}

/// The processes of the ranks that `parent` started, in order.
#[cfg(target_os = "linux")]
fn ranks_of(parent: u32) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        if status.lines().any(|line| line.split_whitespace().eq(["PPid:", &parent.to_string()])) {
            let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            let rank = String::from_utf8_lossy(&environment)
                .split('\0')
                .find_map(|variable| variable.strip_prefix("METAL_CANDLE_RANK=").map(str::to_owned));
            found.extend(rank.map(|rank| (rank, entry.file_name().into_string().unwrap())));
        }
    }
    found.sort();
    found.into_iter().map(|(_, process)| process).collect()
}

fn start(fixture: &Fixture, words: &str) -> Child {
    let mut command = fixture.command();
    command.args(words.split_whitespace()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until the run has done more than `steps` steps.
fn wait_for(fixture: &Fixture, run: &str, steps: usize) {
    let deadline = Instant::now() + Duration::from_mins(2);
    while Instant::now() < deadline {
        let text = std::fs::read_to_string(fixture.path(&format!("{run}/metrics.jsonl"))).unwrap_or_default();
        if text.lines().count() > steps {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("no step is done");
}

#[cfg(unix)]
fn signal(name: &str, process: &str) {
    assert!(std::process::Command::new("kill").args([name, process]).status().unwrap().success());
}

#[cfg(target_os = "linux")]
#[test]
fn a_killed_process_ends_the_run_with_an_error() {
    let fixture = Fixture::new();
    for (number, run) in [(1, "second"), (0, "first")] {
        let words = WORDS.replace("--steps 20", "--steps 100000");
        let child = start(&fixture, &format!("{words} --output {run} --num-devices 2"));
        wait_for(&fixture, run, 3);
        let ranks = ranks_of(child.id());
        assert_eq!(ranks.len(), 2);
        signal("-KILL", &ranks[number]);
        let started = Instant::now();
        let output = child.wait_with_output().unwrap();
        assert!(started.elapsed() < Duration::from_secs(30));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(&format!("device {number} of 2 ended first (signal: 9")), "{text}");
        for rank in ranks {
            assert!(!std::path::Path::new("/proc").join(rank).exists(), "a process is left");
        }
        if number == 1 {
            assert!(text.contains("error: rank 1: its process has ended"), "{text}");
            let record: Value = serde_json::from_str(&fixture.text("second/run.json")).unwrap();
            assert_eq!(record["outcome"], "failed");
        }
    }
    // and no process continues after its parent has ended
    let words = WORDS.replace("--steps 20", "--steps 100000");
    let mut child = start(&fixture, &format!("{words} --output orphans --num-devices 2"));
    wait_for(&fixture, "orphans", 3);
    let ranks = ranks_of(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let is_running = |rank: &String| {
        let status = std::fs::read_to_string(format!("/proc/{rank}/status")).unwrap_or_default();
        !status.is_empty() && !status.contains("State:\tZ")
    };
    while ranks.iter().any(is_running) {
        assert!(Instant::now() < deadline, "an orphan is still running");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_any_number_of_processes_goes_on() {
    let fixture = Fixture::new();
    let words = format!("{WORDS} --dropout 0.1").replace("--steps 20", "--steps 60");
    fixture.ok(&format!("{words} --output whole --num-devices 2"));
    let child = start(&fixture, &format!("{words} --output cut --num-devices 2"));
    wait_for(&fixture, "cut", 3);
    signal("-INT", &child.id().to_string());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let done = metrics(&fixture, "cut").iter().filter(|row| row["event"] == "step").count();
    assert!(done < 60, "the signal came too late");
    assert!(fixture.path(&format!("cut/checkpoints/step-{done:06}/state.json")).exists());
    std::fs::create_dir(fixture.path("one")).unwrap();
    let copied =
        std::process::Command::new("cp").args(["-r", "cut/.", "one"]).current_dir(fixture.path(".")).status().unwrap();
    assert!(copied.success());
    fixture.ok("train --resume cut --num-devices 2");
    for name in ["adapter/adapter_model.safetensors", "metrics.jsonl", "config.toml"] {
        let [whole, cut] = ["whole", "cut"].map(|run| fixture.read(&format!("{run}/{name}")));
        assert!(whole == cut, "{name} differs");
    }
    let json = fixture.ok("train --resume one --json").json();
    assert_eq!(json["steps"], 60);
}
