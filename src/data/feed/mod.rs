//! Makes batches of images: [`loader`] for training, [`test_batches`] for evaluation. Worker threads read and transform the images
//! before they are needed.

mod ahead;
pub mod batch;
mod batch_memory;
pub mod images;
pub mod loader;
pub mod objects;
pub mod pairs;
pub mod reader;
mod sampler;
pub mod test_batches;
#[cfg(test)]
mod tests;
pub mod workers;

pub use workers::Feed;
