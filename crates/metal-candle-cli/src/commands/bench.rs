//! `bench`: measures prefill, decode and training on this machine, alone or compared with another program.

mod arguments;
mod measure;
mod memory;
mod peer;
mod report;
mod shape;
mod work;

pub(crate) use arguments::BenchArguments;

use crate::error::UserError;
use crate::model_source::{ModelSource, NANO, moved, quantized};
use crate::output::Output;
use crate::values::{MixtureName, WeightType};
use anyhow::{Context, Result};
use measure::{Measured, measure, weights_bytes};
use metal_candle::inference::KVCacheType;
use metal_candle::models::{MatmulPrecision, save_model};
use metal_candle::{Device, Model, ModelConfig};
use peer::{Peer, PeerKind};
use report::{Report, Row};
use shape::Shape;
use std::path::{Path, PathBuf};
use work::Work;

/// The text of `--help` below the flags.
pub(crate) const HELP: &str = "\
By default, the built-in model is measured on the CPU, and random bf16 weights with the shape of qwen2.5-0.5b on Metal
and CUDA. Prefill and decode use the generator, and training uses the trainer (AdamW, all linear layers), as the other
commands do; a smaller micro-batch or checkpointed blocks are reported. Memory is the peak: of the process on the CPU,
otherwise of the device. Progress is printed to standard error.

Examples:
  metal-candle bench
  metal-candle bench --shape qwen2.5-7b --skip train
  metal-candle bench --model ./Qwen2.5-Coder-0.5B --prefill 1024 --decode-batch 1,4,16 --context 2048
  metal-candle bench --against mlx-lm --python ~/mlx/bin/python
  metal-candle bench --against transformers --best --shape qwen2.5-0.5b --json

--against needs a Python with mlx-lm, or with torch, transformers and peft. For it, random weights are written to a
temporary folder (TMPDIR). Both programs load the model, and each row is measured by one and then the other; if memory
is short, this program measures all its rows first.";

pub(crate) fn run(flags: &BenchArguments, output: Output) -> Result<()> {
    let device = flags.device.open(output)?;
    // report missing packages before loading anything
    if flags.best && flags.against != Some(PeerKind::Transformers) {
        return Err(UserError::new("`--best` is only for `--against transformers`").into());
    }
    let mut peer = flags.against.map(|kind| Peer::start(kind, flags.best, &flags.python, device)).transpose()?;
    let origin = Origin::find(flags, device, output)?;
    // report wrong sizes before loading and quantizing
    let works = flags.works(&origin.config()?, device, output)?;
    let mut subject = Subject::new(origin, flags, device, output)?;
    subject.model = flags.precision.apply(subject.model)?;
    let mut report = Report {
        device: device.name(),
        device_name: device.description(),
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        model: subject.name.clone(),
        num_parameters: subject.model.config().num_parameters(),
        dtype: subject.model.weight_type(),
        kv_cache: flags.cache.kv_cache.map(KVCacheType::name),
        is_rounded: subject.model.matmul_precision() == MatmulPrecision::Bf16,
        rows: Vec::with_capacity(works.len()),
        peer: peer.as_ref().map(|peer| peer.name.clone()),
    };
    let mut bench = Bench { kv_cache: flags.cache.kv_cache, output, failure: None };
    match &mut peer {
        Some(peer) => bench.beside(subject, peer, &works, &mut report)?,
        None => {
            for work in works {
                report.rows.push(Row { work, ours: bench.measure(&subject.model, work)?, theirs: None });
            }
        }
    }
    if output.json {
        Output::print_json(&report.to_json())?;
    } else {
        Output::print(report.to_text())?;
    }
    bench.failure.map_or(Ok(()), Err)
}

/// The state of the measurements.
struct Bench {
    /// The type of the KV cache, if `--kv-cache` is set.
    kv_cache: Option<KVCacheType>,
    output: Output,
    /// The first row that failed; the other rows are measured and printed anyway.
    failure: Option<anyhow::Error>,
}

impl Bench {
    fn measure(&mut self, model: &Model, work: Work) -> Result<Measured> {
        self.output.note(format_args!("measuring {}", work.title()));
        match measure(model, work, self.kv_cache) {
            Err(error) if !error.is::<UserError>() => {
                let remark = crate::error::message(&error);
                self.failure.get_or_insert(error.context(work.title()));
                Ok(Measured::failed(remark))
            }
            measured => measured,
        }
    }

    /// Measures both programs, row by row if memory is sufficient for both.
    fn beside(&mut self, subject: Subject, peer: &mut Peer, works: &[Work], report: &mut Report) -> Result<()> {
        let dtype = subject.model.weight_type();
        let weights = weights_bytes(&subject.model);
        let (model, folder) = subject.into_folder(self.output)?;
        // the weights of the other program, and the same amount to work with
        let fits_twice = model.device().memory().is_none_or(|memory| memory.free >= 2 * weights);
        let mut measured = Vec::new();
        let model = if fits_twice {
            Some(model)
        } else {
            self.output.note("memory is too small for both programs at the same time: measuring one after the other");
            for &work in works {
                measured.push(self.measure(&model, work)?);
            }
            None
        };
        let mut measured = measured.into_iter();
        self.output.note(format_args!("loading the model with {}", peer.name));
        peer.load(folder.path(), dtype)?;
        for &work in works {
            let ours = match (measured.next(), &model) {
                (Some(measured), _) => measured,
                (None, Some(model)) => self.measure(model, work)?,
                (None, None) => Measured::default(),
            };
            self.output.note(format_args!("measuring {} with {}", work.title(), peer.name));
            let theirs = peer.measure(work);
            report.rows.push(Row { work, ours, theirs: Some(theirs) });
        }
        Ok(())
    }
}

/// Where the measured model comes from.
enum Origin {
    /// Random weights.
    Random(Shape),
    Files(ModelSource),
}

/// The measured model.
struct Subject {
    model: Model,
    /// Its name in the report.
    name: String,
    /// The folder it was read from; none for random weights.
    folder: Option<PathBuf>,
}

/// A folder with a model, possibly a temporary one.
enum Folder {
    Own(tempfile::TempDir),
    Given(PathBuf),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Self::Own(folder) => folder.path(),
            Self::Given(path) => path,
        }
    }
}

impl Origin {
    fn find(flags: &BenchArguments, device: Device, output: Output) -> Result<Self> {
        Ok(match (&flags.model, flags.shape) {
            (None, None) if !device.is_cpu() => Self::Random(Shape::Qwen500M),
            (_, Some(shape)) => Self::Random(shape),
            (model, None) => Self::Files(ModelSource::find(model.as_deref().unwrap_or(NANO), output)?),
        })
    }

    fn config(&self) -> Result<ModelConfig> {
        match self {
            Self::Random(shape) => Ok(shape.config()?),
            Self::Files(source) => Ok(source.config()?),
        }
    }
}

impl Subject {
    fn new(origin: Origin, flags: &BenchArguments, device: Device, output: Output) -> Result<Self> {
        match origin {
            Origin::Random(shape) => Self::random(shape, flags, device, output),
            Origin::Files(source) => {
                let model = source.load_as((flags.dtype, flags.quantize), flags.device, output)?;
                let is_shared = source.gguf().is_none() && flags.quantize.is_none();
                let folder = is_shared.then(|| source.folder().to_path_buf());
                Ok(Self { model, name: source.name, folder })
            }
        }
    }

    fn random(shape: Shape, flags: &BenchArguments, device: Device, output: Output) -> Result<Self> {
        let dtype = flags.dtype.unwrap_or(WeightType::Bf16).dtype();
        let config = shape.config()?;
        // weights to be quantized are created on the CPU
        let home = if flags.quantize.is_some() { Device::CPU } else { device };
        shape.check_memory(dtype, home.memory().map(|memory| memory.free))?;
        output.note(format_args!("creating random weights with the shape of {}", shape.name()));
        let model = match flags.quantize {
            Some(MixtureName(mixture)) => {
                let model = Model::repeated_pattern(config, 1, dtype, Device::CPU)?;
                moved(&quantized(&model, &mixture.into(), output)?, device, flags.dtype)?
            }
            None => Model::repeated_pattern(config, 1, dtype, device)?,
        };
        Ok(Self { model, name: format!("random weights, shape of {}", shape.name()), folder: None })
    }

    /// The model, and a folder that other programs can load it from.
    fn into_folder(self, output: Output) -> Result<(Model, Folder)> {
        if let Some(folder) = self.folder {
            return Ok((self.model, Folder::Given(folder)));
        }
        let folder = tempfile::tempdir().context("cannot create a temporary folder for the model")?;
        output.note("writing the weights for the other program to a temporary folder");
        save_model(&self.model, folder.path())?;
        Ok((self.model, Folder::Own(folder)))
    }
}
