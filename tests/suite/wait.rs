//! Waiting for other processes. The limit only ends a test that waits in vain: on a busy machine everything takes longer.

use std::time::{Duration, Instant};

pub const LIMIT: Duration = Duration::from_secs(300);

/// Waits until the condition holds, and panics with `what` if it never does.
#[track_caller]
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    assert!(holds_within(LIMIT, condition), "waited in vain for {what}");
}

/// Whether the condition comes to hold within the limit.
pub fn holds_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        let asked = Instant::now();
        if condition() {
            return true;
        }
        if began.elapsed() > limit {
            return false;
        }
        // A condition that starts a process takes at most half of a core.
        std::thread::sleep(asked.elapsed().max(Duration::from_millis(2)));
    }
}
