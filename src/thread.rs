//! Starts threads. A start fails if the process may have no more threads, or if there is no memory for another stack.

use crate::usage;
use anyhow::Result;
use std::error::Error;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

/// Starts a thread that runs `act`.
///
/// # Errors
/// A usage error if the thread cannot be started.
pub fn start<T: Send + 'static>(name: &str, act: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(act).map_err(|error| cannot_start(&error))
}

/// Starts a thread that runs `act` and ends within `scope`.
///
/// # Errors
/// A usage error if the thread cannot be started.
pub fn start_within<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    act: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    Builder::new().name(name.into()).spawn_scoped(scope, act).map_err(|error| cannot_start(&error))
}

/// The usage error of a thread that cannot be started.
pub fn cannot_start(error: &dyn Error) -> anyhow::Error {
    usage!("cannot start a thread: {error}; allow this process more threads (ulimit -u) or memory (ulimit -d, -v)")
}
