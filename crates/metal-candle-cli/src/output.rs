//! Prints results to standard output and everything else to standard error.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
pub(crate) use metal_candle::files::format_bytes as bytes;
use metal_candle::files::{printable, printable_json, sanitize};
use std::fmt;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Prints results to standard output and messages to standard error.
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

    /// Prints a message to standard error, unless `--quiet` is set.
    pub(crate) fn note(self, message: impl fmt::Display) {
        if !self.quiet {
            // standard error may be closed
            let _ = writeln!(std::io::stderr().lock(), "{}", sanitize(&message.to_string()));
        }
    }

    /// Whether messages go to a terminal.
    pub(crate) fn is_terminal(self) -> bool {
        self.terminal
    }

    /// Whether `--quiet` is set.
    pub(crate) fn is_quiet(self) -> bool {
        self.quiet
    }

    /// Prints a warning, even with `--quiet`.
    pub(crate) fn warn(message: impl fmt::Display) {
        let _ = writeln!(std::io::stderr().lock(), "warning: {}", sanitize(&message.to_string()));
    }

    /// Prints `error: ...` and, if there is one, `hint: ...`.
    pub(crate) fn error(message: impl fmt::Display, hint: Option<&str>) {
        let mut stderr = std::io::stderr().lock();
        let _ = writeln!(stderr, "error: {}", sanitize(&message.to_string()));
        if let Some(hint) = hint {
            let _ = writeln!(stderr, "hint: {}", sanitize(hint));
        }
    }

    /// Prints a result; control characters are escaped.
    pub(crate) fn print(text: impl fmt::Display) -> std::io::Result<()> {
        Self::print_styled(printable(&text.to_string()))
    }

    /// Prints generated text: unchanged to a file or pipe, with control characters escaped on a terminal.
    pub(crate) fn print_generated(text: &str) -> std::io::Result<()> {
        if std::io::stdout().is_terminal() { Self::print(text) } else { Self::print_styled(text) }
    }

    /// Prints a result with colours; the caller has made its text [`printable`].
    pub(crate) fn print_styled(text: impl fmt::Display) -> std::io::Result<()> {
        let mut stdout = std::io::stdout().lock();
        write!(stdout, "{text}")?;
        stdout.flush()
    }

    /// Prints a result as JSON on one line.
    pub(crate) fn print_json(value: &serde_json::Value) -> std::io::Result<()> {
        Self::print_styled(format_args!("{}\n", printable_json(&value.to_string())))
    }

    /// Shows progress: a bar of `length` steps if standard error is a terminal, otherwise plain lines.
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

/// The unit of a progress bar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Steps or other items.
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

/// The shortest time between two lines of progress; it grows with the time so far, to a tenth of it.
const LINE_INTERVAL: Duration = Duration::from_secs(2);
const LONGEST_LINE_INTERVAL: Duration = Duration::from_mins(1);

/// The progress of a long operation.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    output: Output,
    unit: Unit,
    label: String,
    length: u64,
    /// The first position, and the start time.
    first: u64,
    started: Instant,
    last_line: Option<(Instant, u64)>,
}

impl Progress {
    /// Starts at `position`, if a part is complete already.
    pub(crate) fn start(&mut self, position: u64) {
        self.first = position;
        self.started = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            bar.reset_eta();
        }
    }

    /// Updates the position.
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

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
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

/// `1 step`, `3,000 steps`: a number of items whose plural ends in `s`.
pub(crate) fn counted(count: usize, item: &str) -> String {
    format!("{} {item}{}", grouped(count as u64), if count == 1 { "" } else { "s" })
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

#[cfg(test)]
mod tests {
    use super::{bytes, counted, duration, grouped, short};

    #[test]
    fn numbers_as_people_read_them() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(3_145_728), "3,145,728");
        assert_eq!([0, 1, 2000].map(|count| counted(count, "step")), ["0 steps", "1 step", "2,000 steps"]);
        assert_eq!(bytes(25_165_824), "25.2 MB");
        assert_eq!([7.4, 999.4, 10_864.0, 123_456.0, 1_234_567.0].map(short), ["7", "999", "10.9k", "123k", "1.23M"]);
        assert_eq!(duration(59.4), "59 s");
        assert_eq!(duration(184.0), "3:04 min");
        assert_eq!(duration(7509.0), "2:05:09 h");
    }
}
