//! The settings of a training run, from flags and a TOML file.

mod data;
mod kinds;
mod methods;
mod optimization;
mod path_values;

use crate::error::{UserError, message};
use crate::matmul_precision::Precision;
use crate::model_source::NANO;
use crate::values::{DeviceKind, MixtureName, WeightType};
use anyhow::{Context, Result};
use clap::Args;
pub(crate) use kinds::lora_learning_rate;
use kinds::{DecayKind, OptimizerKind, Schedule};
use metal_candle::ModelConfig;
pub(crate) use path_values::PathValues;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Settings of new adapters only.
const OF_NEW_ADAPTERS: [&str; 14] = [
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "layers",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "ensure_weight_tying",
    "trainable_tokens",
    "bias",
];

/// Settings of `train`. `None` means not given; [`TrainSettings::complete`] fills in defaults.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TrainSettings {
    /// The model: a folder, a safetensors or GGUF file, `nano` (the built-in model), or a Hub name such as
    /// `org/name` or `org/name@revision` [default: nano].
    #[arg(long, help_heading = "Model")]
    pub(crate) model: Option<String>,

    /// Start from this adapter: a run folder, a PEFT or mlx-lm folder, or a GGUF file.
    #[arg(long, value_name = "FOLDER", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,

    /// Convert weights to this type while loading [default: as in the file].
    #[arg(long, value_enum, help_heading = "Model")]
    pub(crate) dtype: Option<WeightType>,

    /// Quantize the frozen weights while loading to a type such as `q4_k_m`.
    #[arg(long, value_name = "TYPE", help_heading = "Model")]
    pub(crate) quantize: Option<MixtureName>,

    /// Type to which the CPU rounds activations in products with bf16 weights; `bf16` is faster with AVX512-BF16 or AMX [default: f32].
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Model")]
    pub(crate) matmul_precision: Option<Precision>,

    /// Where to run: `auto`, `cpu`, `metal`, `cuda` or `cuda:N` [default: auto].
    #[arg(long, value_name = "DEVICE", help_heading = "Model")]
    pub(crate) device: Option<DeviceKind>,

    /// Train all weights instead of an adapter.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Model")]
    pub(crate) full: Option<bool>,

    /// With --full: start from random weights, using only config.json and the tokenizer of the model.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Model")]
    pub(crate) from_scratch: Option<bool>,

    /// With --full: train only the last blocks, this number of them.
    #[arg(long, value_name = "COUNT", help_heading = "Model")]
    pub(crate) train_last_layers: Option<usize>,

    /// A JSONL file, or a folder with train.jsonl, valid.jsonl and test.jsonl [default: the built-in
    /// model's sample data].
    #[arg(long, value_name = "PATH", help_heading = "Data")]
    pub(crate) data: Option<PathBuf>,

    /// Share of the rows used for validation when the data has no valid.jsonl [default: 0.05].
    #[arg(long, value_name = "SHARE", help_heading = "Data")]
    pub(crate) valid_fraction: Option<f64>,

    /// Longest row, in tokens; longer rows are an error [default: the model's context, at most 2048].
    #[arg(long, value_name = "TOKENS", help_heading = "Data")]
    pub(crate) max_tokens_per_sample: Option<usize>,

    /// Truncate rows that are too long instead of failing.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Data")]
    pub(crate) truncate: Option<bool>,

    /// Train only answers and completions, not prompts [default: true].
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Data")]
    pub(crate) mask_prompt: Option<bool>,

    /// Train only the last assistant turn of a chat.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Data")]
    pub(crate) train_last_turn_only: Option<bool>,

    /// Use the chat template in this file [default: the model's].
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub(crate) chat_template: Option<PathBuf>,

    /// Set a variable of the chat template, such as `enable_thinking=false`; may be given more than once.
    #[arg(long, value_name = "NAME=VALUE", value_parser = crate::values::template_var, help_heading = "Data")]
    pub(crate) template_var: Option<Vec<String>>,

    /// Rank of the adapter [default: 8].
    #[arg(long, help_heading = "Adapter")]
    pub(crate) rank: Option<usize>,

    /// Alpha of the adapter; its output is scaled by alpha / rank [default: twice the rank].
    #[arg(long, help_heading = "Adapter")]
    pub(crate) alpha: Option<f64>,

    /// Probability of dropping an input of the adapter [default: 0].
    #[arg(long, help_heading = "Adapter")]
    pub(crate) dropout: Option<f64>,

    /// Layers to adapt, separated by commas: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    /// `down_proj`, or `all-linear` for all of these; `embed_tokens`, `lm_head`; ends of paths such as `0.self_attn.q_proj`;
    /// and regular expressions for whole paths such as `.*\.[0-3]\..*_proj` [default: all-linear].
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", help_heading = "Adapter")]
    pub(crate) target_modules: Option<Vec<String>>,

    /// Decoder blocks to adapt, such as `0-3,7` or `last:8` [default: all].
    #[arg(long, value_name = "LIST", help_heading = "Adapter")]
    pub(crate) layers: Option<String>,

    /// Scale by alpha / sqrt(rank) (rsLoRA).
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Adapter")]
    pub(crate) use_rslora: Option<bool>,

    /// Also train the magnitude of each row of the adapted weights (DoRA).
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Adapter")]
    pub(crate) use_dora: Option<bool>,

    /// Initialization of the adapter: `kaiming`, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N` (N quick iterations
    /// instead of an exact decomposition), `olora`, `loftq`, `loftq_niter_N`, `loftq_8bit` [default: kaiming].
    #[arg(long, value_name = "START", help_heading = "Adapter")]
    pub(crate) init_lora_weights: Option<String>,

    /// Ranks by regular expression on the end of a path, such as `q_proj=16,layers\.0\..*=4`; the first match applies.
    #[arg(long, value_name = "PATTERN=RANK,...", help_heading = "Adapter")]
    pub(crate) rank_pattern: Option<PathValues>,

    /// Values of alpha by regular expression, like --rank-pattern.
    #[arg(long, value_name = "PATTERN=ALPHA,...", help_heading = "Adapter")]
    pub(crate) alpha_pattern: Option<PathValues>,

    /// Modules to train in full, by the ends of their paths, such as `lm_head,embed_tokens,model.norm`.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", help_heading = "Adapter")]
    pub(crate) modules_to_save: Option<Vec<String>>,

    /// Keep the head tied to the embedding if one of them is trained in full.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Adapter")]
    pub(crate) ensure_weight_tying: Option<bool>,

    /// Train the embedding rows of these tokens (and the rows of a tied head), given as ids or vocabulary entries:
    /// `151665,<|tool|>`.
    #[arg(long, value_delimiter = ',', value_name = "TOKEN,...", help_heading = "Adapter")]
    pub(crate) trainable_tokens: Option<Vec<String>>,

    /// Biases to train: `none`, `all` or `lora_only` (of the adapted layers) [default: none].
    #[arg(long, value_name = "KIND", help_heading = "Adapter")]
    pub(crate) bias: Option<String>,

    /// Number of optimizer steps; excludes --epochs.
    #[arg(long, conflicts_with = "epochs", help_heading = "Training")]
    pub(crate) steps: Option<usize>,

    /// Number of passes over the data [default: 3; 1 for nano].
    #[arg(long, help_heading = "Training")]
    pub(crate) epochs: Option<usize>,

    /// The optimizer [default: adamw].
    #[arg(long, value_enum, help_heading = "Optimization")]
    pub(crate) optimizer: Option<OptimizerKind>,

    /// Highest learning rate [default: 2e-4; with --full 2e-5, with --from-scratch 1e-3; 3e-3 for nano; times 0.3
    /// for lion, 2 for schedule-free-adamw, 200 for sgd].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) learning_rate: Option<f64>,

    /// Learning-rate schedule [default: warmup-cosine; warmup-constant for schedule-free-adamw].
    #[arg(long, value_enum, help_heading = "Optimization")]
    pub(crate) schedule: Option<Schedule>,

    /// Warm-up steps, for all schedules except constant and cosine [default: a twentieth of all steps].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) warmup_steps: Option<usize>,

    /// Final learning rate, for all schedules except constant, warmup-constant and inverse-sqrt [default: a tenth of the
    /// highest].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) min_learning_rate: Option<f64>,

    /// Number of cycles of cosine-restarts [default: 3].
    #[arg(long, value_name = "COUNT", help_heading = "Optimization")]
    pub(crate) num_cycles: Option<usize>,

    /// Exponent of polynomial [default: 2].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) power: Option<f64>,

    /// Decay steps of warmup-stable-decay [default: a fifth of all steps].
    #[arg(long, value_name = "STEPS", help_heading = "Optimization")]
    pub(crate) decay_steps: Option<usize>,

    /// Decay shape of warmup-stable-decay [default: one-minus-sqrt].
    #[arg(long, value_enum, help_heading = "Optimization")]
    pub(crate) decay_shape: Option<DecayKind>,

    /// Weight decay [default: 0.01; 0.1 for lion and muon; 0 for adam, sgd, adafactor and schedule-free-adamw].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) weight_decay: Option<f64>,

    /// Apply weight decay to matrices only, not to norms and biases.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Optimization")]
    pub(crate) decay_matrices_only: Option<bool>,

    /// Decay rate of the mean of the gradients; for muon, of the parameters that use AdamW; not for sgd and adafactor
    /// [default: 0.9].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) beta1: Option<f64>,

    /// Decay rate of the mean of the squared gradients; for lion, of the moment; not for sgd and adafactor [default:
    /// 0.999; 0.99 for lion].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) beta2: Option<f64>,

    /// Added to the square root of the mean of the squared gradients; not for sgd, lion and adafactor [default: 1e-8].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) eps: Option<f64>,

    /// Momentum of sgd and muon [default: 0.9; 0.95 for muon].
    #[arg(long, help_heading = "Optimization")]
    pub(crate) momentum: Option<f64>,

    /// Use Nesterov momentum, for sgd and muon [default: true for muon].
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Optimization")]
    pub(crate) nesterov: Option<bool>,

    /// LoRA+: the learning rate of each B is this times that of A [default: equal rates].
    #[arg(long, value_name = "RATIO", help_heading = "Optimization")]
    pub(crate) lora_plus_ratio: Option<f64>,

    /// Clip the global norm of the gradients to this; 0 for no clipping [default: 1].
    #[arg(long, help_heading = "Training")]
    pub(crate) max_grad_norm: Option<f64>,

    /// Memory limit of the run, such as `8GB`. Micro-batches shrink and then blocks are checkpointed until the run
    /// fits [default: nine tenths of the free memory, if the system reports it].
    #[arg(long, value_name = "SIZE", help_heading = "Training")]
    pub(crate) memory: Option<String>,

    /// Blocks that save only their input and are recomputed in the backward pass: `none`, `all` or a number
    /// [default: as few as memory allows].
    #[arg(long, value_name = "COUNT", help_heading = "Training")]
    pub(crate) checkpointed_blocks: Option<String>,

    /// Maximum number of tokens in a micro-batch; larger batches are split [default: as memory allows].
    #[arg(long, value_name = "TOKENS", help_heading = "Training")]
    pub(crate) micro_batch_tokens: Option<usize>,

    /// Maximum number of tokens in a batch [default: 2048].
    #[arg(long, value_name = "TOKENS", help_heading = "Training")]
    pub(crate) batch_tokens: Option<usize>,

    /// Number of batches per optimizer step [default: 1].
    #[arg(long, value_name = "COUNT", help_heading = "Training")]
    pub(crate) gradient_accumulation_steps: Option<usize>,

    /// Label smoothing: the share of the target spread over the vocabulary [default: 0].
    #[arg(long, help_heading = "Training")]
    pub(crate) label_smoothing: Option<f64>,

    /// Noise on the embedded tokens (NEFTune); 5 is common, 0 turns it off [default: 0].
    #[arg(long, value_name = "ALPHA", help_heading = "Training")]
    pub(crate) neftune_noise_alpha: Option<f64>,

    /// Seed of all randomness; the same seed gives the same run [default: 0].
    #[arg(long, value_parser = crate::numbers::train_seed, help_heading = "Training")]
    pub(crate) seed: Option<u64>,

    /// Steps between two evaluations on the validation rows; 0 to evaluate after each epoch
    /// [default: a tenth of all steps].
    #[arg(long, value_name = "STEPS", help_heading = "Training")]
    pub(crate) eval_interval: Option<usize>,

    /// Steps between two checkpoints [default: --eval-interval, or a tenth of all steps if it is 0].
    #[arg(long, value_name = "STEPS", help_heading = "Training")]
    pub(crate) save_interval: Option<usize>,

    /// Stop when the validation loss has not fallen for this number of evaluations; 0 for never [default: 0; 2 for
    /// nano on its sample data].
    #[arg(long, value_name = "COUNT", help_heading = "Training")]
    pub(crate) early_stopping_patience: Option<usize>,

    /// Number of test rows to answer before and after training and compare; 0 for none [default: 64].
    #[arg(long, value_name = "COUNT", help_heading = "Run")]
    pub(crate) test_samples: Option<usize>,

    /// The run folder to write [default: the next free one of runs/001, runs/002, ...].
    #[arg(long, value_name = "FOLDER", help_heading = "Run")]
    pub(crate) output: Option<PathBuf>,
}

impl TrainSettings {
    /// These settings merged over those of the file at `path`, if any, with absolute paths.
    pub(crate) fn over_file(&self, path: Option<&Path>) -> Result<Self> {
        let mut settings = match path {
            Some(path) => self.over(&Self::read(path)?)?,
            None => self.clone(),
        };
        settings.fix_paths()?;
        Ok(settings)
    }

    /// Merges these settings over those of `file`. Settings of the file that have no meaning with these settings are dropped.
    pub(crate) fn over(&self, file: &Self) -> Result<Self> {
        let mut table = file.table()?;
        let own = self.table()?;
        if own.contains_key("steps") {
            table.remove("epochs");
        } else if own.contains_key("epochs") {
            table.remove("steps");
        }
        let leave_out =
            |table: &mut Table, names: &[&str]| names.iter().for_each(|name| std::mem::drop(table.remove(*name)));
        self.leave_out_optimization(&mut table);
        if self.full == Some(true) {
            leave_out(&mut table, &["adapter", "lora_plus_ratio"]);
        }
        if self.full == Some(true) || self.adapter.is_some() {
            leave_out(&mut table, &OF_NEW_ADAPTERS);
        }
        if self.full == Some(false) || self.adapter.is_some() {
            leave_out(&mut table, &["full", "from_scratch", "train_last_layers"]);
        }
        table.extend(own);
        Ok(Value::Table(table).try_into()?)
    }

    fn table(&self) -> Result<Table> {
        // TOML integers are below 2^63
        for (key, value) in serde_json::to_value(self)?.as_object().into_iter().flatten() {
            if value.as_u64().is_some_and(|value| i64::try_from(value).is_err()) {
                let flag = key.replace('_', "-");
                let message = format!("`--{flag}`: expected a whole number of at most 2^63 - 1, found {value}");
                return Err(UserError::new(message).into());
            }
        }
        Ok(Table::try_from(self)?)
    }

    /// The names of the given settings.
    pub(crate) fn given(&self) -> Result<Vec<String>> {
        Ok(self.table()?.keys().map(|key| format!("--{}", key.replace('_', "-"))).collect())
    }

    /// Reads a TOML file whose keys are the names of the flags, with `-` or `_`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = metal_candle::files::read_text(path, metal_candle::files::MAX_SIDE_FILE_BYTES)?;
        Self::parse(&text).map_err(|error| UserError::new(format!("`{}`: {}", path.display(), message(&error))).into())
    }

    fn parse(text: &str) -> Result<Self> {
        let given: Table = text.parse().context("not valid TOML")?;
        let mut table = Table::new();
        for (key, value) in given {
            let name = key.replace('-', "_");
            if table.insert(name, value).is_some() {
                anyhow::bail!("`{key}` is given twice");
            }
        }
        if table.contains_key("steps") && table.contains_key("epochs") {
            anyhow::bail!("`steps` and `epochs` exclude each other");
        }
        let mut settings: Self = Value::Table(table).try_into()?;
        let lists = [&mut settings.target_modules, &mut settings.modules_to_save, &mut settings.trainable_tokens];
        for modules in lists.into_iter().flatten() {
            modules.retain(|name| !name.is_empty());
        }
        Ok(settings)
    }

    /// Fills in all settings that do not depend on the data, and returns an error for contradictions.
    pub(crate) fn complete(&mut self, model: &ModelConfig) -> Result<()> {
        self.check()?;
        let is_nano = self.is_nano();
        let full = *self.full.get_or_insert(false);
        self.from_scratch.get_or_insert(false);
        self.model.get_or_insert_with(|| NANO.into());
        self.device.get_or_insert(DeviceKind::Auto);
        self.valid_fraction.get_or_insert(0.05);
        check_max_tokens(self.max_tokens_per_sample, model)?;
        self.max_tokens_per_sample.get_or_insert(model.max_sequence_length().min(2048));
        self.truncate.get_or_insert(false);
        self.mask_prompt.get_or_insert(true);
        self.train_last_turn_only.get_or_insert(false);
        if !full && self.adapter.is_none() {
            let rank = *self.rank.get_or_insert(8);
            self.alpha.get_or_insert(2.0 * rank as f64);
            self.dropout.get_or_insert(0.0);
            self.target_modules.get_or_insert_with(|| vec!["all-linear".into()]);
            self.use_rslora.get_or_insert(false);
            self.use_dora.get_or_insert(false);
            self.init_lora_weights.get_or_insert_with(|| "kaiming".into());
        }
        // the built-in model learns what its sample data teach in a third of an epoch
        let is_default_job = is_nano && self.data.is_none() && self.steps.is_none() && self.epochs.is_none();
        self.early_stopping_patience.get_or_insert(if is_default_job { 2 } else { 0 });
        if self.steps.is_none() {
            self.epochs.get_or_insert(if is_nano { 1 } else { 3 });
        }
        self.complete_optimization(is_nano)?;
        self.max_grad_norm.get_or_insert(1.0);
        self.batch_tokens.get_or_insert(2048);
        self.gradient_accumulation_steps.get_or_insert(1);
        self.label_smoothing.get_or_insert(0.0);
        self.neftune_noise_alpha.get_or_insert(0.0);
        self.seed.get_or_insert(0);
        self.test_samples.get_or_insert(64);
        Ok(())
    }

    /// Fills in the settings that depend on the number of steps.
    pub(crate) fn complete_for(&mut self, total_steps: usize) {
        self.complete_schedule_for(total_steps);
        let tenth = total_steps.div_ceil(10).max(1);
        let interval = *self.eval_interval.get_or_insert(tenth);
        self.save_interval.get_or_insert(if interval == 0 { tenth } else { interval });
    }

    /// Whether the model is the built-in one.
    pub(crate) fn is_nano(&self) -> bool {
        self.model.as_deref().is_none_or(|model| model == NANO)
    }

    fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(UserError::new(message).into());
        if self.steps.is_some() && self.epochs.is_some() {
            return refuse("`--steps` and `--epochs` exclude each other".into());
        }
        if self.from_scratch == Some(true) && self.full != Some(true) {
            return refuse("`--from-scratch` trains all weights: it needs `--full`".into());
        }
        if self.full == Some(true) && self.adapter.is_some() {
            return refuse("`--full` trains no adapter: remove `--adapter`, or fuse it first".into());
        }
        if self.full == Some(true) && self.lora_plus_ratio.is_some() {
            return refuse("`--full` trains no adapter: remove `--lora-plus-ratio`".into());
        }
        self.check_methods()?;
        if let Some(alpha) = self.alpha
            && (alpha <= 0.0 || !alpha.is_finite())
        {
            return refuse(format!("`--alpha`: expected a number above 0, found {alpha}"));
        }
        self.check_optimization()
    }

    /// The TOML text for [`TrainSettings::read`]; further settings of `complete` are added as comments.
    pub(crate) fn to_toml(&self, complete: &Self) -> Result<String> {
        let given = self.table()?;
        let mut text = String::from(
            "# The settings of this run. `metal-candle train --config FILE` starts another run with them.\n",
        );
        text.push_str(&toml::to_string(&given)?);
        text.push_str("\n# Derived settings; to set one, remove its `# `.\n");
        for (key, value) in complete.table()? {
            if !given.contains_key(&key) {
                let line = toml::to_string(&Table::from_iter([(key, value)]))?;
                text.extend(["# ", line.trim_end(), "  # derived\n"]);
            }
        }
        Ok(text)
    }

    /// Makes existing paths absolute, so that the run can be resumed from another folder.
    pub(crate) fn fix_paths(&mut self) -> Result<()> {
        let fixed = |path: &Path| {
            std::path::absolute(path).map_err(|source| metal_candle::Error::Read { path: path.to_path_buf(), source })
        };
        for path in [&mut self.adapter, &mut self.data, &mut self.chat_template].into_iter().flatten() {
            if path.exists() {
                *path = fixed(path)?;
            }
        }
        if let Some(model) = &mut self.model
            && model != NANO
            && Path::new(model.as_str()).exists()
            && let Some(path) = fixed(Path::new(model.as_str()))?.to_str()
        {
            path.clone_into(model);
        }
        Ok(())
    }
}

/// Returns an error if rows may be longer than the model's context.
pub(crate) fn check_max_tokens(max_tokens: Option<usize>, model: &ModelConfig) -> Result<()> {
    let most = model.max_sequence_length();
    match max_tokens {
        Some(found) if found > most => Err(UserError::new(format!(
            "`--max-tokens-per-sample`: expected at most {most}, the model's context, found {found}"
        ))
        .into()),
        _ => Ok(()),
    }
}

/// Parses a list of decoder blocks: `0-3,7` or `last:8`.
pub(crate) fn parse_layers(text: &str, num_layers: usize) -> Result<Vec<usize>> {
    let wrong = |part: &str| {
        UserError::new(format!(
            "`--layers`: expected a list such as `0-3,7` or `last:8` within 0 to {}, found `{part}`",
            num_layers.saturating_sub(1)
        ))
    };
    if let Some(count) = text.strip_prefix("last:") {
        let count: usize = count.trim().parse().map_err(|_| wrong(text))?;
        if count == 0 || count > num_layers {
            return Err(wrong(text).into());
        }
        return Ok((num_layers - count..num_layers).collect());
    }
    let mut layers = std::collections::BTreeSet::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| wrong(part))?;
        let last: usize = last.trim().parse().map_err(|_| wrong(part))?;
        if first > last || last >= num_layers {
            return Err(wrong(part).into());
        }
        layers.extend(first..=last);
    }
    Ok(layers.into_iter().collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Schedule, TrainSettings, parse_layers};

    #[test]
    fn toml_and_flags_share_names_and_flags_override() {
        let file = TrainSettings::parse(
            "rank = 4\nlearning-rate = 1e-3\nepochs = 2\nschedule = \"warmup-cosine\"\ntarget_modules = [\"q_proj\"]\nfull = true\n",
        )
        .unwrap();
        assert_eq!(file.learning_rate, Some(1e-3));
        assert_eq!(file.schedule, Some(Schedule::WarmupCosine));
        let flags = TrainSettings { rank: Some(16), steps: Some(5), full: Some(false), ..Default::default() };
        let both = flags.over(&file).unwrap();
        assert_eq!((both.rank, both.steps, both.epochs, both.full), (Some(16), Some(5), None, Some(false)));
        assert_eq!(both.target_modules.as_deref(), Some(&["q_proj".to_owned()][..]));
    }

    #[test]
    fn unknown_and_duplicate_keys_are_errors() {
        let unknown = TrainSettings::parse("ranks = 4").unwrap_err();
        assert!(format!("{unknown:#}").contains("ranks"), "{unknown:#}");
        let doubled = TrainSettings::parse("batch-tokens = 4\nbatch_tokens = 5").unwrap_err();
        assert!(format!("{doubled:#}").contains("given twice"), "{doubled:#}");
        assert!(TrainSettings::parse("steps = 1\nepochs = 1").is_err());
    }

    #[test]
    fn written_settings_are_read_back() {
        let settings = TrainSettings {
            model: Some("a \"b\"".into()),
            learning_rate: Some(3.25e-4),
            seed: Some(7),
            data: Some("x/y".into()),
            ..Default::default()
        };
        let complete = TrainSettings { rank: Some(8), alpha: Some(16.0), ..settings.clone() };
        let text = settings.to_toml(&complete).unwrap();
        assert!(text.contains("\n# alpha = 16.0  # derived\n"), "{text}");
        assert_eq!(TrainSettings::parse(&text).unwrap(), settings);
    }

    #[test]
    fn layer_lists() {
        assert_eq!(parse_layers("0-2,5", 6).unwrap(), [0, 1, 2, 5]);
        assert_eq!(parse_layers("last:2", 6).unwrap(), [4, 5]);
        for wrong in ["6", "3-1", "", "a", "last:7", "last:0", "0-99999999999"] {
            assert!(parse_layers(wrong, 6).is_err(), "{wrong}");
        }
    }
}
