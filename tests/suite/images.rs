//! Image files that tests write.

use std::path::Path;

/// Writes a PNG file of 8 bits per channel, and its folder.
pub fn png(path: &Path, color: png::ColorType, [width, height]: [u32; 2], data: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), width, height);
    encoder.set_color(color);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header().unwrap().write_image_data(data).unwrap();
}
