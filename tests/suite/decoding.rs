//! Compares decoded files with the pixels that Pillow decodes (written by `tools/golden_transforms.py`), and decodes damaged files.

use crate::golden::{SAME, difference, golden};
use incubate::data::image::crop;
use incubate::data::image::decode::{Decoder, jpeg};
use incubate::data::image::pixels::{Region, View};
use incubate::data::source::folder::Folder;
use incubate::data::source::samples::{Samples, Stored};
use incubate::random::Random;
use safetensors::SafeTensors;

#[test]
fn every_kind_of_file_is_decoded_as_pillow_converts_it_to_rgb() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let mut decoder = Decoder::new().unwrap();
    let mut kinds = 0;
    for name in golden.names() {
        let Some(kind) = name.strip_prefix("file.") else { continue };
        let bytes = golden.tensor(name).unwrap().data();
        let reference = golden.tensor(&format!("decoded.{kind}")).unwrap();
        let (height, width) = decoder.open(bytes, Stored::Encoded).unwrap();
        assert_eq!([height, width], reference.shape()[..2], "{kind}");
        let view = decoder.view(bytes, Region { left: 0, top: 0, width, height }, 1).unwrap();
        let ours: Vec<u8> = view.bytes.chunks(view.channels).flat_map(|p| [p[0], p[1], p[2]]).collect();
        let d = difference(&ours, reference.data());
        // In 4:2:0 and 4:2:2, chroma may be rounded differently if Pillow has another release of libjpeg-turbo.
        assert!(d <= SAME, "{kind}: {d}");
        kinds += 1;
    }
    assert_eq!(kinds, 17);
}

#[test]
fn a_jpeg_that_is_called_png_is_read() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, kind) in [("1.png", "420.jpg"), ("2.jpg", "rgb.png")] {
        std::fs::write(folder.path().join(name), golden.tensor(&format!("file.{kind}")).unwrap().data()).unwrap();
    }
    let files = Folder::flat(folder.path()).unwrap();
    let (mut decoder, mut bytes) = (Decoder::new().unwrap(), Vec::new());
    for index in 0..2 {
        let stored = files.read(index, &mut bytes).unwrap();
        assert_eq!(decoder.open(&bytes, stored).unwrap(), (45, 61));
    }
}

#[test]
fn a_jpeg_without_its_end_is_refused_even_if_only_its_top_is_decoded() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let photo = golden.tensor("photo.jpg").unwrap().data();
    let mut decoder = Decoder::new().unwrap();
    let mut top = |bytes: &[u8]| {
        let (_, width) = decoder.open(bytes, Stored::Encoded)?;
        decoder.view(bytes, Region { left: 0, top: 0, width, height: 32 }, 1).map(|view| view.height)
    };
    assert_eq!(top(photo).unwrap(), 34);
    for length in [photo.len() - 1, photo.len() - 2, photo.len() / 2] {
        let error = top(&photo[..length]).unwrap_err().to_string();
        assert!(error.contains("not a whole JPEG"), "{length}: {error}");
    }
    // If an end marker comes too early, the missing pixels become gray, as in Pillow.
    let mut early = photo[..photo.len() / 2].to_vec();
    early.extend([0xFF, 0xD9]);
    assert_eq!(top(&early).unwrap(), 34);
    let (height, width) = decoder.open(&early, Stored::Encoded).unwrap();
    decoder.view(&early, Region { left: 0, top: 0, width, height }, 1).unwrap();
}

#[test]
fn a_progressive_jpeg_of_hundreds_of_scans_is_refused_soon() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let bytes = golden.tensor("file.progressive.jpg").unwrap().data();
    // Repeat the last scan.
    let scan = bytes.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap();
    let (head, last) = (&bytes[..scan], &bytes[scan..bytes.len() - 2]);
    let many = [head, &last.repeat(300), &[0xFF, 0xD9]].concat();
    let mut decoder = Decoder::new().unwrap();
    let (height, width) = decoder.open(&many, Stored::Encoded).unwrap();
    let error = decoder.view(&many, Region { left: 0, top: 0, width, height }, 1).unwrap_err().to_string();
    assert!(error.contains("scan"), "{error}");
}

#[test]
fn a_part_of_a_jpeg_has_the_pixels_of_the_whole() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let (mut one, mut other) = (Decoder::new().unwrap(), Decoder::new().unwrap());
    for kind in ["420.jpg", "444.jpg", "422.jpg", "progressive.jpg", "gray.jpg", "cmyk.jpg"] {
        let bytes = golden.tensor(&format!("file.{kind}")).unwrap().data();
        let (height, width) = one.open(bytes, Stored::Encoded).unwrap();
        other.open(bytes, Stored::Encoded).unwrap();
        for shrunk in [1, 2, 4] {
            let whole = one.view(bytes, Region { left: 0, top: 0, width, height }, shrunk).unwrap();
            let mut random = Random::new(&[1]);
            for _ in 0..50 {
                let region = crop::random_resized(&mut random, height, width, [0.05, 0.9], [0.5, 2.0]);
                let part = other.view(bytes, region, shrunk).unwrap();
                for row in region.top / shrunk..(region.top + region.height) / shrunk {
                    for column in region.left / shrunk..(region.left + region.width) / shrunk {
                        let at = |v: &View| {
                            let start = 4 * ((row - v.top) * v.width + column - v.left);
                            v.bytes[start..start + 3].to_vec()
                        };
                        assert_eq!(at(&part), at(&whole), "{kind} 1/{shrunk} {region:?} row {row} column {column}");
                    }
                }
            }
        }
    }
}

#[test]
fn damaged_empty_and_monstrous_files_are_refused() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let bytes = |kind: &str| golden.tensor(&format!("file.{kind}")).unwrap().data().to_vec();
    let fault = |bytes: &[u8]| {
        let mut decoder = Decoder::new().unwrap();
        let decoded = decoder.open(bytes, Stored::Encoded).and_then(|(height, width)| {
            decoder.view(bytes, Region { left: 0, top: 0, width, height }, 1).map(|view| view.width)
        });
        decoded.unwrap_err().to_string()
    };
    let (jpeg, png) = (bytes("420.jpg"), bytes("rgb.png"));
    assert!(fault(&[]).contains("empty"));
    assert!(fault(b"GIF89a").contains("neither a JPEG nor a PNG"));
    assert!(fault(&jpeg[..jpeg.len() / 2]).contains("not a whole JPEG"), "{}", fault(&jpeg[..jpeg.len() / 2]));
    assert!(fault(&png[..png.len() / 2]).contains("not a whole PNG"), "{}", fault(&png[..png.len() / 2]));
    // These small files claim 60,000 × 60,000 pixels. In the JPEG, the size follows the marker of the frame. In the PNG, it is at a
    // fixed offset and part of a checksum.
    let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    let mut bomb = jpeg.clone();
    bomb[frame + 5..frame + 9].copy_from_slice(&[0xEA, 0x60, 0xEA, 0x60]);
    assert!(fault(&bomb).contains("60000 × 60000"), "{}", fault(&bomb));
    let mut bomb = png.clone();
    bomb[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
    let mut crc = flate2::Crc::new();
    crc.update(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    assert!(fault(&bomb).contains("60000 × 60000"), "{}", fault(&bomb));
}

#[test]
fn a_jpeg_that_incubate_encodes_decodes_to_nearly_the_same_pixels() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let large = golden.tensor("large").unwrap();
    let (height, width) = (large.shape()[0], large.shape()[1]);
    let bytes = jpeg::encode(large.data(), height, width, 95).unwrap();
    let mut decoder = Decoder::new().unwrap();
    assert_eq!(decoder.open(&bytes, Stored::Encoded).unwrap(), (height, width));
    let view = decoder.view(&bytes, Region { left: 0, top: 0, width, height }, 1).unwrap();
    let ours: Vec<u8> = view.bytes.chunks(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
    assert!(difference(&ours, large.data()) < 8.0);
}

#[test]
fn the_tables_of_one_jpeg_do_not_reach_the_next() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let large = golden.tensor("large").unwrap();
    let (height, width) = (large.shape()[0], large.shape()[1]);
    let whole = jpeg::encode(large.data(), height, width, 50).unwrap();
    let others: Vec<&[u8]> = golden
        .names()
        .into_iter()
        .filter(|name| name.starts_with("file.") && name.ends_with(".jpg"))
        .map(|name| golden.tensor(name).unwrap().data())
        .collect();
    assert!(others.len() > 3);
    let mut decoder = Decoder::new().unwrap();
    let mut decoded = |bytes: &[u8]| -> anyhow::Result<Vec<u8>> {
        let (height, width) = decoder.open(bytes, Stored::Encoded)?;
        Ok(decoder.view(bytes, Region { left: 0, top: 0, width, height }, 1)?.bytes.to_vec())
    };
    let pixels = decoded(&whole).unwrap();
    // A frame of Motion JPEG leaves the standard's Huffman tables out. There are no standard tables of quantisation.
    let (motion, unquantised) = (without_segments(&whole, 0xC4), without_segments(&whole, 0xDB));
    assert!(motion.len() < whole.len() - 400 && unquantised.len() < whole.len() - 100);
    for other in others {
        decoded(other).unwrap();
        assert!(decoded(&motion).unwrap() == pixels);
        decoded(other).unwrap();
        let error = decoded(&unquantised).unwrap_err().to_string();
        assert!(error.contains("uantization table"), "{error}");
    }
}

/// The JPEG without the segments that have this marker.
fn without_segments(jpeg: &[u8], marker: u8) -> Vec<u8> {
    let (mut out, mut at) = (jpeg[..2].to_vec(), 2);
    while jpeg[at + 1] != 0xDA {
        let end = at + 2 + usize::from(u16::from_be_bytes([jpeg[at + 2], jpeg[at + 3]]));
        if jpeg[at + 1] != marker {
            out.extend(&jpeg[at..end]);
        }
        at = end;
    }
    out.extend(&jpeg[at..]);
    out
}
