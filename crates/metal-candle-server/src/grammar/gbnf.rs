//! Converts grammars in llama.cpp's notation (GBNF) to Lark.
//!
//! Rules without recursion become regular expressions, the others become rules. A regular expression next to a rule uses the
//! longest match, so a few texts of an ambiguous grammar are never generated; no other texts are added.

use super::error::GrammarError;
use std::collections::HashMap;
use std::fmt::Write as _;

/// Maximum number of rules in a grammar.
const MAX_RULES: usize = 500;
/// Maximum nesting of groups.
const MAX_NESTING: usize = 50;
/// Maximum number of repetitions.
const MAX_COUNT: u32 = 2000;
/// Maximum size of one regular expression, in bytes.
const MAX_REGEX: usize = 16 << 10;
/// Maximum size of all regular expressions, in bytes.
const MAX_LARK: usize = 128 << 10;

type Result<T> = std::result::Result<T, GrammarError>;

#[derive(Debug)]
enum Node {
    /// A regular expression that matches at least one character.
    Text(String),
    Rule(usize),
    Sequence(Vec<Node>),
    Either(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

/// Converts a grammar to Lark.
pub(super) fn to_lark(text: &str) -> Result<String> {
    let mut parser = Parser { rest: text, line: 1, names: HashMap::new(), bodies: Vec::new() };
    parser.parse()?;
    let Parser { names, bodies, .. } = parser;
    let mut rules = Vec::with_capacity(bodies.len());
    for (index, body) in bodies.into_iter().enumerate() {
        let undefined = || {
            let name = names.iter().find(|(_, known)| **known == index).map_or("", |(name, _)| name);
            GrammarError::Invalid(format!("the rule `{name}` is not defined"))
        };
        rules.push(body.ok_or_else(undefined)?);
    }
    let Some(&root) = names.get("root") else {
        return Err(GrammarError::Invalid("the grammar has no rule `root`".into()));
    };
    let regular = Regular::of(&rules);
    let mut lark = format!("start: r{root}\n");
    let mut left = MAX_LARK;
    for (index, body) in rules.iter().enumerate() {
        if index == root || regular.texts[index].is_none() {
            let _ = writeln!(lark, "r{index}: {}", regular.rule_body(body, &mut left)?);
        }
    }
    Ok(lark)
}

/// The regular expressions of the rules that need no recursion.
struct Regular {
    texts: Vec<Option<String>>,
}

impl Regular {
    fn of(rules: &[Node]) -> Self {
        let mut regular = Self { texts: rules.iter().map(|_| None).collect() };
        let mut waiting: Vec<usize> = (0..rules.len()).collect();
        loop {
            let (ready, rest): (Vec<usize>, Vec<usize>) =
                waiting.iter().partition(|&&index| regular.knows_rules_of(&rules[index]));
            for &index in &ready {
                // a rule with too long an expression stays a rule
                regular.texts[index] = regular.regex(&rules[index]);
            }
            if ready.is_empty() {
                return regular;
            }
            waiting = rest;
        }
    }

    fn knows_rules_of(&self, node: &Node) -> bool {
        match node {
            Node::Text(_) => true,
            Node::Rule(index) => self.texts[*index].is_some(),
            Node::Sequence(nodes) | Node::Either(nodes) => nodes.iter().all(|node| self.knows_rules_of(node)),
            Node::Repeat(node, ..) => self.knows_rules_of(node),
        }
    }

    /// The regular expression of a node; `None` if it needs recursion or is too long.
    fn regex(&self, node: &Node) -> Option<String> {
        let mut text = String::new();
        self.write(node, &mut text).then_some(text)
    }

    fn write(&self, node: &Node, text: &mut String) -> bool {
        let is_written = match node {
            Node::Text(part) => {
                text.push_str(part);
                true
            }
            Node::Rule(index) => self.texts[*index].as_ref().is_some_and(|part| {
                text.push_str(part);
                true
            }),
            Node::Sequence(nodes) => nodes.iter().all(|node| self.write(node, text)),
            Node::Either(nodes) => {
                text.push_str("(?:");
                let is_written = nodes.iter().enumerate().all(|(index, node)| {
                    text.push_str(if index > 0 { "|" } else { "" });
                    self.write(node, text)
                });
                text.push(')');
                is_written
            }
            Node::Repeat(node, min, max) => {
                text.push_str("(?:");
                let is_written = self.write(node, text);
                text.push(')');
                text.push_str(&counts(*min, *max));
                is_written
            }
        };
        is_written && text.len() <= MAX_REGEX
    }

    /// The right side of a rule. `left` is the number of remaining bytes for all rules.
    fn rule_body(&self, node: &Node, left: &mut usize) -> Result<String> {
        if let Some(text) = self.regex(node) {
            return terminal(&text, left);
        }
        Ok(match node {
            Node::Text(text) => terminal(text, left)?,
            Node::Rule(index) => format!("r{index}"),
            Node::Sequence(nodes) => {
                let (mut parts, mut run) = (Vec::new(), String::new());
                for node in nodes {
                    match self.regex(node) {
                        Some(text) if run.len() + text.len() <= MAX_REGEX => run.push_str(&text),
                        Some(text) => parts.push(terminal(&std::mem::replace(&mut run, text), left)?),
                        None => {
                            parts.push(terminal(&std::mem::take(&mut run), left)?);
                            parts.push(self.rule_body(node, left)?);
                        }
                    }
                }
                parts.push(terminal(&run, left)?);
                parts.retain(|part| part != EMPTY);
                parts.join(" ")
            }
            Node::Either(nodes) => {
                let parts: Result<Vec<String>> = nodes.iter().map(|node| self.rule_body(node, left)).collect();
                format!("({})", parts?.join(" | "))
            }
            Node::Repeat(_, _, Some(0)) => EMPTY.into(),
            Node::Repeat(node, min, max) => {
                let counts = match (min, max) {
                    (0, None) => "*".into(),
                    (1, None) => "+".into(),
                    (0, Some(1)) => "?".into(),
                    (min, max) => counts(*min, *max),
                };
                format!("({}){counts}", self.rule_body(node, left)?)
            }
        })
    }
}

fn counts(min: u32, max: Option<u32>) -> String {
    max.map_or(format!("{{{min},}}"), |max| format!("{{{min},{max}}}"))
}

const EMPTY: &str = "\"\"";

fn terminal(regex: &str, left: &mut usize) -> Result<String> {
    let too_long = || GrammarError::Invalid("the grammar is too complex".into());
    *left = left.checked_sub(regex.len()).ok_or_else(too_long)?;
    Ok(if regex.is_empty() { EMPTY.into() } else { format!("/{regex}/") })
}

struct Parser<'a> {
    rest: &'a str,
    line: usize,
    names: HashMap<&'a str, usize>,
    bodies: Vec<Option<Node>>,
}

impl<'a> Parser<'a> {
    fn parse(&mut self) -> Result<()> {
        self.skip_space(true);
        while !self.rest.is_empty() {
            let name = self.word();
            if name.is_empty() {
                return self.wrong("expected the name of a rule");
            }
            let index = self.rule(name)?;
            self.skip_space(false);
            if !self.skip("::=") {
                return self.wrong(&format!("expected `::=` after the rule `{name}`"));
            }
            self.skip_space(true);
            let body = self.alternatives(0)?;
            if self.bodies[index].replace(body).is_some() {
                return self.wrong(&format!("the rule `{name}` is defined twice"));
            }
            if !self.rest.is_empty() && !self.rest.starts_with(['\n', '\r']) {
                return self.wrong("expected the end of the rule");
            }
            self.skip_space(true);
        }
        Ok(())
    }

    fn wrong<T>(&self, message: &str) -> Result<T> {
        Err(GrammarError::Invalid(format!("line {}: {message}", self.line)))
    }

    fn rule(&mut self, name: &'a str) -> Result<usize> {
        if let Some(&index) = self.names.get(name) {
            return Ok(index);
        }
        if self.bodies.len() == MAX_RULES {
            return self.wrong(&format!("the grammar has more than {MAX_RULES} rules"));
        }
        self.names.insert(name, self.bodies.len());
        self.bodies.push(None);
        Ok(self.bodies.len() - 1)
    }

    fn word(&mut self) -> &'a str {
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let end = self.rest.find(|c| !is_part(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn skip(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn skip_space(&mut self, skips_lines: bool) {
        while let Some(c) = self.rest.chars().next() {
            match c {
                ' ' | '\t' => {}
                '\n' if skips_lines => self.line += 1,
                '\r' if skips_lines => {}
                '#' => {
                    let end = self.rest.find('\n').unwrap_or(self.rest.len());
                    self.rest = &self.rest[end..];
                    continue;
                }
                _ => return,
            }
            self.rest = &self.rest[1..];
        }
    }

    fn alternatives(&mut self, depth: usize) -> Result<Node> {
        if depth > MAX_NESTING {
            return self.wrong(&format!("the grammar has more than {MAX_NESTING} nested groups"));
        }
        let mut alternatives = vec![self.sequence(depth)?];
        while self.skip("|") {
            self.skip_space(true);
            alternatives.push(self.sequence(depth)?);
        }
        Ok(match alternatives.pop() {
            Some(only) if alternatives.is_empty() => only,
            last => Node::Either(alternatives.into_iter().chain(last).collect()),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Node> {
        let mut nodes = Vec::new();
        loop {
            let node = match self.rest.chars().next() {
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.skip(".");
                    Node::Text("(?s:.)".into())
                }
                Some('(') => {
                    self.skip("(");
                    self.skip_space(true);
                    let group = self.alternatives(depth + 1)?;
                    if !self.skip(")") {
                        return self.wrong("expected `)`");
                    }
                    group
                }
                Some('<' | '!') => return self.wrong("tokens such as `<name>` are not supported"),
                Some(c) if c.is_ascii_alphanumeric() => {
                    let name = self.word();
                    Node::Rule(self.rule(name)?)
                }
                _ => break,
            };
            self.skip_space(depth > 0);
            nodes.push(self.repeated(node, depth)?);
        }
        Ok(Node::Sequence(nodes))
    }

    fn repeated(&mut self, mut node: Node, depth: usize) -> Result<Node> {
        // each repetition adds a level
        for _ in 0..=MAX_NESTING {
            let (min, max) = if self.skip("*") {
                (0, None)
            } else if self.skip("+") {
                (1, None)
            } else if self.skip("?") {
                (0, Some(1))
            } else if self.skip("{") {
                self.counts()?
            } else {
                return Ok(node);
            };
            self.skip_space(depth > 0);
            node = Node::Repeat(Box::new(node), min, max);
        }
        self.wrong("too many repetitions of a repetition")
    }

    fn counts(&mut self) -> Result<(u32, Option<u32>)> {
        let min = self.number()?.unwrap_or(0);
        let max = if self.skip(",") { self.number()? } else { Some(min) };
        if !self.skip("}") || max.is_some_and(|max| max < min) {
            return self.wrong("expected a repetition such as `{2}`, `{2,}` or `{2,5}`");
        }
        Ok((min, max))
    }

    fn number(&mut self) -> Result<Option<u32>> {
        self.skip_space(false);
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        self.skip_space(false);
        match digits.parse::<u32>() {
            _ if digits.is_empty() => Ok(None),
            Ok(number) if number <= MAX_COUNT => Ok(Some(number)),
            _ => self.wrong(&format!("expected at most {MAX_COUNT} repetitions")),
        }
    }

    fn literal(&mut self) -> Result<Node> {
        self.skip("\"");
        let mut regex = String::new();
        while !self.skip("\"") {
            let c = self.character()?;
            push_escaped(&mut regex, c);
        }
        Ok(if regex.is_empty() { Node::Sequence(Vec::new()) } else { Node::Text(regex) })
    }

    fn class(&mut self) -> Result<Node> {
        self.skip("[");
        let mut regex = String::from(if self.skip("^") { "[^" } else { "[" });
        let start = regex.len();
        while !self.skip("]") {
            let first = self.character()?;
            push_escaped(&mut regex, first);
            if self.rest.starts_with('-') && !self.rest.starts_with("-]") {
                self.skip("-");
                let last = self.character()?;
                if last < first {
                    return self.wrong("a range of characters ends before its start");
                }
                regex.push('-');
                push_escaped(&mut regex, last);
            }
        }
        if regex.len() == start {
            return self.wrong("a class of characters is empty");
        }
        regex.push(']');
        Ok(Node::Text(regex))
    }

    fn character(&mut self) -> Result<char> {
        let mut chars = self.rest.chars();
        let c = match chars.next() {
            None | Some('\n') => return self.wrong("a text or class of characters has no end"),
            Some('\\') => chars.next(),
            Some(c) => {
                self.rest = chars.as_str();
                return Ok(c);
            }
        };
        self.rest = chars.as_str();
        match c {
            Some('n') => Ok('\n'),
            Some('r') => Ok('\r'),
            Some('t') => Ok('\t'),
            Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^')) => Ok(c),
            Some('x') => self.code(2),
            Some('u') => self.code(4),
            Some('U') => self.code(8),
            _ => self.wrong("unknown escape"),
        }
    }

    fn code(&mut self, digits: usize) -> Result<char> {
        let text = self.rest.get(..digits).filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let Some(c) = text.and_then(|text| u32::from_str_radix(text, 16).ok()).and_then(char::from_u32) else {
            return self.wrong("an escape is not a character");
        };
        self.rest = &self.rest[digits..];
        Ok(c)
    }
}

fn push_escaped(regex: &mut String, c: char) {
    if c.is_ascii_alphanumeric() {
        regex.push(c);
    } else {
        let _ = write!(regex, "\\x{{{:x}}}", u32::from(c));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn rules_without_recursion_are_one_expression() {
        let lark = to_lark("root ::= item (\", \" item){0,2} # a list\nitem ::= [a-c]+ |\n  \"x\\n\" | .?\n").unwrap();
        assert_eq!(
            lark,
            concat!(
                "start: r0\n",
                r"r0: /(?:(?:[a-c]){1,}|x\x{a}|(?:(?s:.)){0,1})",
                r"(?:\x{2c}\x{20}(?:(?:[a-c]){1,}|x\x{a}|(?:(?s:.)){0,1})){0,2}/",
                "\n"
            )
        );
    }

    #[test]
    fn recursive_rules_stay_rules() {
        let lark = to_lark("root ::= \"(\" root? \")\" ws\nws ::= \" \"*").unwrap();
        assert_eq!(lark, "start: r0\nr0: /\\x{28}/ (r0)? /\\x{29}(?:\\x{20}){0,}/\n");
    }

    #[test]
    fn errors_name_the_line() {
        for (text, message) in [
            ("item ::= \"a\"", "no rule `root`"),
            ("root ::= item", "`item` is not defined"),
            ("root ::= \"a\n", "line 1: a text or class"),
            ("\nroot = \"a\"", "line 2: expected `::=`"),
            ("root ::= [z-a]", "ends before its start"),
            ("root ::= []", "is empty"),
            ("root ::= (\"a\"", "expected `)`"),
            ("root ::= \"a\"{9999}", "at most 2000"),
            ("root ::= \"a\"{3,2}", "a repetition such as"),
            ("root ::= <think>", "tokens such as"),
            ("root ::= \"\\ud800\"", "not a character"),
            ("root ::= \"a\"\nroot ::= \"b\"", "defined twice"),
            (&format!("root ::= {}", "(".repeat(1000)), "nested groups"),
            (&format!("root ::= \"a\"{}", "*".repeat(1000)), "too many repetitions"),
        ] {
            let error = to_lark(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text:.40}: {error}");
        }
    }
}
