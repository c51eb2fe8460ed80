//! Makes the images that `incubate pack` stores: JPEGs, or rows of RGB bytes. The shorter side of an image has an upper limit.

use super::decode::{Decoder, jpeg};
use super::pixels::{Pixels, Region};
use super::resize::{Order, Resample};
use crate::data::source::samples::Stored;
use crate::data::source::shard::Encoding;
use anyhow::Result;

/// The longest shorter side of a packed image by default, in pixels.
pub const SHORT_SIDE: u32 = 256;
/// The quality of the JPEGs that `incubate pack` encodes by default.
pub const QUALITY: u8 = 90;

/// An image in the form in which a pack stores it.
pub struct Image {
    pub bytes: Vec<u8>,
    pub height: usize,
    pub width: usize,
}

/// The form in which a pack stores images.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    pub encoding: Encoding,
    /// The longest allowed shorter side, in pixels.
    pub size: usize,
    /// The quality of JPEGs, 1 to 100.
    pub quality: u8,
}

/// Decodes and shrinks images. Each thread has its own `Shrink`, because its memory is reused from image to image.
pub struct Shrink {
    decoder: Decoder,
    resample: Resample,
    pixels: Pixels,
}

impl Form {
    /// The form that `incubate pack` uses by default, for a given encoding.
    pub fn usual(encoding: Encoding) -> Form {
        Form { encoding, size: SHORT_SIDE as usize, quality: QUALITY }
    }
}

impl Shrink {
    pub fn new() -> Result<Shrink> {
        Ok(Shrink { decoder: Decoder::new()?, resample: Resample::default(), pixels: Pixels::default() })
    }

    /// Shrinks an image if its shorter side is too long. Always decodes the whole image, so that damage is found now. In a pack of
    /// JPEGs, a JPEG that is small enough keeps its bytes, because encoding it a second time would only lose quality.
    pub fn shrink(&mut self, bytes: &[u8], stored: Stored, form: Form) -> Result<Image> {
        let (height, width) = self.decoder.open(bytes, stored)?;
        let whole = Region { left: 0, top: 0, width, height };
        let view = self.decoder.view(bytes, whole, 1)?;
        let (new_height, new_width) = bounded(height, width, form.size);
        let keeps_size = (new_height, new_width) == (height, width);
        let is_jpeg = stored == Stored::Encoded && bytes.starts_with(&[0xFF, 0xD8]);
        if keeps_size && is_jpeg && form.encoding == Encoding::Jpeg {
            return Ok(Image { bytes: bytes.to_vec(), height, width });
        }
        self.pixels.resize(new_height, new_width);
        self.resample.resample(&view, whole.area(), whole, Order::ColumnsFirst, &mut self.pixels)?;
        let rgb: Vec<u8> = self.pixels.rgbx.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect();
        let bytes = match form.encoding {
            Encoding::Raw => rgb,
            Encoding::Jpeg => jpeg::encode(&rgb, new_height, new_width, form.quality)?,
        };
        Ok(Image { bytes, height: new_height, width: new_width })
    }
}

/// The (height, width) of an image after its shorter side is shrunk to at most `size`. The ratio of the sides stays.
fn bounded(height: usize, width: usize, size: usize) -> (usize, usize) {
    let short = height.min(width);
    let scaled = |side: usize| (side * size + short / 2) / short;
    if short <= size { (height, width) } else { (scaled(height), scaled(width)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shorter_side_is_bounded_and_the_proportions_stay() {
        assert_eq!(bounded(500, 375, 256), (341, 256));
        assert_eq!(bounded(1000, 1000, 256), (256, 256));
        assert_eq!(bounded(256, 9000, 256), (256, 9000));
        assert_eq!(bounded(512, 51200, 256), (256, 25600));
        assert_eq!(bounded(10, 20, 256), (10, 20));
    }
}
