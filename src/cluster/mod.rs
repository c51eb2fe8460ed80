//! What a cluster's user asks from outside a job: submit it, see where it stands, know whether a node can do it.

pub mod doctor;
mod evidence;
mod gpus;
pub mod job;
pub mod queue;
mod sbatch;
pub mod script;
pub mod slurm;
pub mod status;
pub mod submit;
