//! Decoded images in memory, and rectangles in them.

use anyhow::{Result, ensure};

/// Red, green, blue and an unused byte. The fourth byte lets vector instructions work on whole pixels.
pub type Pixel = [u8; 4];

/// A decoded image.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pixels {
    pub width: usize,
    pub height: usize,
    /// height · width pixels, row after row.
    pub rgbx: Vec<Pixel>,
}

/// Images with more pixels are refused. A JPEG or PNG is refused before memory for its pixels is allocated. Above this limit,
/// Pillow warns of a decompression bomb.
const MOST_PIXELS: usize = 89_478_485;

const BLACK: Pixel = [0, 0, 0, 255];

/// Memory of at most this many pixels (64 MiB) is kept for the next image.
const MOST_KEPT: usize = 16 << 20;

impl Pixels {
    /// Sets the size. The pixels may keep old values, so the caller must write all pixels. Memory is allocated only if the image
    /// outgrows it.
    pub fn resize(&mut self, height: usize, width: usize) {
        (self.height, self.width) = (height, width);
        self.rgbx.resize(height * width, [0; 4]);
    }

    /// If the memory exceeds `MOST_KEPT` pixels, frees it and leaves the image empty.
    pub fn free_if_huge(&mut self) {
        if self.rgbx.capacity() > MOST_KEPT {
            *self = Pixels::default();
        }
    }

    /// Copies the part of `image` that begins at row `top` and column `left`, and has the size of `self`. Pixels outside of `image`
    /// become black.
    pub fn copy_part(&mut self, image: &Pixels, (top, left): (isize, isize)) {
        let inside = |start: isize, length: usize, most: usize| {
            let first = (-start).clamp(0, length as isize) as usize;
            first..(most as isize - start).clamp(first as isize, length as isize) as usize
        };
        let (rows, columns) = (inside(top, self.height, image.height), inside(left, self.width, image.width));
        for (row, out) in self.rgbx.chunks_exact_mut(self.width).enumerate() {
            if rows.contains(&row) && !columns.is_empty() {
                let start = (columns.start as isize + left) as usize;
                let shown = &image.row((row as isize + top) as usize)[start..start + columns.len()];
                out[..columns.start].fill(BLACK);
                out[columns.clone()].copy_from_slice(shown);
                out[columns.end..].fill(BLACK);
            } else {
                out.fill(BLACK);
            }
        }
    }

    /// Copies the part of `image` that begins at row `top` and column `left`, and has the size of `self`. Pixels outside of `image`
    /// are mirrored about its first or last row and column, and these are not repeated. On each side, the part must extend beyond
    /// `image` by fewer rows or columns than `image` has.
    pub fn copy_mirrored_part(&mut self, image: &Pixels, (top, left): (isize, isize)) {
        let mirrored = |number: isize, count: usize| {
            let last = count as isize - 1;
            (last - (last - number.abs()).abs()) as usize
        };
        for (row, out) in self.rgbx.chunks_exact_mut(self.width).enumerate() {
            let shown = image.row(mirrored(row as isize + top, image.height));
            for (column, pixel) in out.iter_mut().enumerate() {
                *pixel = shown[mirrored(column as isize + left, image.width)];
            }
        }
    }

    /// The pixels of one row.
    pub fn row(&self, row: usize) -> &[Pixel] {
        &self.rgbx[row * self.width..(row + 1) * self.width]
    }
}

/// A rectangle of whole pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    pub left: usize,
    pub top: usize,
    pub width: usize,
    pub height: usize,
}

/// A rectangle whose borders may lie within pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Area {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

/// A decoded part of an image, possibly at a reduced size.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The pixels, row after row.
    pub bytes: &'a [u8],
    /// Bytes per pixel: 3 (RGB) or 4 ([`Pixel`]).
    pub channels: usize,
    pub width: usize,
    pub height: usize,
    /// The image was decoded at 1/`reduction` of its height and width: 1, 2, 4 or 8.
    pub reduction: usize,
    /// The part begins at column `left` and row `top` of the reduced image.
    pub left: usize,
    pub top: usize,
}

impl Region {
    /// This rectangle as an [`Area`].
    pub fn area(self) -> Area {
        let Region { left, top, width, height } = self;
        Area { left: left as f64, top: top as f64, width: width as f64, height: height as f64 }
    }
}

/// Refuses an image without pixels, or with more than `MOST_PIXELS`.
pub fn check_size(height: usize, width: usize) -> Result<()> {
    ensure!(height > 0 && width > 0, "it claims {width} × {height} pixels");
    let pixels = height.saturating_mul(width);
    ensure!(pixels <= MOST_PIXELS, "it claims {width} × {height} pixels, more than the limit of {MOST_PIXELS}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirrored_border_repeats_neither_the_first_nor_the_last_pixel() {
        let image = Pixels { width: 4, height: 3, rgbx: (0..12).map(|number| [number, 0, 0, 255]).collect() };
        let mut part = Pixels { width: 4, height: 4, rgbx: vec![[0; 4]; 16] };
        let mut reds = |start: (isize, isize)| -> Vec<u8> {
            part.copy_mirrored_part(&image, start);
            part.rgbx.iter().map(|pixel| pixel[0]).collect()
        };
        // The values of `torch.nn.functional.pad(…, mode="reflect")` for the rows 0…3, 4…7 and 8…11.
        assert_eq!(reds((-2, -2)), [10, 9, 8, 9, 6, 5, 4, 5, 2, 1, 0, 1, 6, 5, 4, 5]);
        assert_eq!(reds((1, 2)), [6, 7, 6, 5, 10, 11, 10, 9, 6, 7, 6, 5, 2, 3, 2, 1]);
        assert_eq!(reds((0, 0))[..8], [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
