//! The shapes in drawn images: discs and boxes, in the colour of their class.

use crate::random::Random;

/// A disc or a box, whose height and width may differ.
pub struct Shape {
    /// The class, from 1; 0 is the background.
    pub class: usize,
    pub is_disc: bool,
    /// Row and column of the centre, in pixels.
    pub centre: [f64; 2],
    /// Half the height and half the width, in pixels.
    pub radii: [f64; 2],
}

impl Shape {
    /// Draws a random shape, whose centre is in the image. `classes` is the number of classes, with the background.
    pub fn draw(random: &mut Random, [height, width]: [usize; 2], classes: usize) -> Shape {
        let smaller = height.min(width) as f64;
        Shape {
            class: 1 + random.below(classes - 1),
            is_disc: random.uniform() < 0.5,
            centre: [random.between(0.0, height as f64), random.between(0.0, width as f64)],
            radii: [random.between(0.15, 0.4) * smaller, random.between(0.15, 0.4) * smaller],
        }
    }

    /// Whether the centre of a pixel is within the shape.
    pub fn covers(&self, row: usize, column: usize) -> bool {
        let away = |at: usize, axis: usize| (at as f64 + 0.5 - self.centre[axis]).abs() / self.radii[axis];
        let (y, x) = (away(row, 0), away(column, 1));
        if self.is_disc { x * x + y * y < 1.0 } else { x.max(y) < 1.0 }
    }
}

/// The red, green and blue of a class, from 0 to 255. Classes with neighbouring numbers have clearly different colours.
pub fn colour(class: u8) -> [f64; 3] {
    let hue = f64::from(class) * 0.618_034 % 1.0 * std::f64::consts::TAU;
    let channel = |shift: f64| 128.0 + 90.0 * (hue + shift).cos();
    if class == 0 { [60.0; 3] } else { [channel(0.0), channel(2.1), channel(4.2)] }
}

/// Begins the stream of an image's random numbers, and draws its height and width: each from `side` to 1.5 · `side` pixels.
pub fn begin(key: [u64; 4], side: usize) -> (Random, [usize; 2]) {
    let mut random = Random::new(&key);
    let mut length = || side + random.below(side / 2 + 1);
    let size = [length(), length()];
    (random, size)
}

/// Replaces the content of `bytes` by the RGB bytes of an image whose pixels have these classes. Adds normal noise.
pub fn paint(classes: Vec<u8>, random: &mut Random, bytes: &mut Vec<u8>) {
    bytes.clear();
    for class in classes {
        let noise = 12.0 * random.normal();
        bytes.extend(colour(class).map(|level| (level + noise).clamp(0.0, 255.0) as u8));
    }
}
