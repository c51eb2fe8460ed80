//! Turns stored images into batches, in three rooms. Each imports only from the rooms before it:
//! 1. [`source`] holds labelled images: bytes of files, or planes of pixels in memory. It gives one image's bytes at a time.
//! 2. [`image`] turns an image's bytes into pixels, and the pixels into the network's input, by the recipe of training or of
//!    evaluation.
//! 3. [`feed`] decides the images of each step, reads them ahead in threads, and makes batches of tensors.

pub mod feed;
pub mod image;
pub mod source;

pub use source::bad_images::BadImages;
pub use source::files;
pub use source::{Source, data_set, format_of, open, open_read_only, open_unchecked, train_images};
