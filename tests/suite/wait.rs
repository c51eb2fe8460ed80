//! Waits for other processes. The limit is long, because everything takes longer on a busy machine. It only ends a test that waits in
//! vain.

use std::time::{Duration, Instant};

pub const LIMIT: Duration = Duration::from_secs(300);

/// Waits until the condition holds, and panics with `what` if it never does.
#[track_caller]
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    assert!(holds_within(LIMIT, condition), "waited in vain for {what}");
}

/// Waits until the condition holds, for at most `limit`, and returns whether it holds.
pub fn holds_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        let check_began = Instant::now();
        if condition() {
            return true;
        }
        if began.elapsed() > limit {
            return false;
        }
        // Sleep as long as the check took, so that a condition that starts a process takes at most half of a core.
        std::thread::sleep(check_began.elapsed().max(Duration::from_millis(2)));
    }
}
