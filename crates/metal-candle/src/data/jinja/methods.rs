//! Implements methods of Python's `str`, `bytes`, `list`, `tuple` and `dict`.

use super::args::{Args, pay_bytes, pay_items};
use super::format::str_format;
use super::python::{invalid, is_printable};
use minijinja::value::{Tuple, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use regex::Regex;
use std::sync::LazyLock;

/// Calls a method that the engine does not know.
pub(in crate::data) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            pay_bytes(state, text.len())?;
            string_method(state, text, name, args)
        }
        ValueKind::Bytes if name == "decode" => {
            let text = String::from_utf8(value.as_bytes().unwrap_or_default().to_vec());
            text.map(Value::from).map_err(|_| invalid("`decode`: the bytes are not UTF-8"))
        }
        ValueKind::Map => map_method(state, value, name, args),
        ValueKind::Seq | ValueKind::Iterable => list_method(state, value, name, args),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

// one arm per method
#[allow(clippy::too_many_lines)]
fn string_method(state: &State, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == "format" {
        return str_format(state, text, args).map(Value::from);
    }
    let mut args = Args::new(name, args)?;
    let result = match name {
        "strip" | "lstrip" | "rstrip" => {
            let chars = args.optional_text("")?;
            let is_cut = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c));
            let text = if name == "rstrip" { text } else { text.trim_start_matches(is_cut) };
            Value::from(if name == "lstrip" { text } else { text.trim_end_matches(is_cut) })
        }
        "split" | "rsplit" => {
            let separator = args.optional_text("sep")?;
            let limit = args.integer("maxsplit", -1)?;
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            let parts = split(state, text, separator.as_deref(), limit, name == "rsplit")?;
            parts.into_iter().map(Value::from).collect()
        }
        "splitlines" => split_lines(state, text, args.flag("keepends", false)?)?,
        "partition" | "rpartition" => {
            let separator = args.text("")?;
            if separator.is_empty() {
                return Err(args.wrong("the separator is empty"));
            }
            let parts = if name == "partition" {
                text.split_once(&separator).map_or([text, "", ""], |(a, b)| [a, &separator, b])
            } else {
                text.rsplit_once(&separator).map_or(["", "", text], |(a, b)| [a, &separator, b])
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "replace" => {
            let (old, new) = (args.text("")?, args.text("")?);
            let count = usize::try_from(args.integer("count", -1)?).unwrap_or(usize::MAX);
            let found = text.matches(old.as_str()).count().min(count);
            pay_bytes(state, found.saturating_mul(new.len()))?;
            Value::from(if count == usize::MAX { text.replace(&old, &new) } else { text.replacen(&old, &new, count) })
        }
        "count" | "find" | "rfind" | "index" | "rindex" => {
            let target = args.text("")?;
            search(text, name, &target, &mut args)?
        }
        "startswith" | "endswith" => {
            let target = args.required("")?;
            let (part, _) = window(text, &mut args)?;
            let matches = |target: &Value| match target.as_str() {
                Some(target) if name == "startswith" => Ok(part.is_some_and(|part| part.starts_with(target))),
                Some(target) => Ok(part.is_some_and(|part| part.ends_with(target))),
                None => Err(invalid(format!("`{name}`: expected a string or a tuple of strings"))),
            };
            if matches!(target.kind(), ValueKind::Seq | ValueKind::Iterable) {
                let mut is_found = false;
                for target in target.try_iter()? {
                    is_found = is_found || matches(&target)?;
                }
                Value::from(is_found)
            } else {
                Value::from(matches(&target)?)
            }
        }
        "join" => {
            let items = args.required("")?;
            let mut joined = String::new();
            for (index, item) in items.try_iter()?.enumerate() {
                let item = item.as_str().ok_or_else(|| args.wrong("expected strings"))?;
                state.consume_fuel(1 + (item.len() + text.len()) as u64 / 64)?;
                if index > 0 {
                    joined.push_str(text);
                }
                joined.push_str(item);
            }
            Value::from(joined)
        }
        "center" | "ljust" | "rjust" | "zfill" => {
            let width = usize::try_from(args.required("")?.as_i64().unwrap_or(0)).unwrap_or(0);
            let fill = if name == "zfill" { "0".into() } else { args.optional_text("")?.unwrap_or(" ".into()) };
            pad(state, text, name, width, &fill)?
        }
        "expandtabs" => {
            let size = usize::try_from(args.integer("tabsize", 8)?).unwrap_or(0);
            pay_bytes(state, text.matches('\t').count().saturating_mul(size))?;
            Value::from(expand_tabs(text, size))
        }
        "encode" => {
            let encoding = args.optional_text("encoding")?.unwrap_or("utf-8".into()).to_lowercase();
            match encoding.as_str() {
                "utf-8" | "utf8" | "utf_8" => {}
                "ascii" | "us-ascii" if text.is_ascii() => {}
                _ => return Err(args.wrong("only UTF-8 is supported")),
            }
            Value::from_bytes(text.as_bytes().to_vec())
        }
        "removeprefix" => Value::from(text.strip_prefix(args.text("")?.as_str()).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(args.text("")?.as_str()).unwrap_or(text)),
        "upper" => Value::from(text.to_uppercase()),
        "lower" => Value::from(text.to_lowercase()),
        "casefold" => {
            let fold = |c: char| c.to_lowercase().flat_map(char::to_uppercase).flat_map(char::to_lowercase);
            Value::from(text.chars().flat_map(fold).collect::<String>())
        }
        "swapcase" => {
            let swap =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "capitalize" => Value::from(capitalized(text)),
        "title" => Value::from(titled(text)),
        _ => Value::from(is_all(text, name).ok_or(ErrorKind::UnknownMethod)?),
    };
    args.end()?;
    Ok(result)
}

/// `str.isspace` of one character.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The first character in upper case, the others in lower case.
pub(super) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next();
    first.into_iter().flat_map(char::to_uppercase).collect::<String>() + &chars.as_str().to_lowercase()
}

fn titled(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut is_in_word = false;
    for c in text.chars() {
        if is_in_word {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        is_in_word = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// The `is...` methods of strings; `None` for another name.
fn is_all(text: &str, name: &str) -> Option<bool> {
    static DECIMAL: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\p{Nd}+$").ok());
    static DIGIT: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"^[\p{Nd}²³¹⁰⁴-⁹₀-₉①-⑨⑴-⑼⒈-⒐⓪⓵-⓽⓿❶-❾➀-➈➊-➒]+$").ok());
    let all = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    let is_match = |regex: &Option<Regex>| regex.as_ref().is_some_and(|regex| regex.is_match(text));
    Some(match name {
        "isspace" => all(is_space),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isascii" => text.is_ascii(),
        "isprintable" => text.chars().all(is_printable),
        "isnumeric" => all(char::is_numeric),
        "isdecimal" => is_match(&DECIMAL),
        "isdigit" => is_match(&DIGIT),
        "islower" => text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase),
        "isupper" => text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase),
        "istitle" => text.chars().any(|c| c.is_lowercase() || c.is_uppercase()) && titled(text) == text,
        "isidentifier" => {
            let is_first = |c: char| c.is_alphabetic() || c == '_';
            text.starts_with(is_first) && text.chars().all(|c| c.is_alphanumeric() || c == '_')
        }
        _ => return None,
    })
}

fn split(
    state: &State,
    text: &str,
    separator: Option<&str>,
    limit: usize,
    from_end: bool,
) -> Result<Vec<String>, Error> {
    if separator == Some("") {
        return Err(invalid("`split`: the separator is empty"));
    }
    let mut parts = Vec::new();
    let mut rest = text;
    let trimmed = |rest: &str| {
        if from_end { rest.trim_end_matches(is_space).len() } else { rest.trim_start_matches(is_space).len() }
    };
    loop {
        if separator.is_none() {
            let len = trimmed(rest);
            rest = if from_end { &rest[..len] } else { &rest[rest.len() - len..] };
            if rest.is_empty() {
                break;
            }
        }
        let found = match separator {
            _ if parts.len() >= limit => None,
            Some(separator) if from_end => rest.rsplit_once(separator),
            Some(separator) => rest.split_once(separator),
            None if from_end => rest.rsplit_once(is_space),
            None => rest.split_once(is_space),
        };
        pay_items(state, 1)?;
        match found {
            None => {
                parts.push(rest.to_string());
                break;
            }
            Some((before, after)) => {
                let (part, others) = if from_end { (after, before) } else { (before, after) };
                parts.push(part.to_string());
                rest = others;
            }
        }
    }
    if from_end {
        parts.reverse();
    }
    Ok(parts)
}

fn split_lines(state: &State, text: &str, keep_ends: bool) -> Result<Value, Error> {
    let is_end =
        |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        pay_items(state, 1)?;
        let end = rest.find(is_end).unwrap_or(rest.len());
        let next = end
            + if rest[end..].starts_with("\r\n") { 2 } else { rest[end..].chars().next().map_or(0, char::len_utf8) };
        lines.push(Value::from(&rest[..if keep_ends { next } else { end }]));
        rest = &rest[next..];
    }
    Ok(lines.into())
}

/// The part of the text between the arguments `start` and `end`, and its start in characters; `None` if `start` is after
/// the end.
fn window<'t>(text: &'t str, args: &mut Args) -> Result<(Option<&'t str>, usize), Error> {
    let (start, end) = (args.optional_integer("")?, args.optional_integer("")?);
    if start.is_none() && end.is_none() {
        return Ok((Some(text), 0));
    }
    let len = text.chars().count();
    let (start, end) = bounds(len, start, end);
    let byte = |index: usize| text.char_indices().nth(index).map_or(text.len(), |(byte, _)| byte);
    Ok((text.get(byte(start)..byte(end)).filter(|_| start <= end && start <= len), start))
}

fn bounds(len: usize, start: Option<i64>, end: Option<i64>) -> (usize, usize) {
    let absolute = |index: i64| usize::try_from(if index < 0 { index + len as i64 } else { index }).unwrap_or(0);
    (start.map_or(0, absolute), end.map_or(len, absolute).min(len))
}

fn search(text: &str, name: &str, target: &str, args: &mut Args) -> Result<Value, Error> {
    let (part, offset) = window(text, args)?;
    if name == "count" {
        return Ok(Value::from(part.map_or(0, |part| part.matches(target).count())));
    }
    let is_last = name.starts_with('r');
    let find =
        |part: &str| if is_last { part.rfind(target) } else { part.find(target) }.map(|at| part[..at].chars().count());
    match part.and_then(find) {
        Some(index) => Ok(Value::from(index + offset)),
        None if name.ends_with("find") => Ok(Value::from(-1)),
        None => Err(args.wrong("substring not found")),
    }
}

fn pad(state: &State, text: &str, name: &str, width: usize, fill: &str) -> Result<Value, Error> {
    if fill.chars().count() != 1 {
        return Err(invalid(format!("`{name}`: expected one character to fill with")));
    }
    let missing = width.saturating_sub(text.chars().count());
    pay_bytes(state, missing.saturating_mul(fill.len()))?;
    Ok(Value::from(match name {
        "ljust" => format!("{text}{}", fill.repeat(missing)),
        "rjust" => format!("{}{text}", fill.repeat(missing)),
        "zfill" => {
            let digits = text.trim_start_matches(['+', '-']);
            let sign = if text.len() > digits.len() { &text[..1] } else { "" };
            format!("{sign}{}{}", fill.repeat(missing), &text[sign.len()..])
        }
        _ => {
            // CPython puts the odd character to the left if the width is odd
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left))
        }
    }))
}

fn expand_tabs(text: &str, size: usize) -> String {
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let missing = size - column % size;
                out.extend(std::iter::repeat_n(' ', missing));
                column += missing;
            }
            '\t' => {}
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    out
}

fn map_method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let mut args = Args::new(name, args)?;
    let result = match name {
        "get" => {
            let key = args.required("")?;
            let default = args.next("")?.unwrap_or(Value::from(()));
            match value.get_item(&key)? {
                found if found.is_undefined() => default,
                found => found,
            }
        }
        "keys" | "values" | "items" | "copy" => {
            pay_items(state, value.len().unwrap_or(0))?;
            let keys = value.try_iter()?;
            match name {
                "keys" => keys.collect(),
                "values" => keys.map(|key| value.get_item(&key)).collect::<Result<Vec<_>, _>>()?.into(),
                "copy" => value.clone(),
                _ => {
                    let pair = |key: Value| Ok(Value::from(Tuple::from([key.clone(), value.get_item(&key)?])));
                    keys.map(pair).collect::<Result<Vec<_>, Error>>()?.into()
                }
            }
        }
        _ => return Err(ErrorKind::UnknownMethod.into()),
    };
    args.end()?;
    Ok(result)
}

fn list_method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let mut args = Args::new(name, args)?;
    if name == "copy" {
        args.end()?;
        return Ok(value.clone());
    }
    if !matches!(name, "index" | "count") {
        return Err(ErrorKind::UnknownMethod.into());
    }
    let target = args.required("")?;
    let (start, end) = (args.optional_integer("")?, args.optional_integer("")?);
    args.end()?;
    let items: Vec<Value> = value.try_iter()?.collect();
    pay_items(state, items.len())?;
    if name == "count" {
        return Ok(Value::from(items.iter().filter(|item| **item == target).count()));
    }
    let (start, end) = bounds(items.len(), start, end);
    let found = (start..end).find(|&index| items[index] == target);
    found.map(Value::from).ok_or_else(|| invalid("`index`: the value is not in the list"))
}
