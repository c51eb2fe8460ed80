//! Heartbeats: `progress/{phase}.json`, a small file for each phase and for packing. While a phase trains, the first replica of its
//! group replaces the file at most twice a second. The command `status` and the progress bars read these files in the run
//! directory, so they need no connection to the nodes of the run.

use super::durable::unique;
use super::lease;
use super::process::{host, slurm_job, unix_time};
use super::run_dir::RunDir;
use crate::run::start::Start;
use crate::run::state::{Activity, Heartbeat};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A heartbeat: how far a phase is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub phase: String,
    pub state: Activity,
    /// The optimiser steps that are done.
    pub step: u64,
    /// All optimiser steps of the phase; 0 if its training has not begun.
    pub steps: u64,
    /// Training images per second of the whole group, measured over the steps that the last log line covers.
    pub images_per_s: f64,
    /// The mean loss of the same steps.
    pub loss: Option<f64>,
    /// Seconds spent on the phase, over all its starts.
    pub seconds: f64,
    /// The part of these seconds that was spent in steps whose results still count. It excludes start-up, evaluation, checkpoints,
    /// and steps that had to be repeated.
    #[serde(default)]
    pub useful_s: f64,
    /// How often the phase was restarted.
    #[serde(default)]
    pub restarts: u32,
    /// How many seconds the last checkpoint took.
    #[serde(default)]
    pub save_s: Option<f64>,
    /// Samples per forward pass of a replica. A later start with `run.micro_batch = "auto"` reuses this number.
    #[serde(default)]
    pub micro_batch: Option<usize>,
    /// The ID of the Slurm job that trains the phase, such as `17`, or `17_2` for a task of an array.
    #[serde(default)]
    pub job: Option<String>,
    /// The error with which the phase failed.
    #[serde(default)]
    pub error: Option<String>,
    /// Why the running phase cannot be saved at present, such as a full disk.
    #[serde(default)]
    pub trouble: Option<String>,
    /// The record of the newest start.
    #[serde(default)]
    pub start: Option<Start>,
    /// The number of replicas that train the phase.
    #[serde(alias = "ranks")]
    pub replicas: usize,
    pub host: String,
    pub pid: u32,
    /// Unix time of this heartbeat.
    pub updated: f64,
}

impl Progress {
    /// Replaces the heartbeat of the phase. The file is not synced, because a lost heartbeat costs nothing.
    pub fn write(&self, run: &Path) -> Result<()> {
        let path = run.join("progress").join(format!("{}.json", self.phase));
        let beside = path.with_extension(format!("{}.partial", unique()));
        let written = std::fs::write(&beside, serde_json::to_vec(self)?).and_then(|()| std::fs::rename(&beside, &path));
        if written.is_err() {
            // On a full disk, each heartbeat would otherwise leave a temporary file.
            let _ = std::fs::remove_file(&beside);
        }
        written.with_context(|| format!("cannot write {}", path.display()))
    }

    /// Marks a phase as failed, even if it had not begun.
    pub fn fail(run: &Path, phase: &str, error: &str) -> Result<()> {
        let began = Progress::read(run, phase).unwrap_or_else(|| Progress::begun(phase));
        let (host, pid, updated) = (host(), std::process::id(), unix_time());
        Progress { state: Activity::Failed, error: Some(error.into()), host, pid, updated, ..began }.write(run)
    }

    /// The first heartbeat of a phase that this process starts.
    pub fn begun(phase: &str) -> Progress {
        Progress {
            phase: phase.into(),
            state: Activity::Running,
            step: 0,
            steps: 0,
            images_per_s: 0.0,
            loss: None,
            seconds: 0.0,
            useful_s: 0.0,
            restarts: 0,
            save_s: None,
            micro_batch: None,
            job: slurm_job(),
            error: None,
            trouble: None,
            start: None,
            replicas: 1,
            host: host(),
            pid: std::process::id(),
            updated: unix_time(),
        }
    }

    /// The phase's last heartbeat; none if there is no readable file.
    pub fn read(run: &Path, phase: &str) -> Option<Progress> {
        let bytes = std::fs::read(run.join("progress").join(format!("{phase}.json"))).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// The evidence of this heartbeat about the state of its phase. A renewal of the lease is a sign of life too: during a long
    /// step or evaluation, only the thread that renews the lease gives signs of life.
    pub fn heartbeat(&self, run: &RunDir) -> Heartbeat {
        let since = |time: f64| (unix_time() - time).max(0.0);
        let renewed = lease::holder(run, &self.phase).map_or(f64::INFINITY, |holder| since(holder.renewed));
        Heartbeat { says: self.state, error: self.error.clone(), age: since(self.updated).min(renewed) }
    }

    /// Seconds until the phase ends at its last measured rate; none before a rate was measured.
    pub fn eta(&self, global_batch: usize) -> Option<f64> {
        let remaining = (self.steps - self.step.min(self.steps)) as f64 * global_batch as f64;
        (self.images_per_s > 0.0).then(|| remaining / self.images_per_s)
    }
}

/// A duration such as `1h02m` or `3m05s`, for people.
pub fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86400, s % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::lease::Lease;

    #[test]
    fn a_phase_in_a_long_evaluation_counts_as_running_while_its_lease_is_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir { path: folder.path().into() };
        ["leases", "progress"].iter().for_each(|name| std::fs::create_dir(run.file(name)).unwrap());
        Progress { updated: unix_time() - 120.0, ..Progress::begun("meta") }.write(&run.path).unwrap();
        let age = || Progress::read(&run.path, "meta").unwrap().heartbeat(&run).age;
        assert!(age() >= 120.0);
        let lease = Lease::take(&run, "meta", || false).unwrap();
        assert!(age() < 60.0);
        drop(lease);
        assert!(age() >= 120.0);
    }
}
