//! Bitmap pictures: photographs, which can be painted with masks of classes and have an SVG picture below them.

use super::png;

/// The pixels of a picture, row after row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    pub rgb: Vec<[u8; 3]>,
}

/// An object to mark in a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Marked<'a> {
    /// Left, top, width, height in pixels.
    pub bbox: [f64; 4],
    /// The run lengths of the object's mask, column after column. Runs outside and inside the object alternate, and the first run
    /// is outside. Empty if only the box is marked.
    pub runs: &'a [u32],
    pub colour: [u8; 3],
}

/// The thickness of the border of a marked box, in pixels.
const BORDER: usize = 2;
/// The width, in pixels, from which a drawn picture below a photograph is legible.
const LEGIBLE: usize = 480;

impl Picture {
    /// The picture enlarged by the smallest whole factor that makes it wide enough for a legible text below it.
    pub fn legible(&self) -> Picture {
        let times = LEGIBLE.div_ceil(self.width.max(1));
        let row = |row: &[[u8; 3]]| -> Vec<[u8; 3]> {
            row.iter().flat_map(|pixel| std::iter::repeat_n(*pixel, times)).collect()
        };
        let rows = self.rgb.chunks_exact(self.width).flat_map(|own| std::iter::repeat_n(row(own), times));
        Picture { width: self.width * times, height: self.height * times, rgb: rows.flatten().collect() }
    }

    /// The picture reduced by the whole factor `self.width` / `width`, rounded up, so that it is at most `width` pixels wide. Each
    /// pixel is the mean of a square block of pixels. Incomplete blocks at the right and bottom edges are left out, unless no block
    /// is complete.
    pub fn at_most(&self, width: usize) -> Picture {
        let by = self.width.div_ceil(width).max(1);
        let (width, height) = ((self.width / by).max(1), (self.height / by).max(1));
        let mean = |row: usize, column: usize| {
            let rows = row * by..((row + 1) * by).min(self.height);
            let of_row = |row: usize| &self.rgb[row * self.width..][column * by..((column + 1) * by).min(self.width)];
            let (mut sums, mut count) = ([0u32; 3], 0);
            for pixel in rows.flat_map(of_row) {
                sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += u32::from(*value));
                count += 1;
            }
            sums.map(|sum| (sum / count) as u8)
        };
        let rgb = (0..height).flat_map(|row| (0..width).map(move |column| (row, column)));
        Picture { width, height, rgb: rgb.map(|(row, column)| mean(row, column)).collect() }
    }

    /// The picture with each pixel mixed half and half with the colour of its class. A pixel whose class `is_bare` stays as it is.
    pub fn painted(&self, classes: &[u8], is_bare: impl Fn(u8) -> bool) -> Picture {
        let mix = |(pixel, &class): (&[u8; 3], &u8)| match is_bare(class) {
            true => *pixel,
            false => std::array::from_fn(|i| pixel[i].midpoint(colour(class)[i])),
        };
        Picture { rgb: self.rgb.iter().zip(classes).map(mix).collect(), ..*self }
    }

    /// The picture with all objects marked. The pixels of each object are mixed half and half with the object's colour, and the
    /// border of its box is drawn. Later objects lie over earlier objects.
    pub fn marked(&self, objects: &[Marked]) -> Picture {
        let mut picture = self.clone();
        for object in objects {
            picture.cover(object);
            picture.outline(object);
        }
        picture
    }

    fn cover(&mut self, object: &Marked) {
        let mut start = 0;
        for (number, &run) in object.runs.iter().enumerate() {
            let end = start + run as usize;
            if number % 2 == 1 {
                for pixel in start..end.min(self.width * self.height) {
                    let own = &mut self.rgb[pixel % self.height * self.width + pixel / self.height];
                    *own = std::array::from_fn(|i| own[i].midpoint(object.colour[i]));
                }
            }
            start = end;
        }
    }

    fn outline(&mut self, object: &Marked) {
        let [left, top, width, height] = object.bbox;
        let within = |at: f64, length: usize| (at.max(0.0).round() as usize).min(length);
        let (left, right) = (within(left, self.width), within(left + width, self.width));
        let (top, bottom) = (within(top, self.height), within(top + height, self.height));
        for row in top..bottom {
            let is_edge = row < top + BORDER || row + BORDER >= bottom;
            let at_sides =
                (left..right).filter(|&column| is_edge || column < left + BORDER || column + BORDER >= right);
            at_sides.for_each(|column| self.rgb[row * self.width + column] = object.colour);
        }
    }

    /// The picture with another picture of the same height to its right.
    pub fn beside(&self, other: &Picture) -> Picture {
        let rows = self.rgb.chunks_exact(self.width).zip(other.rgb.chunks_exact(other.width));
        let rgb = rows.flat_map(|(own, theirs)| [own, theirs].concat()).collect();
        Picture { width: self.width + other.width, height: self.height, rgb }
    }

    /// The picture with the drawn picture `svg` below it.
    pub fn above(&self, svg: &str) -> Picture {
        let rgb = [&self.rgb[..], &png::pixels(svg, self.width)].concat();
        Picture { width: self.width, height: rgb.len() / self.width, rgb }
    }

    /// The PNG of the picture.
    pub fn png(&self) -> Vec<u8> {
        png::encoded(&self.rgb, self.width)
    }
}

/// The colour of a class, by the rule of PASCAL VOC's label maps. The bits of the class's number become the highest bits of red,
/// green and blue in turn. The number of a class is its index plus 1, because the number 0 would give black, VOC's colour of the
/// background.
pub fn colour(class: u8) -> [u8; 3] {
    let number = u32::from(class) + 1;
    let bit = |channel: usize, shift: usize| ((number >> (3 * shift + channel) & 1) as u8) << (7 - shift);
    std::array::from_fn(|channel| (0..3).map(|shift| bit(channel, shift)).sum())
}

#[cfg(test)]
mod tests {
    use super::super::bars::Bars;
    use super::*;

    fn picture(width: usize, height: usize) -> Picture {
        let rgb = (0..width * height).map(|i| [i as u8, 2 * i as u8, 3]).collect();
        Picture { width, height, rgb }
    }

    #[test]
    fn classes_have_the_colours_of_pascal_voc() {
        let colours = [0, 1, 2, 3, 6, 7, 63].map(colour);
        let voc = [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 128, 128], [64, 0, 0], [32, 0, 0]];
        assert_eq!(colours, voc);
        let all: std::collections::BTreeSet<_> = (0..255).map(colour).collect();
        assert_eq!(all.len(), 255);
    }

    #[test]
    fn a_mask_covers_half_and_leaves_bare_pixels_and_parts_keep_their_places() {
        let photo = picture(3, 2);
        let painted = photo.painted(&[0, 255, 255, 255, 255, 1], |class| class == 255);
        assert_eq!(painted.rgb[0], [64, 0, 1]);
        assert_eq!(painted.rgb[5], [2, 69, 1]);
        assert_eq!(painted.rgb[1..5], photo.rgb[1..5]);
        let both = photo.beside(&painted);
        assert_eq!((both.width, both.height, both.rgb[3], both.rgb[8]), (6, 2, [64, 0, 1], [5, 10, 3]));
        let large = photo.legible();
        assert_eq!((large.width, large.height, large.rgb[159], large.rgb[160]), (480, 320, [0, 0, 3], [1, 2, 3]));
        let small = picture(4, 2).at_most(2);
        assert_eq!((small.width, small.height, small.rgb), (2, 1, vec![[2, 5, 3], [4, 9, 3]]));
    }

    #[test]
    fn a_marked_object_covers_its_pixels_by_columns_and_its_box_has_a_border() {
        let photo = Picture { width: 8, height: 7, rgb: vec![[0; 3]; 56] };
        let red = [200, 0, 0];
        // Three pixels of the fourth column.
        let object = Marked { bbox: [1.0, 0.0, 6.2, 6.0], runs: &[23, 3, 30], colour: red };
        let marked = photo.marked(std::slice::from_ref(&object));
        let at = |row: usize, column: usize| marked.rgb[row * 8 + column][0];
        assert_eq!([at(2, 3), at(3, 3), at(4, 3), at(3, 4)], [100, 100, 200, 0], "the border lies over the mask");
        assert_eq!([at(0, 1), at(5, 6), at(3, 1), at(3, 6)], [200; 4]);
        assert_eq!([at(6, 3), at(3, 0), at(3, 7)], [0; 3], "outside of the box");
        let beyond = Marked { bbox: [-5.0, -5.0, 100.0, 100.0], runs: &[0, 1000], colour: red };
        assert!(photo.marked(&[beyond]).rgb.iter().all(|pixel| pixel[0] >= 100));
    }

    #[test]
    fn a_picture_above_a_drawn_one_becomes_a_png_with_both() {
        let bars = Bars { title: "a title".into(), parts: Vec::new(), bars: Vec::new() };
        let photo = picture(3, 2).legible();
        let both = photo.above(&bars.svg());
        assert!(both.height > photo.height && both.rgb.len() == both.width * both.height);
        assert_eq!(both.rgb[..photo.rgb.len()], photo.rgb[..]);
        let below = &both.rgb[photo.rgb.len()..];
        assert!(below.contains(&[255; 3]) && below.iter().any(|pixel| pixel[0] < 100), "a title on white");
        assert!(both.png().starts_with(b"\x89PNG"));
    }
}
