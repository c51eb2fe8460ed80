//! RoIAlign (arXiv 1703.06870) with `aligned=True` and an adaptive number of samples, as in torchvision 0.26 and detectron2's
//! `ROIPooler`, on the host.
//!
//! The value of a bin is the mean of samples of the map, each interpolated between four cells. This is a weighted sum of cells.
//! The weight of a cell is the product of a weight of its row and a weight of its column. So the gradient of a map can be
//! computed row by row, always in the same order.

use super::boxes::{Corners, area};
use crate::plan::detection::POOLED_LEVELS;
use rayon::prelude::*;

/// A box of an image of the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Region {
    /// The position of its image in the micro-batch.
    pub image: usize,
    pub corners: Corners,
}

/// The side, in patches, of a square box that is pooled from the map with one cell for each token. If a patch has 16 pixels, this
/// side is 224 pixels. Boxes that are not square count as squares of the same area.
const CANONICAL: f32 = 14.0;
/// The level of the map with one cell for each token.
const CANONICAL_LEVEL: f32 = 2.0;

impl Region {
    /// The level from which the region is pooled, counted from the finest: detectron2's `assign_boxes_to_levels`.
    pub fn level(&self, patch: usize) -> usize {
        let side = area(&self.corners).max(0.0).sqrt();
        let level = (CANONICAL_LEVEL + (side / (CANONICAL * patch as f32) + 1e-8).log2()).floor();
        level.clamp(0.0, (POOLED_LEVELS - 1) as f32) as usize
    }
}

/// The samples of a region along one axis of a map. Positions are in cells; the centre of the first cell is at 0.
pub struct Samples {
    /// The position at which the region begins.
    start: f32,
    /// The length of a bin.
    bin: f32,
    /// The number of samples of a bin.
    pub per_bin: usize,
}

impl Samples {
    /// The samples of a region from `low` to `high` pixels, which is divided into `bins` bins. A cell of the map is 1 / `scale`
    /// pixels wide.
    pub fn new([low, high]: [f32; 2], scale: f32, bins: usize) -> Samples {
        let (start, end) = (low * scale - 0.5, high * scale - 0.5);
        let length = end - start;
        let per_bin = (length / bins as f32).ceil().max(0.0) as usize;
        Samples { start, bin: length / bins as f32, per_bin }
    }

    /// The position of a sample on a map of `cells` cells; none if it is below −1 or above `cells`. A position beyond the
    /// outermost cells' centres is moved to the nearest of them.
    pub fn place(&self, bin: usize, sample: usize, cells: usize) -> Option<f32> {
        let offset = (sample as f32 + 0.5) * self.bin / self.per_bin as f32;
        let place = self.start + bin as f32 * self.bin + offset;
        (-1.0..=cells as f32).contains(&place).then(|| place.clamp(0.0, (cells - 1) as f32))
    }

    /// The cells that each bin reads, with their weights.
    fn weights(&self, bins: usize, cells: usize) -> Vec<Vec<(usize, f32)>> {
        let of_bin = |bin: usize| {
            let mut weights: Vec<(usize, f32)> = Vec::new();
            let mut add = |cell: usize, weight: f32| match weights.iter_mut().rev().find(|(known, _)| *known == cell) {
                Some((_, sum)) => *sum += weight,
                None => weights.push((cell, weight)),
            };
            let share = 1.0 / self.per_bin.max(1) as f32;
            for place in (0..self.per_bin).filter_map(|sample| self.place(bin, sample, cells)) {
                let (lower, part) = (place as usize, place.fract());
                add(lower, (1.0 - part) * share);
                if part > 0.0 {
                    add(lower + 1, part * share);
                }
            }
            weights
        };
        (0..bins).map(of_bin).collect()
    }
}

/// A map in host memory: numbers ordered by image, row, column and channel.
#[derive(Clone, Copy)]
pub struct Map<'a> {
    pub numbers: &'a [f32],
    pub side: usize,
    pub channels: usize,
}

/// A region with the rows and the columns of cells that each of its bins reads, and their weights.
struct Weighed {
    level: usize,
    image: usize,
    rows: Vec<Vec<(usize, f32)>>,
    columns: Vec<Vec<(usize, f32)>>,
}

/// Regions that are pooled to `bins` rows and columns. Each region reads the map of one level.
pub struct Pooling {
    all: Vec<Weighed>,
    bins: usize,
}

impl Pooling {
    /// Prepares the pooling of regions. For each level, `maps` holds the number of rows of its map and its cells per pixel.
    pub fn new(regions: &[Region], maps: &[(usize, f32)], bins: usize, patch: usize) -> Pooling {
        let weighed = |region: &Region| {
            let level = region.level(patch);
            let (side, scale) = maps[level];
            let [left, top, right, bottom] = region.corners;
            let weights = |ends| Samples::new(ends, scale, bins).weights(bins, side);
            Weighed { level, image: region.image, rows: weights([top, bottom]), columns: weights([left, right]) }
        };
        Pooling { all: regions.par_iter().map(weighed).collect(), bins }
    }

    /// Writes the pooled regions to `output`, ordered by region, row, column and channel.
    pub fn forward(&self, maps: &[Map], output: &mut [f32]) {
        if self.all.is_empty() {
            return;
        }
        let length = output.len() / self.all.len();
        output.par_chunks_mut(length).zip(&self.all).for_each(|(output, region)| {
            let Map { numbers, side, channels, .. } = maps[region.level];
            output.fill(0.0);
            for (bin, sum) in output.chunks_exact_mut(channels).enumerate() {
                for &(row, of_row) in &region.rows[bin / self.bins] {
                    for &(column, of_column) in &region.columns[bin % self.bins] {
                        let cell = ((region.image * side + row) * side + column) * channels;
                        add(sum, &numbers[cell..cell + channels], of_row * of_column);
                    }
                }
            }
        });
    }

    /// Adds the gradient of the map of a level to `output`, given the gradient of the pooled regions. Each row of the map is
    /// summed by one thread, in the order of the regions.
    pub fn backward(&self, level: usize, gradient: &[f32], (side, channels): (usize, usize), output: &mut [f32]) {
        let mut of_rows: Vec<Vec<(usize, usize, f32)>> = vec![Vec::new(); output.len() / (side * channels)];
        for (number, region) in self.all.iter().enumerate().filter(|(_, region)| region.level == level) {
            for (bin, weights) in region.rows.iter().enumerate() {
                for &(row, weight) in weights {
                    of_rows[region.image * side + row].push((number, bin, weight));
                }
            }
        }
        output.par_chunks_mut(side * channels).zip(of_rows).for_each(|(sums, readers)| {
            for (number, row_bin, of_row) in readers {
                for (column_bin, weights) in self.all[number].columns.iter().enumerate() {
                    let bin = ((number * self.bins + row_bin) * self.bins + column_bin) * channels;
                    for &(column, of_column) in weights {
                        let sum = &mut sums[column * channels..][..channels];
                        add(sum, &gradient[bin..bin + channels], of_row * of_column);
                    }
                }
            }
        });
    }
}

fn add(sum: &mut [f32], numbers: &[f32], weight: f32) {
    sum.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += weight * number);
}
