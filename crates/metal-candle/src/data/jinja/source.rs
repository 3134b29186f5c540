//! Rewrites the source of a template where the engine differs from Jinja2 and Python, and limits its nesting.
//!
//! The changes add no output and keep line numbers. transformers' `{% generation %}` becomes a scope whose edges can be
//! marked, operands of `~` print as in Python, `%` formats text, and values stored in a namespace pass through a filter
//! that checks them.

/// Maximum number of operators in one tag, and of `elif` in a template: the parser recurses for each.
const MAX_OPERATORS: usize = 5_000;
/// The filter that guards namespaces, the only mutable values of a template.
pub(in crate::data) const STORABLE: &str = "_storable";
/// The variable that makes a template write [`GENERATION_START`] and [`GENERATION_END`] around `{% generation %}` blocks.
pub(in crate::data) const GENERATION_MARKS: &str = "_generation_marks";
/// Written at the start of a marked part: a private-use character.
pub(in crate::data) const GENERATION_START: char = '\u{E0FA}';
/// Written at the end of a marked part.
pub(in crate::data) const GENERATION_END: char = '\u{E0FB}';
/// The function that writes these characters.
pub(super) const MARK: &str = "_generation_mark";
/// The filter that replaces `%`.
pub(super) const PERCENT: &str = "_percent";
/// The filter that replaces `+` in tags with the filter `safe`.
pub(super) const PLUS: &str = "_plus";
/// The filter that prints an operand of `~`.
pub(super) const PRINTED: &str = "_printed";

/// Returns the rewritten source.
///
/// # Errors
/// A tag is nested too deeply; the message names the line.
pub(in crate::data) fn rewritten(source: &str) -> Result<String, String> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut text = String::with_capacity(source.len() + source.len() / 4);
    let mut rest = source.as_str();
    let mut num_elif = 0;
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        text.push_str(before);
        let len = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'%' | b'{') => {
                let is_block = tag.as_bytes()[1] == b'%';
                let line = || text.matches('\n').count() + 1;
                let Some(inside) = Tag::read(tag, is_block) else { break };
                if inside.num_operators > MAX_OPERATORS {
                    return Err(format!("line {}: expected at most {MAX_OPERATORS} operators in a tag", line()));
                }
                num_elif += usize::from(inside.name == "elif");
                if num_elif > MAX_OPERATORS {
                    return Err(format!("line {}: expected at most {MAX_OPERATORS} `elif`", line()));
                }
                let len = inside.len;
                if inside.name == "raw" {
                    raw_end(tag, len)
                } else {
                    text.push_str(&tag[..inside.start]);
                    text.push_str(&inside.finished());
                    rest = &tag[len - inside.end_len..];
                    text.push_str(&rest[..inside.end_len]);
                    rest = &rest[inside.end_len..];
                    continue;
                }
            }
            _ => 1,
        };
        text.push_str(&tag[..len]);
        rest = &tag[len..];
    }
    Ok(text + rest)
}

/// The end of the `{% endraw %}` of a raw block.
fn raw_end(tag: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(found) = tag[at..].find("{%") {
        let start = at + found + 2;
        let inside = tag[start..].trim_start_matches(['-', '+']).trim_start();
        if inside.starts_with("endraw") {
            return tag[start..].find("%}").map_or(tag.len(), |end| start + end + 2);
        }
        at = start;
    }
    tag.len()
}

/// One bracket of an expression: the finished part, the current operand, and pending operators.
#[derive(Default)]
struct Level {
    done: String,
    operand: String,
    left_of_percent: Option<String>,
    is_concatenated: bool,
    /// The start of the current sum.
    sum_start: usize,
    /// Whether the whole sum is already an operand of [`PLUS`].
    is_filtered: bool,
    is_in_plus: bool,
}

impl Level {
    fn end_percent(&mut self) {
        if let Some(left) = self.left_of_percent.take() {
            self.operand = format!(" (({left}) | {PERCENT}({}))", self.operand);
        }
    }

    fn end_operand(&mut self) {
        self.end_percent();
        let operand = std::mem::take(&mut self.operand);
        let is_text = operand.trim().starts_with(['"', '\''])
            && !operand.trim()[1..operand.trim().len() - 1].contains(['"', '\'']);
        if self.is_concatenated && !is_text && !operand.trim().is_empty() {
            self.done.extend([" ((", operand.as_ref(), ") | ", PRINTED, ") "]);
        } else {
            self.done.push_str(&operand);
        }
        if std::mem::take(&mut self.is_in_plus) {
            self.done.push(')');
        }
    }

    fn delimiter(&mut self, token: &str, is_concatenation: bool) {
        self.is_concatenated |= is_concatenation;
        self.end_operand();
        self.is_concatenated = is_concatenation;
        self.done.push_str(token);
        self.is_filtered = false;
        if !matches!(token, "-" | "~") {
            self.sum_start = self.done.len();
        }
    }

    fn plus(&mut self) {
        self.end_operand();
        self.is_concatenated = false;
        if !std::mem::replace(&mut self.is_filtered, true) {
            self.done.insert(self.sum_start, '(');
            self.done.push(')');
        }
        self.done.extend([" | ", PLUS, "("]);
        self.is_in_plus = true;
    }
}

/// A parsed tag: its rewritten content and its end.
struct Tag {
    name: String,
    inside: String,
    /// Bytes before the content.
    start: usize,
    /// Bytes of the whole tag.
    len: usize,
    /// Bytes of the closing mark.
    end_len: usize,
    num_operators: usize,
}

impl Tag {
    /// Reads the tag at the start of a text; `None` if it has no end.
    fn read(tag: &str, is_block: bool) -> Option<Self> {
        let bytes = tag.as_bytes();
        let close = if is_block { "%}" } else { "}}" };
        let start = if matches!(bytes.get(2), Some(b'-' | b'+')) { 3 } else { 2 };
        let has_safe = tag.find(close).is_some_and(|end| tag[..end].contains("safe"));
        let mut levels = vec![Level::default()];
        let mut name = String::new();
        let mut num_operators = 0;
        let mut at = start;
        // whether the previous token is an operand
        let mut after_operand = false;
        loop {
            let rest = &tag[at..];
            let c = rest.chars().next()?;
            let marks = usize::from(matches!(c, '-' | '+'));
            if levels.len() == 1 && rest[marks..].starts_with(close) {
                let mut level = levels.pop()?;
                level.end_operand();
                let (inside, end_len) = (level.done, marks + 2);
                return Some(Self { name, inside, start, len: at + end_len, end_len, num_operators });
            }
            let level = levels.last_mut()?;
            let mut len = c.len_utf8();
            match c {
                '"' | '\'' => {
                    len = string_len(rest)?;
                    level.operand.push_str(&literal(&rest[..len]));
                    after_operand = true;
                }
                c if c.is_alphanumeric() || c == '_' => {
                    len = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                    let word = &rest[..len];
                    let is_first = is_block && name.is_empty();
                    name.push_str(if is_first { word } else { "" });
                    // after a dot or a bar, a keyword is a name
                    let is_name = level.operand.trim_end().ends_with(['.', '|']);
                    let is_keyword = matches!(word, "and" | "or" | "not" | "if" | "else" | "elif" | "in" | "recursive");
                    let belongs_to_is = matches!(word, "not" | "in") && level.operand.trim_end().ends_with(" is");
                    if is_first || (is_keyword && !is_name && !belongs_to_is) {
                        level.delimiter(word, false);
                        num_operators += 1;
                        after_operand = false;
                    } else {
                        level.operand.push_str(word);
                        num_operators += usize::from(word == "is");
                        after_operand = word != "is";
                    }
                }
                '(' | '[' | '{' => {
                    level.operand.push(c);
                    levels.push(Level::default());
                    num_operators += 1;
                    after_operand = false;
                }
                ')' | ']' | '}' => {
                    level.end_operand();
                    let inside = std::mem::take(&mut level.done);
                    levels.pop();
                    let outer = levels.last_mut()?;
                    outer.operand.push_str(&inside);
                    outer.operand.push(c);
                    after_operand = true;
                }
                '~' => {
                    level.delimiter("~", true);
                    num_operators += 1;
                    after_operand = false;
                }
                '%' => {
                    level.end_percent();
                    level.left_of_percent = Some(std::mem::take(&mut level.operand));
                    num_operators += 1;
                    after_operand = false;
                }
                '*' | '/' => {
                    len += usize::from(rest[1..].starts_with(c));
                    if &rest[..len] != "**" {
                        level.end_percent();
                    }
                    level.operand.push_str(&rest[..len]);
                    num_operators += 1;
                    after_operand = false;
                }
                '+' | '-' if !after_operand => {
                    level.operand.push(c);
                    num_operators += 1;
                }
                '+' | '-' | '=' | '!' | '<' | '>' | ',' | ':' => {
                    len += usize::from(rest[1..].starts_with('=') && !matches!(c, '+' | '-' | ',' | ':'));
                    match c {
                        '+' if has_safe => level.plus(),
                        _ => level.delimiter(&rest[..len], false),
                    }
                    num_operators += usize::from(!matches!(c, ',' | ':'));
                    after_operand = false;
                }
                c => {
                    level.operand.push(c);
                    num_operators += usize::from(matches!(c, '.' | '|'));
                }
            }
            at += len;
        }
    }

    /// The content with replaced statement names.
    fn finished(&self) -> String {
        let inside = &self.inside;
        let mark = |is_start| format!("call {MARK}({is_start}, {GENERATION_MARKS}) %}}{{% endcall ");
        match inside.trim() {
            "generation" => inside.replacen("generation", &format!("with %}}{{% {}", mark(true)), 1),
            "endgeneration" => inside.replacen("endgeneration", &format!("{}%}}{{% endwith", mark(false)), 1),
            _ => match namespace_assignment(inside) {
                Some((target, value)) => format!("{target}= ({value}) | {STORABLE} "),
                None => inside.clone(),
            },
        }
    }
}

/// The length of the string literal at the start of a text, in bytes.
fn string_len(text: &str) -> Option<usize> {
    let quote = text.chars().next()?;
    let mut is_escaped = false;
    for (index, c) in text.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if c == quote => return Some(index + 1),
            _ => {}
        }
    }
    None
}

/// Rewrites a string literal: escapes that only Python knows are replaced.
fn literal(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let Some(c) = after.chars().next() else { break };
        let digits = |from: usize, len: usize, radix: u32| {
            after
                .get(from..from + len)
                .and_then(|digits| u32::from_str_radix(digits, radix).ok())
                .and_then(char::from_u32)
        };
        let octal = after.bytes().take(3).take_while(|byte| matches!(byte, b'0'..=b'7')).count();
        let (code, len) = match c {
            'x' => (digits(1, 2, 16), 3),
            'U' => (digits(1, 8, 16), 9),
            'a' => (Some('\x07'), 1),
            'v' => (Some('\x0b'), 1),
            '0'..='7' => (digits(0, octal, 8), octal),
            _ => (None, c.len_utf8()),
        };
        match (code, c) {
            (Some(code), _) if u32::from(code) < 0x1_0000 => {
                out.extend(["\\u".to_owned(), format!("{:04x}", u32::from(code))]);
            }
            (Some(code), _) => out.push(code),
            (None, '\n') => {}
            (None, '\\' | '"' | '\'' | 'n' | 't' | 'r' | 'b' | 'f' | 'u') => out.extend(['\\', c]),
            (None, c) => out.extend(['\\', '\\', c]),
        }
        rest = &after[if code.is_some() { len } else { c.len_utf8() }..];
    }
    out + rest
}

/// Splits `set a.b = value` into `set a.b ` and the value.
fn namespace_assignment(inside: &str) -> Option<(&str, &str)> {
    let (target, value) = inside.split_once('=')?;
    let names = target.trim_start().strip_prefix("set")?;
    let is_name = |c: char| c.is_alphanumeric() || c.is_whitespace() || matches!(c, '_' | '.' | ',' | '(' | ')');
    (names.contains('.') && names.starts_with(char::is_whitespace) && names.chars().all(is_name))
        .then_some((target, value))
}
