//! Parses numbers on the command line.

use std::any::TypeId;
use std::ffi::OsString;
use std::str::FromStr;

/// Adds parsers whose errors name the range of whole numbers that a flag takes.
pub(crate) fn with_number_parsers(command: clap::Command) -> clap::Command {
    command
        .mut_args(|argument| {
            let kind = argument.get_value_parser().type_id();
            if kind == TypeId::of::<usize>() {
                argument.value_parser(whole_number::<usize>)
            } else if kind == TypeId::of::<u32>() {
                argument.value_parser(whole_number::<u32>)
            } else {
                argument
            }
        })
        .mut_subcommands(with_number_parsers)
}

/// Joins a negative number to the flag before it; clap would read the number as a flag.
pub(crate) fn with_negative_numbers(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut joined: Vec<OsString> = Vec::new();
    for word in words {
        let is_negative = word.to_str().is_some_and(|word| word.starts_with('-') && word.parse::<f64>().is_ok());
        let is_flag = |flag: &&mut OsString| {
            flag.to_str().is_some_and(|flag| flag.len() > 2 && flag.starts_with("--") && !flag.contains('='))
        };
        match joined.last_mut().filter(is_flag) {
            Some(flag) if is_negative => {
                flag.push("=");
                flag.push(word);
            }
            _ => joined.push(word),
        }
    }
    joined
}

/// Parses an unsigned integer; the error names the range.
pub(crate) fn whole_number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| {
        let most = 8 * size_of::<T>();
        format!("expected a whole number from 0 to 2^{most} - 1")
    })
}

/// Parses a seed. TOML, which holds the settings of a run, has no larger integers.
pub(crate) fn train_seed(text: &str) -> Result<u64, String> {
    let seed = text.parse().ok().filter(|&seed: &u64| i64::try_from(seed).is_ok());
    seed.ok_or_else(|| format!("expected a whole number from 0 to {}", i64::MAX))
}
