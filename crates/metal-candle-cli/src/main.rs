//! The `metal-candle` program: fine-tunes, runs and serves language models.

mod adapter_output;
mod args;
mod commands;
#[cfg(all(test, unix, feature = "serve"))]
mod document_tests;
mod error;
mod eval_data;
mod gguf_output;
mod input;
mod interrupt;
mod kv_cache;
mod matmul_precision;
mod memory;
mod model_folder;
mod model_source;
mod nano;
mod numbers;
mod output;
mod plot;
mod proof;
mod rank;
mod ranks;
mod run_folder;
mod run_lock;
mod run_record;
mod sampling;
mod screen;
mod settings;
mod templates;
mod tensorboard;
mod values;

use args::{Arguments, Command};
use clap::{CommandFactory, FromArgMatches};
use output::Output;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Whether a thread has panicked outside a guard, which is a bug.
static HAS_PANICKED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let words = numbers::with_negative_numbers(std::env::args_os());
    let command = numbers::with_number_parsers(Arguments::command());
    let arguments = match command.try_get_matches_from(words).and_then(|found| Arguments::from_arg_matches(&found)) {
        Ok(arguments) => arguments,
        Err(error) => {
            // a failure to print cannot be reported
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    std::panic::set_hook(Box::new(|panic| {
        // the library returns this panic as an error
        if metal_candle::files::is_guarded() {
            return;
        }
        screen::leave();
        HAS_PANICKED.store(true, Ordering::Relaxed);
        Output::error(panic, Some("this is a bug; please open an issue and include the command you ran"));
    }));
    // a panic in a thread ends in another panic here; the hook has printed it
    let outcome = std::panic::catch_unwind(|| run(&arguments));
    match outcome {
        _ if HAS_PANICKED.load(Ordering::Relaxed) => ExitCode::from(2),
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if error::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => ExitCode::from(error::report(&error)),
        Err(_) => ExitCode::from(2),
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let output = Output::new(arguments.json, arguments.quiet);
    // a level that this machine does not have is an error, not a silent fallback
    metal_candle::Device::cpu_levels()?;
    match &arguments.command {
        Command::Train(flags) => commands::train::run(flags, output),
        Command::Plan(flags) => commands::train::plan(flags, output),
        Command::Generate(flags) => commands::generate::run(flags, output),
        Command::Chat(flags) => commands::chat::run(flags, output),
        #[cfg(feature = "serve")]
        Command::Serve(flags) => commands::serve::run(flags, output),
        Command::Fuse(flags) => commands::fuse::run(flags, output),
        Command::Quantize(flags) => commands::quantize::run(flags, output),
        Command::Convert(flags) => commands::convert::run(flags, output),
        Command::Eval(flags) => commands::eval::run(flags, output),
        Command::Logits(flags) => commands::logits::run(flags, output),
        Command::Runs(flags) => commands::runs::run(flags, output),
        Command::Template(flags) => commands::template::run(flags, output),
        Command::Tokenize(flags) => commands::tokenize::run(flags, output),
        Command::Detokenize(flags) => commands::tokenize::detokenize(flags, output),
        Command::Data(flags) => commands::data::run(flags, output),
        Command::Bench(flags) => commands::bench::run(flags, output),
        Command::Info(flags) => commands::info::run(flags, output),
        Command::Completions { kind } => commands::completions::run(*kind),
    }
}
