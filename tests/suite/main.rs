//! What users rely on. One binary, so that libtorch is linked once.

mod damage;
mod house;
mod incubate;
mod kills;
mod parity;
mod runs;
mod usage;
