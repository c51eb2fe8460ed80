//! The commands for clusters: submit a run, show its state, cancel its jobs, and check a node.

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
