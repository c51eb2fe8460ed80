//! Images with label maps that the program draws, for tests and first tries without a download. For a given config, the split and
//! the number of an image determine its pixels. Class 0 is the background. Every other class has a colour, which its discs and
//! boxes show. Discs and boxes may overlap.

use super::drawn_shapes::{self, Shape};
use super::samples::{Samples, Stored, StoredMap};
use crate::config::Config;
use crate::random::Random;
use anyhow::Result;

/// One split of drawn images.
#[derive(Debug)]
pub struct DrawnMaps {
    seed: u64,
    /// 1 for training, 2 for evaluation.
    split: u64,
    images: usize,
    /// The number of classes, including the background.
    classes: usize,
    /// The smallest height and width of an image, in pixels. The largest height and width are 1.5 times as large.
    side: usize,
}

/// Makes the training and the evaluation split. Each image is drawn when it is read.
pub fn draw(config: &Config) -> (DrawnMaps, DrawnMaps) {
    let keys = &config.segmentation;
    let split = |split: u64, images: usize| DrawnMaps {
        seed: config.run.seed,
        split,
        images,
        classes: keys.classes,
        side: keys.crop,
    };
    (split(1, keys.train_images), split(2, keys.test_images))
}

impl DrawnMaps {
    /// Seeds the random numbers of an image, and draws its height and width at random.
    fn begin(&self, index: usize) -> (Random, [usize; 2]) {
        drawn_shapes::begin([self.seed, DRAWN, self.split, index as u64], self.side)
    }

    /// Draws five shapes, and returns the class of each pixel, row after row. A later shape covers earlier shapes.
    fn classes_of(&self, random: &mut Random, [height, width]: [usize; 2]) -> Vec<u8> {
        let shapes: Vec<Shape> = (0..5).map(|_| Shape::draw(random, [height, width], self.classes)).collect();
        let class =
            |row, column| shapes.iter().rev().find(|shape| shape.covers(row, column)).map_or(0, |s| s.class as u8);
        (0..height).flat_map(|row| (0..width).map(move |column| (row, column))).map(|(r, c)| class(r, c)).collect()
    }
}

impl Samples for DrawnMaps {
    fn len(&self) -> usize {
        self.images
    }

    fn label(&self, _: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        format!("drawn image {index}")
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        let (mut random, [height, width]) = self.begin(index);
        let classes = self.classes_of(&mut random, [height, width]);
        drawn_shapes::paint(classes, &mut random, bytes);
        Ok(Stored::Raw { height, width })
    }

    fn map_name(&self, index: usize) -> String {
        format!("the label map of drawn image {index}")
    }

    fn read_map(&self, index: usize, bytes: &mut Vec<u8>) -> Result<StoredMap> {
        let (mut random, [height, width]) = self.begin(index);
        *bytes = self.classes_of(&mut random, [height, width]);
        Ok(StoredMap::Classes { height, width })
    }
}

/// The part of the random key that sets drawn images with label maps apart from other uses of the same seed.
const DRAWN: u64 = 0xD4A3;

#[cfg(test)]
mod tests {
    use super::drawn_shapes::colour;
    use super::*;

    #[test]
    fn an_image_and_its_map_have_one_size_and_the_colours_of_the_classes() {
        let split = DrawnMaps { seed: 1, split: 1, images: 8, classes: 4, side: 24 };
        let (mut pixels, mut map) = (Vec::new(), Vec::new());
        let mut seen = [false; 4];
        for index in 0..8 {
            let Stored::Raw { height, width } = split.read(index, &mut pixels).unwrap() else { unreachable!() };
            let StoredMap::Classes { height: rows, width: columns } = split.read_map(index, &mut map).unwrap() else {
                unreachable!()
            };
            assert_eq!((height, width, map.len()), (rows, columns, height * width));
            let near = |class: u8, pixel: &[u8]| {
                let distance = |(a, b): (f64, &u8)| (a - f64::from(*b)).abs();
                colour(class).into_iter().zip(pixel).map(distance).fold(0.0, f64::max) < 70.0
            };
            assert!(map.iter().zip(pixels.chunks(3)).all(|(&class, pixel)| near(class, pixel)));
            map.iter().for_each(|&class| seen[class as usize] = true);
        }
        assert_eq!(seen, [true; 4]);
    }
}
