//! The commands that a user of a cluster gives outside a job: submit a run, look at its state, check a node.

pub mod doctor;
mod evidence;
mod finding;
mod gpus;
pub mod job;
pub mod queue;
mod sbatch;
pub mod script;
pub mod slurm;
pub mod status;
pub mod submit;
