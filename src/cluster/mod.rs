//! What a cluster's user asks from outside a job: where a run stands, and whether a node can do it.

pub mod doctor;
pub mod status;
