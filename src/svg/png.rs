//! Turns drawn pictures into pixels, and pixels into PNGs.

use resvg::tiny_skia::{Color, IntSize, Pixmap, PremultipliedColorU8, Transform};
use resvg::usvg::{Options, Tree, fontdb::Database};
use std::sync::Arc;

/// Pixels for each unit of a picture.
const SCALE: f32 = 2.0;

/// The PNG of an SVG picture, on white. The font of the texts is part of the program, because a compute node may have no fonts.
pub fn png(svg: &str) -> Vec<u8> {
    drawn(svg, |_| SCALE).encode_png().expect("memory takes whatever is written")
}

/// The pixels of an SVG picture on white, scaled to rows of `width` pixels.
pub fn pixels(svg: &str, width: usize) -> Vec<[u8; 3]> {
    let drawn = drawn(svg, |units| width as f32 / units);
    let rows = drawn.pixels().chunks_exact(drawn.width() as usize);
    // Rounding may make the scaled picture one pixel too wide or too narrow.
    let row = |row: &[PremultipliedColorU8]| -> Vec<[u8; 3]> {
        let pixels = row.iter().map(|pixel| [pixel.red(), pixel.green(), pixel.blue()]);
        pixels.chain(std::iter::repeat([u8::MAX; 3])).take(width).collect()
    };
    rows.flat_map(row).collect()
}

/// The PNG of rows of `width` pixels.
pub fn encoded(rgb: &[[u8; 3]], width: usize) -> Vec<u8> {
    let bytes = rgb.iter().flat_map(|&[r, g, b]| [r, g, b, u8::MAX]).collect();
    let size = IntSize::from_wh(width as u32, (rgb.len() / width) as u32).expect("a picture has a size");
    let pixels = Pixmap::from_vec(bytes, size).expect("there are four bytes for each pixel");
    pixels.encode_png().expect("memory takes whatever is written")
}

/// The pixels of an SVG picture. `scale` gives the pixels for each unit, from the width of the picture in units.
fn drawn(svg: &str, scale: impl Fn(f32) -> f32) -> Pixmap {
    let mut fonts = Database::new();
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    let family = fonts.faces().next().map(|face| face.families[0].0.clone()).unwrap_or_default();
    fonts.set_sans_serif_family(family);
    let options = Options { fontdb: Arc::new(fonts), ..Options::default() };
    let tree = Tree::from_str(svg, &options).expect("the picture is SVG");
    let scale = scale(tree.size().width());
    let size = tree.size().to_int_size().scale_by(scale).expect("a picture has a size");
    let mut pixels = Pixmap::new(size.width(), size.height()).expect("a picture has a size");
    pixels.fill(Color::WHITE);
    resvg::render(&tree, Transform::from_scale(scale, scale), &mut pixels.as_mut());
    pixels
}
