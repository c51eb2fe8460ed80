//! The record of one start of a phase, which is a line of the phase's ledger. A phase starts again after each interruption.

use super::state::Activity;
use crate::config::Precision;
use serde::{Deserialize, Serialize};

/// One start of a phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// The time at which the process began with the phase (RFC 3339). It also identifies the start.
    pub began: String,
    /// How the start ended; none if it was killed or has not ended.
    pub end: Option<Activity>,
    /// The number of all MPI ranks.
    pub ranks: usize,
    /// The number of replicas that trained the phase.
    pub replicas: usize,
    pub precision: Precision,
    /// The number of steps that were done when this start began. Steps that the start has to repeat do not count.
    pub from: u64,
    /// The number of steps of the phase that were done at the end of this start.
    pub to: u64,
    /// Training images that passed through the network in this start.
    pub images: u64,
    /// Floating-point operations of training in this start.
    pub flops: f64,
    pub seconds: f64,
    /// Seconds times replicas.
    pub device_seconds: f64,
    /// The machine of the process that wrote the record.
    pub host: String,
    /// The ID of the Slurm job.
    pub job: Option<String>,
    #[serde(default)]
    pub spent: Spent,
    #[serde(default)]
    pub peak: Peak,
}

/// Seconds of a start that the first replica did not spend on its own training computation. All are 0 in records of earlier
/// versions.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Spent {
    /// Waiting for the loader.
    pub data: f64,
    /// Summing the gradients over the replicas, which includes waiting for slower replicas. A GPU sums while the host goes on, so
    /// on GPUs the figure contains only the host's part.
    pub all_reduce: f64,
    pub evaluation: f64,
    /// Waiting for checkpoints. Most of the writing happens in the background and does not count here.
    pub checkpoints: f64,
}

/// The memory that a start needed, in bytes; 0 if unknown.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Peak {
    /// The largest resident memory of the first rank's process, with all its replicas and data workers.
    pub host: u64,
    /// The memory in use on the first replica's GPU at the last heartbeat, by all processes.
    pub gpu: u64,
}

impl Start {
    /// Sets the figures of this start to those after `step`: each step since `from` had `batch` images, and the start took
    /// `seconds` so far.
    pub fn count(&mut self, step: u64, batch: usize, flops_per_image: f64, seconds: f64) {
        self.to = step;
        self.images = step.saturating_sub(self.from) * batch as u64;
        self.flops = self.images as f64 * flops_per_image;
        (self.seconds, self.device_seconds) = (seconds, seconds * self.replicas as f64);
    }
}
