//! A small random model and data for it.

use assert_cmd::Command;
use metal_candle::models::save_model;
use metal_candle::{Device, Model, ModelConfig};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A folder with a model and data in it; commands run inside it.
pub struct Fixture {
    folder: tempfile::TempDir,
}

/// What a command printed.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Standard output as the one JSON value it is.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e} in {:?}\n{}", self.stdout, self.stderr))
    }
}

/// The folder of the built-in model.
pub fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/nano")
}

impl Fixture {
    pub fn new() -> Self {
        let fixture = Self { folder: tempfile::tempdir().unwrap() };
        let model = fixture.path("model");
        std::fs::create_dir(&model).unwrap();
        let config = r#"{"model_type": "qwen2", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "initializer_range": 0.2,
            "eos_token_id": 4076}"#;
        let config = ModelConfig::from_json_str(config).unwrap();
        save_model(&Model::initialize(config, 3, Device::CPU).unwrap(), &model).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(nano().join(name), model.join(name)).unwrap();
        }
        let data = fixture.path("data");
        std::fs::create_dir(&data).unwrap();
        for (name, rows) in [("train", 0..40), ("valid", 40..48), ("test", 48..52)] {
            let rows: String = rows.map(row).collect();
            std::fs::write(data.join(format!("{name}.jsonl")), rows).unwrap();
        }
        fixture
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    pub fn command(&self) -> std::process::Command {
        self.command_named(env!("CARGO_BIN_EXE_metal-candle"))
    }

    /// Another program in the same folder and environment.
    pub fn command_named(&self, program: &str) -> std::process::Command {
        let mut command = std::process::Command::new(program);
        command.current_dir(self.folder.path());
        for name in ["HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "NO_COLOR"] {
            command.env_remove(name);
        }
        command
            .env("HF_HOME", self.path("hub"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("RAYON_NUM_THREADS", "2");
        command
    }

    /// Runs the program with words separated by spaces.
    pub fn run(&self, words: &str) -> Ran {
        self.run_with(&words.split_whitespace().collect::<Vec<_>>(), "")
    }

    /// Runs it and expects success.
    pub fn ok(&self, words: &str) -> Ran {
        let ran = self.run(words);
        assert_eq!(ran.code, 0, "{words}\n{}", ran.stderr);
        ran
    }

    pub fn run_with(&self, words: &[&str], stdin: &str) -> Ran {
        let output = Command::from_std(self.command()).args(words).write_stdin(stdin).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// One chat row.
fn row(number: usize) -> String {
    let (question, answer) = (format!("/// Returns item {number}."), format!("fn item_{number}() -> usize"));
    format!(
        "{}\n",
        serde_json::json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    )
}
