//! `completions`: prints completion scripts for shells.

use crate::args::Arguments;
use crate::output::Output;
use clap::CommandFactory;
use clap_complete::Shell;

pub(crate) fn run(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "metal-candle", &mut script);
    Output::print_styled(String::from_utf8_lossy(&script))?;
    Ok(())
}
