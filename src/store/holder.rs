//! The process that holds a lease: how it is identified, and whether it is known to be gone.

use super::process::{host, machine, process_start, slurm_job, unix_time};
use serde::{Deserialize, Serialize};

/// The process that holds a phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Holder {
    pub host: String,
    pub pid: u32,
    /// The start of the process, in clock ticks since boot, because the system may reuse a process ID.
    pub(super) started: u64,
    /// The boot and the namespace in which the process ID is valid ([`machine`]).
    pub(super) machine: String,
    /// The ID of the process's Slurm job.
    pub job: Option<String>,
    /// How often Slurm has restarted that job.
    pub(super) restarts: u64,
    /// Whether the process has given the phase back.
    pub(super) released: bool,
    /// The Unix time of the last renewal by the holder's clock. The status and `Lease::take_if_free` compare this time with the
    /// clock of their machine. A process that waits for the lease only looks whether this time changes, because clocks may differ.
    pub renewed: f64,
}

impl Holder {
    pub(super) fn this_process() -> Holder {
        let pid = std::process::id();
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
        Holder {
            host: host(),
            pid,
            started: process_start(pid).unwrap_or_default(),
            machine: machine(),
            job: slurm_job(),
            restarts: number("SLURM_RESTART_COUNT").unwrap_or(0),
            released: false,
            renewed: unix_time(),
        }
    }

    /// Whether this process may take the phase from `other` at once, without waiting until `other` has been silent for long.
    pub(super) fn may_follow(&self, other: &Holder) -> bool {
        let restarted = self.job.is_some() && self.job == other.job && self.restarts > other.restarts;
        let gone = self.machine == other.machine && process_start(other.pid) != Some(other.started);
        other.released || restarted || gone
    }

    /// The process in words, with its Slurm job.
    pub(super) fn name(&self) -> String {
        let job = self.job.as_ref().map_or(String::new(), |job| format!("job {job}, "));
        format!("{job}process {} on {}", self.pid, self.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_gone_from_this_machine_holds_nothing() {
        let this = Holder::this_process();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let started = process_start(child.id()).unwrap_or(1);
        child.wait().unwrap();
        let gone = Holder { pid: child.id(), started, ..this.clone() };
        assert!(this.may_follow(&gone) && !this.may_follow(&this));
        let elsewhere = Holder { machine: "another".into(), ..gone };
        assert!(!this.may_follow(&elsewhere), "only its silence shows that it is gone");
    }
}
