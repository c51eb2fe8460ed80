//! Transforms images and their label maps together, as mmsegmentation 1.2.2 does for ADE20K (`_base_/datasets/ade20k.py`). Training:
//! random resize, random crop with a limit on its largest class, flip, photometric distortion, normalisation, padding below and to
//! the right. Evaluation: resize, normalisation. Images are interpolated as by OpenCV, label maps take the nearest pixel.

use super::decode::label_map::LabelMap;
use super::distort::distort;
use super::normalise::Normalise;
use super::pixels::{Area, Region};
use super::resize::Resample;
use super::workbench::Workbench;
use crate::config::{Config, IGNORED, Segmentation};
use crate::data::source::samples::StoredMap;
use crate::random::Random;
use anyhow::Result;

/// The transforms of a config, which all workers share.
#[derive(Debug, Clone)]
pub struct Joint {
    keys: Segmentation,
    flip: f64,
    normalise: Normalise,
}

/// The image and the targets of a training sample.
pub struct Crop<'a> {
    /// (channel, row, column), normalised. Outside of the image they are 0, the mean colour.
    pub pixels: &'a mut [f32],
    /// (row, column); [`IGNORED`] outside of the image.
    pub classes: &'a mut [u8],
}

/// A crop whose largest class has too large a share is drawn again at most this many times.
const DRAWS: usize = 10;
/// At scale 1, the longer side of a resized image has at most this many times the side of the crop.
const LONGEST: usize = 4;

impl Joint {
    /// The transforms of a config of segmentation that passed validation.
    pub fn new(config: &Config) -> Joint {
        Joint {
            keys: config.segmentation.clone(),
            flip: config.data.flip,
            normalise: Normalise::new(&config.data.mean, &config.data.std),
        }
    }

    /// The scales at which an image is evaluated.
    pub fn scales(&self) -> &[f64] {
        &self.keys.test_scales
    }

    /// Memory for a worker.
    pub fn bench(&self) -> Result<Workbench> {
        Workbench::new(Resample::default())
    }

    /// The label map in these stored bytes.
    ///
    /// # Errors
    /// The map is damaged, or holds a label that the config does not know.
    pub fn map(&self, bytes: &[u8], stored: StoredMap) -> Result<LabelMap> {
        match stored {
            StoredMap::Png => LabelMap::decode(bytes, |label| self.keys.class_of(label)),
            StoredMap::Classes { height, width } => Ok(LabelMap { height, width, classes: bytes.into() }),
        }
    }

    /// Writes a training sample: its image and label map, transformed alike. All its randomness comes from `random`. The image has
    /// been opened by [`Workbench::open`], and the label map has its size.
    ///
    /// # Errors
    /// If the image cannot be decoded.
    pub fn train(
        &self,
        bench: &mut Workbench,
        bytes: &[u8],
        map: &LabelMap,
        random: &mut Random,
        out: Crop,
    ) -> Result<()> {
        let size = (map.height, map.width);
        let [low, high] = self.keys.resize;
        let resized = fitting(size, self.keys.crop, random.between(low, high));
        let part = self.draw_part(map, resized, random);
        let flipped = random.uniform() < self.flip;
        bench.interpolate(bytes, size, resized, part)?;
        if self.keys.distortion {
            distort(&mut bench.pixels.rgbx, random);
        }
        let side = self.keys.crop;
        self.normalise.apply_padded(&bench.pixels, flipped, side, &mut bench.planes, out.pixels);
        out.classes.fill(IGNORED);
        let nearest = Nearest { map, resized };
        for (row, own) in out.classes.chunks_exact_mut(side).take(part.height).enumerate() {
            nearest.row(part.top + row, part.left, &mut own[..part.width]);
            if flipped {
                own[..part.width].reverse();
            }
        }
        Ok(())
    }

    /// An image for evaluation (channel, row, column), resized to `scale` times its usual size, with its height and width. `size` is
    /// what [`Workbench::open`] or [`Workbench::open_whole`] has returned for the image.
    ///
    /// # Errors
    /// If the image cannot be decoded.
    pub fn evaluate(
        &self,
        bench: &mut Workbench,
        bytes: &[u8],
        size: (usize, usize),
        scale: f64,
    ) -> Result<(Vec<f32>, [usize; 2])> {
        let (height, width) = fitting(size, self.keys.crop, scale);
        bench.interpolate(bytes, size, (height, width), Region { left: 0, top: 0, width, height })?;
        let mut planes = vec![0.0; 3 * height * width];
        self.normalise.apply(&bench.pixels, None, false, &mut planes);
        Ok((planes, [height, width]))
    }

    /// Draws the part of the resized image. If one class has too large a share of the part's labelled pixels, or if no pixel is
    /// labelled, the part is drawn again, up to [`DRAWS`] times. The last draw stands, whatever it holds. With a limit of 1 nothing is
    /// drawn again.
    fn draw_part(&self, map: &LabelMap, (height, width): (usize, usize), random: &mut Random) -> Region {
        let side = self.keys.crop;
        let mut draw = || Region {
            top: random.below(height.saturating_sub(side) + 1),
            left: random.below(width.saturating_sub(side) + 1),
            width: side.min(width),
            height: side.min(height),
        };
        let mut part = draw();
        if self.keys.category_limit < 1.0 {
            let nearest = Nearest { map, resized: (height, width) };
            for _ in 0..DRAWS {
                if is_mixed(&nearest.counts(part), self.keys.category_limit) {
                    break;
                }
                part = draw();
            }
        }
        part
    }
}

impl Workbench {
    /// Decodes the opened image and computes one part of its resized form. `part` is in pixels of the resized image.
    fn interpolate(
        &mut self,
        bytes: &[u8],
        (height, width): (usize, usize),
        (resized_height, resized_width): (usize, usize),
        part: Region,
    ) -> Result<()> {
        let view = self.decoder.view(bytes, Region { left: 0, top: 0, width, height }, 1)?;
        let (y, x) = (height as f64 / resized_height as f64, width as f64 / resized_width as f64);
        let (left, top) = (part.left as f64 * x, part.top as f64 * y);
        // Rounding must not lead beyond the border.
        let area = Area {
            left,
            top,
            width: (part.width as f64 * x).min(width as f64 - left),
            height: (part.height as f64 * y).min(height as f64 - top),
        };
        self.pixels.free_if_huge();
        self.pixels.resize(part.height, part.width);
        self.resample.interpolate(&view, area, &mut self.pixels)
    }
}

/// The size of an image that keeps its ratio and fits into [`LONGEST`] · crop × crop pixels, times `scale`: mmcv's `rescale_size`.
fn fitting((height, width): (usize, usize), crop: usize, scale: f64) -> (usize, usize) {
    let (short, long) = ((crop as f64 * scale).floor(), ((LONGEST * crop) as f64 * scale).floor());
    let factor = (long / height.max(width) as f64).min(short / height.min(width) as f64);
    let resized = |length: usize| ((length as f64 * factor + 0.5) as usize).max(1);
    (resized(height), resized(width))
}

/// A label map as it would be if it were resized by OpenCV's `INTER_NEAREST`.
struct Nearest<'a> {
    map: &'a LabelMap,
    /// Height and width.
    resized: (usize, usize),
}

impl Nearest<'_> {
    /// Writes the classes of a resized row from a column on.
    fn row(&self, row: usize, left: usize, out: &mut [u8]) {
        let LabelMap { height, width, classes } = self.map;
        let source = |at: usize, from: usize, to: usize| (at * from / to).min(from - 1);
        let own = &classes[source(row, *height, self.resized.0) * width..][..*width];
        for (column, class) in out.iter_mut().enumerate() {
            *class = own[source(left + column, *width, self.resized.1)];
        }
    }

    /// How many pixels of each class a part holds.
    fn counts(&self, part: Region) -> [usize; 256] {
        let mut counts = [0; 256];
        let mut classes = vec![0; part.width];
        for row in part.top..part.top + part.height {
            self.row(row, part.left, &mut classes);
            classes.iter().for_each(|&class| counts[usize::from(class)] += 1);
        }
        counts
    }
}

/// Whether there are several classes, and the largest has less than `limit` of the pixels that have a class.
fn is_mixed(counts: &[usize; 256], limit: f64) -> bool {
    let labelled = &counts[..usize::from(IGNORED)];
    let (all, largest) = (labelled.iter().sum::<usize>(), labelled.iter().copied().max().unwrap_or(0));
    labelled.iter().filter(|&&count| count > 0).count() > 1 && (largest as f64) < limit * all as f64
}

#[cfg(test)]
mod tests;
