//! Shared by `fuse` and `convert`: loads an adapter, checks the output folder, and compares logits.

use crate::model_source::{ModelArguments, ModelSource, check_adapter, load_adapter};
use crate::output::Output;
use crate::run_folder::{FREE_HINT, check_free};
use anyhow::Result;
use candle_core::Tensor;
use clap::Args;
use metal_candle::Model;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::models::Batch;
use std::path::PathBuf;

/// The number of tokens whose logits are compared.
const NUM_COMPARED: usize = 32;

/// The flags of a command that reads an adapter and writes a folder.
#[derive(Debug, Clone, Args)]
pub(crate) struct AdapterOutputArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,

    /// The adapter to read: a run folder, a PEFT or mlx-lm folder, or a GGUF file.
    #[arg(long, value_name = "FOLDER", help_heading = "Model")]
    pub(crate) adapter: PathBuf,

    /// The folder to write; it must be missing or empty.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) output: PathBuf,
}

impl AdapterOutputArguments {
    /// Checks that the output folder is free, and loads the model and the adapter.
    pub(crate) fn load(&self, output: Output) -> Result<(ModelSource, Model, LoRAAdapter)> {
        check_adapter(&self.adapter)?;
        check_free(&self.output, FREE_HINT)?;
        let source = ModelSource::find(&self.model.model, output)?;
        let model = source.load_as(self.model.types(), self.model.device, output)?;
        let adapter = load_adapter(&model, &self.adapter, &source)?;
        Ok((source, model, adapter))
    }
}

/// A batch for comparisons, with tokens from the whole vocabulary.
pub(crate) fn probe(model: &Model) -> Batch {
    let vocab_size = model.config().vocab_size;
    let ids: Vec<u32> = (0..NUM_COMPARED).map(|i| (i * 7919 % vocab_size) as u32).collect();
    Batch::single(&ids)
}

/// The largest absolute difference of two tensors of equal shape.
pub(crate) fn largest_difference(a: &Tensor, b: &Tensor) -> metal_candle::Result<f32> {
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?)
}
