//! One image as it is packed.

use super::Options;
use crate::data::image::shrink::{Image, Shrink};
use crate::data::source::samples::Split;
use anyhow::Result;

/// What reads and shrinks images, with its memory; each thread has its own.
pub struct Encoder {
    shrink: Shrink,
    stored: Vec<u8>,
}

impl Encoder {
    pub fn new() -> Result<Encoder> {
        Ok(Encoder { shrink: Shrink::new()?, stored: Vec::new() })
    }

    /// Reads an image of a split and makes what is stored of it.
    pub fn encode(&mut self, images: &Split, index: usize, options: &Options) -> Result<Image> {
        let stored = images.read(index, &mut self.stored)?;
        self.shrink.shrink(&self.stored, stored, options.form)
    }
}
