//! [`Error`]: the error type of the library. Its variants are grouped by what a caller can do about them.

use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};

/// The result type of the library.
pub type Result<T> = std::result::Result<T, Error>;

/// The error type of the library. Its variants are grouped by what the caller can do about them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A file or folder could not be written.
    #[error("cannot write `{}`: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A file was read, but its contents are not valid.
    #[error("`{}` is not valid: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
    /// Tensors of a checkpoint or adapter do not fit the model; all of them are listed.
    #[error("`{}` does not fit the model:{}", path.display(), list(problems))]
    Tensors {
        /// The file or folder.
        path: PathBuf,
        /// One line per tensor: its name, what was expected and what was found.
        problems: Vec<String>,
    },
    /// Rows of a dataset cannot be used; all of them are listed.
    #[error("the dataset cannot be used:{}", list(problems))]
    Data {
        /// One entry per row.
        problems: Vec<DataProblem>,
    },
    /// A tensor argument has the wrong shape.
    #[error("`{name}` has the wrong shape: expected {expected}, found {found:?}")]
    Shape {
        /// The argument.
        name: String,
        /// The expected shape, in words such as `[tokens, hidden]`.
        expected: String,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A setting or argument is out of its range, or two of them contradict each other.
    #[error("`{name}`: {message}")]
    Argument {
        /// The setting or argument.
        name: String,
        /// What is wrong and what was expected.
        message: String,
    },
    /// The file or request is valid, but needs something that is not supported.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A state that only a bug in this library can cause.
    #[error("internal error: {0}; please open an issue and include the command you ran")]
    Bug(String),
    /// A chat template could not be compiled or rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// The loss was NaN or infinite.
    #[error("the loss is {loss} at step {step}; rows: {}", rows.join(", "))]
    NonFiniteLoss {
        /// The optimizer step, counted from 1.
        step: usize,
        /// The loss.
        loss: f64,
        /// `file:line` of each affected row.
        rows: Vec<String>,
    },
    /// The loss of an evaluation was NaN or infinite.
    #[error("the loss of an evaluation is {loss}, not a finite number; rows: {}", rows.join(", "))]
    NonFiniteEvaluation {
        /// The loss of these rows.
        loss: f64,
        /// `file:line` of each affected row.
        rows: Vec<String>,
    },
    /// A gradient was NaN or infinite although the loss was not.
    #[error("the gradients of `{}` are not finite at step {step}; rows: {}", parameters.join("`, `"), rows.join(", "))]
    NonFiniteGradient {
        /// The optimizer step, counted from 1.
        step: usize,
        /// The names of the affected tensors.
        parameters: Vec<String>,
        /// `file:line` of each row of the step.
        rows: Vec<String>,
    },
    /// The run would not fit in memory.
    #[error("the run needs {} of memory, the limit is {}: {detail}", format_bytes(*needed as u64), format_bytes(*limit as u64))]
    Memory {
        /// The least required memory, in bytes.
        needed: usize,
        /// The limit, in bytes.
        limit: usize,
        /// How the memory is used.
        detail: String,
    },
    /// The device ran out of memory.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// A callback, a dropped stream or a signal stopped the work.
    #[error("stopped")]
    Stopped,
    /// The Hub did not answer or does not have the file.
    #[error("hub: {0}")]
    Hub(String),
    /// Another process of a distributed run failed or ended.
    #[error("rank {rank}: {message}")]
    Peer {
        /// The rank of the process, from 0.
        rank: usize,
        /// The error that it sent, or how it failed.
        message: String,
    },
    /// The device failed, or there is no such device.
    #[error("device: {0}")]
    Device(String),
    /// A tensor operation failed: a bug in this library.
    #[error(transparent)]
    Candle(candle_core::Error),
}

/// Converts failures of the device to [`Error::OutOfMemory`] or [`Error::Device`], and others to [`Error::Candle`].
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        let message = device_failure(&text);
        if is_about_memory(&text) {
            let inner = text.lines().next().unwrap_or_default().trim_start_matches("out of memory: ").to_owned();
            return Self::OutOfMemory(message.unwrap_or(inner));
        }
        message.map_or(Self::Candle(error), Self::Device)
    }
}

/// Whether a message of CUDA, Metal or one of the libraries means that the device ran out of memory.
fn is_about_memory(text: &str) -> bool {
    // CUDA's driver, cuBLAS, candle's Metal backend, Metal's command buffers
    let words = ["out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED", "ALLOCATION_FAILED"];
    let of_metal = ["Insufficient Memory", "FailedToCreateResource"];
    words.iter().chain(&of_metal).any(|words| text.contains(words))
}

/// A readable message for `DriverError(CODE, "text")`, `CublasError(CODE)` and similar errors of CUDA's libraries.
fn device_failure(text: &str) -> Option<String> {
    const SOURCES: [(&str, &str); 5] = [
        ("DriverError(", "the CUDA driver"),
        ("CublasError(", "cuBLAS"),
        ("CurandError(", "cuRAND"),
        ("NvrtcError(", "the CUDA compiler (NVRTC)"),
        ("NcclError(", "NCCL"),
    ];
    let (who, inside) = SOURCES.iter().find_map(|(start, who)| {
        let from = text.find(start)? + start.len();
        let inside = &text[from..];
        Some((*who, inside.split_once(')').map_or(inside, |(inside, _)| inside)))
    })?;
    let (code, words) = inside.split_once(',').unwrap_or((inside, ""));
    let code = code.trim();
    // the first error of a compiler says more than its code
    let log = text.lines().find(|line| line.contains("error:")).unwrap_or_default().trim();
    let words = words.trim().trim_matches('"');
    let words = if words.is_empty() { log } else { words };
    let sentence =
        if words.is_empty() { format!("{who} reports {code}") } else { format!("{who} reports: {words} ({code})") };
    #[cfg(feature = "cuda")]
    if let Some(missing) = metal_candle_kernels::gpu::cuda::missing_function() {
        return Some(format!("{sentence}; {missing}"));
    }
    Some(sentence)
}

/// One row of a dataset that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DataProblem {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1; 0 for a problem of the whole file.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for DataProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{}: {}", self.path.display(), self.message)
        } else {
            write!(f, "{}:{}: {}", self.path.display(), self.line, self.message)
        }
    }
}

/// Maximum number of problems that are printed; the others are counted.
const MAX_LISTED: usize = 20;

fn list<T: fmt::Display>(problems: &[T]) -> String {
    let mut text = String::new();
    for problem in problems.iter().take(MAX_LISTED) {
        let _ = write!(text, "\n  {problem}");
    }
    if problems.len() > MAX_LISTED {
        let _ = write!(text, "\n  and {} more", problems.len() - MAX_LISTED);
    }
    text
}

/// A number of bytes in decimal units, for messages: `1.2 MB`.
pub fn format_bytes(count: u64) -> String {
    let count = count as f64;
    match count {
        c if c < 1e3 => format!("{c:.0} B"),
        c if c < 1e6 => format!("{:.1} kB", c / 1e3),
        c if c < 1e9 => format!("{:.1} MB", c / 1e6),
        c => format!("{:.2} GB", c / 1e9),
    }
}

impl Error {
    /// Whether the device ran out of memory, so that a smaller micro-batch might work.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        let text = match self {
            Self::OutOfMemory(_) => return true,
            Self::Candle(error) => error.to_string(),
            Self::Device(message) => message.clone(),
            _ => return false,
        };
        is_about_memory(&text)
    }

    pub(crate) fn read(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Read { path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn write(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Write { path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn format(path: impl AsRef<Path>, message: impl fmt::Display) -> Self {
        Self::Format { path: path.as_ref().to_path_buf(), message: message.to_string() }
    }

    pub(crate) fn argument(name: impl Into<String>, message: impl fmt::Display) -> Self {
        Self::Argument { name: name.into(), message: message.to_string() }
    }

    pub(crate) fn shape(name: &str, expected: impl Into<String>, found: &[usize]) -> Self {
        Self::Shape { name: name.into(), expected: expected.into(), found: found.to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use super::Error;

    #[test]
    fn sizes_have_units_that_show_them() {
        let error = Error::Memory { needed: 21_400_000, limit: 4_900, detail: "step 4 MB".into() };
        assert_eq!(error.to_string(), "the run needs 21.4 MB of memory, the limit is 4.9 kB: step 4 MB");
        let error = Error::Memory { needed: 2_140_000_000, limit: 7, detail: String::new() };
        assert_eq!(error.to_string(), "the run needs 2.14 GB of memory, the limit is 7 B: ");
    }

    fn converted(text: &str) -> Error {
        Error::from(candle_core::Error::Msg(text.to_owned()))
    }

    #[test]
    fn device_failures_have_readable_messages() {
        let error = converted("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        assert!(matches!(error, Error::OutOfMemory(_)) && error.is_out_of_memory());
        let text = "out of memory: the CUDA driver reports: out of memory (CUDA_ERROR_OUT_OF_MEMORY)";
        assert_eq!(error.to_string(), text);
        // converting the message again does not change it
        assert_eq!(converted(text).to_string(), text);
        let error = converted("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")");
        let expected = "device: the CUDA driver reports: an illegal memory access was encountered \
                        (CUDA_ERROR_ILLEGAL_ADDRESS)";
        assert_eq!(error.to_string(), expected);
        let error = converted("CublasError(CUBLAS_STATUS_EXECUTION_FAILED)");
        assert_eq!(error.to_string(), "device: cuBLAS reports CUBLAS_STATUS_EXECUTION_FAILED");
        assert!(converted("CublasError(CUBLAS_STATUS_ALLOC_FAILED)").is_out_of_memory());
        assert!(matches!(converted("shape mismatch in add"), Error::Candle(_)));
    }
}
