//! Where text goes: results to standard output, everything else to standard error.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use metal_candle::files::{printable, printable_json, sanitize};
use std::fmt;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// An error of the user's input that the library does not know of.
#[derive(Debug)]
pub(crate) struct UserError {
    message: String,
    hint: Option<String>,
}

impl UserError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for UserError {}

/// How the program talks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// Results are printed as one JSON object.
    pub(crate) json: bool,
    quiet: bool,
    terminal: bool,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet, terminal: std::io::stderr().is_terminal() }
    }

    /// A message to whoever watches.
    pub(crate) fn note(self, message: impl fmt::Display) {
        if !self.quiet {
            // standard error may be closed; there is nobody to tell then
            let _ = writeln!(std::io::stderr().lock(), "{}", sanitize(&message.to_string()));
        }
    }

    /// Whether messages go to a terminal.
    pub(crate) fn is_terminal(self) -> bool {
        self.terminal
    }

    /// Whether only errors and results are wanted.
    pub(crate) fn is_quiet(self) -> bool {
        self.quiet
    }

    /// A message that is shown with `--quiet` too.
    pub(crate) fn warn(message: impl fmt::Display) {
        let _ = writeln!(std::io::stderr().lock(), "warning: {}", sanitize(&message.to_string()));
    }

    /// `error: ...` and, where there is one, `hint: ...`.
    pub(crate) fn error(message: impl fmt::Display, hint: Option<&str>) {
        let mut stderr = std::io::stderr().lock();
        let _ = writeln!(stderr, "error: {}", sanitize(&message.to_string()));
        if let Some(hint) = hint {
            let _ = writeln!(stderr, "hint: {}", sanitize(hint));
        }
    }

    /// A result; its control characters are escaped.
    pub(crate) fn print(text: impl fmt::Display) -> std::io::Result<()> {
        Self::print_styled(printable(&text.to_string()))
    }

    /// Text that a model wrote: byte by byte into a file or a pipe, with control characters escaped on a terminal.
    pub(crate) fn print_generated(text: &str) -> std::io::Result<()> {
        if std::io::stdout().is_terminal() { Self::print(text) } else { Self::print_styled(text) }
    }

    /// A result with colours, whose text the caller has made [`printable`].
    pub(crate) fn print_styled(text: impl fmt::Display) -> std::io::Result<()> {
        let mut stdout = std::io::stdout().lock();
        write!(stdout, "{text}")?;
        stdout.flush()
    }

    /// The result as JSON, on one line.
    pub(crate) fn print_json(value: &serde_json::Value) -> std::io::Result<()> {
        Self::print_styled(format_args!("{}\n", printable_json(&value.to_string())))
    }

    /// A bar of `length` steps where standard error is a terminal, lines of progress otherwise.
    pub(crate) fn progress(self, length: u64, label: &str, style: Unit) -> Progress {
        let bar = if self.terminal && !self.quiet {
            let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
            if let Ok(template) = ProgressStyle::with_template(style.template()) {
                bar.set_style(template.progress_chars("━╸─"));
            }
            bar.set_prefix(sanitize(label));
            bar.enable_steady_tick(Duration::from_millis(250));
            Some(bar)
        } else {
            None
        };
        Progress {
            bar,
            output: self,
            unit: style,
            label: label.to_owned(),
            length,
            first: 0,
            started: Instant::now(),
            last_line: None,
        }
    }
}

/// What a progress bar counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Steps of training and the like.
    Steps,
    /// Bytes.
    Bytes,
}

impl Unit {
    fn template(self) -> &'static str {
        match self {
            Self::Steps => "{wide_bar} {pos}/{len}  {msg}  {eta} left",
            Self::Bytes => "{prefix} {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
        }
    }
}

/// Time between two lines of progress, at first and at most; in between it is a tenth of the time so far.
const LINE_INTERVAL: Duration = Duration::from_secs(2);
const LONGEST_LINE_INTERVAL: Duration = Duration::from_mins(1);

/// Progress of something long.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    output: Output,
    unit: Unit,
    label: String,
    length: u64,
    /// Where it began, and when.
    first: u64,
    started: Instant,
    last_line: Option<(Instant, u64)>,
}

impl Progress {
    /// Begins at `position`, when a part was done earlier.
    pub(crate) fn start(&mut self, position: u64) {
        self.first = position;
        self.started = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            bar.reset_eta();
        }
    }

    /// Shows that `position` is reached.
    pub(crate) fn set(&mut self, position: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            bar.set_message(sanitize(message));
            return;
        }
        let now = Instant::now();
        let interval = (self.started.elapsed() / 10).clamp(LINE_INTERVAL, LONGEST_LINE_INTERVAL);
        let is_due = self
            .last_line
            .is_none_or(|(last, shown)| now - last >= interval || (position == self.length && shown != position));
        if !is_due {
            return;
        }
        self.last_line = Some((now, position));
        let elapsed = self.started.elapsed().as_secs_f64();
        let done = position.saturating_sub(self.first) as f64;
        let left = elapsed / done * self.length.saturating_sub(position) as f64;
        let left = if left.is_finite() { format!("  {} left", duration(left)) } else { String::new() };
        let (position, length) = match self.unit {
            Unit::Steps => (position.to_string(), self.length.to_string()),
            Unit::Bytes => (bytes(position), bytes(self.length)),
        };
        let message = if message.is_empty() { String::new() } else { format!("  {message}") };
        self.output.note(format_args!("{} {position}/{length}{message}{left}", self.label));
    }

    /// Prints a warning above the bar.
    pub(crate) fn warn(&self, message: impl fmt::Display) {
        match &self.bar {
            Some(bar) => bar.suspend(|| Output::warn(message)),
            None => Output::warn(message),
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `1.2 MB`.
pub(crate) fn bytes(count: u64) -> String {
    let count = count as f64;
    match count {
        c if c < 1e3 => format!("{c:.0} B"),
        c if c < 1e6 => format!("{:.1} kB", c / 1e3),
        c if c < 1e9 => format!("{:.1} MB", c / 1e6),
        c => format!("{:.2} GB", c / 1e9),
    }
}

/// `987`, `10.9k`, `1.23M`: three digits and a unit.
pub(crate) fn short(count: f64) -> String {
    match count {
        c if c < 999.5 => format!("{c:.0}"),
        c if c < 99_950.0 => format!("{:.1}k", c / 1e3),
        c if c < 999_500.0 => format!("{:.0}k", c / 1e3),
        c => format!("{:.2}M", c / 1e6),
    }
}

/// `3,145,728`.
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `12 s` or `3:04 min` or `2:05:09 h`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{}:{:02} min", whole / 60, whole % 60),
        _ => format!("{}:{:02}:{:02} h", whole / 3600, whole / 60 % 60, whole % 60),
    }
}

/// Prints `error: ...` and, where there is one, `hint: ...`; returns the exit code.
pub(crate) fn report(error: &anyhow::Error) -> u8 {
    Output::error(message(error), hint(error).as_deref());
    exit_code(error)
}

/// The error and its causes, but those whose text was told already.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if message.contains(&text) {
            continue;
        }
        if !message.is_empty() {
            message.push_str(": ");
        }
        message.push_str(&text);
    }
    message
}

/// Whether whoever reads standard output has gone, as `head` does: no error then.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn exit_code(error: &anyhow::Error) -> u8 {
    use metal_candle::Error;
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<Error>() {
            return match error {
                Error::Candle(_) | Error::Device(_) => 2,
                Error::Peer { .. } => crate::ranks::OTHER_FAILED,
                _ => 1,
            };
        }
        if cause.is::<UserError>() || cause.is::<std::io::Error>() {
            return 1;
        }
    }
    2
}

fn hint(error: &anyhow::Error) -> Option<String> {
    use metal_candle::Error;
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<UserError>() {
            return error.hint.clone();
        }
        let Some(error) = cause.downcast_ref::<Error>() else { continue };
        let hint = match error {
            Error::Tensors { path, problems } => return Some(tensors_hint(path, problems)),
            Error::Data { .. } => "`metal-candle data check FILE` shows how each row is read",
            Error::NonFiniteLoss { .. } | Error::NonFiniteGradient { .. } => {
                "a lower --learning-rate or --max-grad-norm usually helps; see the rows named"
            }
            Error::NonFiniteEvaluation { .. } => {
                "the model or the adapter overflows on these rows: `--dtype f32` has a wider range, or use an earlier checkpoint"
            }
            Error::Format { path, message } if message.contains("of the model") => return base_hint(path),
            Error::Template(_) => "`generate --raw` does without the chat template",
            Error::Write { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "free some space on that disk; `train --resume RUN` continues a training run"
            }
            Error::Hub(_) => "a model folder on this machine can be given to --model instead",
            Error::Device(_) => "`metal-candle info` shows the devices of this build; `--device cpu` always works",
            Error::OutOfMemory(_) => {
                "fewer or shorter sequences, or --dtype bf16, take less memory; other programs on the device take some too"
            }
            Error::Candle(_) => {
                "this is a bug, or the device is faulty: please open an issue and include the command you ran"
            }
            _ => return None,
        };
        return Some(hint.to_owned());
    }
    None
}

/// The base model that the configuration beside an adapter's file `path` names.
fn base_of(path: &std::path::Path) -> Option<String> {
    use metal_candle::files::{MAX_SIDE_FILE_BYTES, read_json};
    let config = path.parent()?.join("adapter_config.json");
    let config: serde_json::Value = read_json(config, MAX_SIDE_FILE_BYTES).ok()?;
    let name = config.get("base_model_name_or_path").or_else(|| config.get("model"))?.as_str()?;
    (!name.is_empty()).then(|| name.to_owned())
}

/// What to do about an adapter that may belong to another model.
fn base_hint(path: &std::path::Path) -> Option<String> {
    base_of(path).map(|base| format!("the adapter was made for `{base}`; give that model to --model"))
}

/// What fits the problems of the tensors in `path`.
fn tensors_hint(path: &std::path::Path, problems: &[String]) -> String {
    let folder = path.parent().unwrap_or(path);
    let is_adapter = folder.join("adapter_config.json").is_file();
    let any = |words: &str| problems.iter().any(|problem| problem.contains(words));
    let all = |words: &str| problems.iter().all(|problem| problem.contains(words));
    let what = if any("expected shape") || any("not the weight of this model") || any("expected [") {
        if is_adapter {
            match base_of(path) {
                Some(base) => {
                    return format!(
                        "the adapter was made for `{base}`, which has other sizes or weights; give that model to --model"
                    );
                }
                None => "the adapter belongs to a model of other sizes or weights; give that model to --model",
            }
        } else {
            "the weights and config.json belong to different models"
        }
    } else if all("is missing") || all("found no such tensor") {
        "the file lacks tensors that its configuration asks for: it may be incomplete; copy or download it again"
    } else if all("is not expected") {
        match base_of(path).filter(|_| is_adapter) {
            Some(base) => return format!("the adapter was made for `{base}`, which may have more layers"),
            None => "the file holds tensors that this model has no use for; it may belong to a model with more layers",
        }
    } else if all("not finite") {
        "the training that wrote the file diverged; use an earlier checkpoint"
    } else if is_adapter {
        match base_hint(path) {
            Some(hint) => return hint,
            None => "the adapter and the model do not fit together",
        }
    } else {
        "the weights and config.json belong to different models"
    };
    what.to_owned()
}

#[cfg(test)]
mod tests {
    use super::{bytes, duration, exit_code, grouped, message, short};
    use metal_candle::Error;

    #[test]
    fn numbers_as_people_read_them() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(3_145_728), "3,145,728");
        assert_eq!(bytes(25_165_824), "25.2 MB");
        assert_eq!([7.4, 999.4, 10_864.0, 123_456.0, 1_234_567.0].map(short), ["7", "999", "10.9k", "123k", "1.23M"]);
        assert_eq!(duration(59.4), "59 s");
        assert_eq!(duration(184.0), "3:04 min");
        assert_eq!(duration(7509.0), "2:05:09 h");
    }

    #[test]
    fn a_cause_is_told_once() {
        let missing = || std::io::Error::other("no such file");
        let error = anyhow::Error::from(Error::Read { path: "x".into(), source: missing() });
        assert_eq!(message(&error), "cannot read `x`: no such file");
        assert_eq!(message(&anyhow::Error::from(missing()).context("y")), "y: no such file");
    }

    #[test]
    fn exit_codes_say_whose_fault_it_is() {
        assert_eq!(exit_code(&Error::Unsupported("x".into()).into()), 1);
        assert_eq!(exit_code(&anyhow::Error::from(Error::Hub("x".into())).context("y")), 1);
        assert_eq!(exit_code(&Error::Device("x".into()).into()), 2);
        assert_eq!(exit_code(&anyhow::anyhow!("x")), 2);
    }
}
