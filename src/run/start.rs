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
    pub host: String,
    /// The ID of the Slurm job.
    pub job: Option<String>,
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
