//! Draws images and writes them in the forms that sources read: JPEG and PNG files, image folders, tar shards.

use incubate::data::image::decode::jpeg;
use incubate::random::Random;
use std::ops::Range;
use std::path::Path;

/// Rows of RGB bytes: stripes at a random offset with noise. The class decides their direction, width and colour.
pub fn rgb(class: u64, number: u64, height: usize, width: usize) -> Vec<u8> {
    let mut random = Random::new(&[class, number]);
    let phase = random.between(0.0, std::f64::consts::TAU);
    let (angle, frequency) = ((class % 5) as f64 * 0.6, 4.0 + (class / 5) as f64 * 4.0);
    let mut bytes = Vec::with_capacity(3 * height * width);
    for row in 0..height {
        for column in 0..width {
            let (y, x) = (row as f64 / height as f64, column as f64 / width as f64);
            let wave = (frequency * (x * angle.cos() + y * angle.sin()) + phase).sin();
            for channel in 0..3 {
                let tint = if class % 3 == channel { 90.0 } else { 40.0 };
                bytes.push((120.0 + tint * wave + random.between(-20.0, 20.0)) as u8);
            }
        }
    }
    bytes
}

pub fn jpeg(class: u64, number: u64, height: usize, width: usize) -> Vec<u8> {
    jpeg::encode(&rgb(class, number, height, width), height, width, 90).unwrap()
}

pub fn png(class: u64, number: u64, height: usize, width: usize) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&rgb(class, number, height, width)).unwrap();
    file
}

/// The extension and the bytes of an image. The images have a few sizes. One in ten is a PNG, the others are JPEGs.
fn image(class: u64, number: u64) -> (&'static str, Vec<u8>) {
    let (height, width) = (40 + 8 * (number as usize % 3), 64 - 4 * (number as usize % 5));
    if number % 10 == 9 {
        ("png", png(class, number, height, width))
    } else {
        ("jpg", jpeg(class, number, height, width))
    }
}

/// Writes the images as `train/CLASS/…` and `val/CLASS/…`.
pub fn folder(root: &Path, classes: u64, train: u64, val: u64) {
    for (split, numbers) in [("train", 0..train), ("val", train..train + val)] {
        for class in 0..classes {
            let folder = root.join(split).join(format!("class-{class:02}"));
            std::fs::create_dir_all(&folder).unwrap();
            for number in numbers.clone() {
                let (extension, bytes) = image(class, number);
                std::fs::write(folder.join(format!("{number:04}.{extension}")), bytes).unwrap();
            }
        }
    }
}

/// Writes the same images as `train-….tar` and `val-….tar`, with a tar for each class.
pub fn tars(root: &Path, classes: u64, train: u64, val: u64) {
    for (split, numbers) in [("train", 0..train), ("val", train..train + val)] {
        for class in 0..classes {
            std::fs::write(root.join(format!("{split}-{class:03}.tar")), tar(class, numbers.clone())).unwrap();
        }
    }
}

/// A tar of the images of one class in webdataset's layout.
pub fn tar(class: u64, numbers: Range<u64>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for number in numbers {
        let (extension, bytes) = image(class, number);
        for (extension, bytes) in [(extension, bytes), ("cls", class.to_string().into_bytes())] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            let name = format!("class-{class:02}/{number:04}.{extension}");
            builder.append_data(&mut header, name, &bytes[..]).unwrap();
        }
    }
    builder.into_inner().unwrap()
}
