//! Turns a picture into pixels.

use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb::Database};
use std::sync::Arc;

/// Pixels for each unit of a picture.
const SCALE: f32 = 2.0;

/// The PNG of a picture of this module, on white. The font of the texts comes with the program, as a compute node may have none.
pub fn png(svg: &str) -> Vec<u8> {
    let mut fonts = Database::new();
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    let family = fonts.faces().next().map(|face| face.families[0].0.clone()).unwrap_or_default();
    fonts.set_sans_serif_family(family);
    let options = Options { fontdb: Arc::new(fonts), ..Options::default() };
    let tree = Tree::from_str(svg, &options).expect("the picture is SVG");
    let size = tree.size().to_int_size().scale_by(SCALE).expect("a picture has a size");
    let mut pixels = Pixmap::new(size.width(), size.height()).expect("a picture has a size");
    pixels.fill(Color::WHITE);
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().expect("memory takes whatever is written")
}
