//! One image as it is packed.

use super::Options;
use crate::data::Images;
use crate::data::decode::{Decoder, jpeg};
use crate::data::pixels::{Pixels, Region};
use crate::data::resize::{Area, Order, Resample};
use crate::data::samples::{Split, Stored};
use crate::data::shard::Encoding;
use anyhow::Result;

/// What is stored of one image.
pub struct Image {
    pub bytes: Vec<u8>,
    pub height: usize,
    pub width: usize,
}

/// A decoder and resampler with their memory; each thread has its own.
pub struct Encoder {
    decoder: Decoder,
    resample: Resample,
    stored: Vec<u8>,
    pixels: Pixels,
}

impl Encoder {
    pub fn new() -> Result<Encoder> {
        let (resample, pixels) = (Resample::default(), Pixels::default());
        Ok(Encoder { decoder: Decoder::new()?, resample, stored: Vec::new(), pixels })
    }

    /// Reads an image, decodes it whole, so that a damaged one is found now, and shrinks it if it is too large. A JPEG that is
    /// small enough is kept as it is: encoding it again would only lose quality.
    pub fn encode(&mut self, images: &Split, index: usize, options: &Options) -> Result<Image> {
        let stored = match images {
            Split::Stored(samples) => samples.read(index, &mut self.stored)?,
            Split::Small(images) => rgb(images, index, &mut self.stored),
        };
        let (height, width) = self.decoder.open(&self.stored, stored)?;
        let whole = Region { left: 0, top: 0, width, height };
        let view = self.decoder.view(&self.stored, whole, 1)?;
        let (new_height, new_width) = bounded(height, width, options.size);
        let small_enough = (new_height, new_width) == (height, width);
        let is_jpeg = stored == Stored::Encoded && self.stored.starts_with(&[0xFF, 0xD8]);
        if small_enough && is_jpeg && options.encoding == Encoding::Jpeg {
            return Ok(Image { bytes: self.stored.clone(), height, width });
        }
        self.pixels.resize(new_height, new_width);
        let area = Area { left: 0.0, top: 0.0, width: width as f64, height: height as f64 };
        self.resample.resample(&view, area, whole, Order::ColumnsFirst, &mut self.pixels)?;
        let rgb: Vec<u8> = self.pixels.rgbx.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect();
        let bytes = match options.encoding {
            Encoding::Raw => rgb,
            Encoding::Jpeg => jpeg::encode(&rgb, new_height, new_width, options.quality)?,
        };
        Ok(Image { bytes, height: new_height, width: new_width })
    }
}

/// (height, width) with the shorter side at most `size` and the same proportions.
fn bounded(height: usize, width: usize, size: usize) -> (usize, usize) {
    let short = height.min(width);
    let scaled = |side: usize| (side * size + short / 2) / short;
    if short <= size { (height, width) } else { (scaled(height), scaled(width)) }
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
    fn the_shorter_side_is_bounded_and_the_proportions_stay() {
        assert_eq!(bounded(500, 375, 256), (341, 256));
        assert_eq!(bounded(1000, 1000, 256), (256, 256));
        assert_eq!(bounded(256, 9000, 256), (256, 9000));
        assert_eq!(bounded(512, 51200, 256), (256, 25600));
        assert_eq!(bounded(10, 20, 256), (10, 20));
    }

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
