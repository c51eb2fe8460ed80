//! A split whose images are all decoded in memory. They are square and of one size.

use super::samples::{Samples, Stored};
use anyhow::Result;

/// The images of one split.
#[derive(Debug)]
pub struct Images {
    /// The pixel bytes, image after image. The bytes of an image are in the order (channel, row, column).
    pub pixels: Vec<u8>,
    pub labels: Vec<u32>,
    /// 1 (gray) or 3 (red, green, blue).
    pub channels: usize,
    /// Height = width, in pixels.
    pub size: usize,
}

impl Images {
    /// The bytes of one image.
    pub fn image(&self, index: usize) -> &[u8] {
        let bytes = self.channels * self.size * self.size;
        &self.pixels[index * bytes..(index + 1) * bytes]
    }
}

impl Samples for Images {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.labels[index]
    }

    fn name(&self, index: usize) -> String {
        format!("image {index}")
    }

    fn planes(&self) -> Option<(usize, usize)> {
        Some((self.channels, self.size))
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        bytes.clear();
        bytes.extend_from_slice(self.image(index));
        Ok(Stored::Planes { channels: self.channels, size: self.size })
    }
}
