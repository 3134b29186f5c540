//! Loads datasets from JSONL files and splits them: rows of token ids, with a flag for each trained token.

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
    /// Converts a row of any schema to a sample, as [`Dataset::from_file`] does.
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

/// How validation rows are split off if there is no validation file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitOptions {
    /// Share of validation rows, from 0 to less than 1. If it is above 0 and there are at least two rows, at least one is a
    /// validation row.
    pub valid_fraction: f64,
    /// Seed of the random selection.
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
    /// Creates a dataset from samples.
    pub fn from_samples(samples: Vec<Sample>) -> Self {
        Self { samples }
    }

    /// Reads the rows of one JSONL or JSON file.
    ///
    /// The keys of a row determine its schema: `messages` (with or without `tools`), `prompt` and `completion`, `text`,
    /// `instruction` and `output` (alpaca), or `conversations` (sharegpt). The trained tokens are the assistant's turns of a
    /// conversation, including their end tokens, the completion after a prompt, or all of a text.
    ///
    /// # Errors
    /// The file cannot be read, or rows cannot be used; one error lists all of them.
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

    /// Splits the rows into training and validation rows, both in their order.
    pub fn split(self, options: &SplitOptions) -> (Self, Self) {
        let num_rows = self.samples.len();
        let requested = (num_rows as f64 * options.valid_fraction.clamp(0.0, 1.0)).round() as usize;
        let at_least = usize::from(options.valid_fraction > 0.0);
        let num_valid = requested.max(at_least).min(num_rows.saturating_sub(1));
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

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The number of tokens of each sample.
    pub fn lengths(&self) -> Vec<usize> {
        self.samples.iter().map(|sample| sample.ids.len()).collect()
    }
}

/// The datasets of a path: training rows, and optionally validation and test rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Datasets {
    /// The training rows.
    pub train: Dataset,
    /// The validation rows.
    pub valid: Option<Dataset>,
    /// The test rows.
    pub test: Option<Dataset>,
    /// Harmless irregularities of the files.
    pub notes: Vec<DataProblem>,
}

impl Datasets {
    /// Reads a file, or a folder with `train`, `valid` (or `validation`, `val`) and `test`, each `.jsonl` or `.json`; only
    /// `train` is required. Without a validation file, `split` determines the validation rows.
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
            let (train_rows, valid_rows) = train.split(split);
            train = train_rows;
            valid = Some(valid_rows);
        }
        problems.into_result(Self { train, valid, test, notes })
    }
}

/// The files of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFiles {
    /// The training rows.
    pub train: PathBuf,
    /// The validation rows.
    pub valid: Option<PathBuf>,
    /// The test rows.
    pub test: Option<PathBuf>,
}

impl DatasetFiles {
    /// Finds the files of a path: the file itself, or those in the folder.
    ///
    /// # Errors
    /// The path does not exist, or the folder has no `train` file, or several files for one purpose.
    pub fn find(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let [train, valid, test] = splits(path)?;
        let train =
            train.ok_or_else(|| problem(path, "expected `train.jsonl` or `train.json`, found neither".into()))?;
        Ok(Self { train, valid, test })
    }

    /// Finds the file to evaluate on: the path itself, or in a folder the `test` file, else the `valid` file, else the
    /// `train` file.
    ///
    /// # Errors
    /// The path does not exist, or the folder has none of these files, or several files for one purpose.
    pub fn find_for_evaluation(path: impl AsRef<Path>) -> Result<PathBuf> {
        let path = path.as_ref();
        let [train, valid, test] = splits(path)?;
        let message = "expected `test.jsonl`, `valid.jsonl` or `train.jsonl`, found none of them";
        test.or(valid).or(train).ok_or_else(|| problem(path, message.into()))
    }
}

/// The error about a folder.
fn problem(path: &Path, message: String) -> Error {
    Error::Data { problems: vec![DataProblem { path: path.to_path_buf(), line: 0, message }] }
}

/// The files for training, validation and test in a folder. A file is for training.
fn splits(path: &Path) -> Result<[Option<PathBuf>; 3]> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
    if !metadata.is_dir() {
        return Ok([Some(path.to_path_buf()), None, None]);
    }
    let find = |names: &[&str]| {
        let paths = names.iter().flat_map(|name| ["jsonl", "json"].map(|e| path.join(format!("{name}.{e}"))));
        // a dangling link counts as a file, so that it is an error and not a missing file
        let found: Vec<PathBuf> = paths.filter(|path| path.symlink_metadata().is_ok()).collect();
        match found.as_slice() {
            [] => Ok(None),
            [path] => Ok(Some(path.clone())),
            [first, second, ..] => {
                let (first, second) = (first.display(), second.display());
                Err(problem(path, format!("expected one of `{first}` and `{second}`, found both")))
            }
        }
    };
    Ok([find(&["train"])?, find(&["valid", "validation", "val"])?, find(&["test"])?])
}
