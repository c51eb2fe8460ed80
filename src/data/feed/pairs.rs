//! Reads and transforms images with label maps. Each worker has a reader of its own.

use super::reader::unreadable;
use crate::config::Config;
use crate::data::image::decode::label_map::LabelMap;
use crate::data::image::joint::{Crop, Joint};
use crate::data::image::pixels::View;
use crate::data::image::workbench::Workbench;
use crate::data::source::bad_images::BadImages;
use crate::data::source::samples::Split;
use crate::random::Random;
use crate::usage;
use anyhow::{Result, ensure};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// The state that all readers of a split share.
pub struct PairReading {
    split: Split,
    joint: Joint,
    bad: Arc<BadImages>,
    /// Height = width of a training crop, in pixels.
    crop: usize,
}

/// Reads the images of a split in one thread. Its memory is reused from image to image.
pub struct PairReader {
    reading: Arc<PairReading>,
    bytes: Vec<u8>,
    map_bytes: Vec<u8>,
    /// The memory for the transforms. None before the first image.
    bench: Option<Workbench>,
}

impl PairReading {
    pub fn new(config: &Config, split: &Split, bad: &Arc<BadImages>) -> Arc<PairReading> {
        let (split, bad) = (split.clone(), bad.clone());
        Arc::new(PairReading { split, joint: Joint::new(config), bad, crop: config.segmentation.crop })
    }

    /// A reader for one thread.
    pub fn reader(self: &Arc<Self>) -> PairReader {
        PairReader { reading: self.clone(), bytes: Vec::new(), map_bytes: Vec::new(), bench: None }
    }

    /// The size in bytes of the largest image for evaluation at scale 1: three fp32 planes of (4 · crop) × crop pixels.
    pub fn largest_bytes(&self) -> usize {
        4 * 3 * 4 * self.crop * self.crop
    }
}

impl PairReader {
    /// Writes training images (channel, row, column) of `side` rows and columns into `pixels`, one after another. Returns their
    /// label maps (batch, row, column). A sample is the index of an image, and the key of the random numbers of its transform.
    ///
    /// # Errors
    /// - More images than the config allows are unreadable or differ in size from their label maps.
    /// - No image can be used, or a label map cannot be used.
    /// - The operating system fails to read an image.
    pub fn train(&mut self, samples: &[(usize, [u64; 4])], side: usize, pixels: &mut [f32]) -> Result<Tensor> {
        let mut classes = vec![0u8; samples.len() * side * side];
        let outs = pixels.chunks_exact_mut(3 * side * side).zip(classes.chunks_exact_mut(side * side));
        for ((index, key), (pixels, classes)) in samples.iter().zip(outs) {
            self.train_one(*index, key, Crop { pixels, classes })?;
        }
        Ok(Tensor::from_slice(&classes).view([samples.len() as i64, side as i64, side as i64]))
    }

    /// Writes a training image or, if it cannot be used, the next image that can be used. Also writes the image's label map.
    fn train_one(&mut self, index: usize, key: &[u64], out: Crop) -> Result<()> {
        let Crop { pixels, classes } = out;
        let count = self.reading.split.len();
        for other in (index..count).chain(0..index) {
            let map = self.map(other)?;
            let mut random = Random::new(key);
            let out = Crop { pixels: &mut *pixels, classes: &mut *classes };
            let transformed =
                self.image(other, &map, |joint, bench, bytes, _| joint.train(bench, bytes, &map, &mut random, out))?;
            if transformed.is_some() {
                return Ok(());
            }
        }
        Err(usage!("none of the {count} images can be read; see the warnings above"))
    }

    /// Returns an image for evaluation at each scale (1, channel, row, column), and its label map (1, row, column) at the size of
    /// the upright image. If the image is skipped, there is one image tensor, and the first dimension of both tensors is 0.
    ///
    /// # Errors
    /// More images than the config allows are unreadable or differ in size from their label maps. Or the label map cannot be used,
    /// or the operating system fails to read the image.
    pub fn evaluate(&mut self, index: usize) -> Result<(Vec<Tensor>, Tensor)> {
        let map = self.map(index)?;
        let Some(images_1chw) = self.image(index, &map, at_scales)? else {
            let none = |size: &[i64], kind: Kind| Tensor::empty(size, (kind, tch::Device::Cpu));
            return Ok((vec![none(&[0, 3, 1, 1], Kind::Float)], none(&[0, 1, 1], Kind::Uint8)));
        };
        Ok((images_1chw, Tensor::from_slice(&map.classes).view([1, map.height as i64, map.width as i64])))
    }

    /// Returns an image for evaluation at each scale (1, channel, row, column). The image needs no label map.
    ///
    /// # Errors
    /// A usage error if the image is unreadable.
    pub fn image_alone(&mut self, index: usize) -> Result<Vec<Tensor>> {
        self.read(index, None, at_scales).map_err(|fault| unreadable(&self.reading.split, index, &fault))
    }

    /// The upright pixels of the image that was read last.
    ///
    /// # Panics
    /// If no image has been read.
    pub fn photo(&self) -> View<'_> {
        self.bench.as_ref().expect("an image was read").photo(&self.bytes)
    }

    /// The label map of an image.
    fn map(&mut self, index: usize) -> Result<LabelMap> {
        let PairReading { split, joint, .. } = self.reading.as_ref();
        let map = split.read_map(index, &mut self.map_bytes).and_then(|stored| joint.map(&self.map_bytes, stored));
        map.map_err(|error| usage!("{}: {error:#}", split.map_name(index)))
    }

    /// Opens an image, and calls `transform` with the image and its (height, width). If the image is unreadable or differs in size
    /// from its label map, skips it and returns none.
    ///
    /// # Errors
    /// More images than the config allows are unreadable or differ in size from their label maps. Or the operating system fails to
    /// read the image.
    fn image<T>(
        &mut self,
        index: usize,
        map: &LabelMap,
        transform: impl FnOnce(&Joint, &mut Workbench, &[u8], (usize, usize)) -> Result<T>,
    ) -> Result<Option<T>> {
        match self.read(index, Some(map), transform) {
            Ok(value) => Ok(Some(value)),
            Err(fault) => self.reading.bad.skip(self.reading.split.name(index), fault).map(|()| None),
        }
    }

    /// Opens an image, and calls `transform` with the image and its (height, width). If `map` is given, this method fails unless
    /// the image and the map have the same size.
    fn read<T>(
        &mut self,
        index: usize,
        map: Option<&LabelMap>,
        transform: impl FnOnce(&Joint, &mut Workbench, &[u8], (usize, usize)) -> Result<T>,
    ) -> Result<T> {
        let PairReading { split, joint, .. } = self.reading.as_ref();
        let stored = split.read(index, &mut self.bytes)?;
        let bench = match &mut self.bench {
            Some(bench) => bench,
            none => none.insert(joint.bench()?),
        };
        // Every transform needs the whole image.
        let (height, width) = bench.open_whole(&self.bytes, stored)?;
        if let Some(map) = map {
            ensure!(
                (height, width) == (map.height, map.width),
                "it has {width}×{height} pixels{}, but its label map {} has {}×{}; make them of one size",
                bench.turned(),
                split.map_name(index),
                map.width,
                map.height
            );
        }
        transform(joint, bench, &self.bytes, (height, width))
    }
}

/// Transforms the opened image for evaluation at each scale (1, channel, row, column).
fn at_scales(joint: &Joint, bench: &mut Workbench, bytes: &[u8], size: (usize, usize)) -> Result<Vec<Tensor>> {
    let at_scale = |&scale: &f64| {
        let (pixels, [height, width]) = joint.evaluate(bench, bytes, size, scale)?;
        Ok(Tensor::from_slice(&pixels).view([1, 3, height as i64, width as i64]))
    };
    joint.scales().iter().map(at_scale).collect()
}
