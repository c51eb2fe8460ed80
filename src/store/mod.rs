//! The files that outlive a process: the run directory, HDF5 artefacts and checkpoints, the record of the data, leases, metrics,
//! heartbeats, ledgers and previews.

pub mod artefact;
mod checkpoints;
mod data;
pub mod durable;
pub mod full_disk;
mod holder;
pub mod lease;
pub mod ledger;
pub mod metrics;
pub mod previews;
pub mod process;
pub mod progress;
pub mod run_dir;
pub mod seen;
mod tensorboard;

pub use artefact::{Artefact, Header};
pub use run_dir::RunDir;
pub use seen::Seen;
