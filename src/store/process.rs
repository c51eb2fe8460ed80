//! The facts that a process records about itself: the time, its node, its Slurm job, its age, and the scope of its process ID.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970.
pub fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The name of this node.
pub fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map_or("?".into(), |name| name.trim().to_string())
}

/// The ID of this process's Slurm job: `17`, or `17_2` for a task of an array.
pub fn slurm_job() -> Option<String> {
    let variable = |name: &str| std::env::var(name).ok();
    match (variable("SLURM_ARRAY_JOB_ID"), variable("SLURM_ARRAY_TASK_ID")) {
        (Some(array), Some(task)) => Some(format!("{array}_{task}")),
        _ => variable("SLURM_JOB_ID"),
    }
}

/// The seconds since this process was started.
pub fn process_age() -> f64 {
    let uptime = fs::read_to_string("/proc/uptime").ok();
    let uptime: Option<f64> = uptime.and_then(|text| text.split(' ').next()?.parse().ok());
    // SAFETY: sysconf only reads a constant.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    let started = process_start(std::process::id()).map(|ticks| ticks as f64 / per_second);
    uptime.zip(started).map_or(0.0, |(now, started)| (now - started).max(0.0))
}

/// The clock ticks from boot to the start of a process (proc(5), `stat`, field 22); none if the process is gone or a zombie.
pub fn process_start(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the process is in parentheses and may contain spaces.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if state == "Z" { None } else { fields.nth(18)?.parse().ok() }
}

/// The boot ID of this machine and the PID namespace of this process. A process ID identifies a process only within both.
pub fn machine() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}
