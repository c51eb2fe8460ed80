//! One image as it is packed.

use super::Options;
use crate::data::image::shrink::{Image, Shrink};
use crate::data::source::images::Images;
use crate::data::source::samples::{Split, Stored};
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
        let stored = match images {
            Split::Stored(samples) => samples.read(index, &mut self.stored)?,
            Split::Small(images) => rgb(images, index, &mut self.stored),
        };
        self.shrink.shrink(&self.stored, stored, options.form)
    }
}

/// A small image's planes as rows of RGB; gray in all three.
fn rgb(images: &Images, index: usize, out: &mut Vec<u8>) -> Stored {
    let (image, plane) = (images.image(index), images.size * images.size);
    out.clear();
    out.extend((0..plane).flat_map(|at| [0, 1, 2].map(|channel| image[channel.min(images.channels - 1) * plane + at])));
    Stored::Raw { height: images.size, width: images.size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gray_planes_become_rgb_and_colour_planes_are_interleaved() {
        let gray = Images { pixels: vec![1, 2, 3, 4], labels: vec![0], channels: 1, size: 2 };
        let mut out = Vec::new();
        assert_eq!(rgb(&gray, 0, &mut out), Stored::Raw { height: 2, width: 2 });
        assert_eq!(out, [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]);
        let colour = Images { pixels: (0..12).collect(), labels: vec![0], channels: 3, size: 2 };
        rgb(&colour, 0, &mut out);
        assert_eq!(out, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]);
    }
}
