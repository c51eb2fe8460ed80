//! Reads and transforms images with annotated objects. Each worker has a reader of its own.

use super::reader::unreadable;
use crate::coco::objects::Scene;
use crate::config::Config;
use crate::data::image::pixels::View;
use crate::data::image::scale_jitter::ScaleJitter;
use crate::data::image::workbench::Workbench;
use crate::data::source::bad_images::BadImages;
use crate::data::source::samples::{Split, Stored};
use crate::random::Random;
use crate::usage;
use anyhow::{Result, ensure};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// The state that all readers of a split share.
pub struct ObjectReading {
    split: Split,
    jitter: ScaleJitter,
    bad: Arc<BadImages>,
    /// Height = width of the network's input.
    side: usize,
}

/// Reads the images of a split in one thread. Its memory is reused from image to image.
pub struct ObjectReader {
    reading: Arc<ObjectReading>,
    bytes: Vec<u8>,
    /// The memory for the transforms. None before the first image.
    bench: Option<Workbench>,
}

impl ObjectReading {
    pub fn new(config: &Config, split: &Split, bad: &Arc<BadImages>) -> Arc<ObjectReading> {
        let (split, bad) = (split.clone(), bad.clone());
        Arc::new(ObjectReading { split, jitter: ScaleJitter::new(config), bad, side: config.detection.crop })
    }

    /// A reader for one thread.
    pub fn reader(self: &Arc<Self>) -> ObjectReader {
        ObjectReader { reading: self.clone(), bytes: Vec::new(), bench: None }
    }

    /// The size in bytes of an image for evaluation: three fp32 planes.
    pub fn image_bytes(&self) -> usize {
        4 * 3 * self.side * self.side
    }
}

impl ObjectReader {
    /// Writes training images (channel, row, column) into `pixels`, one after another, and returns their objects in fp64 (batch,
    /// number). Each row is [`Scene::to_row`], padded with zeros to the length of the longest row. A sample is the index of an
    /// image, and the key of the random numbers of its transform.
    ///
    /// # Errors
    /// - More images than the config allows are unreadable or differ in size from their annotations.
    /// - No image can be used.
    /// - The operating system fails to read an image.
    pub fn train(&mut self, samples: &[(usize, [u64; 4])], pixels: &mut [f32]) -> Result<Tensor> {
        let side = self.reading.side;
        let outs = pixels.chunks_exact_mut(3 * side * side);
        let scenes = samples.iter().zip(outs).map(|((index, key), out)| self.train_one(*index, key, out));
        let mut rows = scenes.map(|scene| Ok(scene?.to_row())).collect::<Result<Vec<Vec<f64>>>>()?;
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        rows.iter_mut().for_each(|row| row.resize(longest, 0.0));
        Ok(Tensor::from_slice(&rows.concat()).view([samples.len() as i64, longest as i64]))
    }

    /// Writes a training image or, if it cannot be used, the next image that can be used. Returns the objects of the written image.
    fn train_one(&mut self, index: usize, key: &[u64], out: &mut [f32]) -> Result<Scene> {
        let count = self.reading.split.len();
        for other in (index..count).chain(0..index) {
            let scene = self.reading.split.scene(other)?;
            let mut random = Random::new(key);
            let transformed = self.image(other, (&scene, Workbench::open), |jitter, bench, bytes, _| {
                jitter.train(bench, bytes, &scene, &mut random, &mut *out)
            })?;
            if let Some(scene) = transformed {
                return Ok(scene);
            }
        }
        Err(usage!("none of the {count} images can be read; see the warnings above"))
    }

    /// Returns an image for evaluation (1, channel, row, column), and its objects in fp64 (1, number) as [`Scene::to_row`] writes
    /// them. The objects are in pixels of the upright image before it is resized. If the image is skipped, the first dimension of
    /// both tensors is 0.
    ///
    /// # Errors
    /// More images than the config allows are unreadable or differ in size from their annotations. Or the operating system fails to
    /// read the image.
    pub fn evaluate(&mut self, index: usize) -> Result<(Vec<Tensor>, Tensor)> {
        let scene = self.reading.split.scene(index)?;
        let Some(images_1chw) = self.image(index, (&scene, Workbench::open_whole), fitted)? else {
            let none = |size: &[i64], kind: Kind| Tensor::empty(size, (kind, Device::Cpu));
            return Ok((vec![none(&[0, 3, 1, 1], Kind::Float)], none(&[0, 1], Kind::Double)));
        };
        Ok((images_1chw, Tensor::from_slice(&scene.to_row()).unsqueeze(0)))
    }

    /// Returns an image for evaluation (1, channel, row, column). The objects of the image need not be known.
    ///
    /// # Errors
    /// A usage error if the image is unreadable.
    pub fn image_alone(&mut self, index: usize) -> Result<Vec<Tensor>> {
        let image = self.read(index, (None, Workbench::open_whole), fitted);
        image.map_err(|fault| unreadable(&self.reading.split, index, &fault))
    }

    /// The upright pixels of the image that [`ObjectReader::evaluate`] or [`ObjectReader::image_alone`] has read last.
    ///
    /// # Panics
    /// If no image has been read. It may also panic if a training image was read last.
    pub fn photo(&self) -> View<'_> {
        self.bench.as_ref().expect("an image was read").photo(&self.bytes)
    }

    /// Opens an image by `open`, and calls `transform` with the image, its height and its width. If the image is unreadable or
    /// differs in size from its annotations, skips it and returns none.
    ///
    /// # Errors
    /// More images than the config allows are unreadable or differ in size from their annotations. Or the operating system fails to
    /// read the image.
    fn image<T>(
        &mut self,
        index: usize,
        (scene, open): (&Scene, Open),
        transform: impl FnOnce(&ScaleJitter, &mut Workbench, &[u8], [usize; 2]) -> Result<T>,
    ) -> Result<Option<T>> {
        match self.read(index, (Some(scene), open), transform) {
            Ok(value) => Ok(Some(value)),
            Err(fault) => self.reading.bad.skip(self.reading.split.name(index), fault).map(|()| None),
        }
    }

    /// Opens an image by `open`, and calls `transform` with the image, its height and its width. If `scene` is given, fails unless
    /// the image has the size of the scene.
    fn read<T>(
        &mut self,
        index: usize,
        (scene, open): (Option<&Scene>, Open),
        transform: impl FnOnce(&ScaleJitter, &mut Workbench, &[u8], [usize; 2]) -> Result<T>,
    ) -> Result<T> {
        let ObjectReading { split, jitter, .. } = self.reading.as_ref();
        let stored = split.read(index, &mut self.bytes)?;
        let bench = match &mut self.bench {
            Some(bench) => bench,
            none => none.insert(jitter.bench()?),
        };
        let (height, width) = open(bench, &self.bytes, stored)?;
        if let Some(scene) = scene {
            let [annotated_height, annotated_width] = scene.size;
            ensure!(
                [height, width] == scene.size,
                "it has {width}×{height} pixels{}, but its annotations say {annotated_width}×{annotated_height}; make them of one size",
                bench.turned()
            );
        }
        transform(jitter, bench, &self.bytes, [height, width])
    }
}

/// Opens an image: [`Workbench::open`] or [`Workbench::open_whole`].
type Open = fn(&mut Workbench, &[u8], Stored) -> Result<(usize, usize)>;

/// Transforms the opened image for evaluation (1, channel, row, column).
fn fitted(jitter: &ScaleJitter, bench: &mut Workbench, bytes: &[u8], size: [usize; 2]) -> Result<Vec<Tensor>> {
    let side = jitter.side();
    let mut pixels = vec![0.0; 3 * side * side];
    jitter.evaluate(bench, bytes, size, &mut pixels)?;
    Ok(vec![Tensor::from_slice(&pixels).view([1, 3, side as i64, side as i64])])
}
