//! Looks up values by the path of a module, like PEFT's `rank_pattern` and `alpha_pattern`.

use crate::error::{Error, Result};
use crate::files::guard;
use fancy_regex::{Regex, RegexBuilder};

/// Maximum number of backtracking steps of one match.
const MAX_STEPS: usize = 20_000;

/// Values by regular expression; the first that matches the whole path, or its end after a dot, applies.
#[derive(Debug, Clone)]
pub(crate) struct Patterns<T> {
    entries: Vec<(String, Regex, T)>,
}

impl<T: Copy> Patterns<T> {
    /// # Errors
    /// A pattern is not a valid regular expression of Python.
    pub(crate) fn new(name: &str, entries: impl IntoIterator<Item = (String, T)>) -> Result<Self> {
        let entries = entries.into_iter().map(|(pattern, value)| {
            let regex = compile(&format!(r"^(?:.*\.)?(?:{pattern})$"))
                .ok_or_else(|| Error::argument(name, format!("`{pattern}` is not a supported regular expression")))?;
            Ok((pattern, regex, value))
        });
        Ok(Self { entries: entries.collect::<Result<_>>()? })
    }

    pub(crate) fn get(&self, path: &str) -> Option<T> {
        self.entries.iter().find(|(_, regex, _)| is_match(regex, path)).map(|(_, _, value)| *value)
    }

    /// The patterns that match none of the paths.
    pub(crate) fn unused<'a>(&self, paths: &(impl Iterator<Item = &'a str> + Clone)) -> Vec<&str> {
        let is_used = |regex: &Regex| paths.clone().any(|path| is_match(regex, path));
        self.entries.iter().filter(|(_, regex, _)| !is_used(regex)).map(|(pattern, _, _)| pattern.as_str()).collect()
    }
}

/// Compiles a regular expression of Python; `None` if it is invalid or too large.
pub(super) fn compile(pattern: &str) -> Option<Regex> {
    let build = || RegexBuilder::new(pattern).backtrack_limit(MAX_STEPS).build();
    guard(build).ok()?.ok()
}

/// Whether an expression matches; false if matching takes too many steps.
pub(super) fn is_match(regex: &Regex, text: &str) -> bool {
    guard(|| regex.is_match(text).unwrap_or(false)).unwrap_or(false)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Patterns;

    #[test]
    fn patterns_match_ends_of_paths_after_a_dot() {
        let entries = [("q_proj", 1), (r"layers\.0\..*", 2), ("layers.1.mlp.(up|down)_proj", 3)];
        let patterns = Patterns::new("rank_pattern", entries.map(|(name, rank)| (name.to_string(), rank))).unwrap();
        assert_eq!(patterns.get("model.layers.0.self_attn.q_proj"), Some(1));
        assert_eq!(patterns.get("model.layers.0.mlp.up_proj"), Some(2));
        assert_eq!(patterns.get("model.layers.1.mlp.down_proj"), Some(3));
        assert_eq!(patterns.get("model.layers.1.mlp.gate_proj"), None);
        assert_eq!(patterns.get("model.layers.1.self_attn.aq_proj"), None);
        let paths = ["model.layers.0.self_attn.q_proj"];
        assert_eq!(patterns.unused(&paths.iter().copied()), ["layers.1.mlp.(up|down)_proj"]);
        let looking = Patterns::new("rank_pattern", [(r"(?=\w+_proj).*(?<!up)_proj\Z".to_string(), 1)]).unwrap();
        assert_eq!(looking.get("layers.0.self_attn.q_proj"), Some(1));
        assert_eq!(looking.get("layers.0.mlp.up_proj"), None);
        assert!(Patterns::new("rank_pattern", [("(".to_string(), 1)]).is_err());
        assert!(Patterns::new("rank_pattern", [(r"\w{1000}{1000}{1000}".to_string(), 1)]).is_err());
        // stops after a bounded number of steps
        let slow = Patterns::new("rank_pattern", [(r"((a+)+)+(?!a)b\1".to_string(), 1)]).unwrap();
        assert_eq!(slow.get(&"a".repeat(200)), None);
    }
}
