//! Counts the time of a rank. Every second counts for one of the rank's phases. It counts for none if the rank waited for other
//! ranks or worked on another run of a study.

use crate::store::process::process_age;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Counts a rank's time.
pub struct Clock {
    /// The moment up to which the time is counted. The time since then belongs to the next phase that begins.
    counted_until: Mutex<Instant>,
}

impl Clock {
    /// The clock of this process. It starts at the start of the process, so the time of loading counts for the first phase.
    pub fn of_process() -> Clock {
        let now = Instant::now();
        let start = now.checked_sub(Duration::from_secs_f64(process_age())).unwrap_or(now);
        Clock { counted_until: Mutex::new(start) }
    }

    /// Counts the time up to now for no phase. The rank has waited for other ranks, or worked on another run.
    pub fn leave_uncounted(&self) {
        self.count_up_to(Instant::now());
    }

    /// Begins a phase and returns the moment from which time counts for the phase.
    pub(super) fn begin_phase(&self, now: Instant) -> Instant {
        std::mem::replace(&mut *self.counted_until.lock().expect("no holder panics"), now)
    }

    /// Marks the time up to `time` as counted.
    pub(super) fn count_up_to(&self, time: Instant) {
        self.begin_phase(time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_has_the_time_since_the_phase_before_it_without_the_time_of_waiting() {
        let clock = Clock::of_process();
        let first = Instant::now();
        assert!(clock.begin_phase(first) <= first, "the first phase has the start of the process");
        let end = first + Duration::from_secs(5);
        clock.count_up_to(end);
        assert_eq!(clock.begin_phase(end + Duration::from_secs(2)), end);
        clock.leave_uncounted();
        assert!(clock.begin_phase(Instant::now()) < end, "the time of waiting is nobody's");
    }
}
