//! Parses flag values that several commands use: devices, types of weights, sizes, template variables.

use crate::output::Output;
use crate::rank::device_number;
use candle_core::DType;
use clap::ValueEnum;
use metal_candle::Device;
use metal_candle::models::QuantizationMixture;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The device of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum DeviceKind {
    /// Metal or CUDA if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The Metal device.
    Metal,
    /// The CUDA device with this ordinal; with `--num-devices`, this one and the following devices.
    Cuda(usize),
}

impl DeviceKind {
    /// Opens the device. `auto` prints a note if the build supports an accelerator that cannot be used.
    pub(crate) fn open(self, output: Output) -> metal_candle::Result<Device> {
        let rank = device_number();
        match self {
            Self::Auto => Ok(Device::accelerator(rank).unwrap_or_else(|error| {
                if cfg!(any(feature = "cuda", feature = "metal")) {
                    let reason = match error {
                        metal_candle::Error::Device(message) => message,
                        other => other.to_string(),
                    };
                    output.note(format_args!("note: running on the CPU: {reason}"));
                }
                Device::CPU
            })),
            Self::Cpu => Ok(Device::CPU),
            Self::Metal => Device::metal(),
            Self::Cuda(first) => Device::cuda(first.saturating_add(rank)),
        }
    }
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let (name, number) = match lower.split_once(':') {
            Some((name, number)) => (name, Some(number)),
            None => (lower.as_str(), None),
        };
        let number = match number {
            None => None,
            Some(digits) if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse::<usize>().unwrap_or(usize::MAX))
            }
            Some(_) => return Err("expected a device number after `:`, such as `cuda:1`".into()),
        };
        match (name, number) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None | Some(0)) => Ok(Self::Cpu),
            ("metal", None | Some(0)) => Ok(Self::Metal),
            ("cuda", number) => Ok(Self::Cuda(number.unwrap_or(0))),
            ("cpu" | "metal", Some(number)) => Err(format!("there is only device 0 of `{name}`, not {number}")),
            _ => Err("expected `auto`, `cpu`, `metal`, `cuda` or `cuda:N`".into()),
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Metal => f.write_str("metal"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl TryFrom<String> for DeviceKind {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|message| format!("`{text}` is not a device: {message}"))
    }
}

impl From<DeviceKind> for String {
    fn from(kind: DeviceKind) -> Self {
        kind.to_string()
    }
}

/// The type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WeightType {
    /// 32-bit floating point.
    F32,
    /// 16-bit floating point.
    F16,
    /// 16-bit floating point with the exponent of f32.
    Bf16,
}

impl WeightType {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// A size in bytes, such as `8GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteSize(pub(crate) usize);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_bytes(text).map(Self)
    }
}

/// A named quantization mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct MixtureName(pub(crate) QuantizationMixture);

impl FromStr for MixtureName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        QuantizationMixture::from_name(text).map(Self).ok_or_else(|| {
            let known: Vec<&str> = QuantizationMixture::ALL.iter().map(|mixture| mixture.name).collect();
            format!("expected one of {}", known.join(", "))
        })
    }
}

impl TryFrom<String> for MixtureName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|message| format!("`{text}`: {message}"))
    }
}

impl From<MixtureName> for String {
    fn from(name: MixtureName) -> Self {
        name.0.name.into()
    }
}

/// A number of bytes such as `8GB`, `500 MB` or `12e9`.
pub(crate) fn parse_bytes(text: &str) -> Result<usize, String> {
    let wrong = || format!("`{text}`: expected a size such as `8GB`, `500MB` or `6GiB`");
    let text = text.trim();
    let unit = text.find(|c: char| c.is_ascii_alphabetic() && c != 'e' && c != 'E').unwrap_or(text.len());
    let number: f64 = text[..unit].trim().parse().map_err(|_| wrong())?;
    let factor: f64 = match text[unit..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    let bytes = number * factor;
    if bytes.is_finite() && bytes >= 1.0 { Ok(bytes as usize) } else { Err(wrong()) }
}

/// Variables that the program sets.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// Checks the syntax of a template variable.
pub(crate) fn template_var(text: &str) -> Result<String, String> {
    let name = text.split_once('=').map(|(name, _)| name).ok_or("expected NAME=VALUE")?;
    let is_name = name.chars().all(|c| c.is_alphanumeric() || c == '_') && !name.starts_with(|c: char| c.is_numeric());
    if name.is_empty() || !is_name {
        return Err(format!("expected a name of letters, digits and `_` before `=`, found `{name}`"));
    }
    if RESERVED.contains(&name) {
        return Err(format!("`{name}` is set by the program"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{DeviceKind, parse_bytes};

    #[test]
    fn names_of_devices() {
        for (text, kind, shown) in [
            ("auto", DeviceKind::Auto, "auto"),
            ("cpu", DeviceKind::Cpu, "cpu"),
            ("metal:0", DeviceKind::Metal, "metal"),
            ("cuda", DeviceKind::Cuda(0), "cuda"),
            ("cuda:0", DeviceKind::Cuda(0), "cuda"),
            ("cuda:12", DeviceKind::Cuda(12), "cuda:12"),
        ] {
            let parsed: DeviceKind = text.parse().unwrap_or_else(|message| unreachable!("{message}"));
            assert_eq!((parsed, parsed.to_string().as_str()), (kind, shown));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "metal:1", "cpu:2", "auto:0", "cuda:1:2"] {
            assert!(text.parse::<DeviceKind>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_parsed() {
        assert_eq!(parse_bytes("8GB"), Ok(8_000_000_000));
        assert_eq!(parse_bytes(" 1.5 MiB"), Ok(1_572_864));
        assert_eq!(parse_bytes("12e9"), Ok(12_000_000_000));
        for wrong in ["", "GB", "-3GB", "8 parsecs", "0", "1e400"] {
            assert!(parse_bytes(wrong).is_err_and(|message| message.contains("expected a size")), "{wrong}");
        }
    }
}
