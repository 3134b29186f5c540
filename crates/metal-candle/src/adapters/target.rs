//! The linear layers of a decoder block.

use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A linear layer of a decoder block, by the last part of its path.
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
}

impl TargetModule {
    /// All linear layers of a block.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

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
        }
    }

    /// The modules of a list such as `q_proj,v_proj`, or all of them for `all-linear`.
    ///
    /// ```
    /// use metal_candle::adapters::TargetModule;
    ///
    /// assert_eq!(TargetModule::parse_list("q_proj, v_proj")?, [TargetModule::QProj, TargetModule::VProj]);
    /// assert_eq!(TargetModule::parse_list("all-linear")?.len(), 7);
    /// # Ok::<(), metal_candle::Error>(())
    /// ```
    ///
    /// # Errors
    /// A name is unknown.
    pub fn parse_list(list: &str) -> Result<Vec<Self>> {
        if list.trim() == "all-linear" {
            return Ok(Self::ALL.to_vec());
        }
        list.split(',').map(|name| name.trim().parse()).collect()
    }
}

impl FromStr for TargetModule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|module| module.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join("`, `");
            Error::argument("target_modules", format!("`{name}` is none of `{names}`"))
        })
    }
}

impl fmt::Display for TargetModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
