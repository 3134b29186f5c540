//! Reads the metadata of a GGUF file whose keys have the architecture as prefix.

use crate::error::{Error, Result};
use crate::files::{GgufFile, GgufValue};
use serde_json::Value;

/// The metadata of a model: keys with the name of its architecture as prefix.
pub(super) struct Metadata<'a> {
    pub(super) file: &'a GgufFile,
    /// The value of `general.architecture`.
    pub(super) name: &'a str,
}

impl<'a> Metadata<'a> {
    pub(super) fn of(file: &'a GgufFile) -> Result<Self> {
        let name = file.text("general.architecture")?;
        let name =
            name.ok_or_else(|| Error::format(file.path(), "expected the key `general.architecture`, found none"))?;
        if let Some(kind) = file.text("general.type")?.filter(|kind| *kind != "model") {
            return Err(Error::format(file.path(), format!("expected a model, found a file of type `{kind}`")));
        }
        Ok(Self { file, name })
    }

    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    /// A size, which must be the same for all layers; `None` if the key is absent.
    pub(super) fn size(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        let Some(GgufValue::List(values)) = self.file.metadata().get(&key) else { return self.file.size(&key) };
        let first = values.first();
        if values.iter().any(|value| Some(value) != first) {
            return Err(self.unsupported(&format!("`{key}` differs between layers")));
        }
        Ok(match first {
            Some(GgufValue::Integer(size)) => usize::try_from(*size).ok(),
            _ => None,
        })
    }

    pub(super) fn required_size(&self, name: &str) -> Result<usize> {
        let missing = || Error::format(self.file.path(), format!("expected the key `{}`, found none", self.key(name)));
        self.size(name)?.ok_or_else(missing)
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<f64>> {
        self.file.number(&self.key(name))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.file.text(&self.key(name))
    }

    pub(super) fn head_dim(&self) -> Result<usize> {
        let heads = self.required_size("attention.head_count")?;
        let width = self.required_size("embedding_length")?.checked_div(heads).unwrap_or(0);
        Ok(self.size("attention.key_length")?.unwrap_or(width))
    }

    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    pub(super) fn unsupported(&self, what: &str) -> Error {
        Error::Unsupported(format!("`{}`: {what}", self.file.path().display()))
    }
}

/// A number that the file stores as f32, with no more digits than f32 needs.
pub(super) fn shortest(number: f64) -> Value {
    let narrow = number as f32;
    if f64::from(narrow).to_bits() == number.to_bits() {
        return narrow.to_string().parse::<f64>().map_or(Value::Null, Value::from);
    }
    number.into()
}
