//! Decides which image stands at each position of each step's global batch.
//!
//! Repeated augmentation follows DeiT's RASampler: it shuffles the images, repeats each image `repeats` times in a row, and keeps
//! as many samples as an epoch has. A step takes the next `global_batch` samples of the epoch. The even positions of the step's
//! batch get the first half of these samples, the odd positions the second half. So mixing partners (positions 2j and 2j + 1) are
//! different images if `repeats` is at most half the batch. Ranks and micro-batches divide the batch at even positions, so
//! partners stay together. No sample depends on the number of ranks or workers.

use crate::random::Random;

/// Decides the order of a phase's samples.
#[derive(Debug, Clone)]
pub struct Sampler {
    /// How many training images there are.
    pub images: usize,
    /// How many times in a row an epoch repeats an image.
    pub repeats: usize,
    pub global_batch: usize,
    pub steps_per_epoch: u64,
    pub seed: u64,
}

/// The order of an epoch's images.
#[derive(Debug)]
pub struct Epoch {
    /// The shuffled indexes of the images. Each index stands for `repeats` samples in a row.
    order: Vec<u32>,
    repeats: usize,
}

impl Sampler {
    /// Shuffles the images for an epoch.
    pub fn epoch(&self, epoch: u64) -> Epoch {
        let mut order: Vec<u32> = (0..self.images as u32).collect();
        Random::new(&[self.seed, ORDER_KEY, epoch]).shuffle(&mut order);
        Epoch { order, repeats: self.repeats }
    }

    /// The number, from 0, of the epoch's sample that stands at a position of a step's batch.
    fn number_in_epoch(&self, step: u64, position: usize) -> usize {
        let start_of_half = position % 2 * (self.global_batch / 2);
        (step % self.steps_per_epoch) as usize * self.global_batch + start_of_half + position / 2
    }

    /// The image at a position of a step's batch, and the key of the random numbers of its transform.
    pub fn sample(&self, epoch: &Epoch, step: u64, position: usize) -> (usize, [u64; 4]) {
        let number = self.number_in_epoch(step, position);
        let image = epoch.order[number / epoch.repeats % epoch.order.len()] as usize;
        (image, [self.seed, SAMPLE_KEY, step / self.steps_per_epoch, number as u64])
    }
}

/// Parts of random keys: `ORDER_KEY` for the shuffling of the images, `SAMPLE_KEY` for the transform of a sample. No other random
/// numbers of a phase use them.
const ORDER_KEY: u64 = 1;
const SAMPLE_KEY: u64 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn epoch_images(sampler: &Sampler, epoch: u64) -> Vec<usize> {
        let order = sampler.epoch(epoch);
        (0..sampler.steps_per_epoch)
            .flat_map(|step| (0..sampler.global_batch).map(move |position| (step, position)))
            .map(|(step, position)| sampler.sample(&order, epoch * sampler.steps_per_epoch + step, position).0)
            .collect()
    }

    #[test]
    fn without_repeats_an_epoch_shows_every_image_once() {
        let sampler = Sampler { images: 64, repeats: 1, global_batch: 16, steps_per_epoch: 4, seed: 3 };
        let mut first = epoch_images(&sampler, 0);
        assert_ne!(first, epoch_images(&sampler, 1));
        first.sort_unstable();
        assert_eq!(first, (0..64).collect::<Vec<_>>());
    }

    #[test]
    fn with_three_repeats_a_third_of_the_images_is_shown_thrice_and_never_mixed_with_itself() {
        let sampler = Sampler { images: 768, repeats: 3, global_batch: 64, steps_per_epoch: 12, seed: 3 };
        let images = epoch_images(&sampler, 0);
        let mut counts = HashMap::new();
        images.iter().for_each(|i| *counts.entry(i).or_insert(0) += 1);
        assert_eq!(counts.len(), 256);
        assert!(counts.values().all(|&n| n == 3));
        assert!(images.chunks(2).all(|pair| pair[0] != pair[1]));
    }
}
