//! Decodes PNGs of every colour type and bit depth.

use crate::data::image::pixels::{Pixel, Pixels, check_size};
use anyhow::{Result, anyhow};
use png::{BitDepth, ColorType, Transformations};

/// Decodes a PNG to the RGB that Pillow gives. Alpha is dropped, not blended. Numbers of 16 bits keep their high byte, but 16-bit
/// gray without alpha is clipped at 255, because Pillow reads it as mode `I;16`.
pub fn decode(bytes: &[u8], out: &mut Pixels) -> Result<()> {
    let broken = |e: png::DecodingError| anyhow!("not a whole PNG: {e}");
    let mut decoder = png::Decoder::new(std::io::Cursor::new(bytes));
    let header = decoder.read_header_info().map_err(broken)?;
    check_size(header.height as usize, header.width as usize)?;
    let deep_gray = (header.color_type, header.bit_depth) == (ColorType::Grayscale, BitDepth::Sixteen);
    let transformations = Transformations::EXPAND | Transformations::STRIP_16;
    decoder.set_transformations(if deep_gray { Transformations::IDENTITY } else { transformations });
    let mut reader = decoder.read_info().map_err(broken)?;
    let size = reader.output_buffer_size().ok_or_else(|| anyhow!("the PNG does not fit into memory"))?;
    let mut buffer = vec![0; size];
    let info = reader.next_frame(&mut buffer).map_err(broken)?;
    out.resize(info.height as usize, info.width as usize);
    for (row, out) in buffer.chunks_exact(info.line_size).zip(out.rgbx.chunks_exact_mut(info.width as usize)) {
        match info.color_type {
            ColorType::Grayscale if deep_gray => fill(out, row, 2, |p| [if p[0] == 0 { p[1] } else { 255 }; 4]),
            ColorType::Grayscale => fill(out, row, 1, |p| [p[0]; 4]),
            ColorType::GrayscaleAlpha => fill(out, row, 2, |p| [p[0]; 4]),
            ColorType::Rgb => fill(out, row, 3, |p| [p[0], p[1], p[2], 255]),
            ColorType::Rgba => fill(out, row, 4, |p| [p[0], p[1], p[2], 255]),
            ColorType::Indexed => unreachable!("EXPAND turns a palette into colours"),
        }
    }
    Ok(())
}

/// Converts one row of `channels` bytes per pixel.
fn fill(out: &mut [Pixel], row: &[u8], channels: usize, pixel: impl Fn(&[u8]) -> Pixel) {
    out.iter_mut().zip(row.chunks_exact(channels)).for_each(|(out, bytes)| *out = pixel(bytes));
}
