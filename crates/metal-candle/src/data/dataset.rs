//! Datasets: rows of token ids with the tokens that are trained.

use super::encode::Encoder;
use super::files::{FileRow, Problems, read_rows};
use super::random::Random;
use super::rows;
use super::sample::{DatasetOptions, Sample};
use super::tokenizer::Tokenizer;
use crate::error::{DataProblem, Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

impl Sample {
    /// The sample that a row of any schema becomes, as [`Dataset::from_file`] reads it.
    ///
    /// # Errors
    /// The row cannot be used; the message says why.
    pub fn from_row(row: Value, tokenizer: &Tokenizer, options: &DatasetOptions) -> Result<Self> {
        let encoded = rows::parse(row)
            .and_then(|(schema, row)| Encoder::new(tokenizer, options, false).encode(schema, row))
            .map_err(|message| Error::argument("row", message))?;
        Ok(Self { ids: encoded.ids, trained: encoded.trained, source: None })
    }
}

/// How rows are held out where there is no file for validation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitOptions {
    /// Share of the rows held out, 0 to less than 1; if above 0 and there are two rows or more, at least one is.
    pub valid_fraction: f64,
    /// Seed of the choice.
    pub seed: u64,
}

impl Default for SplitOptions {
    fn default() -> Self {
        Self { valid_fraction: 0.05, seed: 0 }
    }
}

/// Tokenized samples.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dataset {
    /// The samples in the order of the file.
    pub samples: Vec<Sample>,
}

impl Dataset {
    /// A dataset of these samples.
    pub fn from_samples(samples: Vec<Sample>) -> Self {
        Self { samples }
    }

    /// The rows of one JSONL or JSON file.
    ///
    /// The schema of each row is found by its keys: `messages` (with `tools` or without), `prompt` and `completion`, `text`,
    /// `instruction` and `output` (alpaca), or `conversations` (sharegpt). Of a conversation the assistant's turns are trained up to
    /// and with the token that ends them, of a completion what follows the prompt, of a text everything.
    ///
    /// # Errors
    /// The file cannot be read, or rows cannot be used; all of those are in one error.
    pub fn from_file(path: impl AsRef<Path>, tokenizer: &Tokenizer, options: &DatasetOptions) -> Result<Self> {
        let mut problems = Problems::default();
        let dataset = Self::read(path.as_ref(), tokenizer, options, &mut problems, &mut Vec::new())?;
        problems.into_result(dataset)
    }

    fn read(
        path: &Path,
        tokenizer: &Tokenizer,
        options: &DatasetOptions,
        problems: &mut Problems,
        notes: &mut Vec<DataProblem>,
    ) -> Result<Self> {
        let mut samples = Vec::new();
        let keep = |row: FileRow| samples.push(row.sample);
        notes.extend(read_rows(path, tokenizer, options, false, problems, keep)?);
        Ok(Self { samples })
    }

    /// Splits the rows into those trained on and those held out, both in their order.
    pub fn split(self, options: &SplitOptions) -> (Self, Self) {
        let num_rows = self.samples.len();
        let wanted = (num_rows as f64 * options.valid_fraction.clamp(0.0, 1.0)).round() as usize;
        let at_least = usize::from(options.valid_fraction > 0.0);
        let num_valid = wanted.max(at_least).min(num_rows.saturating_sub(1));
        let mut order: Vec<usize> = (0..num_rows).collect();
        Random::new(options.seed).shuffle(&mut order);
        let mut is_valid = vec![false; num_rows];
        order.iter().take(num_valid).for_each(|&index| is_valid[index] = true);
        let (mut train, mut valid) = (Self::default(), Self::default());
        for (sample, is_valid) in self.samples.into_iter().zip(is_valid) {
            if is_valid { &mut valid } else { &mut train }.samples.push(sample);
        }
        (train, valid)
    }

    /// The number of samples.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The number of tokens of each sample.
    pub fn lengths(&self) -> Vec<usize> {
        self.samples.iter().map(|sample| sample.ids.len()).collect()
    }
}

/// What a path holds: rows to train on, and perhaps to validate and test with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Datasets {
    /// The rows trained on.
    pub train: Dataset,
    /// The rows held out.
    pub valid: Option<Dataset>,
    /// The rows for a last test.
    pub test: Option<Dataset>,
    /// What is odd about the files but does no harm.
    pub notes: Vec<DataProblem>,
}

impl Datasets {
    /// Reads a file, or a folder with `train`, `valid` (or `validation`, `val`) and `test`, each `.jsonl` or `.json`; only `train` must
    /// be there. Without a file for validation, `split` says which rows are held out.
    ///
    /// # Errors
    /// As [`Dataset::from_file`], for all files at once.
    pub fn load(
        path: impl AsRef<Path>,
        tokenizer: &Tokenizer,
        options: &DatasetOptions,
        split: &SplitOptions,
    ) -> Result<Self> {
        if !(0.0..1.0).contains(&split.valid_fraction) {
            let found = split.valid_fraction;
            return Err(Error::argument("valid_fraction", format!("expected 0 to less than 1, found {found}")));
        }
        let files = DatasetFiles::find(path)?;
        let mut problems = Problems::default();
        let mut notes = Vec::new();
        let mut read = |path: &PathBuf| Dataset::read(path, tokenizer, options, &mut problems, &mut notes);
        let mut train = read(&files.train)?;
        let mut valid = files.valid.as_ref().map(&mut read).transpose()?;
        let test = files.test.as_ref().map(&mut read).transpose()?;
        if valid.is_none() && split.valid_fraction > 0.0 && train.len() > 1 {
            let (kept, held_out) = train.split(split);
            train = kept;
            valid = Some(held_out);
        }
        problems.into_result(Self { train, valid, test, notes })
    }
}

/// The files of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFiles {
    /// The rows trained on.
    pub train: PathBuf,
    /// The rows held out.
    pub valid: Option<PathBuf>,
    /// The rows for a last test.
    pub test: Option<PathBuf>,
}

impl DatasetFiles {
    /// The files at a path: itself, or those of a folder.
    ///
    /// # Errors
    /// There is nothing at the path, the folder has no `train` file, or several for one purpose.
    pub fn find(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
        if !metadata.is_dir() {
            return Ok(Self { train: path.to_path_buf(), valid: None, test: None });
        }
        let problem = |message: String| Error::Data {
            problems: vec![DataProblem { path: path.to_path_buf(), line: 0, message }],
        };
        let find = |names: &[&str]| {
            let paths = names.iter().flat_map(|name| ["jsonl", "json"].map(|e| path.join(format!("{name}.{e}"))));
            // whatever stands there is read, so that a link to nothing is an error and not an absent file
            let found: Vec<PathBuf> = paths.filter(|path| path.symlink_metadata().is_ok()).collect();
            match found.as_slice() {
                [] => Ok(None),
                [path] => Ok(Some(path.clone())),
                [first, second, ..] => Err(problem(format!(
                    "expected one of `{}` and `{}`, found both",
                    first.display(),
                    second.display()
                ))),
            }
        };
        let train = find(&["train"])?;
        let train = train.ok_or_else(|| problem("expected `train.jsonl` or `train.json`, found neither".into()))?;
        Ok(Self { train, valid: find(&["valid", "validation", "val"])?, test: find(&["test"])? })
    }
}
