//! Images with annotated objects that the program draws, for tests and first tries without a download. For a given config, the
//! split and the number of an image determine its pixels and its objects. An object is a disc or a box in the colour of its class.
//! Objects may overlap, but at least half of each object stays visible. The outline of an object includes the part that other
//! objects cover.

use super::drawn_shapes::{self, Shape};
use super::samples::{Samples, Stored};
use crate::coco::objects::{Object, Outline, Scene};
use crate::coco::polygons;
use crate::config::Config;
use crate::random::Random;
use anyhow::Result;
use std::f64::consts::TAU;

/// One split of drawn images.
#[derive(Debug)]
pub struct DrawnObjects {
    seed: u64,
    /// 1 for training, 2 for evaluation.
    split: u64,
    images: usize,
    /// The names of the classes.
    classes: Vec<String>,
    /// Whether the objects have outlines.
    masks: bool,
    /// The smallest height and width of an image, in pixels. The largest height and width are 1.5 times as large.
    side: usize,
}

/// The largest number of objects in an image.
const MOST: usize = 5;
/// The outline of a disc is a polygon within the disc. It has this number of corners.
const CORNERS: usize = 32;

/// Makes the training and the evaluation split. Each image is drawn when it is read.
pub fn draw(config: &Config) -> (DrawnObjects, DrawnObjects) {
    let keys = &config.detection;
    let split = |split: u64, images: usize| DrawnObjects {
        seed: config.run.seed,
        split,
        images,
        classes: (0..keys.classes).map(|class| format!("colour {class}")).collect(),
        masks: keys.masks,
        side: keys.crop,
    };
    (split(1, keys.train_images), split(2, keys.test_images))
}

impl DrawnObjects {
    /// Draws the objects of an image. Returns the random numbers that follow the objects, the image's height and width, its
    /// objects, and the class of each pixel (from 1; 0 is the background).
    fn drawn(&self, index: usize) -> (Random, [usize; 2], Vec<Shape>, Vec<u8>) {
        let (mut random, size) = drawn_shapes::begin([self.seed, DRAWN, self.split, index as u64], self.side);
        let mut shapes: Vec<Shape> = Vec::new();
        // For each pixel, the number of the visible shape, from 1; 0 is the background.
        let mut seen = vec![0usize; size[0] * size[1]];
        // For each shape number, how many pixels the shape covered when it was drawn. Entry 0 is the background.
        let mut whole: Vec<usize> = vec![0];
        for _ in 0..MOST {
            let shape = Shape::draw(&mut random, size, self.classes.len() + 1);
            let covered: Vec<usize> = (0..seen.len()).filter(|at| shape.covers(at / size[1], at % size[1])).collect();
            // For each shape number, how many pixels of the shape stay visible if the new shape is drawn.
            let mut visible = vec![0; whole.len()];
            seen.iter().for_each(|&number| visible[number] += 1);
            covered.iter().for_each(|&at| visible[seen[at]] -= 1);
            let hides = (1..whole.len()).any(|number| 2 * visible[number] < whole[number]);
            if !hides && !covered.is_empty() {
                whole.push(covered.len());
                covered.iter().for_each(|&at| seen[at] = shapes.len() + 1);
                shapes.push(shape);
            }
        }
        let class = |number: usize| if number == 0 { 0 } else { shapes[number - 1].class as u8 };
        let classes = seen.into_iter().map(class).collect();
        (random, size, shapes, classes)
    }

    /// The annotated object of a shape. None if the shape's polygon is outside of the image.
    fn object(&self, shape: &Shape, [height, width]: [usize; 2]) -> Option<Object> {
        let corners = if shape.is_disc { CORNERS } else { 4 };
        let [down, right] = shape.radii;
        // The corners of a box are at the angles 45°, 135° and so on, at which the sine and cosine are ±1 / √2.
        let reach = if shape.is_disc { 1.0 } else { std::f64::consts::SQRT_2 };
        let corner = |number: usize| {
            let angle = TAU * (number as f64 + 0.5) / corners as f64;
            [shape.centre[1] + right * reach * angle.cos(), shape.centre[0] + down * reach * angle.sin()]
        };
        let polygon: Vec<f64> = (0..corners).flat_map(corner).collect();
        let (outline, [left, top, right, bottom]) =
            polygons::part(&[polygon], [0.0, 0.0, width as f64, height as f64])?;
        Some(Object {
            class: shape.class - 1,
            bbox: [left, top, right - left, bottom - top],
            area: polygons::area_of(&outline),
            is_crowd: false,
            outline: if self.masks { outline } else { Outline::None },
        })
    }
}

impl Samples for DrawnObjects {
    fn len(&self) -> usize {
        self.images
    }

    fn label(&self, _: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        format!("drawn image {index}")
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        let (mut random, [height, width], _, classes) = self.drawn(index);
        drawn_shapes::paint(classes, &mut random, bytes);
        Ok(Stored::Raw { height, width })
    }

    fn scene(&self, index: usize) -> Result<Scene> {
        let (_, size, shapes, _) = self.drawn(index);
        let objects = shapes.iter().filter_map(|shape| self.object(shape, size)).collect();
        Ok(Scene { image: index, size, objects })
    }
}

/// The part of the random key that sets drawn images with objects apart from other uses of the same seed.
const DRAWN: u64 = 0xD0B7;

#[cfg(test)]
mod tests {
    use super::drawn_shapes::colour;
    use super::*;

    #[test]
    fn objects_have_the_colour_of_their_class_inside_their_boxes_and_half_of_each_is_seen() {
        let config = ["detection.format=shapes", "detection.train_images=20", "detection.test_images=1"]
            .into_iter()
            .chain(["detection.classes=3", "detection.crop=64", "detection.window=0"])
            .map(str::to_string)
            .collect::<Vec<_>>();
        let (split, _) = draw(&Config::parse("", &config).unwrap());
        let (mut bytes, mut seen, mut most) = (Vec::new(), [false; 3], 0);
        for index in 0..20 {
            let Stored::Raw { height, width } = split.read(index, &mut bytes).unwrap() else { unreachable!() };
            let scene = split.scene(index).unwrap();
            assert_eq!(scene.size, [height, width]);
            assert!((64..=96).contains(&height) && (64..=96).contains(&width) && !scene.objects.is_empty());
            most = most.max(scene.objects.len());
            for Object { class, bbox: [x, y, w, h], area, outline, .. } in scene.objects {
                assert!(x >= 0.0 && y >= 0.0 && x + w <= width as f64 && y + h <= height as f64 && area > 0.5 * w * h);
                let is_seen = |&(row, column): &(usize, usize)| {
                    let pixel = &bytes[3 * (row * width + column)..][..3];
                    let distance = |(level, &byte): (f64, &u8)| (level - f64::from(byte)).abs();
                    colour(class as u8 + 1).into_iter().zip(pixel).map(distance).fold(0.0, f64::max) < 70.0
                };
                let (rows, columns) = (y as usize..(y + h) as usize, x as usize..(x + w) as usize);
                let inside = rows.flat_map(|row| columns.clone().map(move |column| (row, column)));
                let own = inside.filter(is_seen).count() as f64;
                assert!(own > 0.35 * area, "{own} of {area}");
                let Outline::Polygons(polygons) = outline else { unreachable!() };
                assert_eq!(polygons.len(), 1);
                seen[class] = true;
            }
        }
        assert!(seen == [true; 3] && most > 2);
    }
}
