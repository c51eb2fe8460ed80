//! What a cluster's user asks from outside a job: submit it, see where it stands, know whether a node can do it.

pub mod doctor;
mod gpus;
pub mod queue;
pub mod slurm;
pub mod status;
pub mod submit;
