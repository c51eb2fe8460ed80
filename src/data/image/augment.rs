//! The small-image DeiT recipe on one image: random crop with zero padding, horizontal flip, normalisation,
//! RandomErasing. Large images have [`super::recipe`].

use super::erase;
use crate::config::Config;
use crate::data::source::images::Images;
use crate::random::Random;

/// Turns bytes into normalised numbers, with or without augmentation.
#[derive(Debug, Clone)]
pub struct Transform {
    /// Per channel, the normalised value of each byte.
    table: Vec<[f32; 256]>,
    padding: usize,
    flip: f64,
    erase: f64,
}

impl Transform {
    /// The training transform of a config.
    pub fn training(config: &Config) -> Transform {
        let data = &config.data;
        // Images of more than 32 pixels that are all of the model's size are not cropped.
        let padding = if config.model.image_size() <= 32 { data.crop_padding } else { 0 };
        Transform { padding, flip: data.flip, erase: data.erase, ..Self::evaluation(config) }
    }

    /// Normalisation alone.
    pub fn evaluation(config: &Config) -> Transform {
        let scale = |(mean, std): (&f64, &f64)| std::array::from_fn(|byte| ((byte as f64 / 255.0 - mean) / std) as f32);
        let table = config.data.mean.iter().zip(&config.data.std).map(scale).collect();
        Transform { table, padding: 0, flip: 0.0, erase: 0.0 }
    }

    /// Writes one image (channel, row, column) into `out`. Everything random about it comes from `random`.
    pub fn apply(&self, images: &Images, index: usize, mut random: Random, out: &mut [f32]) {
        let size = images.size;
        let offset = |random: &mut Random| match self.padding {
            0 => 0,
            padding => random.below(2 * padding + 1) as isize - padding as isize,
        };
        let (down, right) = (offset(&mut random), offset(&mut random));
        let flipped = self.flip > 0.0 && random.uniform() < self.flip;
        let planes = images.image(index).chunks_exact(size * size).zip(out.chunks_exact_mut(size * size));
        for (table, (source, out)) in self.table.iter().zip(planes) {
            for (row, out) in out.chunks_exact_mut(size).enumerate() {
                let source_row = row as isize + down;
                if !(0..size as isize).contains(&source_row) {
                    out.fill(table[0]);
                    continue;
                }
                let source = &source[source_row as usize * size..][..size];
                for (column, out) in out.iter_mut().enumerate() {
                    let column = if flipped { size - 1 - column } else { column } as isize + right;
                    let byte = if (0..size as isize).contains(&column) { source[column as usize] } else { 0 };
                    *out = table[byte as usize];
                }
            }
        }
        if self.erase > 0.0
            && random.uniform() < self.erase
            && let Some(region) = erase::rectangle(size, &mut random)
        {
            erase::fill(out, size, region, |row| row.fill_with(|| random.normal() as f32));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transform(padding: usize, flip: f64, erase: f64) -> Transform {
        Transform { table: vec![std::array::from_fn(|b| b as f32)], padding, flip, erase }
    }

    fn apply(transform: &Transform, key: u64) -> Vec<f32> {
        let images = Images { pixels: (1..=64).collect(), labels: vec![0], channels: 1, size: 8 };
        let mut out = vec![f32::NAN; 64];
        transform.apply(&images, 0, Random::new(&[key]), &mut out);
        out
    }

    #[test]
    fn a_crop_shifts_the_image_by_at_most_the_padding_and_fills_with_zeros() {
        let mut shifts = std::collections::HashSet::new();
        for key in 0..500 {
            let out = apply(&transform(2, 0.0, 0.0), key);
            // Pixel (3, 3) stays inside for every shift of up to 2; its value tells the shift.
            let value = out[3 * 8 + 3] as i32 - 1;
            let (down, right) = (value / 8 - 3, value % 8 - 3);
            assert!(down.abs() <= 2 && right.abs() <= 2);
            for row in 0..8 {
                for column in 0..8 {
                    let (r, c) = (row + down, column + right);
                    let expected = if (0..8).contains(&r) && (0..8).contains(&c) { r * 8 + c + 1 } else { 0 };
                    assert_eq!(out[(row * 8 + column) as usize] as i32, expected);
                }
            }
            shifts.insert((down, right));
        }
        assert_eq!(shifts.len(), 25, "every shift occurs");
    }

    #[test]
    fn a_certain_flip_mirrors_each_row() {
        let out = apply(&transform(0, 1.0, 0.0), 0);
        assert_eq!(out[..8], [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]);
    }

    #[test]
    fn erasing_replaces_one_rectangle_of_the_stated_area() {
        let original = apply(&transform(0, 0.0, 0.0), 0);
        let mut areas = Vec::new();
        for key in 0..300 {
            let out = apply(&transform(0, 0.0, 1.0), key);
            let changed: Vec<usize> = (0..64).filter(|&i| out[i] != original[i]).collect();
            let (top, bottom) = (changed[0] / 8, changed[changed.len() - 1] / 8);
            let left = changed.iter().map(|i| i % 8).min().unwrap();
            let right = changed.iter().map(|i| i % 8).max().unwrap();
            assert_eq!(changed.len(), (bottom - top + 1) * (right - left + 1), "the change is a filled rectangle");
            areas.push(changed.len());
        }
        assert!(areas.iter().all(|&a| (1..=28).contains(&a)), "{areas:?}");
    }
}
