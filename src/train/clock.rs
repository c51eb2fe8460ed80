//! Counts the time of a rank. Every second counts for one of its phases, or for none if the rank was waiting for others.

use crate::store::process::process_age;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The time up to which a rank's time is counted. The time since then belongs to the next phase that begins.
pub struct Clock(Mutex<Instant>);

impl Clock {
    /// Starts at the start of this process, so that the first phase gets the time of loading.
    pub fn of_process() -> Clock {
        let now = Instant::now();
        Clock(Mutex::new(now.checked_sub(Duration::from_secs_f64(process_age())).unwrap_or(now)))
    }

    /// Counts the time up to now for no phase, because the rank has waited for others.
    pub fn skip(&self) {
        self.count_up_to(Instant::now());
    }

    /// Begins a phase and returns the time from which the phase counts.
    pub(super) fn begin(&self, now: Instant) -> Instant {
        std::mem::replace(&mut *self.0.lock().expect("no holder panics"), now)
    }

    pub(super) fn count_up_to(&self, time: Instant) {
        self.begin(time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_has_the_time_since_the_phase_before_it_without_the_time_of_waiting() {
        let clock = Clock::of_process();
        let first = Instant::now();
        assert!(clock.begin(first) <= first, "the first phase has the start of the process");
        let end = first + Duration::from_secs(5);
        clock.count_up_to(end);
        assert_eq!(clock.begin(end + Duration::from_secs(2)), end);
        clock.skip();
        assert!(clock.begin(Instant::now()) < end, "the time of waiting is nobody's");
    }
}
