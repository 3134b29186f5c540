//! `data check`: summarizes a dataset and shows how its rows are tokenized.

use crate::input::rereadable;
use crate::model_source::ModelSource;
use crate::output::{Output, grouped};
use crate::settings::check_max_tokens;
use crate::templates::TemplateArguments;
use anyhow::Result;
use clap::{Args, Subcommand};
use metal_candle::Error;
use metal_candle::data::{
    DataReport, Dataset, DatasetOptions, Duplicates, FileReport, Lengths, Tokenizer, TrainedTurns, highlight,
};
use metal_candle::files::printable;
use serde_json::{Value, json};
use std::fmt::Write;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// Width of the longest bar of a histogram.
const BAR_WIDTH: usize = 40;

/// Flags of `data`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DataArguments {
    #[command(subcommand)]
    pub(crate) command: DataCommand,
}

/// The subcommands of `data`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum DataCommand {
    /// Show token counts, lengths, duplicates and leakage of a dataset, and the trained tokens of some rows.
    #[command(after_help = "\
Examples:
  metal-candle data check train.jsonl
  metal-candle data check my-data --rows 10 --model Qwen/Qwen2.5-Coder-0.5B-Instruct

Trained tokens are shown in colour, or in brackets if colour is off (NO_COLOR, or not a terminal).")]
    Check(DataCheckArguments),
}

/// Flags of `data check`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DataCheckArguments {
    /// A JSONL file, or a folder with train.jsonl, valid.jsonl and test.jsonl.
    pub(crate) data: PathBuf,

    /// Use the tokenizer and chat template of this model: a folder, `nano`, or a Hub name.
    #[arg(long, default_value = "nano")]
    pub(crate) model: String,

    /// Number of rows to show.
    #[arg(long, default_value_t = 3)]
    pub(crate) rows: usize,

    /// Longest row, in tokens [default: the model's context].
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_tokens_per_sample: Option<usize>,

    /// Train only the last assistant turn of a chat.
    #[arg(long)]
    pub(crate) train_last_turn_only: bool,

    #[command(flatten)]
    pub(crate) template: TemplateArguments,
}

pub(crate) fn run(flags: &DataArguments, output: Output) -> Result<()> {
    let DataCommand::Check(flags) = &flags.command;
    check(flags, output)
}

fn check(flags: &DataCheckArguments, output: Output) -> Result<()> {
    let source = ModelSource::find(&flags.model, output)?;
    let tokenizer = flags.template.tokenizer(&source, None)?;
    let config = source.config()?;
    check_max_tokens(flags.max_tokens_per_sample, &config)?;
    let max_tokens = flags.max_tokens_per_sample.unwrap_or(config.max_position_embeddings);
    let options = DatasetOptions {
        max_tokens: Some(max_tokens),
        vocab_size: Some(config.vocab_size),
        trained_turns: if flags.train_last_turn_only { TrainedTurns::Last } else { TrainedTurns::All },
        ..DatasetOptions::default()
    };
    // the rows are read a second time to show them
    let (data, _copy) = rereadable(&flags.data)?;
    let mut report = DataReport::of(&data, &tokenizer, &options)?;
    let first = report.files.first().map(|file| file.path.clone());
    let paths = report.files.iter_mut().map(|file| &mut file.path);
    let problems = report.notes.iter_mut().chain(&mut report.problems).map(|problem| &mut problem.path);
    for path in paths.chain(problems).filter(|path| **path == data) {
        path.clone_from(&flags.data);
    }
    if output.json {
        let mut object = json!(report);
        let rows = match (&first, report.problems.is_empty()) {
            (Some(first), true) if flags.rows > 0 => rows(first, flags.rows, &tokenizer, &options)?,
            _ => Vec::new(),
        };
        object["rows"] = Value::Array(rows);
        Output::print_json(&object)?;
    } else {
        let mut text = String::new();
        // the problems explain a file without usable rows
        for file in report.files.iter().filter(|file| file.rows > 0 || report.problems.is_empty()) {
            describe(&mut text, file)?;
        }
        if report.files.len() > 1 {
            writeln!(text, "in other files  {}", duplicates(&report.leakage))?;
        }
        for note in &report.notes {
            writeln!(text, "note            {note}")?;
        }
        Output::print(text)?;
        if let (Some(first), true) = (&first, report.problems.is_empty()) {
            let dataset = Dataset::from_file(first, &tokenizer, &options)?;
            for sample in dataset.samples.iter().take(flags.rows) {
                let line = sample.source.as_ref().map_or(0, |source| source.line);
                let head = format!("\nline {line} ({} tokens, {} trained)", sample.ids.len(), sample.num_trained());
                Output::print_styled(format_args!("{head}\n{}\n", shown(sample, &tokenizer, is_coloured())?))?;
            }
        }
    }
    if report.problems.is_empty() {
        return Ok(());
    }
    Err(Error::Data { problems: report.problems }.into())
}

/// The first rows of a file: line, text, and the id of each token and whether it is trained.
fn rows(path: &Path, count: usize, tokenizer: &Tokenizer, options: &DatasetOptions) -> Result<Vec<Value>> {
    let dataset = Dataset::from_file(path, tokenizer, options)?;
    let rows = dataset.samples.iter().take(count).map(|sample| {
        Ok(json!({
            "line": sample.source.as_ref().map(|source| source.line),
            "text": tokenizer.decode(&sample.ids, false)?,
            "ids": sample.ids,
            "trained": sample.trained,
        }))
    });
    rows.collect()
}

/// Whether trained tokens are shown in colour.
pub(crate) fn is_coloured() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn describe(text: &mut String, file: &FileReport) -> std::fmt::Result {
    writeln!(text, "{}", file.path.display())?;
    let schemas: Vec<String> =
        file.schemas.iter().map(|(schema, count)| format!("{} {}", grouped(*count as u64), name(*schema))).collect();
    writeln!(text, "rows            {} ({})", grouped(file.rows as u64), schemas.join(", "))?;
    writeln!(
        text,
        "tokens          {}, {} trained ({})",
        grouped(file.tokens as u64),
        grouped(file.trained_tokens as u64),
        percent(file.trained_tokens, file.tokens),
    )?;
    for (role, counts) in &file.roles {
        let trained = percent(counts.trained, counts.tokens);
        writeln!(text, "  {role:<13} {} tokens, {trained} trained", grouped(counts.tokens as u64))?;
    }
    lengths(text, &file.lengths)?;
    writeln!(text, "exact copies    {}", duplicates(&file.exact_duplicates))?;
    writeln!(text, "near copies     {}\n", duplicates(&file.near_duplicates))
}

fn lengths(text: &mut String, lengths: &Lengths) -> std::fmt::Result {
    let percentiles: Vec<String> =
        lengths.percentiles.iter().map(|(percent, length)| format!("{percent} % up to {length}")).collect();
    writeln!(
        text,
        "row lengths     {} to {} tokens, mean {:.0}; {}",
        lengths.min,
        lengths.max,
        lengths.mean,
        percentiles.join(", ")
    )?;
    let most = lengths.histogram.iter().map(|bar| bar.rows).max().unwrap_or(0).max(1);
    for bar in &lengths.histogram {
        // a bar that is not empty has at least one character
        let width = (bar.rows * BAR_WIDTH).div_ceil(most);
        writeln!(text, "  {:>6} - {:<6} {:>8}  {}", bar.from, bar.to, grouped(bar.rows as u64), "#".repeat(width))?;
    }
    Ok(())
}

fn duplicates(found: &Duplicates) -> String {
    let Some(first) = found.listed.first() else { return "none".into() };
    let shown: Vec<String> =
        found.listed.iter().take(3).map(|row| format!("line {} is line {}", row.line, row.first_line)).collect();
    let more = if found.count > shown.len() { ", ..." } else { "" };
    format!("{} rows of {} ({}{more})", grouped(found.count as u64), first.path.display(), shown.join(", "))
}

fn percent(part: usize, whole: usize) -> String {
    format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64)
}

/// The name of a schema in JSON.
fn name(schema: metal_candle::data::Schema) -> String {
    json!(schema).as_str().unwrap_or_default().to_owned()
}

/// The text of a row, with trained spans in colour or brackets.
pub(crate) fn shown(
    sample: &metal_candle::data::Sample,
    tokenizer: &Tokenizer,
    coloured: bool,
) -> metal_candle::Result<String> {
    let (begin, end) = if coloured { ("\x1b[32m", "\x1b[0m") } else { ("⟦", "⟧") };
    let mut text = String::new();
    for span in highlight(sample, tokenizer)? {
        // escape control characters, which could control the terminal
        let plain = printable(&span.text);
        if span.trained {
            text.extend([begin, &plain, end]);
        } else {
            text.push_str(&plain);
        }
    }
    Ok(text)
}
