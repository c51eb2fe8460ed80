//! Where and when this process runs.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970.
pub fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The name of this node.
pub fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or("?".into(), |name| name.trim().to_string())
}
