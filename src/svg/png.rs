//! Turns drawn pictures into pixels, and pixels into PNGs.

use super::picture::Picture;
use resvg::tiny_skia::{Color, IntSize, Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb::Database};
use std::sync::Arc;

/// Pixels for each unit of a picture.
const SCALE: f32 = 2.0;

/// The PNG of a picture of this module, on white. The font of the texts comes with the program, as a compute node may have none.
pub fn png(svg: &str) -> Vec<u8> {
    drawn(svg, |_| SCALE).encode_png().expect("memory takes whatever is written")
}

/// The pixels of a drawn picture on white, so many of them wide.
pub fn pixels(svg: &str, width: usize) -> Picture {
    let drawn = drawn(svg, |units| width as f32 / units);
    let (width, height) = (drawn.width() as usize, drawn.height() as usize);
    let rgb = drawn.pixels().iter().map(|pixel| [pixel.red(), pixel.green(), pixel.blue()]).collect();
    Picture { width, height, rgb }
}

/// The PNG of a picture of pixels.
pub fn encoded(picture: &Picture) -> Vec<u8> {
    let bytes = picture.rgb.iter().flat_map(|&[r, g, b]| [r, g, b, u8::MAX]).collect();
    let size = IntSize::from_wh(picture.width as u32, picture.height as u32).expect("a picture has a size");
    let pixels = Pixmap::from_vec(bytes, size).expect("there are four bytes for each pixel");
    pixels.encode_png().expect("memory takes whatever is written")
}

/// The pixels of a picture at the scale that belongs to its width.
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
