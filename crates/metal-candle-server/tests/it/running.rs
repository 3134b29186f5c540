//! A server that runs in the test, and a client for it.

use metal_candle::data::Tokenizer;
use metal_candle::inference::{GenerationConfig, Generator};
use metal_candle::{Device, Model, ModelLoader};
use metal_candle_server::{Server, ServerConfig};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::LazyLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const NANO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano");

pub(crate) static MODEL: LazyLock<Model> =
    LazyLock::new(|| ModelLoader::new().with_device(Device::CPU).load(NANO).unwrap());

pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_folder(NANO).unwrap()
}

/// A server on a free port; it is shut down when this is dropped.
pub(crate) struct Running {
    pub(crate) url: String,
    pub(crate) shutdown: Option<oneshot::Sender<()>>,
    pub(crate) thread: Option<JoinHandle<()>>,
}

impl Running {
    pub(crate) fn start(config: ServerConfig) -> Self {
        Self::with_adapters(config, &[])
    }

    pub(crate) fn with_adapters(config: ServerConfig, adapters: &[(&str, &Path)]) -> Self {
        let server = Server::new(&MODEL, tokenizer(), config).unwrap();
        for (name, path) in adapters {
            server.add_adapter(name, path).unwrap();
        }
        let (shutdown, is_down) = oneshot::channel();
        let (sender, address) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                server.serve(listener, async { is_down.await.unwrap_or_default() }).await.unwrap();
            });
        });
        let url = format!("http://{}", address.recv().unwrap());
        Self { url, shutdown: Some(shutdown), thread: Some(thread) }
    }

    pub(crate) fn small() -> ServerConfig {
        ServerConfig { name: "nano".into(), slots: 8, context: 512, ..ServerConfig::default() }
    }

    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        answer(ureq::get(&format!("{}{path}", self.url)).call())
    }

    pub(crate) fn delete(&self, path: &str) -> (u16, Value) {
        answer(ureq::delete(&format!("{}{path}", self.url)).call())
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        answer(self.send(path, body))
    }

    /// The answer to a request that must succeed.
    pub(crate) fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, value) = self.post(path, body);
        assert!(status < 300, "{status}: {value}");
        value
    }

    /// `param` and message of a refusal.
    pub(crate) fn refusal(&self, path: &str, body: &Value) -> (u16, String, String) {
        let (status, value) = self.post(path, body);
        assert!((400..500).contains(&status), "{status}: {value}");
        let text = |name: &str| value["error"][name].as_str().unwrap_or_default().to_owned();
        (status, text("param"), text("message"))
    }

    /// The events of a stream, without the last `[DONE]`, which must be there.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let mut events = Vec::new();
        for line in self.lines(path, &body) {
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return events;
            }
            events.push(serde_json::from_str(data).unwrap());
        }
        panic!("the stream ended without [DONE]: {events:?}");
    }

    /// The lines of an answer as they come.
    pub(crate) fn lines(&self, path: &str, body: &Value) -> impl Iterator<Item = String> + use<> {
        let reader = self.send(path, body).unwrap().into_reader();
        BufReader::new(reader).lines().map_while(Result::ok)
    }

    fn send(&self, path: &str, body: &Value) -> Result<ureq::Response, ureq::Error> {
        let request = ureq::post(&format!("{}{path}", self.url)).set("content-type", "application/json");
        request.send_string(&body.to_string())
    }

    /// Waits until a number in `/props` has a value.
    pub(crate) fn wait_for(&self, name: &str, value: u64) {
        let started = Instant::now();
        while self.get("/props").1[name] != value {
            assert!(started.elapsed() < Duration::from_secs(5), "{name} is {}", self.get("/props").1[name]);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.shutdown.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

pub(crate) fn answer(result: Result<ureq::Response, ureq::Error>) -> (u16, Value) {
    let response = match result {
        Ok(response) | Err(ureq::Error::Status(_, response)) => response,
        Err(error) => panic!("{error}"),
    };
    let status = response.status();
    let mut text = String::new();
    response.into_reader().read_to_string(&mut text).unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// A greedy conversation of one message.
pub(crate) fn chat(text: &str, max_tokens: usize) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0})
}

/// The text that the library alone writes after a prompt.
pub(crate) fn alone(prompt: &str, config: &GenerationConfig) -> String {
    let mut generator = Generator::new(MODEL.clone()).with_tokenizer(tokenizer());
    generator.generate(prompt, config).unwrap().text
}
