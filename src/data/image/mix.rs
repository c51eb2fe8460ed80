//! Mixup, CutMix and smoothed targets (timm 1.0: `mixup.py`, mode `batch`). The images at the positions 2j and 2j + 1 of a batch
//! are partners: they are mixed with each other. λ and CutMix's box are drawn once for each block of [`BLOCK`] samples of the
//! global batch. timm draws them once for each GPU's part of the batch.

use crate::config::Data;
use crate::random::Random;
use std::ops::Range;
use tch::Tensor;

/// The number of samples that share one draw, whatever the number of replicas. 128 is one GPU's part of a batch in DeiT's
/// recipe (arXiv 2012.12877: 1,024 images on 8 GPUs).
pub const BLOCK: usize = 128;

/// How the images of one block are mixed in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// The share of a sample's own label (λ). The label of its partner has the rest.
    pub lambda: f64,
    /// The box of CutMix (rows, columns). None for Mixup, and if nothing is mixed (λ is then 1).
    pub region: Option<(Range<usize>, Range<usize>)>,
}

impl Mix {
    /// Draws how a block is mixed. `size` is the height and the width of the images. `key` identifies the step and the block.
    pub fn draw(data: &Data, size: usize, key: &[u64]) -> Mix {
        let mut random = Random::new(key);
        let is_cutmix = match (data.mixup > 0.0, data.cutmix > 0.0) {
            (false, false) => return Mix { lambda: 1.0, region: None },
            (true, true) => random.uniform() < data.switch_probability,
            (_, is_cutmix) => is_cutmix,
        };
        if !is_cutmix {
            return Mix { lambda: random.beta(data.mixup), region: None };
        }
        let lambda = random.beta(data.cutmix);
        let side = (size as f64 * (1.0 - lambda).sqrt()) as usize;
        let mut span = || {
            let centre = random.below(size);
            centre.saturating_sub(side / 2)..(centre + side.div_ceil(2)).min(size)
        };
        let (rows, columns) = (span(), span());
        // The border of the image may cut the box off, so λ is computed from the real area of the box.
        let lambda = 1.0 - (rows.len() * columns.len()) as f64 / (size * size) as f64;
        Mix { lambda, region: Some((rows, columns)) }
    }

    /// Mixes partners in place. `batch` must have an even number of images (channel, row, column).
    pub fn images(&self, batch: &mut [f32], channels: usize, size: usize) {
        let image = channels * size * size;
        for pair in batch.chunks_exact_mut(2 * image) {
            let (a, b) = pair.split_at_mut(image);
            match &self.region {
                Some((rows, columns)) => {
                    for plane in 0..channels {
                        for row in rows.clone() {
                            let start = (plane * size + row) * size;
                            let line = start + columns.start..start + columns.end;
                            a[line.clone()].swap_with_slice(&mut b[line]);
                        }
                    }
                }
                None if self.lambda < 1.0 => {
                    let own = self.lambda as f32;
                    for (a, b) in a.iter_mut().zip(b) {
                        (*a, *b) = (own * *a + (1.0 - own) * *b, own * *b + (1.0 - own) * *a);
                    }
                }
                None => {}
            }
        }
    }

    /// Mixes partners in place in a tensor (batch, channel, row, column) on any device.
    pub fn tensor(&self, images_bchw: &Tensor) {
        let size = images_bchw.size();
        // (pair, 2, channel, row, column)
        let pairs = images_bchw.view([-1, 2, size[1], size[2], size[3]]);
        match &self.region {
            Some((rows, columns)) => {
                let boxes = pairs.narrow(3, rows.start as i64, rows.len() as i64);
                let mut boxes = boxes.narrow(4, columns.start as i64, columns.len() as i64);
                boxes.copy_(&boxes.flip([1i64]));
            }
            None if self.lambda < 1.0 => {
                let partners = pairs.flip([1i64]) * (1.0 - self.lambda);
                let _ = pairs.shallow_clone().g_mul_scalar_(self.lambda).g_add_(&partners);
            }
            None => {}
        }
    }

    /// The distributions over the classes (sample, class) that the mixed images have as targets. `labels` are the classes before
    /// the mixing, and `smoothing` is the share that is spread evenly over all classes.
    pub fn targets(&self, labels: &[u32], classes: usize, smoothing: f64) -> Vec<f32> {
        let of_every_class = smoothing / classes as f64;
        let mut targets = vec![of_every_class as f32; labels.len() * classes];
        for (i, row) in targets.chunks_exact_mut(classes).enumerate() {
            row[labels[i] as usize] += (self.lambda * (1.0 - smoothing)) as f32;
            if let Some(&partner) = labels.get(i ^ 1) {
                row[partner as usize] += ((1.0 - self.lambda) * (1.0 - smoothing)) as f32;
            }
        }
        targets
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn draw(mixup: f64, cutmix: f64, key: u64) -> Mix {
        let data = Data { mixup, cutmix, ..Config::parse("", &[]).unwrap().data };
        Mix::draw(&data, 8, &[key])
    }

    #[test]
    fn cutmix_gives_the_partner_exactly_the_label_share_of_its_pixels() {
        for key in 0..200 {
            let mix = draw(0.0, 1.0, key);
            let mut batch = [vec![1.0; 64], vec![0.0; 64]].concat();
            mix.images(&mut batch, 1, 8);
            let own = batch[..64].iter().sum::<f32>() / 64.0;
            assert!((f64::from(own) - mix.lambda).abs() < 1e-6);
            let targets = mix.targets(&[0, 1], 2, 0.0);
            assert!((targets[0] - own).abs() < 1e-6 && (targets[3] - own).abs() < 1e-6);
        }
    }

    #[test]
    fn mixup_blends_pixels_and_labels_alike_and_targets_sum_to_one() {
        let mix = draw(0.8, 0.0, 5);
        let mut batch = [vec![1.0; 64], vec![0.0; 64]].concat();
        mix.images(&mut batch, 1, 8);
        assert!(
            (f64::from(batch[0]) - mix.lambda).abs() < 1e-6 && (f64::from(batch[64]) - (1.0 - mix.lambda)).abs() < 1e-6
        );
        for row in mix.targets(&[2, 0, 1, 1], 3, 0.1).chunks(3) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn a_device_mixes_as_the_host_does() {
        for key in 0..40 {
            let mix = draw(0.8, if key % 2 == 0 { 0.0 } else { 1.0 }, key);
            let mut batch: Vec<f32> = (0..4 * 3 * 64).map(|n| ((n * n) as f32).sin()).collect();
            let there = Tensor::from_slice(&batch).view([4, 3, 8, 8]);
            mix.tensor(&there);
            mix.images(&mut batch, 3, 8);
            let off = (there.view(-1) - Tensor::from_slice(&batch)).abs().max().double_value(&[]);
            assert!(off < 1e-6, "{mix:?}: {off}");
        }
    }

    #[test]
    fn without_both_nothing_is_mixed() {
        assert_eq!(draw(0.0, 0.0, 1), Mix { lambda: 1.0, region: None });
    }
}
