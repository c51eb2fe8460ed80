//! Resizes images in two ways.
//! - [`Resample::resample`] works like Pillow's `Image.resize` with `BICUBIC` or `BILINEAR`, which are antialiased. The cubic has
//!   the parameter a = −0.5. One pass changes the width, and one pass the height. The result of the first pass is rounded to bytes.
//! - [`Resample::interpolate`] works like OpenCV's bilinear `resize(…, INTER_LINEAR)`, which is not antialiased.

use super::pixels::{Area, Pixels, Region, View};
use anyhow::Result;
use fast_image_resize::images::{CroppedImage, Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

/// The order of the two passes. The numbers between the passes are rounded and clipped to bytes. So the order changes about a fifth
/// of the result's bytes by 1, and bytes near black and white by more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// First along the columns, which changes the height. This is the faster order.
    ColumnsFirst,
    /// First along the rows, which changes the width. This is Pillow's order. One case differs: Pillow 13 and later versions take
    /// columns first if the height is reduced much more than the width.
    RowsFirst,
}

/// Resizes images, and reuses its memory from image to image.
pub struct Resample {
    /// The kernel of [`Resample::resample`].
    kernel: FilterType,
    resizer: Resizer,
    /// The image after the first pass, if rows come first.
    between: Vec<u8>,
    /// The result with three bytes per pixel. It is used only if the input has three bytes per pixel.
    rgb: Vec<u8>,
}

impl Default for Resample {
    /// Creates a `Resample` whose [`Resample::resample`] uses a bicubic kernel.
    fn default() -> Resample {
        Resample { kernel: FilterType::CatmullRom, resizer: Resizer::default(), between: Vec::new(), rgb: Vec::new() }
    }
}

impl Resample {
    /// Creates a `Resample` whose [`Resample::resample`] uses a bilinear kernel.
    pub fn bilinear() -> Resample {
        Resample { kernel: FilterType::Bilinear, ..Resample::default() }
    }

    /// Resamples `area` of the stored image to the size of `out`. Pixels outside of `within` are not read, as if the image were
    /// first cropped to `within`. Both rectangles are in pixels of the stored image, even if `view` shows the image at a reduced
    /// size. At a reduced size, `within` is rounded outwards to whole pixels of the view.
    pub fn resample(&mut self, view: &View, area: Area, within: Region, order: Order, out: &mut Pixels) -> Result<()> {
        let scale = view.reduction;
        let (left, top) = ((within.left / scale).max(view.left), (within.top / scale).max(view.top));
        let right = (within.left + within.width).div_ceil(scale).min(view.left + view.width);
        let bottom = (within.top + within.height).div_ceil(scale).min(view.top + view.height);
        let (width, height) = (right - left, bottom - top);
        let reduced = |length: f64| length / scale as f64;
        let (x, y) = ((reduced(area.left) - left as f64).max(0.0), (reduced(area.top) - top as f64).max(0.0));
        let (w, h) = (reduced(area.width).min(width as f64 - x), reduced(area.height).min(height as f64 - y));
        let (is_rgb, rgb_bytes) = (view.channels == 3, 3 * out.rgbx.len());
        let kind = if is_rgb { PixelType::U8x3 } else { PixelType::U8x4 };
        let image = ImageRef::new(view.width as u32, view.height as u32, view.bytes, kind)?;
        let (part_x, part_y) = ((left - view.left) as u32, (top - view.top) as u32);
        let part = CroppedImage::new(&image, part_x, part_y, width as u32, height as u32)?;
        let (out_width, out_height) = (out.width as u32, out.height as u32);
        self.rgb.resize(if is_rgb { rgb_bytes } else { 0 }, 0);
        let bytes = if is_rgb { &mut self.rgb[..] } else { out.rgbx.as_flattened_mut() };
        let mut to = Image::from_slice_u8(out_width, out_height, bytes, kind)?;
        let kernel = self.kernel;
        match order {
            Order::ColumnsFirst => self.resizer.resize(&part, &mut to, &convolution(kernel, [x, y, w, h]))?,
            Order::RowsFirst => {
                self.between.resize(view.channels * out.width * height, 0);
                let mut between = Image::from_slice_u8(out_width, height as u32, &mut self.between, kind)?;
                self.resizer.resize(&part, &mut between, &convolution(kernel, [x, 0.0, w, height as f64]))?;
                self.resizer.resize(&between, &mut to, &convolution(kernel, [0.0, y, out_width.into(), h]))?;
            }
        }
        if is_rgb {
            spread(&self.rgb, out);
        }
        Ok(())
    }

    /// Interpolates `area` of the stored image to the size of `out`. `view` must show the whole image at its full size.
    pub fn interpolate(&mut self, view: &View, area: Area, out: &mut Pixels) -> Result<()> {
        let (is_rgb, rgb_bytes) = (view.channels == 3, 3 * out.rgbx.len());
        let kind = if is_rgb { PixelType::U8x3 } else { PixelType::U8x4 };
        let image = ImageRef::new(view.width as u32, view.height as u32, view.bytes, kind)?;
        self.rgb.resize(if is_rgb { rgb_bytes } else { 0 }, 0);
        let (width, height) = (out.width as u32, out.height as u32);
        let bytes = if is_rgb { &mut self.rgb[..] } else { out.rgbx.as_flattened_mut() };
        let mut to = Image::from_slice_u8(width, height, bytes, kind)?;
        let algorithm = ResizeAlg::Interpolation(FilterType::Bilinear);
        let Area { left, top, width, height } = area;
        let options = ResizeOptions::new().resize_alg(algorithm).use_alpha(false).crop(left, top, width, height);
        self.resizer.resize(&image, &mut to, &options)?;
        if is_rgb {
            spread(&self.rgb, out);
        }
        Ok(())
    }
}

/// Copies pixels of three bytes to pixels of four bytes.
fn spread(rgb: &[u8], out: &mut Pixels) {
    let pixels = rgb.as_chunks::<3>().0;
    out.rgbx.iter_mut().zip(pixels).for_each(|(out, &[r, g, b])| *out = [r, g, b, 255]);
}

fn convolution(kernel: FilterType, [x, y, width, height]: [f64; 4]) -> ResizeOptions {
    let algorithm = ResizeAlg::Convolution(kernel);
    ResizeOptions::new().resize_alg(algorithm).use_alpha(false).crop(x, y, width, height)
}
