//! Images in, batches out, in three rooms: a room imports only from the ones before it.
//! 1. [`source`] gives stored images of a training and a test split, each with its label.
//! 2. [`image`] turns one stored image into normalised numbers, with or without augmentation.
//! 3. [`feed`] chooses the images of each step and hands out batches.

pub mod feed;
pub mod image;
pub mod source;

pub use source::bad_images::BadImages;
pub use source::{Source, format_of, open, open_read_only, open_unchecked, train_images};
