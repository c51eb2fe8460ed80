//! A square image on which operations are carried out as late as can be: tables of values are combined and applied with
//! whatever comes next, and so is the mirroring, which most operations commute with.

use super::operation::Operation;
use super::table::{self, Histogram, IDENTITY, Table};
use super::{affine, enhance};
use crate::data::image::pixels::{Pixel, Pixels};

/// An image of `size` × `size` with what is still to be done to it.
pub struct Canvas {
    pub pixels: Pixels,
    /// To be applied to every byte.
    pub table: Option<Box<Table>>,
    /// To be mirrored left to right.
    pub flipped: bool,
    /// What geometric operations leave uncovered.
    fill: Pixel,
    spare: Vec<Pixel>,
    scratch: affine::Scratch,
    /// Memory of a table that is not in use.
    kept: Option<Box<Table>>,
}

impl Canvas {
    /// Without an image; `fill` is the colour of what geometric operations leave uncovered.
    pub fn new(fill: Pixel) -> Canvas {
        Canvas {
            pixels: Pixels::default(),
            table: None,
            flipped: false,
            fill,
            spare: Vec::new(),
            scratch: affine::Scratch::default(),
            kept: None,
        }
    }

    /// Takes an empty image of `size` × `size`, to be written.
    pub fn begin(&mut self, size: usize) -> &mut Pixels {
        self.kept = self.table.take().or(self.kept.take());
        self.flipped = false;
        self.pixels.resize(size, size);
        &mut self.pixels
    }

    /// Carries an operation out, or notes it.
    pub fn apply(&mut self, operation: Operation) {
        use Operation::*;
        let (size, fill) = (self.pixels.width, self.fill);
        match operation {
            AutoContrast => self.note(table::auto_contrast(&self.histogram())),
            Equalize => self.note(table::equalize(&self.histogram())),
            Invert => self.note(table::uniform(|value| 255 - value)),
            Posterize(bits) if bits >= 8 => {}
            Posterize(bits) => self.note(table::uniform(|value| value & !((1 << (8 - bits)) - 1))),
            Solarize(from) => self.note(table::uniform(|value| if value < from { value } else { 255 - value })),
            SolarizeAdd(add) => {
                self.note(table::uniform(|value| if value < 128 { (value + add).min(255) } else { value }));
            }
            Brightness(factor) => self.note(table::blend_with(0, factor)),
            Contrast(factor) => {
                self.settle();
                self.note(table::blend_with(enhance::mean_gray(&self.pixels.rgbx), factor));
            }
            Color(factor) => {
                self.settle();
                enhance::color(&mut self.pixels.rgbx, factor as f32);
            }
            Sharpness(factor) => self.redraw(|from, to, _| enhance::sharpness(from, size, factor as f32, to)),
            ShearX(by) => {
                self.move_pixels(|from, to, s| affine::rows(from, size, |y| by * (y as f64 + 0.5), fill, to, s))
            }
            TranslateX(by) => {
                self.move_pixels(|from, to, s| affine::rows(from, size, |_| by * size as f64, fill, to, s))
            }
            ShearY(by) => {
                self.move_pixels(|from, to, s| affine::columns(from, size, |x| by * (x as f64 + 0.5), fill, to, s));
            }
            TranslateY(by) => self.move_pixels(|from, to, _| affine::up(from, size, by * size as f64, fill, to)),
            Rotate(degrees) => self.move_pixels(|from, to, s| affine::rotate(from, size, degrees, fill, to, s)),
        }
    }

    /// Combines a table with what is noted already.
    fn note(&mut self, after: Table) {
        let mut kept = self.kept.take();
        let table = self.table.get_or_insert_with(|| {
            let mut table = kept.take().unwrap_or_else(|| Box::new(IDENTITY));
            *table = IDENTITY;
            table
        });
        table::compose(table, &after);
        self.kept = kept;
    }

    fn histogram(&self) -> Histogram {
        let histogram = table::histogram(&self.pixels.rgbx);
        self.table.as_ref().map_or(histogram, |table| table::mapped(&histogram, table))
    }

    /// Applies the noted table.
    fn settle(&mut self) {
        let Some(table) = self.table.take() else { return };
        for pixel in &mut self.pixels.rgbx {
            let [r, g, b, _] = *pixel;
            *pixel = [table[0][r as usize], table[1][g as usize], table[2][b as usize], 255];
        }
        self.kept = Some(table);
    }

    /// As [`Canvas::redraw`], for what does not commute with mirroring.
    fn move_pixels(&mut self, draw: impl FnOnce(&[Pixel], &mut [Pixel], &mut affine::Scratch)) {
        if std::mem::take(&mut self.flipped) {
            let width = self.pixels.width;
            self.pixels.rgbx.chunks_exact_mut(width).for_each(<[_]>::reverse);
        }
        self.redraw(draw);
    }

    /// Draws the image anew from itself.
    fn redraw(&mut self, draw: impl FnOnce(&[Pixel], &mut [Pixel], &mut affine::Scratch)) {
        self.settle();
        self.spare.resize(self.pixels.rgbx.len(), [0; 4]);
        draw(&self.pixels.rgbx, &mut self.spare, &mut self.scratch);
        std::mem::swap(&mut self.pixels.rgbx, &mut self.spare);
    }
}
