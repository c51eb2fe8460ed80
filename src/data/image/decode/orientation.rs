//! The orientation that a camera has written into a file's EXIF data (CIPA DC-008, tag 0x0112).

use crate::data::image::pixels::Pixels;
use exif::{In, Reader, Tag};
use std::io::Cursor;

/// How the stored rows and columns lie in the upright image, as a number from 2 to 8 of the EXIF standard. An image with the number
/// 1 is stored upright, and has no `Orientation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orientation(u32);

impl Orientation {
    /// The orientation of a JPEG or PNG. None if the file is stored upright, or if its EXIF data hold no readable orientation.
    pub fn of(file: &[u8]) -> Option<Orientation> {
        let mut reader = Reader::new();
        // Some cameras write malformed EXIF fields. A malformed field must not hide the orientation.
        reader.continue_on_error(true);
        let exif =
            reader.read_from_container(&mut Cursor::new(file)).or_else(|e| e.distill_partial_result(|_| ())).ok()?;
        let number = exif.get_field(Tag::Orientation, In::PRIMARY)?.value.get_uint(0)?;
        (2..=8).contains(&number).then_some(Orientation(number))
    }

    /// Turns stored pixels upright, as Pillow's `ImageOps.exif_transpose` does.
    pub fn upright(self, stored: &Pixels) -> Pixels {
        // From number 5 on, the stored rows become the columns of the upright image. Depending on the number, the stored rows, the
        // stored columns, both or neither are read in reverse order.
        let is_transposed = self.0 >= 5;
        let (rows_backwards, columns_backwards) = ([3, 4, 6, 7].contains(&self.0), [2, 3, 7, 8].contains(&self.0));
        let (height, width) = if is_transposed { (stored.width, stored.height) } else { (stored.height, stored.width) };
        let at = |row: usize, column: usize| {
            let (y, x) = if is_transposed { (column, row) } else { (row, column) };
            let y = if rows_backwards { stored.height - 1 - y } else { y };
            stored.row(y)[if columns_backwards { stored.width - 1 - x } else { x }]
        };
        let rgbx = (0..height).flat_map(|row| (0..width).map(move |column| (row, column)));
        Pixels { width, height, rgbx: rgbx.map(|(row, column)| at(row, column)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Decoder, jpeg};
    use crate::data::image::pixels::Region;
    use crate::data::source::samples::Stored;

    /// EXIF data that hold only an orientation.
    fn exif(orientation: u8) -> Vec<u8> {
        let entry = [0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0];
        [b"MM\0*\0\0\0\x08\0\x01".as_slice(), &entry, &[0; 4]].concat()
    }

    /// A PNG with two rows of three pixels. Their red values are 1, 2, 3 and 4, 5, 6.
    fn png(orientation: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut info = png::Info::with_size(3, 2);
        (info.color_type, info.bit_depth) = (png::ColorType::Rgb, png::BitDepth::Eight);
        info.exif_metadata = Some(exif(orientation).into());
        let mut writer = png::Encoder::with_info(&mut bytes, info).unwrap().write_header().unwrap();
        writer.write_image_data(&(1..=6).flat_map(|red| [red, 0, 0]).collect::<Vec<u8>>()).unwrap();
        writer.finish().unwrap();
        bytes
    }

    /// The height, width and red values of a file as the decoder gives them.
    fn seen(decoder: &mut Decoder, file: &[u8], upright: bool) -> (usize, usize, Vec<u8>) {
        let open = if upright { Decoder::open_upright } else { Decoder::open };
        let (height, width) = open(decoder, file, Stored::Encoded).unwrap();
        let view = decoder.view(file, Region { left: 0, top: 0, width, height }, 1).unwrap();
        (height, width, view.bytes.chunks(view.channels).map(|pixel| pixel[0]).collect())
    }

    #[test]
    fn the_eight_orientations_of_a_file_are_those_of_pillow() {
        let mut decoder = Decoder::new().unwrap();
        // The expected values are from `ImageOps.exif_transpose` of Pillow 13.
        for (orientation, (height, width, reds)) in [
            (1, (2, 3, [1, 2, 3, 4, 5, 6])),
            (2, (2, 3, [3, 2, 1, 6, 5, 4])),
            (3, (2, 3, [6, 5, 4, 3, 2, 1])),
            (4, (2, 3, [4, 5, 6, 1, 2, 3])),
            (5, (3, 2, [1, 4, 2, 5, 3, 6])),
            (6, (3, 2, [4, 1, 5, 2, 6, 3])),
            (7, (3, 2, [6, 3, 5, 2, 4, 1])),
            (8, (3, 2, [3, 6, 2, 5, 1, 4])),
        ] {
            let file = png(orientation);
            assert_eq!(seen(&mut decoder, &file, true), (height, width, reds.to_vec()), "orientation {orientation}");
            assert_eq!(
                seen(&mut decoder, &file, false),
                (2, 3, vec![1, 2, 3, 4, 5, 6]),
                "classes are of stored pixels"
            );
        }
        for unknown in [0, 9] {
            assert_eq!(seen(&mut decoder, &png(unknown), true), (2, 3, vec![1, 2, 3, 4, 5, 6]));
        }
    }

    #[test]
    fn a_jpeg_is_turned_whole_and_damaged_exif_data_turn_nothing() {
        let rgb: Vec<u8> =
            (0..40 * 24).flat_map(|pixel| [(pixel % 24 * 9) as u8, (pixel / 24 * 6) as u8, 40]).collect();
        let plain = jpeg::encode(&rgb, 40, 24, 90).unwrap();
        let with = |exif: &[u8]| {
            let length = (exif.len() as u16 + 8).to_be_bytes();
            [&plain[..2], &[0xFF, 0xE1], &length, b"Exif\0\0", exif, &plain[2..]].concat()
        };
        let mut decoder = Decoder::new().unwrap();
        let (height, width, stored) = seen(&mut decoder, &plain, true);
        assert_eq!((height, width), (40, 24));
        let (height, width, turned) = seen(&mut decoder, &with(&exif(6)), true);
        assert_eq!((height, width), (24, 40));
        assert!((0..24).all(|row| (0..40).all(|column| turned[row * 40 + column] == stored[(39 - column) * 24 + row])));
        for damaged in [&exif(6)[..13], b"MM", &[]] {
            assert_eq!(seen(&mut decoder, &with(damaged), true), (40, 24, stored.clone()), "{damaged:?}");
        }
    }
}
