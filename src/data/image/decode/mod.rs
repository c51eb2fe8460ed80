//! Stored bytes to pixels, as Pillow's `Image.open(…).convert("RGB")` gives them: JPEG and PNG are told apart by their
//! first bytes, whatever the file is called; gray, CMYK, palette and 16-bit images become RGB; an EXIF orientation is
//! not applied (timm does not either). A JPEG is decoded only where it is needed.

pub mod jpeg;
mod png;

use super::pixels::{Pixels, Region, View, check_size};
use crate::data::source::samples::Stored;
use anyhow::{Result, bail, ensure};
use jpeg::Jpeg;

/// The decoders with their memory; each thread has its own.
pub struct Decoder {
    jpeg: Jpeg,
    pixels: Pixels,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Jpeg,
    /// Decoded whole into `pixels`.
    Png,
    /// The stored bytes are rows of RGB bytes.
    Raw {
        height: usize,
        width: usize,
    },
}

impl Decoder {
    pub fn new() -> Result<Decoder> {
        Ok(Decoder { jpeg: Jpeg::new()?, pixels: Pixels::default(), kind: Kind::Raw { height: 0, width: 0 } })
    }

    /// Reads an image's size (height, width). The same bytes must then be given to [`Decoder::view`].
    pub fn open(&mut self, bytes: &[u8], stored: Stored) -> Result<(usize, usize)> {
        self.pixels.let_go();
        let (kind, size) = match stored {
            Stored::Raw { height, width } => {
                let promised = height.checked_mul(width).and_then(|n| n.checked_mul(3));
                ensure!(promised == Some(bytes.len()), "{} bytes are not {height}×{width} RGB pixels", bytes.len());
                (Kind::Raw { height, width }, (height, width))
            }
            Stored::Encoded if bytes.starts_with(&[0xFF, 0xD8]) => (Kind::Jpeg, self.jpeg.open(bytes)?),
            Stored::Encoded if bytes.starts_with(b"\x89PNG\r\n\x1a\n") => {
                png::decode(bytes, &mut self.pixels)?;
                (Kind::Png, (self.pixels.height, self.pixels.width))
            }
            Stored::Encoded if bytes.is_empty() => bail!("the file is empty"),
            Stored::Encoded => bail!("neither a JPEG nor a PNG (it begins with {:02x?})", &bytes[..bytes.len().min(4)]),
        };
        self.kind = kind;
        check_size(size.0, size.1)?;
        Ok(size)
    }

    /// Decodes at least `region` of the image just opened, at a `shrunk`th of its size if the format can (1, 2, 4, 8).
    pub fn view<'a>(&'a mut self, bytes: &'a [u8], region: Region, shrunk: usize) -> Result<View<'a>> {
        let whole = View { bytes, channels: 3, width: 0, height: 0, shrunk: 1, left: 0, top: 0 };
        match self.kind {
            Kind::Raw { height, width } => return Ok(View { width, height, ..whole }),
            Kind::Png => {}
            Kind::Jpeg => {
                let (left, top) = self.jpeg.decode(bytes, region, shrunk, &mut self.pixels)?;
                let Pixels { width, height, rgbx } = &self.pixels;
                let bytes = rgbx.as_flattened();
                return Ok(View { bytes, channels: 4, width: *width, height: *height, shrunk, left, top });
            }
        }
        let Pixels { width, height, rgbx } = &self.pixels;
        Ok(View { bytes: rgbx.as_flattened(), channels: 4, width: *width, height: *height, ..whole })
    }
}
