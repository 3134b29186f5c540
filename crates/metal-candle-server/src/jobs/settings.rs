//! Reads the settings of a fine-tuning job from a request, and converts them to flags of `train`.

use crate::error::ApiError;
use crate::fields::Fields;
use crate::files::FileStats;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The layers that an adapter may target.
const MODULES: [&str; 8] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear"];
/// The fields of the extension `metal_candle`.
const EXTRAS: [&str; 9] = [
    "rank",
    "alpha",
    "target_modules",
    "learning_rate",
    "max_steps",
    "save_interval",
    "eval_interval",
    "batch_tokens",
    "serve",
];
/// The fields of `hyperparameters`.
const HYPERPARAMETERS: [&str; 3] = ["n_epochs", "batch_size", "learning_rate_multiplier"];
const MAX_STEPS: usize = 1_000_000;

/// Which checkpoint of a running job is served under its name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Serving {
    /// No checkpoint.
    None,
    /// The newest checkpoint.
    #[default]
    Latest,
    /// The checkpoint with the lowest validation loss.
    Best,
}

/// The settings of a job. Absent settings use the program's defaults.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct JobSettings {
    n_epochs: Option<usize>,
    batch_size: Option<usize>,
    learning_rate_multiplier: Option<f64>,
    rank: Option<usize>,
    alpha: Option<f64>,
    target_modules: Vec<String>,
    learning_rate: Option<f64>,
    max_steps: Option<usize>,
    save_interval: Option<usize>,
    eval_interval: Option<usize>,
    batch_tokens: Option<usize>,
    pub(crate) serve: Serving,
}

/// Checks that an object has only these fields; other fields would be settings without an effect.
fn check_names(fields: &Fields, path: &str, names: &[&str]) -> Result<(), ApiError> {
    let is_unknown = |(name, value): &(&String, &Value)| !names.contains(&name.as_str()) && !value.is_null();
    let Some((name, _)) = fields.map().iter().find(is_unknown) else { return Ok(()) };
    let name: String = name.chars().take(40).collect();
    let message = format!("`{path}`: expected {}, found `{name}`", names.join(", "));
    Err(ApiError::unsupported(path, message))
}

impl JobSettings {
    /// Reads `method`, `hyperparameters` and `metal_candle`.
    ///
    /// # Errors
    /// A value has the wrong type, is out of its range or not supported, or two values contradict each other.
    pub(crate) fn read(fields: &Fields) -> Result<Self, ApiError> {
        let mut settings = Self::default();
        let hyperparameters = match fields.object("method")? {
            Some(method) => {
                if let Some(kind) = method.text("type")?.filter(|kind| *kind != "supervised") {
                    let path = method.path("type");
                    let kind: String = kind.chars().take(40).collect();
                    let message = format!("`{path}`: expected `supervised`, found `{kind}`");
                    return Err(ApiError::unsupported(path, message));
                }
                check_names(&method, "method", &["type", "supervised"])?;
                let supervised = method.object("supervised")?;
                let found = supervised.map(|supervised| supervised.object("hyperparameters")).transpose()?.flatten();
                found.map(|found| ("method.supervised.hyperparameters", found))
            }
            None => fields.object("hyperparameters")?.map(|found| ("hyperparameters", found)),
        };
        if let Some((path, hyperparameters)) = hyperparameters {
            check_names(&hyperparameters, path, &HYPERPARAMETERS)?;
            settings.n_epochs = or_auto(&hyperparameters, "n_epochs", |name| hyperparameters.count(name, 1, 50))?;
            settings.batch_size = or_auto(&hyperparameters, "batch_size", |name| hyperparameters.count(name, 1, 256))?;
            let name = "learning_rate_multiplier";
            settings.learning_rate_multiplier =
                or_auto(&hyperparameters, name, |name| hyperparameters.number(name, 1e-6..=1e6))?;
        }
        if let Some(extras) = fields.object("metal_candle")? {
            check_names(&extras, "metal_candle", &EXTRAS)?;
            settings.read_extras(&extras)?;
        }
        let both = |first: bool, second: bool, param: &str, message: &str| {
            if first && second { Err(ApiError::field(param, message)) } else { Ok(()) }
        };
        both(
            settings.max_steps.is_some(),
            settings.n_epochs.is_some(),
            "metal_candle.max_steps",
            "`metal_candle.max_steps` and `n_epochs` exclude each other",
        )?;
        both(
            settings.learning_rate.is_some(),
            settings.learning_rate_multiplier.is_some(),
            "metal_candle.learning_rate",
            "`metal_candle.learning_rate` and `learning_rate_multiplier` exclude each other",
        )?;
        both(
            settings.batch_tokens.is_some(),
            settings.batch_size.is_some(),
            "metal_candle.batch_tokens",
            "`metal_candle.batch_tokens` and `batch_size` exclude each other",
        )?;
        Ok(settings)
    }

    fn read_extras(&mut self, extras: &Fields) -> Result<(), ApiError> {
        self.rank = extras.count("rank", 1, 512)?;
        self.alpha = extras.number("alpha", 1e-3..=1e5)?;
        self.learning_rate = extras.number("learning_rate", 1e-9..=1.0)?;
        self.max_steps = extras.count("max_steps", 1, MAX_STEPS)?;
        self.save_interval = extras.count("save_interval", 1, MAX_STEPS)?;
        self.eval_interval = extras.count("eval_interval", 1, MAX_STEPS)?;
        self.batch_tokens = extras.count("batch_tokens", 1, 1 << 20)?;
        for name in extras.texts("target_modules", MODULES.len())? {
            if !MODULES.contains(&name) {
                let path = extras.path("target_modules");
                let name: String = name.chars().take(40).collect();
                let message = format!("`{path}`: expected names out of {}, found `{name}`", MODULES.join(", "));
                return Err(ApiError::field(path, message));
            }
            self.target_modules.push(name.to_owned());
        }
        self.serve = match extras.one_of("serve", &["none", "latest", "best"])? {
            Some("none") => Serving::None,
            Some("best") => Serving::Best,
            _ => Serving::Latest,
        };
        Ok(())
    }

    /// The flags of `train` and `plan`. `learning_rate` is the program's default, and `stats` describe the training file.
    pub(crate) fn flags(&self, seed: u64, learning_rate: f64, stats: &FileStats) -> Vec<String> {
        let rate = self.learning_rate.or_else(|| Some(learning_rate * self.learning_rate_multiplier?));
        let numbers = [
            ("--seed", Some(seed.to_string())),
            ("--epochs", self.n_epochs.map(|count| count.to_string())),
            ("--steps", self.max_steps.map(|count| count.to_string())),
            ("--batch-tokens", self.batch_tokens(stats).map(|count| count.to_string())),
            ("--learning-rate", rate.map(|rate| rate.to_string())),
            ("--rank", self.rank.map(|rank| rank.to_string())),
            ("--alpha", self.alpha.map(|alpha| alpha.to_string())),
            ("--target-modules", Some(self.target_modules.join(",")).filter(|names| !names.is_empty())),
            ("--save-interval", self.save_interval.map(|count| count.to_string())),
            ("--eval-interval", self.eval_interval.map(|count| count.to_string())),
            // there are no test rows
            ("--test-samples", Some("0".into())),
        ];
        numbers.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?])).flatten().collect()
    }

    /// Maximum number of tokens in a batch. The trainer limits batches by tokens, so `batch_size` counts rows of mean length;
    /// the longest row must fit.
    pub(crate) fn batch_tokens(&self, stats: &FileStats) -> Option<usize> {
        let of_rows = |rows: usize| (rows * stats.tokens).div_ceil(stats.rows.max(1)).max(stats.longest).max(1);
        self.batch_tokens.or_else(|| self.batch_size.map(of_rows))
    }

    /// The number of rows in a batch, if the request has one.
    pub(crate) fn batch_size(&self) -> Option<usize> {
        self.batch_size
    }

    /// OpenAI's object `hyperparameters`.
    pub(crate) fn hyperparameters(&self) -> Value {
        let or_auto = |value: Option<Value>| value.unwrap_or_else(|| "auto".into());
        json!({
            "n_epochs": or_auto(self.n_epochs.map(Value::from)),
            "batch_size": or_auto(self.batch_size.map(Value::from)),
            "learning_rate_multiplier": or_auto(self.learning_rate_multiplier.map(Value::from)),
        })
    }

    /// The fields of the extension `metal_candle`.
    pub(crate) fn extras(&self) -> Value {
        let modules = Some(&self.target_modules).filter(|names| !names.is_empty());
        json!({
            "rank": self.rank, "alpha": self.alpha, "target_modules": modules, "learning_rate": self.learning_rate,
            "max_steps": self.max_steps, "save_interval": self.save_interval, "eval_interval": self.eval_interval,
            "batch_tokens": self.batch_tokens, "serve": self.serve,
        })
    }
}

fn or_auto<'n, T>(
    fields: &Fields,
    name: &'n str,
    read: impl FnOnce(&'n str) -> Result<Option<T>, ApiError>,
) -> Result<Option<T>, ApiError> {
    if fields.get(name).is_some_and(|value| value == "auto") { Ok(None) } else { read(name) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn read(body: &Value) -> Result<JobSettings, ApiError> {
        JobSettings::read(&Fields::of_body(body).unwrap())
    }

    #[test]
    fn requests_become_numeric_flags() {
        let body = json!({
            "method": {"type": "supervised", "supervised": {"hyperparameters": {
                "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5,
            }}},
            "hyperparameters": {"n_epochs": 9},
            "metal_candle": {"rank": 4, "target_modules": ["q_proj", "v_proj"], "serve": "best"},
        });
        let settings = read(&body).unwrap();
        let stats = FileStats { rows: 10, tokens: 101, trained_tokens: 50, longest: 30 };
        let flags = settings.flags(7, 2e-4, &stats).join(" ");
        let expected = "--seed 7 --epochs 2 --batch-tokens 41 --learning-rate 0.0001 --rank 4 --target-modules q_proj,v_proj \
                        --test-samples 0";
        assert_eq!(flags, expected);
        assert_eq!(settings.serve, Serving::Best);
        let stored: JobSettings = serde_json::from_value(json!(settings)).unwrap();
        assert_eq!(stored, settings);
        assert_eq!(read(&json!({"hyperparameters": {"n_epochs": "auto"}})).unwrap(), JobSettings::default());
        for (wrong, param) in [
            (json!({"metal_candle": {"output": "/etc"}}), "metal_candle"),
            (json!({"metal_candle": {"target_modules": ["--resume"]}}), "metal_candle.target_modules"),
            (json!({"metal_candle": {"rank": "8 --full"}}), "metal_candle.rank"),
            (json!({"metal_candle": {"max_steps": 0}}), "metal_candle.max_steps"),
            (json!({"metal_candle": {"max_steps": 5}, "hyperparameters": {"n_epochs": 1}}), "metal_candle.max_steps"),
            (json!({"method": {"type": "dpo"}}), "method.type"),
            (json!({"hyperparameters": {"n_epochs": 51}}), "hyperparameters.n_epochs"),
            (json!({"hyperparameters": {"warmup_ratio": 0.1}}), "hyperparameters"),
            (json!({"method": {"dpo": {"hyperparameters": {}}}}), "method"),
            (
                json!({"method": {"supervised": {"hyperparameters": {"epochs": 1}}}}),
                "method.supervised.hyperparameters",
            ),
        ] {
            assert_eq!(read(&wrong).unwrap_err().param.as_deref(), Some(param), "{wrong}");
        }
    }
}
