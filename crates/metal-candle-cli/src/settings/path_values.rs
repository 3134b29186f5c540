//! Parses numbers by regular expression: the value of `--rank-pattern` and `--alpha-pattern`.

use crate::error::UserError;
use anyhow::Result;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// Numbers by regular expression on a path, such as `q_proj=16,layers\.0\..*=4`; the first match applies.
///
/// In TOML a table is accepted too, in the order of its keys.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct PathValues(pub(crate) Vec<(String, f64)>);

impl FromStr for PathValues {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut values = Vec::new();
        let mut pattern = String::new();
        for part in text.split(',') {
            // an expression may contain commas
            let Some((end, number)) = part.rsplit_once('=') else {
                pattern.push_str(part);
                pattern.push(',');
                continue;
            };
            pattern.push_str(end);
            let number = number.trim().parse().ok().filter(|number: &f64| number.is_finite());
            let number = number.ok_or_else(|| format!("expected a number after `{}=`", pattern.trim()))?;
            values.push((std::mem::take(&mut pattern).trim().to_owned(), number));
        }
        if values.is_empty() || !pattern.is_empty() || values.iter().any(|(pattern, _)| pattern.is_empty()) {
            return Err(format!("expected a list such as `q_proj=16,layers.0..*=4`, found `{text}`"));
        }
        Ok(Self(values))
    }
}

impl fmt::Display for PathValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (pattern, value)) in self.0.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            write!(f, "{comma}{pattern}={value}")?;
        }
        Ok(())
    }
}

impl Serialize for PathValues {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PathValues {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Given {
            Text(String),
            Table(std::collections::BTreeMap<String, f64>),
        }
        match Given::deserialize(deserializer)? {
            Given::Text(text) => text.parse().map_err(serde::de::Error::custom),
            Given::Table(table) => Ok(Self(table.into_iter().collect())),
        }
    }
}

impl PathValues {
    /// The values as ranks; an error if one is not a whole number above 0.
    pub(crate) fn ranks(&self) -> Result<Vec<(String, usize)>> {
        let rank = |(pattern, value): &(String, f64)| {
            if value.fract() != 0.0 || *value < 1.0 {
                let message =
                    format!("`--rank-pattern`: expected a whole number above 0, found {value} for `{pattern}`");
                return Err(UserError::new(message).into());
            }
            Ok((pattern.clone(), *value as usize))
        };
        self.0.iter().map(rank).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::PathValues;

    #[test]
    fn patterns_are_lists() {
        let values: PathValues = r"q_proj=16, layers\.\d{1,2}\.mlp.*=4.5".parse().unwrap();
        assert_eq!(values.0, [("q_proj".to_owned(), 16.0), (r"layers\.\d{1,2}\.mlp.*".to_owned(), 4.5)]);
        assert_eq!(values.to_string().parse::<PathValues>().unwrap(), values);
        assert!(values.ranks().is_err());
        for wrong in ["", "q_proj", "q_proj=", "=3", "q_proj=3,v_proj", "q_proj=x"] {
            assert!(wrong.parse::<PathValues>().is_err(), "{wrong}");
        }
    }
}
