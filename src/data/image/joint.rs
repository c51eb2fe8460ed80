//! Transforms images and their label maps together, as mmsegmentation 1.2.2 does for ADE20K (`_base_/datasets/ade20k.py`).
//!
//! Training: random resize, random crop with a limit on the share of its most frequent class, random horizontal flip, photometric
//! distortion, normalisation, padding below and to the right. Evaluation: resize, normalisation. Images are resized like OpenCV's
//! `INTER_LINEAR`, and label maps like its `INTER_NEAREST`.

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

/// The transforms of a config. All worker threads share them.
#[derive(Debug, Clone)]
pub struct Joint {
    keys: Segmentation,
    /// The probability of a horizontal flip.
    flip: f64,
    normalise: Normalise,
}

/// The memory into which a training sample is written. Both fields have the height and width `segmentation.crop`.
pub struct Crop<'a> {
    /// The normalised image (channel, row, column). The padding is 0, which is the mean colour.
    pub pixels: &'a mut [f32],
    /// The class of each pixel (row, column). The padding is [`IGNORED`].
    pub classes: &'a mut [u8],
}

/// The most times that a crop is drawn again because its most frequent class has too large a share, or because no pixel is
/// labelled.
const DRAWS: usize = 10;
/// At scale 1, the longer side of a resized image is at most this many times the side of the crop.
const LONGEST: usize = 4;

impl Joint {
    /// The transforms of a config for segmentation. The config must have passed validation.
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

    /// Allocates the memory of one worker thread.
    pub fn bench(&self) -> Result<Workbench> {
        Workbench::new(Resample::default())
    }

    /// Decodes the stored bytes of a label map.
    ///
    /// # Errors
    /// The label map is damaged, or holds a label that the config does not allow.
    pub fn map(&self, bytes: &[u8], stored: StoredMap) -> Result<LabelMap> {
        match stored {
            StoredMap::Png => LabelMap::decode(bytes, |label| self.keys.class_of(label)),
            StoredMap::Classes { height, width } => Ok(LabelMap { height, width, classes: bytes.into() }),
        }
    }

    /// Transforms an image and its label map alike for training, and writes them to `out`. All randomness comes from `random`. The
    /// image must have been opened by [`Workbench::open`] or [`Workbench::open_whole`], and `map` must have the size of the opened
    /// image.
    ///
    /// # Errors
    /// The image cannot be decoded.
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

    /// Transforms an image for evaluation. It is resized to `scale` times the size that it would have in training at scale 1.
    /// Returns the normalised image (channel, row, column) and its height and width. `size` is the (height, width) that
    /// [`Workbench::open`] or [`Workbench::open_whole`] has returned for the image.
    ///
    /// # Errors
    /// The image cannot be decoded.
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

    /// Draws the part of the resized image that becomes the crop. The part is drawn again, up to [`DRAWS`] times, if one class has
    /// at least the share `category_limit` of the part's labelled pixels, or if no pixel is labelled. The last draw is kept in any
    /// case. If the limit is 1, nothing is drawn again.
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
    /// Decodes and resizes the opened image, and writes one part of the result to `self.pixels`. `part` is in pixels of the resized
    /// image.
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
        // Without `min`, rounding errors could extend the area beyond the border of the image.
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

/// The (height, width) of an image after resizing, like mmcv's `rescale_size`. The aspect ratio is kept, apart from rounding. The
/// longer side has at most [`LONGEST`] · `crop` · `scale` pixels, and the shorter side at most `crop` · `scale`. Within these
/// limits, the image becomes as large as possible.
fn fitting((height, width): (usize, usize), crop: usize, scale: f64) -> (usize, usize) {
    let (short, long) = ((crop as f64 * scale).floor(), ((LONGEST * crop) as f64 * scale).floor());
    let factor = (long / height.max(width) as f64).min(short / height.min(width) as f64);
    let resized = |length: usize| ((length as f64 * factor + 0.5) as usize).max(1);
    (resized(height), resized(width))
}

/// Reads a label map as if it were resized by OpenCV's `INTER_NEAREST`.
struct Nearest<'a> {
    map: &'a LabelMap,
    /// The height and width of the resized label map.
    resized: (usize, usize),
}

impl Nearest<'_> {
    /// Writes the classes of row `row` of the resized label map, from column `left` on.
    fn row(&self, row: usize, left: usize, out: &mut [u8]) {
        let LabelMap { height, width, classes } = self.map;
        let source = |at: usize, from: usize, to: usize| (at * from / to).min(from - 1);
        let own = &classes[source(row, *height, self.resized.0) * width..][..*width];
        for (column, class) in out.iter_mut().enumerate() {
            *class = own[source(left + column, *width, self.resized.1)];
        }
    }

    /// How many pixels of each class a part of the resized label map holds.
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

/// Whether there are several classes, and the most frequent class has less than the share `limit` of the pixels that have a class.
fn is_mixed(counts: &[usize; 256], limit: f64) -> bool {
    let labelled = &counts[..usize::from(IGNORED)];
    let (all, largest) = (labelled.iter().sum::<usize>(), labelled.iter().copied().max().unwrap_or(0));
    labelled.iter().filter(|&&count| count > 0).count() > 1 && (largest as f64) < limit * all as f64
}

#[cfg(test)]
mod tests;
