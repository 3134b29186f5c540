//! Parses names of models on the Hub.

use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// The name of a model on the Hub: `org/name` or `org/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    repository: String,
    revision: String,
}

impl HubName {
    /// `org/name`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Branch, tag or commit; `main` by default.
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

impl FromStr for HubName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let word = |word: &str| {
            !word.is_empty()
                && word.len() <= 96
                && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !word.starts_with(['.', '-'])
        };
        let valid_repository = repository.split_once('/').is_some_and(|(owner, name)| word(owner) && word(name));
        if !valid_repository || !revision.split('/').all(word) {
            return Err(Error::argument(
                "model",
                format!("expected `org/name` or `org/name@revision`, found `{text}`"),
            ));
        }
        Ok(Self { repository: repository.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.repository),
            revision => write!(f, "{}@{revision}", self.repository),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::HubName;

    #[test]
    fn names() {
        let name: HubName = "Qwen/Qwen2.5-Coder-0.5B".parse().unwrap();
        assert_eq!((name.repository(), name.revision()), ("Qwen/Qwen2.5-Coder-0.5B", "main"));
        let name: HubName = "a/b@refs/pr/5".parse().unwrap();
        assert_eq!(
            (name.repository(), name.revision(), name.to_string().as_str()),
            ("a/b", "refs/pr/5", "a/b@refs/pr/5")
        );
        for wrong in ["a", "a/b/c", "a/", "/b", "../b", "a/..", "a/b@", "a/b@../x", "a/b@x//y", "a b/c", "~/x"] {
            assert!(wrong.parse::<HubName>().is_err(), "{wrong}");
        }
    }
}
