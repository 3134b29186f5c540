//! Prints runs as text tables.

use super::summary::{Run, date, different_settings, plain, setting_text, short_number};
use crate::output::{duration, short};
use std::fmt::Write;

/// A column: its name, the cell of each run, and whether it is a setting.
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) cells: Vec<String>,
    is_setting: bool,
}

/// The columns of a list of runs.
pub(super) fn columns(runs: &[Run]) -> Vec<Column> {
    let column = |name, is_setting, cell: &dyn Fn(&Run) -> String| Column {
        name,
        cells: runs.iter().map(cell).collect(),
        is_setting,
    };
    let known = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let valid_loss = |run: &Run, index: usize| run.valid_losses().map(|points| points[index].1);
    vec![
        column("run", false, &|run| run.name.clone()),
        column("state", false, &|run| run.state.name().to_owned()),
        column("model", true, &|run| known(&run.record.model)),
        column("data", true, &|run| known(&run.record.data)),
        column("method", true, &|run| known(&run.method())),
        column("learning rate", true, &|run| setting_text(&run.record.settings, "learning_rate")),
        column("schedule", true, &|run| setting_text(&run.record.settings, "schedule")),
        column("optimizer", true, &|run| optimizer(run)),
        column("steps", false, &steps),
        column("train", false, &|run| loss(run.train_loss())),
        column("valid first", false, &|run| loss(valid_loss(run, 0))),
        column("best", false, &|run| loss(valid_loss(run, 1))),
        column("last", false, &|run| loss(valid_loss(run, 2))),
        column("tokens/s", false, &|run| run.record.tokens_per_second.map_or_else(|| "-".into(), short)),
        column("time", false, &time),
        column("started (UTC)", false, &|run| match run.record.started {
            0 => "-".into(),
            seconds => date(seconds),
        }),
    ]
}

fn optimizer(run: &Run) -> String {
    match (run.setting("optimizer"), run.record.settings.is_empty()) {
        (Some(name), _) => plain(name),
        (None, false) => "adamw".into(),
        (None, true) => "-".into(),
    }
}

fn steps(run: &Run) -> String {
    match run.record.total_steps {
        0 => run.steps.to_string(),
        total => format!("{}/{total}", run.steps),
    }
}

fn loss(loss: Option<f64>) -> String {
    loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"))
}

fn time(run: &Run) -> String {
    if run.record.seconds > 0.0 { duration(run.record.seconds) } else { "-".into() }
}

/// The list of runs, below the settings that are equal in all of them.
pub(super) fn list(runs: &[Run]) -> String {
    let (same, columns): (Vec<_>, Vec<_>) = columns(runs)
        .into_iter()
        .partition(|column| column.is_setting && column.cells.windows(2).all(|pair| pair[0] == pair[1]));
    let same: Vec<String> = same
        .iter()
        .filter(|column| column.cells[0] != "-")
        .map(|c| format!("{} {}", c.name, one_line(&c.cells[0])))
        .collect();
    let mut text = String::new();
    if !same.is_empty() {
        let whose = if runs.len() == 1 { "settings" } else { "in all runs" };
        let _ = writeln!(text, "{whose}: {}\n", same.join(", "));
    }
    let header = columns.iter().map(|column| column.name.to_owned()).collect();
    let rows = (0..runs.len()).map(|row| columns.iter().map(|column| column.cells[row].clone()).collect());
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let is_text = |name: &str| ["run", "state", "model", "data", "method", "schedule", "optimizer"].contains(&name);
    text.push_str(&aligned(&rows, |column| !is_text(columns[column].name)));
    let odd = runs.iter().flat_map(|run| run.problems.iter().map(move |problem| (run, problem.clone())));
    let warned = runs.iter().filter(|run| !run.record.warnings.is_empty()).map(|run| (run, warnings(run)));
    let notes: Vec<_> = odd.chain(warned).collect();
    if !notes.is_empty() {
        text.push('\n');
    }
    for (run, note) in notes {
        let _ = writeln!(text, "{}: {}", one_line(&run.name), one_line(&note));
    }
    text
}

/// The kinds of warnings of a run, and their number.
fn warnings(run: &Run) -> String {
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    for warning in &run.record.warnings {
        match kinds.iter_mut().find(|(kind, _)| *kind == warning.kind) {
            Some((_, count)) => *count += 1,
            None => kinds.push((&warning.kind, 1)),
        }
    }
    let text =
        |&(kind, count): &(&str, usize)| if count > 1 { format!("{kind} ({count} times)") } else { kind.to_owned() };
    format!("warnings: {}", kinds.iter().map(text).collect::<Vec<_>>().join(", "))
}

/// The rows of a comparison, with a name and a cell for each run: settings that differ, then results.
pub(super) fn compared(runs: &[Run]) -> (Vec<Vec<String>>, Vec<Vec<String>>) {
    let cell = |value: &Option<serde_json::Value>| value.as_ref().map_or_else(|| "-".to_owned(), plain);
    let row = |name: String, cells: Vec<String>| std::iter::once(name).chain(cells).collect::<Vec<_>>();
    let settings = different_settings(runs);
    let settings = settings.into_iter().map(|(key, values)| row(key, values.iter().map(cell).collect())).collect();
    let of = |name: &str, value: &dyn Fn(&Run) -> String| row(name.to_owned(), runs.iter().map(value).collect());
    let valid_loss = |run: &Run, index: usize| run.valid_losses().map(|points| points[index].1);
    let best_step = |run: &Run| run.valid_losses().map_or_else(|| "-".into(), |points| points[1].0.to_string());
    let perplexity = |run: &Run| valid_loss(run, 1).map_or_else(|| "-".into(), |loss| format!("{:.3}", loss.exp()));
    let memory = |run: &Run| run.record.peak_memory_bytes.map_or_else(|| "-".into(), crate::output::bytes);
    let results = vec![
        of("state", &|run| run.state.name().to_owned()),
        of("steps", &steps),
        of("trained parameters", &|run| crate::output::grouped(run.record.num_trainable_parameters as u64)),
        of("tokens", &|run| crate::output::grouped(run.tokens)),
        of("training loss, last 10 steps", &|run| loss(run.train_loss())),
        of("validation loss, first", &|run| loss(valid_loss(run, 0))),
        of("validation loss, best", &|run| loss(valid_loss(run, 1))),
        of("  its perplexity", &perplexity),
        of("  at step", &best_step),
        of("validation loss, last", &|run| loss(valid_loss(run, 2))),
        of("highest gradient norm", &highest_norm),
        of("tokens/s", &|run| run.record.tokens_per_second.map_or_else(|| "-".into(), short)),
        of("peak memory", &memory),
        of("time", &time),
        of("warnings", &|run| run.record.warnings.len().to_string()),
    ];
    (settings, results)
}

fn highest_norm(run: &Run) -> String {
    let norms = run.curves.grad_norm.iter().map(|point| point.1).filter(|norm| norm.is_finite());
    norms.reduce(f64::max).map_or_else(|| "-".into(), |norm| short_number((norm * 1e3).round() / 1e3))
}

/// A comparison as text.
pub(super) fn comparison(runs: &[Run]) -> String {
    let (settings, results) = compared(runs);
    let header =
        |title: &str| std::iter::once(title.to_owned()).chain(runs.iter().map(|run| run.name.clone())).collect();
    let none = settings.is_empty();
    let mut rows: Vec<Vec<String>> =
        vec![header(if none { "settings: no difference" } else { "settings that differ" })];
    rows.extend(settings);
    rows.push(vec![String::new(); runs.len() + 1]);
    rows.push(header("results"));
    rows.extend(results);
    let mut text = aligned(&rows, |column| column > 0);
    for run in runs {
        for problem in &run.problems {
            let _ = writeln!(text, "{}: {}", one_line(&run.name), one_line(problem));
        }
    }
    text
}

/// Aligns columns, to the right if `is_right` returns true.
fn aligned(rows: &[Vec<String>], is_right: impl Fn(usize) -> bool) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| one_line(cell)).collect()).collect();
    let num_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..num_columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let space = " ".repeat(widths[column] - cell.chars().count());
            let parts = if is_right(column) { [space.as_str(), cell, "  "] } else { [cell, space.as_str(), "  "] };
            line.extend(parts);
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Replaces line breaks and control characters.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::{aligned, one_line};

    #[test]
    fn columns_are_aligned() {
        let rows = [["run", "loss"], ["a\u{1b}[31m", "1.5"], ["bc", "12.25"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(ToString::to_string).collect()).collect();
        assert_eq!(aligned(&rows, |column| column == 1), "run      loss\na [31m    1.5\nbc      12.25\n");
        assert_eq!(one_line("a\nb"), "a b");
    }
}
