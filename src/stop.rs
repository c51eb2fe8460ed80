//! Whether a signal asked this process to stop.

use crate::error::Failure;
use anyhow::Result;
use std::sync::atomic::{AtomicBool, Ordering};

/// The flag that a signal handler sets to ask this process to stop. It is static because a signal handler gets no arguments, and
/// atomic because a handler may do little more than store to an atomic.
pub static STOP: AtomicBool = AtomicBool::new(false);

/// Whether a signal asked this process to stop.
pub fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Fails if a signal asked this process to stop, so that a long activity, such as "listing images", can end early.
///
/// # Errors
/// [`Failure::Interrupted`] after a signal.
pub fn check(activity: &str) -> Result<()> {
    if stop_requested() { Err(Failure::Interrupted { activity: activity.into() }.into()) } else { Ok(()) }
}
