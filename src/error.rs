//! The failures that somebody branches on, each with its exit code. Everything else is an `anyhow` error with context.

use std::path::PathBuf;

/// A failure that has its own exit code. An error chain that holds none of these ends with exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Bad usage, config, data or environment: the message names the key or file and the cure.
    #[error("{0}")]
    Usage(String),
    /// An artefact that must not be used.
    #[error("{}: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    /// Stopped by a signal after writing a checkpoint: starting again resumes at the same step.
    #[error("stopped by a signal in phase {phase} at step {step}; start the same command again to resume")]
    Stopped { phase: String, step: u64 },
    /// Another rank of the world ended with this exit code and has said why.
    #[error("another rank ended with exit code {code}")]
    Elsewhere { code: u8 },
}

impl Failure {
    /// The process exit code, part of the program's interface.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            Failure::Damaged { .. } => 3,
            Failure::Stopped { .. } => 75,
            Failure::Elsewhere { code } => *code,
        }
    }

    /// Whether an error is an orderly stop after a signal.
    pub fn is_stop(error: &anyhow::Error) -> bool {
        exit_code(error) == 75
    }
}

/// The exit code of any error: that of the first [`Failure`] in its chain, else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(|e| e.downcast_ref::<Failure>()).map_or(1, Failure::exit_code)
}

/// Builds a [`Failure::Usage`] as an `anyhow::Error`.
#[macro_export]
macro_rules! usage {
    ($($arg:tt)*) => { ::anyhow::Error::new($crate::error::Failure::Usage(format!($($arg)*))) };
}

/// Returns early with a [`Failure::Usage`] unless the condition holds.
#[macro_export]
macro_rules! require {
    ($condition:expr, $($arg:tt)*) => { if $condition {} else { return Err($crate::usage!($($arg)*)); } };
}
