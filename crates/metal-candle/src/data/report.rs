//! Summarizes a dataset: rows, tokens, lengths, roles, duplicates, leakage and problems.

use super::encode::{Details, RoleTokens};
use super::files::{FileRow, Problems, read_rows};
use super::{DatasetFiles, DatasetOptions, Sample, Schema, Tokenizer};
use crate::error::{DataProblem, Result};
use serde::Serialize;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Maximum number of duplicates that are listed; all are counted.
const MAX_LISTED: usize = 100;
/// Maximum number of bars in a histogram.
const MAX_BARS: usize = 20;

/// A summary of the files of a dataset.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DataReport {
    /// One entry per file: training, then validation and test if they exist.
    pub files: Vec<FileReport>,
    /// Rows of the other files whose text is also in the first, ignoring white space.
    pub leakage: Duplicates,
    /// Harmless irregularities.
    pub notes: Vec<DataProblem>,
    /// Rows that cannot be used.
    pub problems: Vec<DataProblem>,
}

/// A summary of one file.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// The number of usable rows.
    pub rows: usize,
    /// The number of tokens.
    pub tokens: usize,
    /// The number of tokens whose prediction is trained.
    pub trained_tokens: usize,
    /// The lengths of the rows.
    pub lengths: Lengths,
    /// The tokens of each role before rows are truncated; `several` counts turns that cannot be separated.
    pub roles: BTreeMap<String, RoleTokens>,
    /// The number of rows of each schema.
    pub schemas: BTreeMap<Schema, usize>,
    /// Rows with the text of an earlier row.
    pub exact_duplicates: Duplicates,
    /// Rows with the text of an earlier row, ignoring white space; includes the exact duplicates.
    pub near_duplicates: Duplicates,
}

/// The lengths of rows, in tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Lengths {
    /// The shortest row.
    pub min: usize,
    /// The longest row.
    pub max: usize,
    /// The mean.
    pub mean: f64,
    /// The 50th, 90th, 95th and 99th percentile: the smallest length that this share of the rows does not exceed.
    pub percentiles: [(u8, usize); 4],
    /// Bars of equal width.
    pub histogram: Vec<Bar>,
}

/// One bar of a histogram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// The smallest length of the bar.
    pub from: usize,
    /// The largest length of the bar.
    pub to: usize,
    /// The number of rows.
    pub rows: usize,
}

/// Duplicate rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Duplicates {
    /// The number of duplicates.
    pub count: usize,
    /// The first hundred duplicates.
    pub listed: Vec<Duplicate>,
}

/// A duplicate row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Duplicate {
    /// The file.
    pub path: PathBuf,
    /// The line.
    pub line: usize,
    /// The line of the first row with this text.
    pub first_line: usize,
}

impl Duplicates {
    fn add(&mut self, path: &Path, line: usize, first_line: usize) {
        self.count += 1;
        if self.listed.len() < MAX_LISTED {
            self.listed.push(Duplicate { path: path.to_path_buf(), line, first_line });
        }
    }
}

impl DataReport {
    /// Reads all rows of `path`, a file or a folder, as training does.
    ///
    /// # Errors
    /// A file cannot be read. Unusable rows are listed in the report instead.
    pub fn of(path: impl AsRef<Path>, tokenizer: &Tokenizer, options: &DatasetOptions) -> Result<Self> {
        let files = DatasetFiles::find(path)?;
        let mut report = Self::default();
        let mut problems = Problems::default();
        let mut train_lines: HashMap<u64, usize> = HashMap::new();
        let paths = [Some(files.train), files.valid, files.test];
        for (number, path) in paths.into_iter().flatten().enumerate() {
            let mut file = FileCounts::new(&path);
            let leakage = &mut report.leakage;
            let notes = read_rows(&path, tokenizer, options, true, &mut problems, |row| {
                let normalized_hash = file.add(&row);
                let line = row.sample.source.as_ref().map_or(0, |source| source.line);
                if let (Some(hash), true) = (normalized_hash, number > 0)
                    && let Some(&first_line) = train_lines.get(&hash)
                {
                    leakage.add(&path, line, first_line);
                }
            })?;
            report.notes.extend(notes);
            let (finished, lines) = file.finish();
            report.files.push(finished);
            if number == 0 {
                train_lines = lines;
            }
        }
        report.problems = problems.into_list();
        Ok(report)
    }
}

/// The counts of a file that is being read.
struct FileCounts {
    report: FileReport,
    lengths: Vec<usize>,
    exact: HashMap<u64, usize>,
    normalized: HashMap<u64, usize>,
}

impl FileCounts {
    fn new(path: &Path) -> Self {
        let report = FileReport { path: path.to_path_buf(), ..FileReport::default() };
        Self { report, lengths: Vec::new(), exact: HashMap::new(), normalized: HashMap::new() }
    }

    /// Counts a row and returns the hash of its text.
    fn add(&mut self, row: &FileRow) -> Option<u64> {
        let line = row.sample.source.as_ref().map_or(0, |source| source.line);
        let report = &mut self.report;
        report.rows += 1;
        report.tokens += row.sample.ids.len();
        report.trained_tokens += row.sample.num_trained();
        self.lengths.push(row.sample.ids.len());
        *report.schemas.entry(row.schema).or_default() += 1;
        let Details { roles, exact_hash, normalized_hash } = row.details.as_ref()?;
        for (role, counts) in roles {
            let total = report.roles.entry(role.clone()).or_default();
            total.tokens += counts.tokens;
            total.trained += counts.trained;
        }
        if let Some(first_line) = seen(&mut self.exact, *exact_hash, line) {
            report.exact_duplicates.add(&report.path, line, first_line);
        }
        if let Some(first_line) = seen(&mut self.normalized, *normalized_hash, line) {
            report.near_duplicates.add(&report.path, line, first_line);
        }
        Some(*normalized_hash)
    }

    fn finish(mut self) -> (FileReport, HashMap<u64, usize>) {
        self.report.lengths = Lengths::of(self.lengths);
        (self.report, self.normalized)
    }
}

/// The first line with this hash; records the line if it is the first.
fn seen(lines: &mut HashMap<u64, usize>, hash: u64, line: usize) -> Option<usize> {
    match lines.entry(hash) {
        Entry::Occupied(entry) => Some(*entry.get()),
        Entry::Vacant(entry) => {
            entry.insert(line);
            None
        }
    }
}

impl Lengths {
    /// Computes the statistics of these lengths.
    pub fn of(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        let (Some(&min), Some(&max)) = (lengths.first(), lengths.last()) else { return Self::default() };
        let percentile = |percent: u8| {
            let rank = (lengths.len() * usize::from(percent)).div_ceil(100).max(1);
            (percent, lengths[rank - 1])
        };
        Self {
            min,
            max,
            mean: lengths.iter().map(|&length| length as f64).sum::<f64>() / lengths.len() as f64,
            percentiles: [50, 90, 95, 99].map(percentile),
            histogram: histogram(&lengths),
        }
    }
}

/// A histogram with the smallest bar width out of 1, 2, 5, 10, 20, 50 ... that needs at most `MAX_BARS` bars.
fn histogram(sorted: &[usize]) -> Vec<Bar> {
    let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else { return Vec::new() };
    let mut width = 1_usize;
    for factor in [2, 5, 10].iter().cycle() {
        if max / width - min / width < MAX_BARS {
            break;
        }
        let decade = 10_usize.pow(width.ilog10());
        width = decade.saturating_mul(*factor);
    }
    (min / width..=max / width)
        .map(|bar| {
            let (from, to) = (bar * width, (bar * width).saturating_add(width - 1));
            let rows = sorted.partition_point(|&n| n <= to) - sorted.partition_point(|&n| n < from);
            Bar { from, to, rows }
        })
        .collect()
}

/// A part of a row's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Span {
    /// The text.
    pub text: String,
    /// Whether its tokens are trained.
    pub trained: bool,
}

/// Splits the text of a sample into trained and untrained spans.
///
/// # Errors
/// The tokens cannot be decoded.
pub fn highlight(sample: &Sample, tokenizer: &Tokenizer) -> Result<Vec<Span>> {
    let mut spans: Vec<Span> = Vec::new();
    let mut add = |text: String, trained: bool| match spans.last_mut() {
        Some(last) if last.trained == trained => last.text.push_str(&text),
        _ => spans.push(Span { text, trained }),
    };
    let mut decoder = tokenizer.stream_decoder(false);
    let mut is_trained = false;
    for (&id, &trained) in sample.ids.iter().zip(&sample.trained) {
        is_trained = trained;
        if let Some(text) = decoder.push(id)? {
            add(text, trained);
        }
    }
    if let Some(text) = decoder.flush()? {
        add(text, is_trained);
    }
    Ok(spans)
}
