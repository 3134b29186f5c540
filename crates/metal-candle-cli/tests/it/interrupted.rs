//! Runs that are killed or stopped and go on.

use crate::fixture::Fixture;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const WORDS: &str = "train --model model --data data --steps 40 --batch-tokens 256 --save-interval 3 --eval-interval 5 \
                     --dropout 0.1 --learning-rate 0.01 --test-samples 0";

fn start(fixture: &Fixture, words: &str) -> Child {
    let mut command = fixture.command();
    command.args(words.split_whitespace()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Waits for the process, but not longer than until `deadline`; whether it has ended.
fn has_ended(child: &mut Child, deadline: Instant) -> bool {
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.try_wait().unwrap().is_some()
}

/// Files that must be the same, however often a run was interrupted.
fn outcome(fixture: &Fixture, run: &str) -> Vec<Vec<u8>> {
    let files = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl", "config.toml"];
    let mut outcome: Vec<_> = files.iter().map(|name| fixture.read(&format!("{run}/{name}"))).collect();
    outcome.push(fixture.read(&format!("{run}/checkpoints/step-000040/optimizer.safetensors")));
    outcome
}

#[test]
fn killed_at_any_moment_a_run_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    let started = Instant::now();
    fixture.ok(&format!("{WORDS} --output whole"));
    let whole_time = started.elapsed();

    // times between the first file and the end, random in each run of the test
    let mut state = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    let mut kills = 0;
    let mut words = format!("{WORDS} --output cut");
    for _ in 0..12 {
        let mut child = start(&fixture, &words);
        let wait = whole_time.mul_f64(random() * 0.9);
        let ended = has_ended(&mut child, Instant::now() + wait);
        if ended {
            assert!(child.wait().unwrap().success());
            // all that is left of this run is to say that it is done
            "train --resume cut".clone_into(&mut words);
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        // before the settings are written there is no run to go on with
        if fixture.path("cut/config.toml").exists() {
            "train --resume cut".clone_into(&mut words);
        } else {
            let _ = std::fs::remove_dir_all(fixture.path("cut"));
        }
    }
    fixture.ok(&words);
    for (whole, cut) in outcome(&fixture, "whole").iter().zip(outcome(&fixture, "cut")) {
        assert!(*whole == cut, "a file differs after {kills} kills");
    }
    // the plot and the events were written again from all steps
    let events = |run: &str| {
        let mut files = std::fs::read_dir(fixture.path(run)).unwrap().flatten().map(|entry| entry.path());
        let path = files.find(|path| path.display().to_string().contains("tfevents")).unwrap();
        let mut scalars = crate::events::scalars(&std::fs::read(path).unwrap());
        scalars.retain(|scalar| scalar.tag != "train/tokens_per_second");
        scalars
    };
    assert_eq!(events("whole"), events("cut"));
}

#[test]
fn ctrl_c_saves_and_the_run_goes_on_later() {
    let fixture = Fixture::new();
    fixture.ok(&format!("{WORDS} --output whole"));
    let mut child = start(&fixture, &format!("{WORDS} --output cut"));
    let deadline = Instant::now() + Duration::from_mins(1);
    while !has_ended(&mut child, Instant::now() + Duration::from_millis(5)) && Instant::now() < deadline {
        let steps = std::fs::read_to_string(fixture.path("cut/metrics.jsonl")).unwrap_or_default();
        if steps.lines().count() > 3 {
            break;
        }
    }
    let signal = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(signal.success());
    assert!(child.wait().unwrap().success());
    let done = fixture.text("cut/metrics.jsonl").lines().filter(|line| line.contains("\"step\",")).count();
    assert!(done < 40, "the signal came too late");
    let step = format!("cut/checkpoints/step-{done:06}/state.json");
    assert!(fixture.path(&step).exists(), "{step}");
    assert!(fixture.path("cut/adapter/adapter_model.safetensors").exists());
    fixture.ok("train --resume cut");
    assert!(outcome(&fixture, "whole") == outcome(&fixture, "cut"));
}

#[test]
fn ctrl_c_before_the_first_step_ends_cleanly() {
    let fixture = Fixture::new();
    // so much to evaluate that the signal comes before the first step
    let rows = fixture.text("data/valid.jsonl").repeat(400);
    std::fs::write(fixture.path("data/valid.jsonl"), rows).unwrap();
    let mut child = start(&fixture, &format!("{WORDS} --output cut"));
    let deadline = Instant::now() + Duration::from_mins(1);
    while !fixture.path("cut/config.toml").exists()
        && !has_ended(&mut child, Instant::now())
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    let signal = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(signal.success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!fixture.path("cut/adapter").exists(), "the signal came too late");
}

#[test]
fn a_resumed_run_keeps_its_settings() {
    let fixture = Fixture::new();
    fixture.ok(&format!("{WORDS} --output run"));
    let before = outcome(&fixture, "run");
    // a finished run has nothing to do, and says so again
    let json = fixture.ok("train --resume run --json").json();
    assert_eq!(json["steps"], 40);
    assert!(before == outcome(&fixture, "run"));
    let ran = fixture.run("train --resume run --rank 4");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("remove `--rank`"), "{}", ran.stderr);
    // other data is refused
    std::fs::write(fixture.path("data/train.jsonl"), fixture.text("data/valid.jsonl")).unwrap();
    let ran = fixture.run("train --resume run");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("dataset"), "{}", ran.stderr);
}
