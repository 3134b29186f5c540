//! `fuse`: merges an adapter into the weights of its model.

use crate::adapter_output::{AdapterOutputArguments, largest_difference, probe};
use crate::error::UserError;
use crate::model_folder::{with_end_of_turn, write_template};
use crate::output::{Output, bytes};
use crate::proof::{Proof, ProofArguments, save_proved};
use crate::run_folder::{FREE_HINT, fill_folder, recorded_template};
use crate::templates::TemplateArguments;
use anyhow::Result;
use candle_core::DType;
use clap::Args;
use metal_candle::adapters::{LoRAAdapter, Survival};
use metal_candle::models::Rows;
use metal_candle::{Device, Model, ModelLoader};
use serde_json::json;

/// The hint if rounding loses too much of an adapter.
const HINT: &str = "`--auto` writes f16 or else f32 if the model's type is not enough; `--stochastic-rounding SEED` preserves \
the change on average; `--dtype f32` preserves it exactly; an unmerged adapter loses nothing; \
`--min-survival` lowers the threshold";

/// Flags of `fuse`.
#[derive(Debug, Clone, Args)]
pub(crate) struct FuseArguments {
    #[command(flatten)]
    pub(crate) files: AdapterOutputArguments,

    /// Round stochastically to bf16 with this seed, so that changes too small for bf16 are preserved
    /// on average.
    #[arg(long, value_name = "SEED", conflicts_with = "auto")]
    pub(crate) stochastic_rounding: Option<u64>,

    #[command(flatten)]
    pub(crate) proof: ProofArguments,
}

pub(crate) fn run(flags: &FuseArguments, output: Output) -> Result<()> {
    flags.proof.check()?;
    let files = &flags.files;
    let (source, model, adapter) = files.load(output)?;
    // a folder without a tokenizer can be merged, too
    let has_tokenizer = source.has_tokenizer();
    let template = TemplateArguments::default();
    let tokenizer = has_tokenizer.then(|| template.tokenizer(&source, Some(&files.adapter))).transpose()?;
    let (merged, survivals) = merge(flags, &model, &adapter, output)?;
    let merged = match &tokenizer {
        Some(tokenizer) => with_end_of_turn(merged, tokenizer)?,
        None => merged,
    };
    let terms = adapter.low_rank_updates()?;
    let with_adapter = (adapter.run_model(), Some(&terms));
    let proof = flags.proof.text.measure(with_adapter, &merged, tokenizer.as_ref(), Some(&files.adapter), survivals)?;
    fill_folder(&files.output, FREE_HINT, || {
        save_proved(&merged, &files.output, Some(&proof))?;
        source.write_tokenizer(&files.output)?;
        if let (Some(tokenizer), Some(_)) = (&tokenizer, recorded_template(&files.adapter)?.chat_template) {
            write_template(tokenizer, &files.output)?;
        }
        Ok(())
    })?;
    drop(merged);

    let written = ModelLoader::new().with_device(model.device()).load(&files.output)?;
    let batch = probe(&model);
    let with_adapter = adapter.run_model().forward(&batch, Some(&terms), None, Rows::All)?;
    let difference = largest_difference(&with_adapter, &written.forward(&batch, None, None, Rows::All)?)?;
    let effect = largest_difference(&with_adapter, &model.forward(&batch, None, None, Rows::All)?)?;

    let size = std::fs::metadata(files.output.join("model.safetensors")).map_or(0, |file| file.len());
    if output.json {
        return Ok(Output::print_json(&json!({
            "output": files.output.to_string_lossy(),
            "dtype": written.dtype().as_str(),
            "bytes": size,
            "max_logit_difference": difference,
            "max_adapter_effect": effect,
            "proof": proof.to_json(),
        }))?);
    }
    proof.note(output);
    output.note(format_args!(
        "wrote {} ({} in {})\nlogits of the merged model and of model + adapter differ by at most {difference:.2e} ({}); \
         the adapter itself changes them by up to {effect:.2e}",
        files.output.display(),
        bytes(size),
        written.dtype().as_str(),
        rounding(&model, &written),
    ));
    Ok(())
}

/// The merged model, and how much of the adapter's change survives in it.
fn merge(
    flags: &FuseArguments,
    model: &Model,
    adapter: &LoRAAdapter,
    output: Output,
) -> Result<(Model, Vec<Survival>)> {
    let min_survival = flags.proof.min_survival;
    let measured = |merged: Model| -> Result<(Model, Vec<Survival>)> {
        let survivals = adapter.survival(model, &merged)?;
        Ok((merged, survivals))
    };
    let (merged, survivals) = match flags.stochastic_rounding {
        Some(seed) => measured(adapter.merge_stochastically(model, seed)?)?,
        None => measured(adapter.merge(model)?)?,
    };
    if Proof::lost(&survivals, min_survival).is_empty() {
        return Ok((merged, survivals));
    }
    if !flags.proof.auto {
        return Err(Proof::refusal(&Proof::lost(&survivals, min_survival), min_survival, HINT).into());
    }
    for dtype in [DType::F16, DType::F32] {
        // convert the other weights, too: programs load a model in one type
        let wide = model.to_dtype(dtype);
        let Ok(wide) = wide else { continue };
        let merged = adapter.merge(&wide)?;
        let (merged, survivals) = measured(merged)?;
        if Proof::lost(&survivals, min_survival).is_empty() {
            output.note(format_args!(
                "{} would lose too much of the adapter's change: writing weights as {}",
                model.dtype().as_str(),
                dtype.as_str()
            ));
            return Ok((merged, survivals));
        }
    }
    Err(UserError::new("the adapter's change is lost even in f32").into())
}

/// The main cause of differences between the base with the adapter and the written model.
fn rounding(base: &Model, written: &Model) -> &'static str {
    if base.parameters().iter().any(|(_, weight)| weight.block_format().is_some()) {
        // baseline and Neon without dot products use f32
        let is_f32 = |level: &&str| ["baseline", "neon"].contains(level);
        let rounds = Device::cpu_levels().is_ok_and(|levels| !levels.iter().all(is_f32));
        match base.device().is_cpu() {
            true if rounds => return "the quantized model rounds activations to 8 bits, the merged model does not",
            true => {}
            false => return "the quantized model rounds activations, and the merged model its weights",
        }
    }
    match written.dtype() {
        DType::F32 => "due to the order of additions",
        _ => "due to rounding of the weights",
    }
}
