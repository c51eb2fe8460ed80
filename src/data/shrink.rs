//! Images as `incubate pack` makes them by default, to measure with.

use super::decode::Decoder;
use super::pixels::{Pixels, Region};
use super::resize::{Order, Resample};
use super::samples::Stored;
use anyhow::Result;

pub const SHORT_SIDE: usize = 256;
pub const QUALITY: u8 = 90;

/// A decoder and resampler with their memory.
pub struct Shrink {
    decoder: Decoder,
    resample: Resample,
    pixels: Pixels,
}

impl Shrink {
    pub fn new() -> Result<Shrink> {
        Ok(Shrink { decoder: Decoder::new()?, resample: Resample::default(), pixels: Pixels::default() })
    }

    /// RGB bytes, height, width of an image whose shorter side is at most [`SHORT_SIDE`].
    pub fn shrink(&mut self, bytes: &[u8], stored: Stored) -> Result<(Vec<u8>, usize, usize)> {
        let (height, width) = self.decoder.open(bytes, stored)?;
        let whole = Region { left: 0, top: 0, width, height };
        let short = height.min(width);
        let scaled = |side: usize| if short > SHORT_SIDE { side * SHORT_SIDE / short } else { side };
        self.pixels.resize(scaled(height), scaled(width));
        let view = self.decoder.view(bytes, whole, 1)?;
        self.resample.resample(&view, whole.area(), whole, Order::ColumnsFirst, &mut self.pixels)?;
        let rgb = self.pixels.rgbx.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect();
        Ok((rgb, scaled(height), scaled(width)))
    }
}
