//! Draws images with classes, which have the size of the model's input, for tests and benchmarks without a download. For a given
//! config, the split and the number of an image determine its pixels. A class is one of five outlines with stripes of one
//! direction and frequency. The position and size of the outline, the phase of the stripes, the colour and the noise vary from
//! image to image.

use super::images::Images;
use crate::config::Config;
use crate::random::Random;

/// Draws the training and the evaluation split.
pub fn draw(config: &Config) -> (Images, Images) {
    let (model, data) = (&config.model, &config.data);
    let split = |number: u64, count: usize| {
        let mut images = Images {
            pixels: Vec::with_capacity(count * model.channels() * model.image_size().pow(2)),
            labels: (0..count).map(|i| (i % model.classes()) as u32).collect(),
            channels: model.channels(),
            size: model.image_size(),
        };
        for (index, &class) in images.labels.iter().enumerate() {
            let random = Random::new(&[config.run.seed, number, index as u64]);
            draw_one(&mut images.pixels, random, class as usize, images.channels, images.size);
        }
        images
    };
    (split(1, data.train_images), split(2, data.test_images))
}

/// Appends the bytes (channel, row, column) of one image to `pixels`.
fn draw_one(pixels: &mut Vec<u8>, mut random: Random, class: usize, channels: usize, size: usize) {
    let (x0, y0) = (random.between(-0.2, 0.2), random.between(-0.2, 0.2));
    let radius = random.between(0.45, 0.75);
    let (direction, frequency) = (class / 5 % 2, 2.0 + 2.0 * (class / 10) as f64);
    let phase = random.between(0.0, std::f64::consts::TAU);
    let tint: Vec<f64> = (0..channels).map(|_| random.between(0.6, 1.0)).collect();
    for tint in tint {
        for row in 0..size {
            for column in 0..size {
                // The centre of a row or column, from −1 to 1 across the image.
                let at = |i: usize| (2 * i + 1) as f64 / size as f64 - 1.0;
                let (x, y) = ((at(column) - x0) / radius, (at(row) - y0) / radius);
                let inside = match class % 5 {
                    0 => x * x + y * y < 1.0,
                    1 => x.abs().max(y.abs()) < 0.8,
                    2 => y < 0.7 && y > 2.0 * x.abs() - 1.0,
                    3 => x.abs().min(y.abs()) < 0.3 && x.abs().max(y.abs()) < 1.0,
                    _ => (0.35..1.0).contains(&(x * x + y * y)),
                };
                let along = if direction == 0 { x } else { y };
                let stripes = 0.75 + 0.25 * (frequency * 3.0 * along + phase).sin();
                let level = if inside { 200.0 * stripes * tint } else { 30.0 };
                pixels.push((level + 20.0 * random.normal()).clamp(0.0, 255.0) as u8);
            }
        }
    }
}
