//! Transforms images and their annotated objects together, as detectron2 does for ViTDet
//! (`projects/ViTDet/configs/common/coco_loader_lsj.py`).
//!
//! Training, called «large-scale jitter»: random horizontal flip, resize to a random size, random crop, normalisation, padding
//! below and to the right. Evaluation: resize, normalisation, the same padding. Images are resampled as Pillow resamples them.

use super::crop;
use super::normalise::Normalise;
use super::pixels::Region;
use super::resize::{Order, Resample};
use super::workbench::Workbench;
use crate::coco::objects::{Object, Outline, Scene, fitted};
use crate::coco::polygons;
use crate::config::Config;
use crate::random::Random;
use anyhow::Result;

/// The transforms of a config. All worker threads share them.
#[derive(Debug, Clone)]
pub struct ScaleJitter {
    /// The height and the width of the network's input.
    side: usize,
    /// The smallest and the largest scale in training. At scale 1, the longer side of the image becomes `side` pixels.
    resize: [f64; 2],
    /// The probability of a horizontal flip.
    flip: f64,
    normalise: Normalise,
}

/// How an image is flipped, resized and cropped.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Placement {
    flipped: bool,
    /// Height and width of the image before the resize, upright by its EXIF orientation.
    size: [usize; 2],
    /// Height and width of the resized image.
    resized: [usize; 2],
    /// The crop, in pixels of the flipped and resized image.
    part: Region,
}

/// An object is left out if its box is at most this many pixels wide or high.
const SMALLEST: f64 = 1e-5;

impl ScaleJitter {
    /// The transforms of a config for detection. The config must have passed validation.
    pub fn new(config: &Config) -> ScaleJitter {
        ScaleJitter {
            side: config.detection.crop,
            resize: config.detection.resize,
            flip: config.data.flip,
            normalise: Normalise::new(&config.data.mean, &config.data.std),
        }
    }

    /// The height and the width of the network's input.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Allocates the memory of one worker thread.
    pub fn bench(&self) -> Result<Workbench> {
        Workbench::new(Resample::bilinear())
    }

    /// Transforms an image and its objects for training. Writes the image to `out` (channel, row, column), and returns the objects.
    /// All randomness comes from `random`. [`Workbench::open`] must have opened the image, and `scene` must have the size of the
    /// opened image.
    ///
    /// # Errors
    /// The image cannot be decoded.
    pub fn train(
        &self,
        bench: &mut Workbench,
        bytes: &[u8],
        scene: &Scene,
        random: &mut Random,
        out: &mut [f32],
    ) -> Result<Scene> {
        let flipped = random.uniform() < self.flip;
        let [low, high] = self.resize;
        let scale = random.between(low, high);
        let placement = Placement::new(scene.size, self.side, flipped, scale, random.uniform());
        self.image(bench, bytes, placement, out)?;
        Ok(placement.scene(scene))
    }

    /// Transforms an image for evaluation, and writes it to `out` (channel, row, column). [`Workbench::open`] must have opened the
    /// image, and `size` must be the (height, width) that it returned.
    ///
    /// # Errors
    /// The image cannot be decoded.
    pub fn evaluate(&self, bench: &mut Workbench, bytes: &[u8], size: [usize; 2], out: &mut [f32]) -> Result<()> {
        let resized = fitted(size, self.side);
        let part = Region { left: 0, top: 0, width: resized[1], height: resized[0] };
        self.image(bench, bytes, Placement { flipped: false, size, resized, part }, out)
    }

    /// Decodes an image, flips, resizes and crops it as `placement` says, normalises it, and writes it to `out` with padding.
    fn image(&self, bench: &mut Workbench, bytes: &[u8], placement: Placement, out: &mut [f32]) -> Result<()> {
        let Placement { flipped, size, resized, mut part } = placement;
        // The image is resampled first and flipped afterwards, so the part is mirrored here.
        if flipped {
            part.left = resized[1] - part.left - part.width;
        }
        let (area, within) = crop::source(size, resized, part);
        let view = bench.decoder.view(bytes, within, 1)?;
        bench.pixels.free_if_huge();
        bench.pixels.resize(part.height, part.width);
        bench.resample.resample(&view, area, within, Order::RowsFirst, &mut bench.pixels)?;
        self.normalise.apply_padded(&bench.pixels, flipped, self.side, &mut bench.planes, out);
        Ok(())
    }
}

impl Placement {
    /// The placement of an image of `size` (height, width). The longer side is resized to `side` · `scale` pixels, and the ratio of
    /// the sides stays. Then the image is cropped to at most `side` rows and columns. If rows are cut off, the share `share` of
    /// them lies above the crop, and the rest below. If columns are cut off, the same share lies to the left.
    fn new(size: [usize; 2], side: usize, flipped: bool, scale: f64, share: f64) -> Placement {
        let target = side as f64 * scale;
        let factor = (target / size[0] as f64).min(target / size[1] as f64);
        let resized = size.map(|length| ((length as f64 * factor).round_ties_even() as usize).max(1));
        let begin = |length: usize| (length.saturating_sub(side) as f64 * share).round_ties_even() as usize;
        let part = Region {
            left: begin(resized[1]),
            top: begin(resized[0]),
            width: resized[1].min(side),
            height: resized[0].min(side),
        };
        Placement { flipped, size, resized, part }
    }

    /// Moves the objects of the image into the crop. Objects outside of the crop are left out. An object's polygons are cut at the
    /// borders of the crop, and its new box is the smallest box around the cut polygons. An object without polygons keeps only its
    /// box, which is moved and cut. Its area is then the area of the cut box.
    fn scene(&self, scene: &Scene) -> Scene {
        let objects = scene.objects.iter().filter_map(|object| self.object(object)).collect();
        Scene { image: scene.image, size: [self.part.height, self.part.width], objects }
    }

    fn object(&self, object: &Object) -> Option<Object> {
        let within = [0.0, 0.0, self.part.width as f64, self.part.height as f64];
        let (outline, [left, top, right, bottom]) = match &object.outline {
            Outline::Polygons(corners) => {
                let placed: Vec<Vec<f64>> = corners.iter().map(|corners| self.polygon(corners)).collect();
                polygons::part(&placed, within)?
            }
            Outline::None | Outline::Runs(_) => {
                let [x, y, width, height] = object.bbox;
                let corners = self.polygon(&[x, y, x + width, y, x + width, y + height, x, y + height]);
                (Outline::None, polygons::bounds(&corners, within)?)
            }
        };
        let bbox = [left, top, right - left, bottom - top];
        let area = if outline == Outline::None { bbox[2] * bbox[3] } else { polygons::area_of(&outline) };
        (bbox[2] > SMALLEST && bbox[3] > SMALLEST).then_some(Object { bbox, area, outline, ..*object })
    }

    /// Converts the corners of a polygon from pixels of the image before the resize to pixels of the crop.
    fn polygon(&self, corners: &[f64]) -> Vec<f64> {
        let [y_factor, x_factor] = [0, 1].map(|axis| self.resized[axis] as f64 / self.size[axis] as f64);
        let placed = |&[x, y]: &[f64; 2]| {
            let x = if self.flipped { self.size[1] as f64 - x } else { x };
            [x * x_factor - self.part.left as f64, y * y_factor - self.part.top as f64]
        };
        corners.as_chunks().0.iter().flat_map(placed).collect()
    }
}

#[cfg(test)]
mod tests;
