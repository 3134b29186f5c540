//! `logits`: the logits of given token ids.

use crate::args::LogitsArguments;
use crate::model_source::Loaded;
use crate::output::Output;
use anyhow::Result;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::models::{Batch, Rows, write_safetensors};
use serde_json::json;

pub(crate) fn run(flags: &LogitsArguments, output: Output) -> Result<()> {
    let loaded = Loaded::new(&flags.model, output)?;
    let terms = loaded.adapter.as_ref().map(LoRAAdapter::terms).transpose()?;
    let logits = loaded.model.forward(&Batch::single(&flags.ids), terms.as_ref(), None, Rows::All)?;
    write_safetensors(&flags.out, &[("logits", logits.clone())], &[])?;
    let (tokens, vocab) = logits.dims2().map_err(metal_candle::Error::from)?;
    if output.json {
        let out = flags.out.to_string_lossy();
        Output::print_json(&json!({ "out": out, "tensor": "logits", "shape": [tokens, vocab], "dtype": "f32" }))?;
    } else {
        output.note(format_args!("wrote `logits`, f32 [{tokens}, {vocab}], to {}", flags.out.display()));
    }
    Ok(())
}
