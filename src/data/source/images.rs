//! Images that are held in memory, decoded.

/// Images of one split, decoded, in memory.
#[derive(Debug)]
pub struct Images {
    /// Pixel bytes, image after image, each in planes (channel, row, column).
    pub pixels: Vec<u8>,
    pub labels: Vec<u32>,
    pub channels: usize,
    /// Height = width.
    pub size: usize,
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The bytes of one image.
    pub fn image(&self, index: usize) -> &[u8] {
        let bytes = self.channels * self.size * self.size;
        &self.pixels[index * bytes..(index + 1) * bytes]
    }

    /// Keeps these images.
    pub(super) fn select(&self, kept: &[u32]) -> Images {
        Images {
            pixels: kept.iter().flat_map(|&i| self.image(i as usize)).copied().collect(),
            labels: kept.iter().map(|&i| self.labels[i as usize]).collect(),
            ..*self
        }
    }
}
