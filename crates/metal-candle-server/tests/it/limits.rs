//! Queues, cancellation, slow readers, keys and shutting down.

use crate::running::{Running, chat};
use metal_candle::inference::KVCacheType;
use metal_candle_server::{ApiKey, ServerConfig};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A request with a long answer.
fn endless(stream: bool) -> serde_json::Value {
    // the log-probabilities make it slow
    json!({"prompt": "fn main() {", "max_tokens": 2000, "ignore_eos": true, "stream": stream, "logprobs": 5, "seed": 1})
}

fn raw(server: &Running, body: &str) -> TcpStream {
    raw_to(server, "/v1/completions", body)
}

fn raw_to(server: &Running, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    stream
}

#[test]
fn a_client_that_leaves_frees_its_slot() {
    let server = Running::start(ServerConfig { slots: 1, context: 2048, metrics: true, ..Running::small() });
    let metric = |line: &str| server.get("/metrics").1.as_str().unwrap().lines().any(|found| found == line);
    for (number, stream) in [true, false].into_iter().enumerate() {
        let first = raw(&server, &endless(stream).to_string());
        server.wait_for("running", 1);
        // one that waits leaves, too, before it has got a slot
        let second = raw(&server, &endless(stream).to_string());
        server.wait_for("waiting", 1);
        drop(second);
        server.wait_for("waiting", 0);
        assert_eq!(server.get("/props").1["running"], 1);
        drop(first);
        server.wait_for("running", 0);
        assert!(metric(&format!("metal_candle_requests_total{{finish_reason=\"cancelled\"}} {}", number + 1)));
    }
    assert!(metric("metal_candle_requests_total{finish_reason=\"max_tokens\"} 0"));
}

#[test]
fn a_full_queue_is_said_at_once() {
    let server = Running::start(ServerConfig { slots: 1, context: 2048, max_waiting: 1, ..Running::small() });
    // more than ever run at a time
    assert_eq!(server.refusal("/completion", &json!({"prompt": "a", "n": 2})).1, "n");
    let _running = raw(&server, &endless(true).to_string());
    server.wait_for("running", 1);
    let _waiting = raw(&server, &endless(true).to_string());
    server.wait_for("waiting", 1);
    let started = Instant::now();
    let request = ureq::post(&format!("{}/v1/completions", server.url)).set("content-type", "application/json");
    let Err(ureq::Error::Status(503, response)) = request.send_string(&endless(false).to_string()) else {
        panic!("it was not refused");
    };
    assert_eq!(response.header("retry-after"), Some("1"));
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_slow_reader_is_paused_and_holds_up_nobody() {
    let stall_timeout = Duration::from_millis(700);
    let config = ServerConfig { slots: 8, context: 2048, stall_timeout, metrics: true, ..Running::small() };
    let server = Running::start(config);
    // more than the buffers of a connection hold
    let mut long = chat("fn", 1900);
    for (name, value) in
        [("ignore_eos", json!(true)), ("stream", json!(true)), ("n", json!(6)), ("temperature", json!(1))]
    {
        long[name] = value;
    }
    (long["logprobs"], long["top_logprobs"]) = (true.into(), 20.into());
    let mut slow = raw_to(&server, "/v1/chat/completions", &long.to_string());
    let mut head = [0; 12];
    slow.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 200", "{}", {
        let mut rest = vec![0; 1000];
        let count = slow.read(&mut rest).unwrap();
        String::from_utf8_lossy(&rest[..count]).into_owned()
    });
    let metric = |line: &str| server.get("/metrics").1.as_str().unwrap().lines().any(|found| found == line);
    let started = Instant::now();
    while metric("metal_candle_slow_reader_pauses_total 0") {
        assert!(started.elapsed() < Duration::from_secs(30), "{}", server.get("/metrics").1);
        std::thread::sleep(Duration::from_millis(20));
    }
    let answer = server.ok("/v1/chat/completions", &chat("a", 10));
    assert!(answer["usage"]["completion_tokens"].as_u64() > Some(0));
    // one that takes nothing for long is ended
    server.wait_for("running", 0);
    assert!(metric("metal_candle_requests_total{finish_reason=\"timeout\"} 1"));
}

fn key(name: &str, is_admin: bool, max_running: usize, tokens_per_minute: u64) -> ApiKey {
    ApiKey { name: name.into(), secret: format!("secret-of-{name}"), is_admin, max_running, tokens_per_minute }
}

/// The text of a stream of completions.
fn text_of(stream: TcpStream) -> String {
    let mut text = String::new();
    for line in std::io::BufRead::lines(std::io::BufReader::new(stream)) {
        let Ok(line) = line else { break };
        let Some(data) = line.strip_prefix("data: {") else { continue };
        let event: serde_json::Value = serde_json::from_str(&format!("{{{data}")).unwrap();
        text.push_str(event["choices"][0]["text"].as_str().unwrap());
    }
    text
}

#[test]
fn a_key_with_every_slot_gives_some_to_another_and_loses_nothing() {
    let keys = ["a", "b"].map(|name| key(name, false, 0, 0)).to_vec();
    let server = Running::start(ServerConfig { slots: 2, context: 2048, keys, metrics: true, ..Running::small() });
    let send = |key: &str, seed: u64, tokens: usize| {
        let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
        let body = json!({"prompt": "fn main() {", "max_tokens": tokens, "ignore_eos": true, "stream": true, "seed": seed,
            "temperature": 1.0, "logprobs": 5});
        let body = body.to_string();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer secret-of-{key}\r\n\
             connection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    let alone = [1, 2].map(|seed| text_of(send("a", seed, 1500)));
    let long = [1, 2].map(|seed| {
        let stream = send("a", seed, 1500);
        std::thread::spawn(move || text_of(stream))
    });
    let metrics = || {
        let request = ureq::get(&format!("{}/metrics", server.url)).set("x-api-key", "secret-of-b");
        request.call().unwrap().into_string().unwrap()
    };
    while !metrics().contains("metal_candle_requests_running 2\n") {
        std::thread::sleep(Duration::from_millis(1));
    }
    let other = text_of(send("b", 3, 20));
    assert!(!other.is_empty());
    // it came before the long ones had ended
    assert!(!long.iter().all(std::thread::JoinHandle::is_finished));
    let found = long.map(|thread| thread.join().unwrap());
    assert_eq!(found, alone);
    let metrics = metrics();
    assert!(metrics.contains("metal_candle_preemptions_total 1\n"), "{metrics}");
}

#[test]
fn shutting_down_ends_what_runs_and_refuses_the_rest() {
    let config = ServerConfig { drain_timeout: Duration::from_millis(300), context: 2048, ..Running::small() };
    let mut server = Running::start(config);
    let long = json!({"prompt": "fn", "max_tokens": 1900, "ignore_eos": true, "stream": true});
    let mut lines = server.lines("/v1/completions", &long);
    assert!(lines.next().unwrap().starts_with("data: "));
    let started = Instant::now();
    server.shutdown.take().unwrap().send(()).unwrap();
    let rest: Vec<String> = lines.collect();
    let last = rest.iter().rfind(|line| line.starts_with("data: ")).unwrap();
    // all of it, or what there was and an error
    assert!(last.contains("draining") || last.contains("[DONE]"), "{last}");
    server.thread.take().unwrap().join().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn keys_have_rights_and_limits() {
    let keys = vec![key("user", false, 1, 100), key("admin", true, 1, 0), key("other", false, 1, 0)];
    let server = Running::start(ServerConfig { keys, ..Running::small() });
    let post = |path: &str, key: Option<&str>, body: serde_json::Value| {
        let mut request = ureq::post(&format!("{}{path}", server.url)).set("content-type", "application/json");
        if let Some(key) = key {
            request = request.set("authorization", &format!("Bearer {key}"));
        }
        crate::running::answer(request.send_string(&body.to_string()))
    };
    let path = "/v1/chat/completions";
    assert_eq!(server.get("/health").0, 200);
    assert_eq!(server.get("/v1/models").0, 401);
    assert_eq!(post(path, None, chat("a", 2)).0, 401);
    assert_eq!(post(path, Some("secret-of-users"), chat("a", 2)).0, 401);
    assert_eq!(post(path, Some("secret-of-user"), chat("a", 2)).0, 200);
    let (status, value) = post(path, Some("secret-of-user"), chat("a", 90));
    assert_eq!((status, &value["error"]["type"]), (429, &json!("rate_limit_error")));
    assert_eq!(post(path, Some("secret-of-admin"), chat("a", 90)).0, 200);
    // what one key has asked is not in the cache of another
    let cached = |key: &str| {
        let (_, answer) = post(path, Some(key), chat("A long question that others may ask, too.", 2));
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let first = [cached("secret-of-admin"), cached("secret-of-admin")];
    assert!(first[1] > first[0] + 5, "{first:?}");
    let (status, value) = post(path, Some("secret-of-other"), chat("A long question that others may ask, too.", 2));
    assert_eq!((status, &value["usage"]["prompt_tokens_details"]["cached_tokens"]), (200, &json!(0)));
    let load = json!({"name": "x", "path": "y"});
    assert_eq!(post("/v1/adapters", Some("secret-of-user"), load.clone()).0, 403);
    // there is no folder to load from
    assert_eq!(post("/v1/adapters", Some("secret-of-admin"), load).0, 403);
}

#[test]
fn pages_of_other_sites_and_odd_bodies_are_refused() {
    let server = Running::start(ServerConfig { max_body_bytes: 1000, ..Running::small() });
    let url = format!("{}/v1/chat/completions", server.url);
    let body = chat("a", 1).to_string();
    let status = |request: ureq::Request, body: &str| crate::running::answer(request.send_string(body)).0;
    let json = |request: ureq::Request| request.set("content-type", "application/json");
    assert_eq!(status(json(ureq::post(&url)), &body), 200);
    assert_eq!(status(ureq::post(&url).set("content-type", "text/plain"), &body), 415);
    assert_eq!(status(json(ureq::post(&url)).set("content-encoding", "gzip"), &body), 415);
    assert_eq!(status(json(ureq::post(&url)).set("sec-fetch-site", "cross-site"), &body), 403);
    assert_eq!(status(json(ureq::post(&url)).set("origin", "https://evil.example"), &body), 403);
    assert_eq!(status(json(ureq::post(&url)).set("host", "evil.example"), &body), 403);
    assert_eq!(status(json(ureq::post(&url)), &"[".repeat(900)), 400);
    assert_eq!(status(json(ureq::post(&url)), ""), 400);
    assert_eq!(status(json(ureq::post(&url)), &format!("{{\"a\": \"{}\"}}", "x".repeat(2000))), 413);
}

#[test]
fn slots_and_memory_follow_the_type_of_the_cache() {
    // keys and values of a slot: 5 layers, 3 heads of 32, 512 tokens
    let elements = 2 * 5 * 3 * 32 * 512;
    let types = [(None, 2 * elements, 2), (Some(KVCacheType::F32), 4 * elements, 1)];
    let blocks = [(Some(KVCacheType::Q8_0), elements / 32 * 34, 3), (Some(KVCacheType::Q4_0), elements / 32 * 18, 7)];
    for (kv_cache, bytes, slots) in types.into_iter().chain(blocks) {
        let limits = ServerConfig { slots: 0, cache_bytes: 2_000_000, metrics: true, ..Running::small() };
        let server = Running::start(ServerConfig { kv_cache, ..limits });
        let (status, answer) = server.post("/v1/completions", &json!({"prompt": "fn main() {", "max_tokens": 4}));
        assert_eq!((status, &answer["usage"]["completion_tokens"]), (200, &json!(4)), "{answer}");
        let metrics = server.get("/metrics").1;
        let line = format!("metal_candle_kv_bytes {}", slots * bytes);
        assert!(metrics.as_str().unwrap().lines().any(|found| found == line), "{kv_cache:?}: {line} {metrics}");
    }
}
