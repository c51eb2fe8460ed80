//! Decoded images in memory.

/// An image of RGB bytes, row after row, each pixel padded to four bytes: then whole pixels are what vector units and
/// the loops over them move. The fourth byte means nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pixels {
    pub width: usize,
    pub height: usize,
    /// height · width pixels.
    pub rgbx: Vec<[u8; 4]>,
}

/// Pixels for which memory is kept: 64 MiB.
const KEPT: usize = 16 << 20;

impl Pixels {
    /// Takes a size; what the pixels hold is of no meaning. Allocates only to grow.
    pub fn resize(&mut self, height: usize, width: usize) {
        (self.height, self.width) = (height, width);
        self.rgbx.resize(height * width, [0; 4]);
    }

    /// Gives the memory of a huge image back: hardly any other needs it.
    pub fn let_go(&mut self) {
        if self.rgbx.capacity() > KEPT {
            *self = Pixels::default();
        }
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[[u8; 4]] {
        &self.rgbx[row * self.width..(row + 1) * self.width]
    }
}

/// Whole pixels of an image: columns from `left`, rows from `top`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    pub left: usize,
    pub top: usize,
    pub width: usize,
    pub height: usize,
}

impl Region {
    /// The same as fractions.
    pub fn area(self) -> super::resize::Area {
        let Region { left, top, width, height } = self;
        super::resize::Area { left: left as f64, top: top as f64, width: width as f64, height: height as f64 }
    }
}
