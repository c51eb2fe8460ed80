//! Bicubic resampling as Pillow's `Image.resize(…, BICUBIC)`: antialiased, a = −0.5, 8-bit between the passes.

use super::decode::View;
use super::pixels::{Pixels, Region};
use anyhow::Result;
use fast_image_resize::images::{CroppedImage, Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

/// A part of an image with fractional borders.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Area {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

/// A resampler with its memory.
#[derive(Default)]
pub struct Resample {
    resizer: Resizer,
    rgb: Vec<u8>,
}

impl Resample {
    /// Resamples `area` of the stored image to the size of `out`. Pixels outside `within` take no part: a crop's border
    /// is the image's end, as when Pillow crops and then resizes.
    pub fn resample(&mut self, view: &View, area: Area, within: Region, out: &mut Pixels) -> Result<()> {
        let scale = view.shrunk;
        let (left, top) = ((within.left / scale).max(view.left), (within.top / scale).max(view.top));
        let right = (within.left + within.width).div_ceil(scale).min(view.left + view.width);
        let bottom = (within.top + within.height).div_ceil(scale).min(view.top + view.height);
        let (width, height) = (right - left, bottom - top);
        let shrunk = |length: f64| length / scale as f64;
        let (x, y) = ((shrunk(area.left) - left as f64).max(0.0), (shrunk(area.top) - top as f64).max(0.0));
        let (w, h) = (shrunk(area.width).min(width as f64 - x), shrunk(area.height).min(height as f64 - y));
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom))
            .use_alpha(false)
            .crop(x, y, w, h);
        let kind = if view.channels == 4 { PixelType::U8x4 } else { PixelType::U8x3 };
        let image = ImageRef::new(view.width as u32, view.height as u32, view.bytes, kind)?;
        let (x, y) = ((left - view.left) as u32, (top - view.top) as u32);
        let part = CroppedImage::new(&image, x, y, width as u32, height as u32)?;
        let (out_width, out_height) = (out.width as u32, out.height as u32);
        if kind == PixelType::U8x4 {
            let mut to = Image::from_slice_u8(out_width, out_height, out.rgbx.as_flattened_mut(), kind)?;
            self.resizer.resize(&part, &mut to, &options)?;
        } else {
            self.rgb.resize(3 * out.rgbx.len(), 0);
            let mut to = Image::from_slice_u8(out_width, out_height, &mut self.rgb, kind)?;
            self.resizer.resize(&part, &mut to, &options)?;
            let pixels = self.rgb.as_chunks::<3>().0;
            out.rgbx.iter_mut().zip(pixels).for_each(|(out, &[r, g, b])| *out = [r, g, b, 255]);
        }
        Ok(())
    }
}
