//! The files that outlive a process: the run directory, HDF5 artefacts and checkpoints, the record of the data, leases, metrics,
//! heartbeats, ledgers and previews.

pub mod artefact;
pub mod artefact_cache;
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
mod tensorboard;

pub use artefact::{Artefact, Header};
pub use artefact_cache::ArtefactCache;
pub use run_dir::RunDir;
