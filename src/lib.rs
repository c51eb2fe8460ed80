//! Deep Incubation (arXiv 2212.04129) for clusters.

pub mod cli;
pub mod cluster;
pub mod collective;
pub mod config;
pub mod data;
pub mod error;
pub mod export;
pub mod model;
pub mod pipeline;
pub mod plan;
pub mod random;
pub mod store;
pub mod train;
pub mod weights;
