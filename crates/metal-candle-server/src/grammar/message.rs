//! Converts error messages of llguidance to messages for clients.

/// Maximum number of characters in a message.
const MAX_CHARS: usize = 240;

const TOO_COMPLEX: &str = "the grammar is too complex";

/// The message of a compile error, without internals of the program.
pub(super) fn compile_message(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default().trim();
    if line.contains("panic") {
        return "the grammar cannot be compiled".into();
    }
    let (position, rest) = split_position(line);
    if rest.contains("regex parse error") {
        let reason = error.lines().find_map(|line| line.trim().strip_prefix("error: "));
        return format!("invalid regular expression: {}", clipped(reason.unwrap_or("it cannot be parsed")));
    }
    let rest = rest.strip_prefix("failed to compile JSON schema: ").unwrap_or(rest);
    if rest == "NoExtensionBias" {
        return "the grammar matches no text".into();
    }
    let after = |prefix: &str| rest.strip_prefix(prefix).map(|rest| clipped(rest.trim()));
    if let Some(keys) = after("Unimplemented keys: ") {
        return format!("these keywords are not supported: {}", keys.trim_matches(['[', ']']).replace('"', "`"));
    }
    if let Some(format) = after("Unknown format: ") {
        return format!("this `format` is not supported: `{format}`");
    }
    if let Some(kind) = after("Invalid type: ") {
        return format!("unknown `type`: `{kind}`");
    }
    if let Some(reason) = after("Unsatisfiable schema: ") {
        return format!("no value satisfies the schema: {reason}");
    }
    if let Some(reference) = after("Only absolute $ref's (#/...) are supported without 'referencing' feature; ref ") {
        return format!("`$ref` must start with `#/`, found {}", reference.replace('\'', "`"));
    }
    if rest.starts_with("oneOf constraints") {
        return "`oneOf` is supported only if no value can match two of its schemas; use `anyOf`".into();
    }
    if rest.starts_with("min/maxProperties") {
        return "`minProperties` and `maxProperties` are supported only if all `properties` are required".into();
    }
    let is_limit = ["fuel", "too large", "too big", "too many", "limit", "stack level", "too complex"];
    if is_limit.iter().any(|word| rest.contains(word)) {
        return TOO_COMPLEX.into();
    }
    let mut text = clipped(rest);
    let is_word =
        text.starts_with(|c: char| c.is_ascii_uppercase()) && !text[1..].starts_with(|c: char| c.is_ascii_uppercase());
    if is_word {
        text[..1].make_ascii_lowercase();
    }
    if text.is_empty() {
        return "the grammar cannot be compiled".into();
    }
    position.map_or(text.clone(), |line| format!("line {line}: {text}"))
}

/// Splits `at 3(7): message` or `3(7): message` into the line and the message.
fn split_position(text: &str) -> (Option<u32>, &str) {
    let rest = text.strip_prefix("at ").unwrap_or(text);
    let position = rest.split_once("): ").and_then(|(position, message)| {
        let (line, column) = position.split_once('(')?;
        column.parse::<u32>().ok()?;
        Some((line.parse::<u32>().ok()?, message))
    });
    position.map_or((None, text), |(line, message)| (Some(line), message))
}

fn clipped(text: &str) -> String {
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}
