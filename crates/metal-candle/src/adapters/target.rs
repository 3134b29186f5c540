//! Names and selects the layers that an adapter can extend.

use super::patterns::{compile, is_match};
use crate::error::{Error, Result};
use crate::models::LinearInfo;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

/// Linear layers of a model: by the last part of their paths, by path, or by a regular expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TargetModule {
    /// Queries: `q_proj`.
    QProj,
    /// Keys: `k_proj`.
    KProj,
    /// Values: `v_proj`.
    VProj,
    /// Output of the attention: `o_proj`.
    OProj,
    /// Gate of the MLP: `gate_proj`.
    GateProj,
    /// Input of the MLP: `up_proj`.
    UpProj,
    /// Output of the MLP: `down_proj`.
    DownProj,
    /// The embedding of the token ids: `embed_tokens`.
    EmbedTokens,
    /// The output head: `lm_head`.
    LmHead,
    /// Every linear layer of every block, with any name: `all-linear`.
    AllLinear,
    /// The layers selected by a name, a path or a regular expression; see [`TargetModule::named`].
    Named(ModuleName),
}

/// The text of a [`TargetModule::Named`]. Each text is leaked once, for the lifetime of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleName(&'static str);

impl ModuleName {
    fn new(text: &str) -> Self {
        static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
        let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = names.get(text) {
            return Self(name);
        }
        let name: &'static str = Box::leak(text.into());
        names.insert(name);
        Self(name)
    }
}

/// The names of the variants for one kind of module.
const KINDS: [(TargetModule, &str); 9] = [
    (TargetModule::QProj, "q_proj"),
    (TargetModule::KProj, "k_proj"),
    (TargetModule::VProj, "v_proj"),
    (TargetModule::OProj, "o_proj"),
    (TargetModule::GateProj, "gate_proj"),
    (TargetModule::UpProj, "up_proj"),
    (TargetModule::DownProj, "down_proj"),
    (TargetModule::EmbedTokens, "embed_tokens"),
    (TargetModule::LmHead, "lm_head"),
];

/// The name of all linear layers of the blocks.
const ALL_LINEAR: &str = "all-linear";

impl TargetModule {
    /// The linear layers of a block in most families. [`TargetModule::AllLinear`] fits every family.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The layers outside of the blocks.
    pub const OUTSIDE: [Self; 2] = [Self::EmbedTokens, Self::LmHead];

    /// Selects layers by text, as PEFT does. A name such as `qkv_proj` or `layers.0.mlp.up_proj` selects the layers whose
    /// path ends in it; a regular expression such as `.*\.[0-3]\..*_proj` must match the whole path.
    ///
    /// # Errors
    /// The text is empty, or a regular expression that is not supported.
    pub fn named(text: &str) -> Result<Self> {
        if text == ALL_LINEAR {
            return Ok(Self::AllLinear);
        }
        if let Some((module, _)) = KINDS.iter().find(|(_, name)| *name == text) {
            return Ok(*module);
        }
        let is_wrong = text.is_empty() || (is_pattern(text) && compile(&whole(text)).is_none());
        if is_wrong {
            let message = format!("`{text}` is neither the name of a module nor a supported regular expression");
            return Err(Error::argument("target_modules", message));
        }
        Ok(Self::Named(ModuleName::new(text)))
    }

    /// The name, path or regular expression: `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllLinear => ALL_LINEAR,
            Self::Named(name) => name.0,
            kind => KINDS.iter().find(|(module, _)| *module == kind).map_or("", |(_, name)| name),
        }
    }

    /// Whether it selects this layer.
    pub(crate) fn selects(self, linear: &LinearInfo) -> bool {
        let name = match self {
            // PEFT's `all-linear` includes neither the embedding nor the head
            Self::AllLinear => return linear.layer.is_some(),
            Self::Named(name) if is_pattern(name.0) => {
                return compile(&whole(name.0)).is_some_and(|regex| is_match(&regex, &linear.path));
            }
            other => other.name(),
        };
        linear.path == name || linear.path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
    }

    /// Parses a list such as `q_proj,v_proj`; `all-linear` selects all linear layers of the blocks.
    ///
    /// ```
    /// use metal_candle::adapters::TargetModule;
    ///
    /// assert_eq!(TargetModule::parse_list("q_proj, v_proj")?, [TargetModule::QProj, TargetModule::VProj]);
    /// assert_eq!(TargetModule::parse_list("all-linear,lm_head")?, [TargetModule::AllLinear, TargetModule::LmHead]);
    /// # Ok::<(), metal_candle::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`TargetModule::named`].
    pub fn parse_list(list: &str) -> Result<Vec<Self>> {
        list.split(',').map(|name| name.trim().parse()).collect()
    }
}

/// Whether a text is a regular expression rather than a name or path.
fn is_pattern(text: &str) -> bool {
    text.contains(['*', '+', '?', '(', ')', '[', ']', '{', '}', '|', '^', '$', '\\'])
}

fn whole(pattern: &str) -> String {
    format!("^(?:{pattern})$")
}

impl FromStr for TargetModule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::named(name)
    }
}

impl fmt::Display for TargetModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
