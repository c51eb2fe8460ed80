//! What users rely on. One binary, so that libtorch is linked once.

mod cluster;
mod damage;
mod documents;
mod downstream;
mod drawn;
mod exports;
mod fuzz;
mod gpus;
mod house;
mod incubate;
mod kills;
mod leases;
mod pack;
mod parity;
mod phases;
mod precision;
mod replicas;
mod runs;
mod seen;
mod slurm;
mod stored;
mod transforms;
mod usage;
