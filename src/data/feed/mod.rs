//! Which images a step gets, and how they are ready in time. Batches flow through here: worker threads read images ahead of
//! the step that takes them.

mod ahead;
mod batch_memory;
pub mod loader;
pub mod rate;
pub mod reader;
mod sampler;
pub mod test_batches;
