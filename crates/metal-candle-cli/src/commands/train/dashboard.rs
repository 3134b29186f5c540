//! Shows a run as a dashboard in the terminal.

use crate::error::UserError;
use crate::interrupt;
use crate::output::{Output, bytes, counted, duration, short};
use crate::plot::Curves;
use crate::screen;
use anyhow::Result;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph, Wrap};
use ratatui::{Frame, Terminal};
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two frames, and the longest delay of a key press.
const INTERVAL: Duration = Duration::from_millis(200);
/// Maximum number of points in a curve.
const MAX_POINTS: usize = 400;

/// Checks early whether a dashboard can be shown.
pub(super) fn check(output: Output) -> Result<()> {
    let refuse = |message: &str| {
        let hint = "without `--tui`, progress is printed as lines";
        Err(UserError::new(message).with_hint(hint).into())
    };
    if output.is_quiet() {
        return Err(UserError::new("`--tui` and `--quiet` exclude each other").into());
    }
    if !output.is_terminal() {
        return refuse("`--tui` needs a terminal, but standard error is not one");
    }
    if !io::stdin().is_terminal() {
        return refuse("`--tui` reads keys from a terminal, but standard input is not one");
    }
    Ok(())
}

/// The contents of a dashboard.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) title: String,
    pub(super) first_step: usize,
    pub(super) step: usize,
    pub(super) total_steps: usize,
    pub(super) curves: Curves,
    pub(super) tokens_per_second: Option<f64>,
    /// In bytes.
    pub(super) memory: Option<u64>,
    pub(super) warnings: Vec<String>,
    /// A prompt and the model's answer before training.
    pub(super) sample: Option<(String, String)>,
    /// Time since the start, in seconds.
    pub(super) seconds: f64,
    /// Whether the run ends after this step.
    pub(super) is_stopping: bool,
}

/// A dashboard that is drawn by a separate thread, so that it stays responsive during long steps.
#[derive(Debug)]
pub(super) struct Dashboard {
    view: Arc<Mutex<View>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Dashboard {
    pub(super) fn open(view: View) -> io::Result<Self> {
        screen::enter()?;
        let terminal = Terminal::new(CrosstermBackend::new(io::stderr())).inspect_err(|_| screen::leave())?;
        let (view, is_over) = (Arc::new(Mutex::new(view)), Arc::new(AtomicBool::new(false)));
        let (shared, over) = (Arc::clone(&view), Arc::clone(&is_over));
        let thread = std::thread::spawn(move || {
            // a closed terminal does not end the run
            let _ = run(terminal, &shared, &over);
        });
        Ok(Self { view, is_over, thread: Some(thread) })
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut View)) {
        change(&mut lock(&self.view));
    }

    /// Returns to the normal screen.
    pub(super) fn close(mut self) -> View {
        self.end();
        std::mem::take(&mut lock(&self.view))
    }

    fn end(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        screen::leave();
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(view: &Mutex<View>) -> MutexGuard<'_, View> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(
    mut terminal: Terminal<CrosstermBackend<io::Stderr>>,
    view: &Mutex<View>,
    is_over: &AtomicBool,
) -> io::Result<()> {
    let started = Instant::now();
    while !is_over.load(Ordering::SeqCst) {
        {
            let mut view = lock(view);
            view.seconds = started.elapsed().as_secs_f64();
            view.is_stopping = interrupt::is_asked();
            terminal.draw(|frame| draw(frame, &view))?;
        }
        // several keys may be waiting
        let mut wait = INTERVAL;
        while event::poll(wait)? {
            if let Event::Key(key) = event::read()?
                && asks_for_end(key)
            {
                interrupt::ask();
            }
            wait = Duration::ZERO;
        }
    }
    Ok(())
}

fn asks_for_end(key: KeyEvent) -> bool {
    let is_ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press && (is_ctrl_c || key.code == KeyCode::Char('q'))
}

fn draw(frame: &mut Frame, view: &View) {
    let area = frame.area();
    let num_warnings = view.warnings.len().min(3) as u16;
    let warnings_height = if num_warnings > 0 && area.height >= 20 { 2 * num_warnings + 2 } else { 0 };
    let sample_height = if view.sample.is_some() && area.height >= 26 + warnings_height { 8 } else { 0 };
    let [title, progress, numbers, loss, small, warnings, sample, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(6),
        Constraint::Length(if area.height >= 20 { 7 } else { 0 }),
        Constraint::Length(warnings_height),
        Constraint::Length(sample_height),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(Line::from(view.title.as_str()).bold(), title);
    let done = view.step as f64 / view.total_steps.max(1) as f64;
    let label = format!("{} of {}", view.step, counted(view.total_steps, "step"));
    frame.render_widget(
        Gauge::default().ratio(done.clamp(0.0, 1.0)).label(label).gauge_style(Style::new().fg(Color::Blue)),
        progress,
    );
    frame.render_widget(Line::from(numbers_line(view)), numbers);
    loss_chart(frame, loss, &view.curves);
    if small.height > 0 {
        let [left, right] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(small);
        chart(frame, left, "learning rate", &[("", Color::Gray, Drawn::Line, &view.curves.learning_rate)]);
        chart(frame, right, "gradient norm", &[("", Color::Magenta, Drawn::Line, &view.curves.grad_norm)]);
    }
    if warnings.height > 0 {
        let lines: Vec<Line> = view.warnings.iter().rev().take(3).map(|text| Line::from(text.as_str())).collect();
        let block = Block::bordered().title(" warnings ").border_style(Style::new().fg(Color::Yellow));
        frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: true }).block(block), warnings);
    }
    if let (Some((prompt, written)), true) = (&view.sample, sample.height > 0) {
        let [left, right] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(sample);
        for (title, text, area) in [(" prompt ", prompt, left), (" written before training ", written, right)] {
            let text = text.replace('\t', "    ");
            frame.render_widget(Paragraph::new(text).block(Block::bordered().title(title)), area);
        }
    }
    let keys_line = if view.is_stopping {
        Line::from("saving and stopping after this step; q or Ctrl-C again exits at once without saving").yellow()
    } else {
        Line::from(vec![
            Span::from("q").bold(),
            Span::from(" or "),
            Span::from("Ctrl-C").bold(),
            Span::from("  save and stop"),
        ])
        .add_modifier(Modifier::DIM)
    };
    frame.render_widget(keys_line, keys);
}

/// Losses, speed, memory and time.
fn numbers_line(view: &View) -> String {
    let last = |points: &[(f64, f64)]| points.last().map(|point| point.1);
    let left = (view.step > view.first_step).then(|| {
        let steps = (view.step - view.first_step) as f64;
        view.seconds / steps * view.total_steps.saturating_sub(view.step) as f64
    });
    let best = view.curves.valid.iter().map(|point| point.1).filter(|loss| loss.is_finite()).reduce(f64::min);
    let parts = [
        last(&crate::plot::smoothed(&view.curves.train)).map(|loss| format!("loss {loss:.3}")),
        last(&view.curves.valid).map(|loss| format!("valid {loss:.3}")),
        best.map(|best| format!("best {best:.3}")),
        view.tokens_per_second.map(|speed| format!("{} tokens/s", short(speed))),
        view.memory.map(bytes),
        left.map(|left| format!("{} left", duration(left))),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("   ")
}

fn loss_chart(frame: &mut Frame, area: Rect, curves: &Curves) {
    let smooth = crate::plot::smoothed(&curves.train);
    chart(
        frame,
        area,
        "loss",
        &[
            ("training", Color::DarkGray, Drawn::Scattered, &curves.train),
            ("smoothed", Color::Blue, Drawn::Line, &smooth),
            ("", Color::LightRed, Drawn::Line, &curves.valid),
            ("valid", Color::LightRed, Drawn::Dots, &curves.valid),
        ],
    );
}

/// A curve: its name in the legend, colour, style and points.
type Curve<'a> = (&'a str, Color, Drawn, &'a [(f64, f64)]);

/// The style of a curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drawn {
    Line,
    /// Small points.
    Scattered,
    /// Large points.
    Dots,
}

fn chart(frame: &mut Frame, area: Rect, title: &str, curves: &[Curve]) {
    let thin = |points: &[(f64, f64)]| crate::plot::thinned(points, MAX_POINTS);
    let points: Vec<Vec<(f64, f64)>> = curves.iter().map(|curve| thin(curve.3)).collect();
    let block = Block::bordered().title(format!(" {title} "));
    let values: Vec<f64> = points.iter().flatten().map(|point| point.1).collect();
    let Some(last) = points.iter().flatten().map(|point| point.0).reduce(f64::max) else {
        let waiting = Paragraph::new("no step is completed yet").alignment(Alignment::Center).block(block);
        frame.render_widget(waiting, area);
        return;
    };
    let (low, high) = crate::plot::range(&values);
    let last = last.max(1.0);
    let datasets = curves.iter().zip(&points).map(|(&(name, color, drawn, _), points)| {
        let (marker, kind) = match drawn {
            Drawn::Line => (Marker::Braille, GraphType::Line),
            Drawn::Scattered => (Marker::Braille, GraphType::Scatter),
            Drawn::Dots => (Marker::Dot, GraphType::Scatter),
        };
        let dataset = Dataset::default().marker(marker).graph_type(kind).style(Style::new().fg(color));
        let dataset = dataset.data(points);
        if name.is_empty() { dataset } else { dataset.name(name) }
    });
    let axis = |low: String, high: String| Axis::default().labels([low, high]).style(Style::new().fg(Color::DarkGray));
    let chart = Chart::new(datasets.collect())
        .hidden_legend_constraints((Constraint::Percentage(50), Constraint::Percentage(60)))
        .block(block)
        .x_axis(axis("0".into(), format!("{last:.0}")).bounds([0.0, last]))
        .y_axis(axis(number(low), number(high)).bounds([low, high]));
    frame.render_widget(chart, area);
}

/// A short number for an axis.
fn number(value: f64) -> String {
    if value == 0.0 || (0.01..1e4).contains(&value.abs()) { format!("{value:.2}") } else { format!("{value:.1e}") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{View, asks_for_end, draw};
    use crate::plot::Curves;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

    fn drawn(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view)).unwrap();
        terminal.backend().to_string()
    }

    fn view() -> View {
        let step = |i: u32| f64::from(i);
        View {
            title: "nano on its sample data".into(),
            step: 100,
            total_steps: 400,
            curves: Curves {
                train: (1..=100).map(|i| (step(i), 1.0 + 4.0 / step(i))).collect(),
                valid: vec![(0.0, 5.0), (50.0, 1.25), (100.0, 1.5)],
                learning_rate: (1..=100).map(|i| (step(i), 1e-5 * step(i))).collect(),
                grad_norm: (1..=100).map(|i| (step(i), 0.5)).collect(),
            },
            tokens_per_second: Some(10_864.0),
            memory: Some(193_700_000),
            warnings: vec!["the first".into(), "step 7: the loss jumped".into()],
            sample: Some(("fn keep".into(), "\tpub fn".into())),
            seconds: 20.0,
            ..View::default()
        }
    }

    #[test]
    fn a_dashboard_shows_the_whole_run() {
        let text = drawn(&view(), 100, 42);
        for part in [
            "nano on its sample data",
            "100 of 400 steps",
            "valid 1.500   best 1.250   10.9k tokens/s   193.7 MB   1:00 min left",
            " loss ",
            "smoothed",
            "learning rate",
            "gradient norm",
            "step 7: the loss jumped",
            "fn keep",
            "    pub fn",
            "save and stop",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        // evaluations are large points
        assert!(text.contains('•'), "{text}");
        // curves use braille characters
        assert!(text.chars().filter(|c| ('\u{2801}'..='\u{28ff}').contains(c)).count() > 50, "{text}");
        let stopping = drawn(&View { is_stopping: true, ..view() }, 100, 42);
        assert!(stopping.contains("saving and stopping"), "{stopping}");
    }

    #[test]
    fn every_size_and_state_can_be_drawn() {
        let not_finite = Curves { train: vec![(1.0, f64::NAN), (2.0, f64::INFINITY)], ..Curves::default() };
        let one = Curves { train: vec![(1.0, 2.0)], ..Curves::default() };
        let views = [View::default(), view(), View { curves: not_finite, ..view() }, View { curves: one, ..view() }];
        for view in &views {
            for (width, height) in [(1, 1), (10, 4), (40, 12), (80, 24), (300, 100)] {
                drawn(view, width, height);
            }
        }
        assert!(drawn(&View::default(), 80, 24).contains("no step is completed yet"));
        let text = drawn(&views[1], 80, 24);
        assert!(text.contains("10.9k tokens/s") && text.contains("save and stop"), "{text}");
    }

    #[test]
    fn keys_that_end_a_run() {
        let key = |code, modifiers| asks_for_end(KeyEvent::new(code, modifiers));
        assert!(key(KeyCode::Char('q'), KeyModifiers::NONE) && key(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!key(KeyCode::Char('c'), KeyModifiers::NONE) && !key(KeyCode::Esc, KeyModifiers::NONE));
    }
}
