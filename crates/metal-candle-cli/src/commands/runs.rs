//! `runs`: lists and compares training runs.

mod page;
mod summary;
mod table;

use crate::output::Output;

use crate::error::UserError;
use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use metal_candle::Error;
use metal_candle::models::write_atomically;
use std::cmp::Ordering;
use std::path::{Path, PathBuf};
use summary::{Run, find, is_run};

/// The default folder of runs.
const RUNS: &str = "runs";

/// Flags of `runs`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunsArguments {
    #[command(subcommand)]
    pub(crate) command: Option<RunsCommand>,

    /// Run folders, or folders that contain run folders [default: runs].
    #[arg(value_name = "FOLDER")]
    pub(crate) folders: Vec<PathBuf>,

    /// Sort by this column; runs without a value come last.
    #[arg(long, value_enum, default_value = "name")]
    pub(crate) sort: RunSort,

    /// Reverse the order.
    #[arg(long)]
    pub(crate) reverse: bool,

    /// Also write an HTML page with the curves of all runs in one chart.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

/// The subcommands of `runs`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum RunsCommand {
    /// Compare the differing settings and the results of runs side by side.
    Compare(CompareArguments),
}

/// Flags of `runs compare`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CompareArguments {
    /// The run folders.
    #[arg(required = true, num_args = 2.., value_name = "RUN")]
    pub(crate) runs: Vec<PathBuf>,

    /// Also write an HTML page with their curves in one chart.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

/// The columns to sort by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RunSort {
    /// The folder.
    Name,
    /// Running, done, stopped, failed, killed.
    State,
    /// The start time.
    Started,
    /// Completed steps.
    Steps,
    /// The highest learning rate.
    LearningRate,
    /// The last training loss.
    TrainLoss,
    /// The best validation loss.
    #[value(alias = "held-out")]
    Valid,
    /// Tokens per second.
    Speed,
    /// The training time.
    Time,
}

pub(crate) fn run(flags: &RunsArguments, output: Output) -> Result<()> {
    if let Some(RunsCommand::Compare(compared)) = &flags.command {
        for folder in &compared.runs {
            std::fs::read_dir(folder).map_err(|source| Error::Read { path: folder.clone(), source })?;
            if !is_run(folder) {
                let message = format!("`{}` is not a run folder", folder.display());
                let hint = "`metal-candle runs FOLDER` lists the runs in a folder";
                return Err(UserError::new(message).with_hint(hint).into());
            }
        }
        let runs: Vec<Run> = compared.runs.iter().map(|folder| Run::read(folder)).collect();
        return show(&runs, compared.html.as_deref(), table::comparison, output);
    }
    let default = [PathBuf::from(RUNS)];
    let folders = if flags.folders.is_empty() { &default[..] } else { &flags.folders };
    let found = match find(folders) {
        Err(_) if flags.folders.is_empty() && !Path::new(RUNS).exists() => Vec::new(),
        Err(source) => {
            let path = folders.iter().find(|folder| std::fs::read_dir(folder).is_err()).cloned().unwrap_or_default();
            return Err(Error::Read { path, source }.into());
        }
        Ok(found) => found,
    };
    let mut runs: Vec<Run> = found.iter().map(|folder| Run::read(folder)).collect();
    sort(&mut runs, flags.sort, flags.reverse);
    if runs.is_empty() {
        let places: Vec<_> = folders.iter().map(|folder| format!("`{}`", folder.display())).collect();
        output.note(format_args!("there are no runs in {}", places.join(", ")));
    }
    show(&runs, flags.html.as_deref(), table::list, output)
}

fn show(runs: &[Run], html: Option<&Path>, text: fn(&[Run]) -> String, output: Output) -> Result<()> {
    if let Some(path) = html {
        let page = page::page(runs);
        write_atomically(path, |file| file.write_all(page.as_bytes()))?;
        output.note(format_args!("page  {}", path.display()));
    }
    if output.json {
        Output::print_json(&runs.iter().map(Run::as_json).collect())?;
    } else if !runs.is_empty() {
        Output::print(text(runs))?;
    }
    Ok(())
}

/// Sorts by a column; runs without a value come last in either order.
fn sort(runs: &mut [Run], by: RunSort, reverse: bool) {
    let key = |run: &Run| -> Option<f64> {
        let value = match by {
            RunSort::Name => return Some(0.0),
            RunSort::State => Some(f64::from(run.state as u8)),
            RunSort::Started => Some(run.record.started as f64).filter(|&started| started > 0.0),
            RunSort::Steps => Some(run.steps as f64),
            RunSort::LearningRate => run.setting("learning_rate").and_then(serde_json::Value::as_f64),
            RunSort::TrainLoss => run.train_loss(),
            RunSort::Valid => run.valid_losses().map(|points| points[1].1),
            RunSort::Speed => run.record.tokens_per_second,
            RunSort::Time => Some(run.record.seconds).filter(|&seconds| seconds > 0.0),
        };
        value.filter(|value| value.is_finite())
    };
    let turned = |order: Ordering| if reverse { order.reverse() } else { order };
    runs.sort_by(|a, b| match (key(a), key(b)) {
        (Some(x), Some(y)) => turned(x.total_cmp(&y).then_with(|| by_name(&a.name, &b.name))),
        (x, y) => y.is_some().cmp(&x.is_some()),
    });
}

/// `runs/2` before `runs/10`.
fn by_name(a: &str, b: &str) -> Ordering {
    let split = |name: &str| {
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let (text, number) = name.split_at(name.len() - digits);
        (text.to_owned(), number.parse::<u64>().ok())
    };
    split(a).cmp(&split(b)).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::by_name;

    #[test]
    fn names_with_numbers() {
        let mut names = ["runs/10", "runs/9", "runs/b", "runs/001", "a"];
        names.sort_by(|a, b| by_name(a, b));
        assert_eq!(names, ["a", "runs/001", "runs/9", "runs/10", "runs/b"]);
    }
}
