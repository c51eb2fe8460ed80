//! A square image with deferred operations. Some operations map each byte to a new byte. One table collects these operations. The
//! table is applied before a later operation that needs the pixels, or by the normalisation. Mirroring is deferred too: a geometric
//! operation mirrors the image first, and the other operations commute with mirroring.

use super::operation::Operation;
use super::table::{self, Histogram, IDENTITY, Table};
use super::{affine, enhance};
use crate::data::image::pixels::{Pixel, Pixels};

/// A square image and the operations that are still to be applied.
pub struct Canvas {
    pub pixels: Pixels,
    /// The deferred table of new bytes, which is still to be applied to every byte. None if no table is deferred.
    pub table: Option<Box<Table>>,
    /// Whether each row is still to be reversed.
    pub flipped: bool,
    /// The colour of output pixels that a geometric operation takes from outside of the image.
    fill: Pixel,
    /// The memory into which the next operation draws its result.
    spare: Vec<Pixel>,
    scratch: affine::Scratch,
    /// Memory that the next deferred table reuses.
    spare_table: Option<Box<Table>>,
}

impl Canvas {
    /// A canvas without an image. `fill` is the colour of output pixels that a geometric operation takes from outside of the image.
    pub fn new(fill: Pixel) -> Canvas {
        Canvas {
            pixels: Pixels::default(),
            table: None,
            flipped: false,
            fill,
            spare: Vec::new(),
            scratch: affine::Scratch::default(),
            spare_table: None,
        }
    }

    /// Begins an image of `size` × `size` pixels, which the caller must write. Drops the deferred operations of the previous image.
    pub fn begin(&mut self, size: usize) -> &mut Pixels {
        self.spare_table = self.table.take().or(self.spare_table.take());
        self.flipped = false;
        self.pixels.resize(size, size);
        &mut self.pixels
    }

    /// Applies an operation now, or adds it to the deferred table.
    pub fn apply(&mut self, operation: Operation) {
        use Operation::*;
        let size = self.pixels.width as f64;
        match operation {
            AutoContrast => self.add_table(table::auto_contrast(&self.histogram())),
            Equalize => self.add_table(table::equalize(&self.histogram())),
            Invert => self.add_table(table::uniform(|value| 255 - value)),
            Posterize(bits) if bits >= 8 => {}
            Posterize(bits) => self.add_table(table::uniform(|value| value & !((1 << (8 - bits)) - 1))),
            Solarize(from) => self.add_table(table::uniform(|value| if value < from { value } else { 255 - value })),
            SolarizeAdd(add) => {
                self.add_table(table::uniform(|value| if value < 128 { (value + add).min(255) } else { value }));
            }
            Brightness(factor) => self.add_table(table::blend_with(0, factor)),
            Contrast(factor) => {
                self.apply_table();
                self.add_table(table::blend_with(enhance::mean_gray(&self.pixels.rgbx), factor));
            }
            Color(factor) => {
                self.apply_table();
                enhance::color(&mut self.pixels.rgbx, factor as f32);
            }
            Sharpness(factor) => {
                self.redraw(|drawing| enhance::sharpness(drawing.from, drawing.size, factor as f32, drawing.to))
            }
            ShearX(by) => self.move_pixels(|drawing| affine::shift_rows(drawing, |y| by * (y as f64 + 0.5))),
            TranslateX(by) => self.move_pixels(|drawing| affine::shift_rows(drawing, |_| by * size)),
            ShearY(by) => self.move_pixels(|drawing| affine::shift_columns(drawing, |x| by * (x as f64 + 0.5))),
            TranslateY(by) => self.move_pixels(|drawing| affine::shift_up(drawing, by * size)),
            Rotate(degrees) => self.move_pixels(|drawing| affine::rotate(drawing, degrees)),
        }
    }

    /// Defers a table. If another table is already deferred, the new table applies after it.
    fn add_table(&mut self, after: Table) {
        let mut spare_table = self.spare_table.take();
        let table = self.table.get_or_insert_with(|| {
            let mut table = spare_table.take().unwrap_or_else(|| Box::new(IDENTITY));
            *table = IDENTITY;
            table
        });
        table::compose(table, &after);
        self.spare_table = spare_table;
    }

    /// The histogram that the image would have if the deferred table were applied.
    fn histogram(&self) -> Histogram {
        let histogram = table::histogram(&self.pixels.rgbx);
        self.table.as_ref().map_or(histogram, |table| table::mapped(&histogram, table))
    }

    /// Applies the deferred table, if there is one.
    fn apply_table(&mut self) {
        let Some(table) = self.table.take() else { return };
        for pixel in &mut self.pixels.rgbx {
            let [r, g, b, _] = *pixel;
            *pixel = [table[0][r as usize], table[1][g as usize], table[2][b as usize], 255];
        }
        self.spare_table = Some(table);
    }

    /// Redraws the image by a geometric operation. Deferred mirroring is done first, because most geometric operations do not
    /// commute with mirroring.
    fn move_pixels(&mut self, draw: impl FnOnce(affine::Drawing)) {
        if std::mem::take(&mut self.flipped) {
            let width = self.pixels.width;
            self.pixels.rgbx.chunks_exact_mut(width).for_each(<[_]>::reverse);
        }
        self.redraw(draw);
    }

    /// Draws a new image from the present image, after applying the deferred table.
    fn redraw(&mut self, draw: impl FnOnce(affine::Drawing)) {
        self.apply_table();
        self.spare.resize(self.pixels.rgbx.len(), [0; 4]);
        draw(affine::Drawing {
            from: &self.pixels.rgbx,
            to: &mut self.spare,
            size: self.pixels.width,
            fill: self.fill,
            scratch: &mut self.scratch,
        });
        std::mem::swap(&mut self.pixels.rgbx, &mut self.spare);
    }
}
