//! Decodes label maps. A label map is a PNG with one label for each pixel. The labels are gray values of 8 bits, or palette indices
//! of any bit depth. A gray PNG of fewer bits is refused, because some programs scale its values to 0…255 and others do not.

use crate::data::image::pixels::check_size;
use anyhow::{Context, Result, anyhow, ensure};
use png::{ColorType, Transformations};
use std::io::{BufRead, Cursor, Seek};

/// The class of each pixel of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelMap {
    pub height: usize,
    pub width: usize,
    /// One class for each pixel, row after row. A pixel without a class has the value `IGNORED` (255).
    pub classes: Vec<u8>,
}

impl LabelMap {
    /// Decodes a PNG, and replaces each label with its class by `class_of`. `class_of` gives `IGNORED` for labels that mean «no
    /// class», and `None` for labels that the config does not allow.
    ///
    /// # Errors
    /// The PNG is damaged, is too large, is not a label map, or holds a label for which `class_of` gives `None`.
    pub fn decode(png: &[u8], class_of: impl Fn(u8) -> Option<u8>) -> Result<LabelMap> {
        let Labels { height, width, labels } = Labels::read(Cursor::new(png), check_size)?;
        let table: Vec<Option<u8>> = (0..=u8::MAX).map(class_of).collect();
        let class_at = |(pixel, &label): (usize, &u8)| {
            table[usize::from(label)].ok_or_else(|| {
                anyhow!(
                    "label {label} at row {}, column {} is no class; correct segmentation.classes, \
                     segmentation.reduce_zero_label or segmentation.ignore, or the map",
                    pixel / width,
                    pixel % width
                )
            })
        };
        let classes = labels.iter().enumerate().map(class_at).collect::<Result<_>>()?;
        Ok(LabelMap { height, width, classes })
    }
}

/// The labels of a label map, as they are stored in the PNG.
pub struct Labels {
    pub height: usize,
    pub width: usize,
    /// One label for each pixel, row after row.
    pub labels: Vec<u8>,
}

impl Labels {
    /// Reads a PNG. Before memory for the labels is allocated, `check` gets the height and width, and may refuse them.
    ///
    /// # Errors
    /// The PNG is damaged, is not a label map, or has a size that `check` refuses.
    pub fn read(png: impl BufRead + Seek, check: impl FnOnce(usize, usize) -> Result<()>) -> Result<Labels> {
        let broken = |e: png::DecodingError| anyhow!("not a readable PNG: {e}");
        let mut decoder = png::Decoder::new(png);
        // Without transformations, the decoder gives the palette's indices, not its colours.
        decoder.set_transformations(Transformations::IDENTITY);
        let mut reader = decoder.read_info().map_err(broken)?;
        let info = reader.info();
        let (width, height) = (info.width as usize, info.height as usize);
        check(height, width)?;
        let (color, bits) = (info.color_type, info.bit_depth as usize);
        ensure!(
            color == ColorType::Indexed || (color == ColorType::Grayscale && bits == 8),
            "it is {color:?} of {bits} bits; a label map has one channel of 8 bits, or a palette: store one label for each \
             pixel"
        );
        let mut packed = vec![0; reader.output_buffer_size().context("it does not fit into memory")?];
        let line_size = reader.next_frame(&mut packed).map_err(broken)?.line_size;
        let labels = if bits == 8 { packed } else { unpacked(&packed, line_size, width, bits) };
        Ok(Labels { height, width, labels })
    }
}

/// Unpacks numbers of `bits` bits each. Each line has `line_size` bytes and begins with `width` numbers. The first number of a byte
/// is in its highest bits.
fn unpacked(packed: &[u8], line_size: usize, width: usize, bits: usize) -> Vec<u8> {
    let per_byte = 8 / bits;
    let number = |line: &[u8], x: usize| {
        let shift = 8 - bits * (x % per_byte + 1);
        (line[x / per_byte] >> shift) & (u8::MAX >> (8 - bits))
    };
    packed.chunks_exact(line_size).flat_map(|line| (0..width).map(move |x| number(line, x))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use png::BitDepth;

    fn png(color: ColorType, depth: BitDepth, width: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, 2);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == ColorType::Indexed {
            encoder.set_palette(vec![7; 3 * 16]);
        }
        encoder.write_header().unwrap().write_image_data(data).unwrap();
        bytes
    }

    #[test]
    fn grey_values_and_palette_indices_are_labels() {
        let below_9 = |label: u8| (label < 9).then(|| label + 1);
        let grey = png(ColorType::Grayscale, BitDepth::Eight, 3, &[0, 1, 2, 3, 4, 8]);
        let map = LabelMap::decode(&grey, below_9).unwrap();
        assert_eq!((map.height, map.width, &map.classes[..]), (2, 3, &[1, 2, 3, 4, 5, 9][..]));
        let palette = png(ColorType::Indexed, BitDepth::Four, 3, &[0x12, 0x30, 0x45, 0x60]);
        assert_eq!(LabelMap::decode(&palette, Some).unwrap().classes, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn colours_few_bits_and_unknown_labels_are_refused_with_the_cure() {
        let fault = |png: &[u8]| LabelMap::decode(png, |label| (label < 5).then_some(label)).unwrap_err().to_string();
        let rgb = fault(&png(ColorType::Rgb, BitDepth::Eight, 1, &[0; 6]));
        assert!(rgb.contains("Rgb of 8 bits") && rgb.contains("store one label for each pixel"), "{rgb}");
        let few = fault(&png(ColorType::Grayscale, BitDepth::Four, 2, &[0; 2]));
        assert!(few.contains("Grayscale of 4 bits"), "{few}");
        let unknown = fault(&png(ColorType::Grayscale, BitDepth::Eight, 2, &[0, 1, 4, 5]));
        assert!(
            unknown.contains("label 5 at row 1, column 1") && unknown.contains("segmentation.classes"),
            "{unknown}"
        );
    }
}
