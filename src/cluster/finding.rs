//! The result of a check of this machine.

use anyhow::Result;
use serde::Serialize;

/// The result of one check.
#[derive(Debug, Serialize)]
pub struct Finding {
    pub subject: &'static str,
    pub ok: bool,
    /// The finding in words. If it is not ok, the error of the check.
    pub text: String,
}

/// The finding of a check: its text, or its error.
pub fn finding(subject: &'static str, found: Result<String>) -> Finding {
    let ok = found.is_ok();
    Finding { subject, ok, text: found.unwrap_or_else(|error| format!("{error:#}")) }
}
