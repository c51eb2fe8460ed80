//! Bicubic resampling as Pillow's `Image.resize(…, BICUBIC)`: antialiased, a = −0.5, 8-bit between the passes.

use super::pixels::{Area, Pixels, Region, View};
use anyhow::Result;
use fast_image_resize::images::{CroppedImage, Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

/// Which way an image is resampled first. In between numbers are rounded to bytes and cut off to 0…255, so that the order
/// shows, by 1 in a fifth of the bytes and by more beside black and white.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The faster.
    ColumnsFirst,
    /// Pillow's (from version 13 only where the height is not reduced much more than the width).
    RowsFirst,
}

/// A resampler with its memory.
#[derive(Default)]
pub struct Resample {
    resizer: Resizer,
    /// Resampled rows whose columns are not yet.
    between: Vec<u8>,
    rgb: Vec<u8>,
}

impl Resample {
    /// Resamples `area` of the stored image to the size of `out`. Pixels outside `within` take no part: a crop's border
    /// is the image's end, as when Pillow crops and then resizes.
    pub fn resample(&mut self, view: &View, area: Area, within: Region, order: Order, out: &mut Pixels) -> Result<()> {
        let scale = view.shrunk;
        let (left, top) = ((within.left / scale).max(view.left), (within.top / scale).max(view.top));
        let right = (within.left + within.width).div_ceil(scale).min(view.left + view.width);
        let bottom = (within.top + within.height).div_ceil(scale).min(view.top + view.height);
        let (width, height) = (right - left, bottom - top);
        let shrunk = |length: f64| length / scale as f64;
        let (x, y) = ((shrunk(area.left) - left as f64).max(0.0), (shrunk(area.top) - top as f64).max(0.0));
        let (w, h) = (shrunk(area.width).min(width as f64 - x), shrunk(area.height).min(height as f64 - y));
        let (is_rgb, size) = (view.channels == 3, 3 * out.rgbx.len());
        let kind = if is_rgb { PixelType::U8x3 } else { PixelType::U8x4 };
        let image = ImageRef::new(view.width as u32, view.height as u32, view.bytes, kind)?;
        let (part_x, part_y) = ((left - view.left) as u32, (top - view.top) as u32);
        let part = CroppedImage::new(&image, part_x, part_y, width as u32, height as u32)?;
        let (out_width, out_height) = (out.width as u32, out.height as u32);
        self.rgb.resize(if is_rgb { size } else { 0 }, 0);
        let bytes = if is_rgb { &mut self.rgb[..] } else { out.rgbx.as_flattened_mut() };
        let mut to = Image::from_slice_u8(out_width, out_height, bytes, kind)?;
        match order {
            Order::ColumnsFirst => self.resizer.resize(&part, &mut to, &bicubic(x, y, w, h))?,
            Order::RowsFirst => {
                self.between.resize(view.channels * out.width * height, 0);
                let mut between = Image::from_slice_u8(out_width, height as u32, &mut self.between, kind)?;
                self.resizer.resize(&part, &mut between, &bicubic(x, 0.0, w, height as f64))?;
                self.resizer.resize(&between, &mut to, &bicubic(0.0, y, out_width.into(), h))?;
            }
        }
        if is_rgb {
            let pixels = self.rgb.as_chunks::<3>().0;
            out.rgbx.iter_mut().zip(pixels).for_each(|(out, &[r, g, b])| *out = [r, g, b, 255]);
        }
        Ok(())
    }
}

fn bicubic(x: f64, y: f64, width: f64, height: f64) -> ResizeOptions {
    let algorithm = ResizeAlg::Convolution(FilterType::CatmullRom);
    ResizeOptions::new().resize_alg(algorithm).use_alpha(false).crop(x, y, width, height)
}
