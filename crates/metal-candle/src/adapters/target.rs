//! The layers that an adapter can extend.

use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A linear layer of a decoder block, the embedding or the head, by the last part of its path.
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
}

impl TargetModule {
    /// All linear layers of a block.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The layers outside of the blocks.
    pub const OUTSIDE: [Self; 2] = [Self::EmbedTokens, Self::LmHead];

    /// The last part of the path: `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
            Self::EmbedTokens => "embed_tokens",
            Self::LmHead => "lm_head",
        }
    }

    /// The modules of a list such as `q_proj,v_proj`; `all-linear` stands for all linear layers of a block.
    ///
    /// ```
    /// use metal_candle::adapters::TargetModule;
    ///
    /// assert_eq!(TargetModule::parse_list("q_proj, v_proj")?, [TargetModule::QProj, TargetModule::VProj]);
    /// assert_eq!(TargetModule::parse_list("all-linear")?.len(), 7);
    /// assert_eq!(TargetModule::parse_list("all-linear,lm_head")?.len(), 8);
    /// # Ok::<(), metal_candle::Error>(())
    /// ```
    ///
    /// # Errors
    /// A name is unknown.
    pub fn parse_list(list: &str) -> Result<Vec<Self>> {
        let mut modules = Vec::new();
        for name in list.split(',').map(str::trim) {
            match name {
                "all-linear" => modules.extend(Self::ALL),
                name => modules.push(name.parse()?),
            }
        }
        Ok(modules)
    }
}

impl FromStr for TargetModule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let mut known = Self::ALL.into_iter().chain(Self::OUTSIDE);
        known.clone().find(|module| module.name() == name).ok_or_else(|| {
            let first = known.next().map_or("", Self::name).to_string();
            let names = known.fold(first, |names, module| names + "`, `" + module.name());
            Error::argument("target_modules", format!("`{name}` is none of `{names}`"))
        })
    }
}

impl fmt::Display for TargetModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
