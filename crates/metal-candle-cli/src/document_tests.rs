//! Every `metal-candle` command in the documents and in `--help` parses. `tests/it/documents.rs` runs some of them.
#![allow(clippy::unwrap_used)]

#[allow(dead_code, unreachable_pub)]
#[path = "../tests/it/markdown.rs"]
mod markdown;

use crate::args::Arguments;
use crate::numbers;
use clap::CommandFactory;
use markdown::{Document, documents};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::process::Command;

/// Flags in the documents that clap adds, or that belong to cargo.
const OTHER_FLAGS: [&str; 3] = ["--features", "--help", "--version"];

/// Defines `metal-candle`, and `cargo run ... -- `, as functions that print their arguments, and everything else as nothing.
/// So bash itself reads quotes, pipes, comments and continued lines.
const STAND_INS: &str = r#"
# one file for each process, since the commands of a pipe run at the same time
metal-candle() { printf '%s\0' metal-candle "$@" $'\n' >> "$COMMANDS/$BASHPID"; }
cargo() {
    [ "$1" = run ] || return 0
    while [ $# -gt 0 ]; do
        local word=$1
        shift
        if [ "$word" = -- ]; then metal-candle "$@"; return; fi
    done
}
command_not_found_handle() { return 0; }
cd() { return 0; }
export -n PATH
PATH=/nowhere
"#;

/// The arguments of each `metal-candle` command in a script.
fn commands(script: &str) -> Vec<Vec<String>> {
    let folder = tempfile::tempdir().unwrap();
    let output = tempfile::tempdir().unwrap();
    // where examples write to
    for name in ["bash-completion/completions", "man/man1"] {
        std::fs::create_dir_all(folder.path().join(".local/share").join(name)).unwrap();
    }
    let script = format!("{STAND_INS}\n{script}");
    let mut bash = Command::new("bash");
    bash.args(["-c", &script]).current_dir(folder.path()).env("HOME", folder.path()).env("COMMANDS", output.path());
    let ran = bash.output().unwrap();
    let error = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(!error.contains("syntax error"), "{script}\n{error}");
    let mut found = Vec::new();
    for file in std::fs::read_dir(output.path()).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let words: Vec<String> = text.split_terminator('\0').map(str::to_owned).collect();
        found.extend(words.split(|word| word == "\n").filter(|words| !words.is_empty()).map(<[String]>::to_vec));
    }
    found
}

fn parse(words: &[String]) -> Result<(), clap::Error> {
    let words = numbers::with_negative_numbers(words.iter().map(Into::into));
    numbers::with_number_parsers(Arguments::command()).try_get_matches_from(words).map(drop)
}

/// A line for each command of `script` that does not parse, and the number of commands.
fn check(place: &str, script: &str, problems: &mut String) -> usize {
    let commands = commands(script);
    for words in &commands {
        match parse(words) {
            Err(error) if error.use_stderr() => writeln!(problems, "{place}: `{}`\n{error}", words.join(" ")).unwrap(),
            _ => {}
        }
    }
    commands.len()
}

#[test]
fn commands_in_documents_parse() {
    let (mut problems, mut count) = (String::new(), 0);
    for document in documents() {
        for block in document.blocks.iter().filter(|block| block.language == "sh") {
            let found = check(&block.place, &block.text, &mut problems);
            let named = block.text.lines().filter(|line| line.trim_start().starts_with("metal-candle ")).count();
            assert!(found >= named, "{}: {found} commands found, {named} lines start with one", block.place);
            count += found;
        }
        for block in document.blocks.iter().filter(|block| block.language == "console") {
            let lines: Vec<&str> = block.text.lines().filter_map(|line| line.strip_prefix("$ ")).collect();
            count += check(&block.place, &lines.join("\n"), &mut problems);
        }
    }
    assert!(problems.is_empty(), "\n{problems}");
    assert!(count > 60, "only {count} commands were found");
}

#[test]
fn examples_of_the_help_texts_parse() {
    fn walk(command: &clap::Command, problems: &mut String, count: &mut usize) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let examples = help.lines().filter(|line| line.starts_with("  ") && line.contains("metal-candle "));
        for example in examples {
            let found = check(command.get_name(), example, problems);
            assert!(found > 0, "{example}");
            *count += found;
        }
        command.get_subcommands().for_each(|inner| walk(inner, problems, count));
    }
    let (mut problems, mut count) = (String::new(), 0);
    walk(&Arguments::command(), &mut problems, &mut count);
    assert!(problems.is_empty(), "\n{problems}");
    assert!(count > 40, "only {count} commands were found");
}

#[test]
fn flags_in_the_text_exist() {
    fn collect(command: &clap::Command, flags: &mut BTreeSet<String>) {
        flags.extend(command.get_arguments().filter_map(|argument| Some(format!("--{}", argument.get_long()?))));
        command.get_subcommands().for_each(|inner| collect(inner, flags));
    }
    let mut flags = BTreeSet::from(OTHER_FLAGS.map(str::to_owned));
    collect(&Arguments::command(), &mut flags);
    let program = Arguments::command();
    let is_ours = |word: &str| {
        word.starts_with("--")
            || word == "metal-candle"
            || program.get_subcommands().any(|inner| inner.get_name() == word)
    };
    let (mut problems, mut count) = (String::new(), 0);
    let is_guide = |document: &&Document| document.is_page() || document.path.as_os_str() == "README.md";
    for document in documents().iter().filter(is_guide) {
        for (index, line) in document.lines.iter().enumerate() {
            for span in Document::code_spans(line).filter(|span| is_ours(span.split([' ', '=', '[']).next().unwrap())) {
                for flag in span.split([' ', '=', '[']).filter(|word| word.len() > 2 && word.starts_with("--")) {
                    count += 1;
                    if !flags.contains(flag) {
                        writeln!(problems, "{}:{}: `{flag}`", document.path.display(), index + 1).unwrap();
                    }
                }
            }
        }
    }
    assert!(problems.is_empty(), "no command has these flags:\n{problems}");
    assert!(count > 80, "only {count} flags were found");
}

#[test]
fn a_wrong_command_is_found() {
    let mut problems = String::new();
    let script =
        "metal-candle train --rank 8 # a comment\ncargo run --release -- generate --promptt 'a b' | cat > out\n";
    assert_eq!(check("here", script, &mut problems), 2);
    assert!(problems.contains("--promptt") && !problems.contains("--rank"), "{problems}");
}
