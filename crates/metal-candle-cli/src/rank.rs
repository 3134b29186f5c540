//! Identifies this process among the processes of a run.

use metal_candle::training::Group;

/// The environment variable that marks a process as a rank started by another process.
pub(crate) const STARTED: &str = "METAL_CANDLE_STARTED";

/// Exit code of a process that ended because another process of its group failed.
pub(crate) const OTHER_FAILED: u8 = 3;

/// Whether another process started this one as a rank.
pub(crate) fn is_rank() -> bool {
    std::env::var_os(STARTED).is_some()
}

/// The index of this process's device: its rank, or 0.
pub(crate) fn device_number() -> usize {
    std::env::var(Group::RANK).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// ` --num-devices N` with the number of processes of this run; empty for one process.
pub(crate) fn flag() -> String {
    std::env::var(Group::NUM_RANKS).map_or_else(|_| String::new(), |count| format!(" --num-devices {count}"))
}
