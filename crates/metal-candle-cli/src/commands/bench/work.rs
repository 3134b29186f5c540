//! Describes the measurements of `bench`.

use clap::ValueEnum;
use serde_json::{Value, json};

/// A kind of measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    /// Prefill of prompts.
    Prefill,
    /// Decoding of tokens.
    Decode,
    /// LoRA training steps.
    Train,
}

/// One measurement: a row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// From a prompt of `length` tokens to its first new token.
    Prefill { length: usize, repeats: usize },
    /// One token of each of `sequences` after a context of `length` tokens, with an adapter unless its rank is 0.
    Decode { sequences: usize, length: usize, steps: usize, rank: usize },
    /// A step of LoRA training: forward, backward, update.
    Train { sequences: usize, length: usize, rank: usize, repeats: usize },
}

impl Work {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Prefill { .. } => "prefill",
            Self::Decode { .. } => "decode",
            Self::Train { .. } => "train",
        }
    }

    /// The title of the row in the table.
    pub(super) fn title(self) -> String {
        match self {
            Self::Prefill { length, .. } => format!("prefill {length}"),
            Self::Decode { sequences, length, rank: 0, .. } => format!("decode {sequences}, after {length}"),
            Self::Decode { sequences, length, rank, .. } => {
                format!("decode {sequences}, after {length}, rank {rank}")
            }
            Self::Train { sequences, length, rank, .. } => format!("LoRA step {sequences}x{length}, rank {rank}"),
        }
    }

    /// The number of tokens in one timing.
    pub(super) fn tokens(self) -> usize {
        match self {
            Self::Prefill { length, .. } => length,
            Self::Decode { sequences, .. } => sequences,
            Self::Train { sequences, length, .. } => sequences * length,
        }
    }

    /// The request to the other program.
    pub(super) fn request(self) -> Value {
        match self {
            Self::Prefill { length, repeats } => json!({"work": "prefill", "length": length, "repeats": repeats}),
            Self::Decode { sequences, length, steps, rank } => json!({
                "work": "decode", "sequences": sequences, "length": length, "steps": steps, "rank": rank
            }),
            Self::Train { sequences, length, rank, repeats } => json!({
                "work": "train", "sequences": sequences, "length": length, "rank": rank, "repeats": repeats
            }),
        }
    }
}
