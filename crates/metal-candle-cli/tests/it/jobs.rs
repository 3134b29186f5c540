//! Files and fine-tuning jobs of a server, over HTTP.

use crate::fixture::Fixture;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// A server that ends with its test.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(fixture: &Fixture) -> Self {
        let words = "serve --model model --device cpu --port 0 --json --jobs jobs --served-name base";
        let mut command = fixture.command();
        command.args(words.split(' ')).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = serde_json::from_str::<Value>(&line).unwrap()["url"].as_str().unwrap().to_owned();
        Self { child, address: url.trim_start_matches("http://").to_owned() }
    }

    fn request(&self, head: &str, kind: &str, body: &[u8]) -> (u16, Value) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let (address, length) = (&self.address, body.len());
        let lines = format!("Host: {address}\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {length}");
        stream.write_all(format!("{head} HTTP/1.1\r\n{lines}\r\n\r\n").as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or_else(|_| body.into()))
    }

    fn get(&self, path: &str) -> Value {
        let (status, value) = self.request(&format!("GET {path}"), "application/json", b"");
        assert_eq!(status, 200, "{path}: {value}");
        value
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.request(&format!("POST {path}"), "application/json", body.to_string().as_bytes())
    }

    fn upload(&self, rows: &str) -> Value {
        let part = "--x\r\nContent-Disposition: form-data; name=";
        let body = format!(
            "{part}\"file\"; filename=\"../a.jsonl\"\r\n\r\n{rows}\r\n{part}\"purpose\"\r\n\r\nfine-tune\r\n--x--\r\n"
        );
        let (status, file) = self.request("POST /v1/files", "multipart/form-data; boundary=x", body.as_bytes());
        assert_eq!(status, 200, "{file}");
        file
    }

    fn create(&self, file: &Value, extras: &Value) -> String {
        let body = json!({"model": "base", "training_file": file["id"], "suffix": "s", "metal_candle": extras});
        let (status, job) = self.post("/v1/fine_tuning/jobs", &body);
        assert_eq!(status, 200, "{job}");
        job["id"].as_str().unwrap().to_owned()
    }

    /// Asks for a job until it is as expected.
    fn wait(&self, id: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let job = self.get(&format!("/v1/fine_tuning/jobs/{id}"));
            if is_so(&job) {
                return job;
            }
            let ended = ["failed", "cancelled", "succeeded"].iter().any(|status| job["status"] == *status);
            assert!(!ended && started.elapsed() < Duration::from_mins(1), "{job}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn chat(&self, model: &Value) -> (u16, Value) {
        let messages = json!([{"role": "user", "content": "/// Returns item 3."}]);
        self.post("/v1/chat/completions", &json!({"model": model, "messages": messages, "max_tokens": 4}))
    }

    /// All events, oldest first, read in small pages.
    fn events(&self, id: &str) -> Vec<Value> {
        let mut events: Vec<Value> = Vec::new();
        loop {
            let after =
                events.last().map_or(String::new(), |event| format!("&after={}", event["id"].as_str().unwrap()));
            let page = self.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=50&order=asc{after}"));
            events.extend(page["data"].as_array().unwrap().iter().cloned());
            if page["has_more"] == false {
                return events;
            }
        }
    }
}

fn steps(events: &[Value], name: &str) -> Vec<u64> {
    let rows = events.iter().filter(|event| event["type"] == "metrics" && !event["data"][name].is_null());
    rows.map(|event| event["data"]["step"].as_u64().unwrap()).collect()
}

#[test]
fn jobs_train_on_uploaded_files_and_their_adapters_are_served() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture);
    let good = server.upload(&fixture.text("data/train.jsonl"));
    assert_eq!((good["status"].as_str(), good["report"]["rows"].as_u64()), (Some("processed"), Some(40)), "{good}");
    let bad = server.upload("{\"messages\": []}\n{\"x\n");
    assert_eq!(bad["status"], "error", "{bad}");
    assert!(!bad.to_string().contains(&*fixture.path("").to_string_lossy()), "{bad}");
    let refused = server.post("/v1/fine_tuning/jobs", &json!({"model": "base", "training_file": bad["id"]}));
    assert!(refused.0 == 400 && refused.1["error"]["param"] == "training_file", "{refused:?}");
    let body = json!({"model": "base", "training_file": good["id"], "dry_run": true, "seed": 5});
    let (status, plan) = server.post("/v1/fine_tuning/jobs", &body);
    assert!(status == 200 && plan["plan"]["peak_memory_bytes"].as_u64().unwrap() > 0, "{plan}");

    let extras = json!({"rank": 4, "max_steps": 6, "save_interval": 2, "eval_interval": 2, "batch_tokens": 128});
    let id = server.create(&good, &extras);
    // the job has its own copy
    let (status, _) = server.request(&format!("DELETE /v1/files/{}", good["id"].as_str().unwrap()), "text/plain", b"");
    assert_eq!(status, 200);
    let job = server.wait(&id, |job| job["status"] == "succeeded");
    assert!(job["trained_tokens"].as_u64().unwrap() > 0 && job["error"].is_null(), "{job}");
    let name = job["fine_tuned_model"].as_str().unwrap();
    assert!(name.starts_with("ft:base:local:s:"), "{name}");
    let (status, answer) = server.chat(&job["fine_tuned_model"]);
    assert!(status == 200 && answer["model"] == name, "{answer}");
    let events = server.events(&id);
    assert_eq!(steps(&events, "train_loss"), [1, 2, 3, 4, 5, 6]);
    assert_eq!(steps(&events, "valid_loss"), [0, 2, 4, 6]);
    let newest = server.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=1"));
    assert_eq!(newest["data"][0], *events.last().unwrap());
    let checkpoints = server.get(&format!("/v1/fine_tuning/jobs/{id}/checkpoints"));
    assert_eq!(checkpoints["data"][0]["step_number"], 6);
    assert!(checkpoints["data"][0]["metrics"]["valid_loss"].is_number(), "{checkpoints}");
    let (status, answer) = server.chat(&checkpoints["data"][1]["fine_tuned_model_checkpoint"]);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(server.chat(&json!(format!("{name}:ckpt-step-99"))).0, 404);
    let (status, _) = server.post(&format!("/v1/fine_tuning/jobs/{id}/cancel"), &json!({}));
    assert_eq!(status, 409);
}

#[test]
fn jobs_are_cancelled_and_survive_a_kill_of_the_server() {
    let fixture = Fixture::new();
    let mut server = Server::start(&fixture);
    let file = server.upload(&fixture.text("data/train.jsonl"));
    let extras = json!({"max_steps": 100_000, "save_interval": 5, "eval_interval": 100, "batch_tokens": 64});
    let id = server.create(&file, &extras);
    let waiting = server.create(&file, &extras);
    server.wait(&id, |job| job["metal_candle"]["served_step"].is_number());
    for (id, status) in [(&waiting, "queued"), (&id, "running")] {
        assert_eq!(server.get(&format!("/v1/fine_tuning/jobs/{id}"))["status"], status);
        let (status, job) = server.post(&format!("/v1/fine_tuning/jobs/{id}/cancel"), &json!({}));
        assert!(status == 200 && job["status"] == "cancelled" && job["finished_at"].is_number(), "{job}");
    }

    let extras = json!({"max_steps": 200, "save_interval": 5, "eval_interval": 100, "batch_tokens": 64});
    let id = server.create(&file, &extras);
    server.wait(&id, |job| job["metal_candle"]["served_step"].is_number());
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let restarted = Server::start(&fixture);
    let job = restarted.wait(&id, |job| job["status"] == "succeeded");
    let events = restarted.events(&id);
    assert!(events.iter().any(|event| event["message"] == "Fine-tuning job resumed"), "{events:?}");
    assert_eq!(steps(&events, "train_loss"), (1..=200).collect::<Vec<u64>>());
    assert_eq!(restarted.chat(&job["fine_tuned_model"]).0, 200);
    assert_eq!(restarted.get("/v1/fine_tuning/jobs")["data"].as_array().unwrap().len(), 3);
}
