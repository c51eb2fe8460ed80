//! The record of one start of a phase: a line of the phase's ledger.

use super::state::Activity;
use crate::config::Precision;
use serde::{Deserialize, Serialize};

/// One start of a phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// The time at which the process began with the phase (RFC 3339), which also tells one start from another.
    pub began: String,
    /// How it ended; none if it was killed, or has not ended.
    pub end: Option<Activity>,
    /// MPI ranks of the whole world.
    pub ranks: usize,
    /// Replicas that trained the phase.
    pub replicas: usize,
    pub precision: Precision,
    /// The number of steps that were done before.
    pub from: u64,
    /// The number of steps that were done at its end.
    pub to: u64,
    /// Images that passed through the network in training.
    pub images: u64,
    pub flops: f64,
    pub seconds: f64,
    pub device_seconds: f64,
    /// The node of the process that wrote the record.
    pub host: String,
    /// The ID of the Slurm job.
    pub job: Option<String>,
    #[serde(default)]
    pub spent: Spent,
    #[serde(default)]
    pub peak: Peak,
}

/// Seconds of the first replica that did not go into its own computing. An earlier version recorded none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Spent {
    /// Waiting for the loader.
    pub data: f64,
    /// Summing the gradients over the replicas, which includes waiting for slower replicas. A GPU sums while the host goes on, so
    /// this is only the host's part.
    pub all_reduce: f64,
    pub evaluation: f64,
    /// Waiting for checkpoints. Most of the writing happens beside the training.
    pub checkpoints: f64,
}

/// The most memory that a start needed, in bytes; 0 if that is not known.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Peak {
    /// Resident memory of the first rank's process, with all its replicas and data workers.
    pub host: u64,
    /// Memory in use on the first replica's GPU, by all processes.
    pub gpu: u64,
}

impl Start {
    /// Counts the steps up to `step`, of `batch` images each, and the seconds.
    pub fn count(&mut self, step: u64, batch: usize, flops_per_image: f64, seconds: f64) {
        self.to = step;
        self.images = step.saturating_sub(self.from) * batch as u64;
        self.flops = self.images as f64 * flops_per_image;
        (self.seconds, self.device_seconds) = (seconds, seconds * self.replicas as f64);
    }
}
