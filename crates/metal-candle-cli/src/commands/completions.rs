//! `completions`: prints completion scripts for shells, and the man page.

use crate::args::{Arguments, Completions};
use crate::output::Output;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use std::io::Write;

pub(crate) fn run(kind: Completions) -> anyhow::Result<()> {
    let mut text = Vec::new();
    let shell = match kind {
        Completions::Bash => Some(Shell::Bash),
        Completions::Elvish => Some(Shell::Elvish),
        Completions::Fish => Some(Shell::Fish),
        Completions::Powershell => Some(Shell::PowerShell),
        Completions::Zsh => Some(Shell::Zsh),
        Completions::Man => None,
    };
    match shell {
        Some(shell) => clap_complete::generate(shell, &mut Arguments::command(), "metal-candle", &mut text),
        None => man_page(&mut text)?,
    }
    Output::print_styled(String::from_utf8_lossy(&text))?;
    Ok(())
}

/// One page for the program and its commands, in roff.
fn man_page(page: &mut Vec<u8>) -> std::io::Result<()> {
    let mut parts = Vec::new();
    man_page_parts(&mut parts)?;
    // each part starts with the same definition of an apostrophe
    let text = String::from_utf8_lossy(&parts);
    for (index, line) in text.lines().enumerate() {
        if index < 2 || !line.contains(".ds Aq ") {
            writeln!(page, "{line}")?;
        }
    }
    Ok(())
}

fn man_page_parts(page: &mut Vec<u8>) -> std::io::Result<()> {
    let mut command = Arguments::command().disable_help_subcommand(true);
    command.build();
    let man = Man::new(command.clone());
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    command.get_subcommands().try_for_each(|inner| command_section(inner, page))?;
    man.render_extra_section(page)?;
    man.render_version_section(page)
}

/// A section for a command, with the parts that a page of its own would have as subsections.
fn command_section(command: &Command, page: &mut Vec<u8>) -> std::io::Result<()> {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    writeln!(page, ".SH \"{}\"", name.to_uppercase())?;
    let man = Man::new(command.clone());
    let mut parts = Vec::new();
    man.render_description_section(&mut parts)?;
    man.render_synopsis_section(&mut parts)?;
    man.render_options_section(&mut parts)?;
    if command.get_after_help().is_some() {
        man.render_extra_section(&mut parts)?;
    }
    page.write_all(String::from_utf8_lossy(&parts).replace(".SH ", ".SS ").as_bytes())?;
    command.get_subcommands().try_for_each(|inner| command_section(inner, page))
}
