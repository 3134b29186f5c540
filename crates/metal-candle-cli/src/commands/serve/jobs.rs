//! The flags of `serve` for fine-tuning jobs, and the command that the server starts for a job.

use crate::model_source::{ModelArguments, NANO};
use crate::settings::lora_learning_rate;
use crate::templates::TemplateArguments;
use crate::values::ByteSize;
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use metal_candle_server::JobsConfig;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Fine-tuning jobs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Fine-tuning jobs")]
pub(crate) struct JobArguments {
    /// Let clients with an admin key upload files and train adapters. Files and runs are stored in this folder; interrupted
    /// jobs resume when a server is started with it again.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) jobs: Option<PathBuf>,

    /// Largest file that may be uploaded.
    #[arg(long, value_name = "SIZE", default_value = "128MiB")]
    pub(crate) max_file_bytes: ByteSize,

    /// Maximum size of all uploaded files, in bytes.
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub(crate) max_total_file_bytes: ByteSize,
}

impl JobArguments {
    /// The settings of jobs: this program trains the served model.
    pub(super) fn config(&self, model: &ModelArguments, template: &TemplateArguments) -> Result<Option<JobsConfig>> {
        let Some(folder) = &self.jobs else { return Ok(None) };
        let absolute = |path: &Path| std::path::absolute(path).with_context(|| format!("`{}`", path.display()));
        let is_local = model.model != NANO && Path::new(&model.model).exists();
        let mut model_flags: Vec<OsString> = vec!["--model".into()];
        model_flags.push(if is_local { absolute(Path::new(&model.model))?.into() } else { (&model.model).into() });
        model_flags.extend(["--device".into(), model.device.to_string().into()]);
        if let Some(dtype) = model.dtype.and_then(|dtype| dtype.to_possible_value()) {
            model_flags.extend(["--dtype".into(), dtype.get_name().into()]);
        }
        if let Some(mixture) = model.quantize {
            model_flags.extend(["--quantize".into(), String::from(mixture).into()]);
        }
        if let Some(file) = &template.chat_template {
            model_flags.extend(["--chat-template".into(), absolute(file)?.into()]);
        }
        for variable in &template.template_var {
            model_flags.extend(["--template-var".into(), variable.into()]);
        }
        Ok(Some(JobsConfig {
            folder: absolute(folder)?,
            program: std::env::current_exe().context("cannot determine the path of this program")?,
            model_flags,
            learning_rate: lora_learning_rate(model.model == NANO),
            max_file_bytes: self.max_file_bytes.0 as u64,
            max_total_bytes: self.max_total_file_bytes.0 as u64,
        }))
    }
}
