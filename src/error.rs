//! The failures that decide the exit code. All other errors are `anyhow` errors with context and give exit code 1.

use crate::usage;
use std::path::{Path, PathBuf};

/// A failure that decides the exit code of the process.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The usage, the config, the data or the environment is wrong. The message names the key or the file, and usually the cure.
    #[error("{0}")]
    Usage(String),
    /// A file is damaged, or is not the file that it should be, and must not be used.
    #[error("{}: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    /// A signal has stopped the phase. If `step` is not 0, the same command resumes from the checkpoint of this step. If `step` is
    /// 0, the command may have to start the phase again. In the packing phase, `step` is instead the number of the unfinished
    /// shard, and the same command keeps all finished shards.
    #[error("stopped by a signal in phase {phase} at step {step}; start the same command again to resume")]
    Stopped { phase: String, step: u64 },
    /// A signal has stopped the process during an activity that has no step. The same command starts the activity again, but a
    /// study goes on with its unfinished cells.
    #[error("stopped by a signal while {activity}; start the same command again")]
    Interrupted { activity: String },
    /// Another rank ends with this exit code and reports the reason. The cause can also be another replica of this rank. Then the
    /// code is 1, and this rank reports the error of that replica.
    #[error("another rank ended with exit code {code}")]
    OnOtherRank { code: u8 },
}

impl Failure {
    /// The exit code of the process, which is part of the program's interface.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            Failure::Damaged { .. } => 3,
            Failure::Stopped { .. } | Failure::Interrupted { .. } => 75,
            Failure::OnOtherRank { code } => *code,
        }
    }

    /// Turns an error into a usage error that names the file or folder `path`. An error that means a stop by a signal is not
    /// changed.
    pub fn at(path: &Path, error: anyhow::Error) -> anyhow::Error {
        if Failure::is_stop(&error) { error } else { usage!("{}: {error:#}", path.display()) }
    }

    /// Whether an error means that a signal has stopped the program in an orderly way.
    pub fn is_stop(error: &anyhow::Error) -> bool {
        exit_code(error) == 75
    }
}

/// The exit code of any error: the code of the first [`Failure`] in the error's chain, or 1 if the chain has no `Failure`.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(|e| e.downcast_ref::<Failure>()).map_or(1, Failure::exit_code)
}

/// Builds a [`Failure::Usage`] as an `anyhow::Error`.
#[macro_export]
macro_rules! usage {
    ($($arg:tt)*) => { ::anyhow::Error::new($crate::error::Failure::Usage(format!($($arg)*))) };
}

/// Returns early with a [`Failure::Usage`] unless the condition is true.
#[macro_export]
macro_rules! require {
    ($condition:expr, $($arg:tt)*) => { if $condition {} else { return Err($crate::usage!($($arg)*)); } };
}
