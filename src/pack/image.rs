//! Encodes one image for a pack.

use super::Options;
use crate::data::image::shrink::{Image, Shrink};
use crate::data::source::samples::Split;
use anyhow::Result;

/// Reads, shrinks and encodes images. Each thread has an encoder of its own, which reuses its memory.
pub struct Encoder {
    shrink: Shrink,
    stored: Vec<u8>,
}

impl Encoder {
    pub fn new() -> Result<Encoder> {
        Ok(Encoder { shrink: Shrink::new()?, stored: Vec::new() })
    }

    /// Reads an image of a split and encodes it for the pack.
    pub fn encode(&mut self, images: &Split, index: usize, options: &Options) -> Result<Image> {
        let stored = images.read(index, &mut self.stored)?;
        self.shrink.shrink(&self.stored, stored, options.form)
    }
}
