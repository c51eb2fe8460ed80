//! What users rely on. One binary, so that libtorch is linked once.

mod cluster;
mod damage;
mod house;
mod incubate;
mod kills;
mod leases;
mod parity;
mod runs;
mod slurm;
mod usage;
