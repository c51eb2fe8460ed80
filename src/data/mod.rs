//! Turns stored images into batches, in three folders. Each folder imports only from the folders before it:
//! 1. [`source`] gives the stored bytes of one labelled image at a time: a JPEG or PNG file, or uncompressed pixels.
//! 2. [`image`] decodes these bytes, and transforms the pixels into the network's input. Training and evaluation have different
//!    transforms.
//! 3. [`feed`] chooses the images of each step, reads them ahead on threads, and makes batches of tensors.

pub mod feed;
pub mod image;
pub mod source;

pub use source::bad_images::BadImages;
pub use source::files;
pub use source::{Source, data_set, format_of, open, open_read_only, open_unchecked, train_images};
