//! Decodes stored bytes to the pixels that Pillow's `Image.open(…).convert("RGB")` gives. The first bytes of a file, not its name,
//! decide whether it is a JPEG or a PNG. Gray, CMYK, palette and 16-bit images become RGB. [`Decoder::view`] decodes only the
//! needed part of a JPEG.
//!
//! Only [`Decoder::open_upright`] applies an EXIF orientation. mmsegmentation and detectron2 apply the orientation too, but timm
//! does not.

pub mod jpeg;
pub mod label_map;
mod orientation;
mod png;

use super::pixels::{Pixels, Region, View, check_size};
use crate::data::source::samples::Stored;
use anyhow::{Result, bail, ensure};
use jpeg::Jpeg;
use orientation::Orientation;

/// Decodes images. Each thread has its own `Decoder`, because its memory is reused from image to image.
pub struct Decoder {
    jpeg: Jpeg,
    /// The pixels that were decoded last.
    pixels: Pixels,
    kind: Kind,
    /// Whether the opened image was turned upright.
    is_turned: bool,
}

/// The form in which the opened image is available.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The stored bytes are a JPEG. [`Decoder::view`] decodes the needed part of it.
    Jpeg,
    /// The whole image is already decoded into [`Decoder::pixels`].
    Whole,
    /// The stored bytes are rows of RGB bytes, and need no decoding.
    Raw { height: usize, width: usize },
}

impl Decoder {
    pub fn new() -> Result<Decoder> {
        Ok(Decoder {
            jpeg: Jpeg::new()?,
            pixels: Pixels::default(),
            kind: Kind::Raw { height: 0, width: 0 },
            is_turned: false,
        })
    }

    /// Opens an image, and returns its (height, width). A PNG and planes of bytes are decoded at once, a JPEG later. The other
    /// methods that take `bytes` must be given the same bytes.
    pub fn open(&mut self, bytes: &[u8], stored: Stored) -> Result<(usize, usize)> {
        self.pixels.free_if_huge();
        let (kind, size) = match stored {
            Stored::Raw { height, width } => {
                let promised = height.checked_mul(width).and_then(|n| n.checked_mul(3));
                ensure!(promised == Some(bytes.len()), "{} bytes are not {height}×{width} RGB pixels", bytes.len());
                (Kind::Raw { height, width }, (height, width))
            }
            Stored::Planes { channels, size } => {
                merge_planes(bytes, channels, size, &mut self.pixels)?;
                (Kind::Whole, (size, size))
            }
            Stored::Encoded if bytes.starts_with(&[0xFF, 0xD8]) => (Kind::Jpeg, self.jpeg.open(bytes)?),
            Stored::Encoded if bytes.starts_with(b"\x89PNG\r\n\x1a\n") => {
                png::decode(bytes, &mut self.pixels)?;
                (Kind::Whole, (self.pixels.height, self.pixels.width))
            }
            Stored::Encoded if bytes.is_empty() => bail!("the file is empty"),
            Stored::Encoded => {
                bail!("neither a JPEG nor a PNG: the file begins with {:02x?}", &bytes[..bytes.len().min(4)])
            }
        };
        (self.kind, self.is_turned) = (kind, false);
        check_size(size.0, size.1)?;
        Ok(size)
    }

    /// As [`Decoder::open`], but if a file has an EXIF orientation, decodes the image at once and turns it upright. Then returns
    /// the (height, width) of the upright image.
    pub fn open_upright(&mut self, bytes: &[u8], stored: Stored) -> Result<(usize, usize)> {
        let size = self.open(bytes, stored)?;
        let orientation = if stored == Stored::Encoded { Orientation::of(bytes) } else { None };
        let Some(orientation) = orientation else { return Ok(size) };
        self.keep_whole(bytes, size)?;
        self.pixels = orientation.upright(&self.pixels);
        self.is_turned = true;
        Ok((self.pixels.height, self.pixels.width))
    }

    /// Whether [`Decoder::open_upright`] has turned the opened image.
    pub fn is_turned(&self) -> bool {
        self.is_turned
    }

    /// If the opened image is a JPEG, decodes the whole image, so that later views need no decoding. (height, width) must be the
    /// size that [`Decoder::open`] or [`Decoder::open_upright`] returned.
    pub fn keep_whole(&mut self, bytes: &[u8], (height, width): (usize, usize)) -> Result<()> {
        if self.kind == Kind::Jpeg {
            self.jpeg.decode(bytes, Region { left: 0, top: 0, width, height }, 1, &mut self.pixels)?;
            self.kind = Kind::Whole;
        }
        Ok(())
    }

    /// Decodes at least `region` of the opened image. A JPEG is decoded at 1/`reduction` (1, 2, 4 or 8) of its height and width,
    /// unless [`Decoder::keep_whole`] or [`Decoder::open_upright`] has already decoded the whole image.
    pub fn view<'a>(&'a mut self, bytes: &'a [u8], region: Region, reduction: usize) -> Result<View<'a>> {
        if self.kind != Kind::Jpeg {
            return Ok(self.whole(bytes));
        }
        let (left, top) = self.jpeg.decode(bytes, region, reduction, &mut self.pixels)?;
        Ok(View { reduction, left, top, ..self.decoded() })
    }

    /// The whole opened image. If it is a JPEG, [`Decoder::keep_whole`] must have decoded it.
    pub fn whole<'a>(&'a self, bytes: &'a [u8]) -> View<'a> {
        match self.kind {
            Kind::Raw { height, width } => View { bytes, channels: 3, width, height, reduction: 1, left: 0, top: 0 },
            Kind::Whole => self.decoded(),
            Kind::Jpeg => unreachable!("the whole image is not decoded yet"),
        }
    }

    /// The pixels that were decoded last, as the view of a whole image.
    fn decoded(&self) -> View<'_> {
        let Pixels { width, height, rgbx } = &self.pixels;
        View { bytes: rgbx.as_flattened(), channels: 4, width: *width, height: *height, reduction: 1, left: 0, top: 0 }
    }
}

/// Converts planes of bytes to pixels. Each byte of a single plane becomes the red, green and blue of a pixel.
fn merge_planes(bytes: &[u8], channels: usize, size: usize, pixels: &mut Pixels) -> Result<()> {
    let plane = size * size;
    ensure!(
        [1, 3].contains(&channels) && bytes.len() == channels * plane,
        "{} bytes are not 1 or 3 planes of {size}×{size} bytes",
        bytes.len()
    );
    pixels.resize(size, size);
    let (red, green, blue) = match channels {
        1 => (bytes, bytes, bytes),
        _ => (&bytes[..plane], &bytes[plane..2 * plane], &bytes[2 * plane..]),
    };
    let colours = red.iter().zip(green).zip(blue);
    pixels.rgbx.iter_mut().zip(colours).for_each(|(pixel, ((&r, &g), &b))| *pixel = [r, g, b, 255]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gray_planes_become_rgb_and_colour_planes_are_interleaved() {
        let mut pixels = Pixels::default();
        merge_planes(&[1, 2, 3, 4], 1, 2, &mut pixels).unwrap();
        assert_eq!(pixels.rgbx, [1, 2, 3, 4].map(|gray| [gray, gray, gray, 255]));
        merge_planes(&(0..12).collect::<Vec<u8>>(), 3, 2, &mut pixels).unwrap();
        assert_eq!(pixels.rgbx, [[0, 4, 8, 255], [1, 5, 9, 255], [2, 6, 10, 255], [3, 7, 11, 255]]);
        assert!(merge_planes(&[0; 8], 2, 2, &mut pixels).is_err());
    }
}
