//! The recipe of DeiT for large images (timm 1.0: `transforms_factory.py`). Training: RandomResizedCrop, horizontal flip,
//! RandAugment or colour jitter, normalisation, RandomErasing. Evaluation: resize, centre crop, normalisation.

use super::decode::Decoder;
use super::normalise::Normalise;
use super::pixels::{Area, Region};
use super::randaugment::{self, Canvas, Policy};
use super::resize::{Order, Resample};
use super::{crop, erase};
use crate::config::{Config, Data};
use crate::data::source::samples::Stored;
use crate::random::Random;
use anyhow::Result;
use std::time::{Duration, Instant};

/// What is done to stored images; shared by all workers.
#[derive(Debug, Clone)]
pub struct Recipe {
    size: usize,
    data: Data,
    /// None where there is no augmentation.
    policy: Option<Policy>,
    normalise: Normalise,
}

/// The memory of one worker: after the first images, nothing is allocated any more.
pub struct Workbench {
    decoder: Decoder,
    resample: Resample,
    canvas: Canvas,
    pub spent: Spent,
}

/// What becomes the canvas, and how.
struct Part {
    area: Area,
    /// Pixels outside take no part.
    within: Region,
    /// Decoded at this part of its size.
    shrunk: usize,
    order: Order,
}

/// The time that each part of the work took, over all images.
#[derive(Debug, Default)]
pub struct Spent {
    decode: Duration,
    resample: Duration,
    operations: Duration,
    normalise: Duration,
    erase: Duration,
}

impl Spent {
    /// Decoding, resampling, RandAugment or jitter, normalisation, RandomErasing.
    pub fn parts(&self) -> [Duration; 5] {
        [self.decode, self.resample, self.operations, self.normalise, self.erase]
    }
}

/// Adds the time since `since`, which becomes now.
fn lap(sum: &mut Duration, since: &mut Instant) {
    let now = Instant::now();
    *sum += now - std::mem::replace(since, now);
}

impl Recipe {
    /// For a config that passed validation.
    pub fn new(config: &Config) -> Recipe {
        Recipe {
            size: config.model.image_size(),
            data: config.data.clone(),
            policy: Policy::parse(&config.data.auto_augment).expect("the config was validated"),
            normalise: Normalise::new(&config.data.mean, &config.data.std),
        }
    }

    /// Memory for a worker.
    pub fn workbench(&self) -> Result<Workbench> {
        let byte = |channel: usize| (255.0 * self.data.mean[channel]).round_ties_even().min(255.0) as u8;
        let canvas = Canvas::new([byte(0), byte(1), byte(2), 255]);
        Ok(Workbench { decoder: Decoder::new()?, resample: Resample::default(), canvas, spent: Spent::default() })
    }

    /// Writes one training image (channel, row, column) into `out`. Everything random about it comes from `random`.
    ///
    /// # Errors
    /// If the image cannot be decoded.
    pub fn train(
        &self,
        bench: &mut Workbench,
        bytes: &[u8],
        stored: Stored,
        random: &mut Random,
        out: &mut [f32],
    ) -> Result<()> {
        let data = &self.data;
        let mut since = Instant::now();
        let (height, width) = bench.decoder.open(bytes, stored)?;
        let region = crop::random(random, height, width, data.crop_scale, data.crop_ratio);
        let area = region.area();
        let part = Part { area, within: region, shrunk: self.shrink(area), order: Order::ColumnsFirst };
        bench.draw(bytes, part, self.size, &mut since)?;
        bench.canvas.flipped = random.uniform() < data.flip;
        match &self.policy {
            Some(policy) => policy.apply(&mut bench.canvas, random),
            None if data.color_jitter > 0.0 => randaugment::jitter(&mut bench.canvas, data.color_jitter, random),
            None => {}
        }
        lap(&mut bench.spent.operations, &mut since);
        bench.finish(&self.normalise, out);
        lap(&mut bench.spent.normalise, &mut since);
        if random.uniform() < data.erase
            && let Some(region) = erase::rectangle(self.size, random)
        {
            erase::fill(out, self.size, region, |row| erase::noise(row, random));
        }
        lap(&mut bench.spent.erase, &mut since);
        Ok(())
    }

    /// Writes one image (channel, row, column) as it is evaluated: decoded at its full size whatever `data.reduced_decode`
    /// says, and resampled as Pillow does it, so that other programs see the same pixels.
    ///
    /// # Errors
    /// If the image cannot be decoded.
    pub fn evaluate(&self, bench: &mut Workbench, bytes: &[u8], stored: Stored, out: &mut [f32]) -> Result<()> {
        let mut since = Instant::now();
        let (height, width) = bench.decoder.open(bytes, stored)?;
        let (area, region) = crop::centre(height, width, self.size, self.data.crop_percent);
        let part = Part { area, within: region, shrunk: 1, order: Order::RowsFirst };
        bench.draw(bytes, part, self.size, &mut since)?;
        bench.finish(&self.normalise, out);
        lap(&mut bench.spent.normalise, &mut since);
        Ok(())
    }

    fn shrink(&self, area: Area) -> usize {
        if self.data.reduced_decode { crop::shrinkable(area, self.size) } else { 1 }
    }
}

impl Workbench {
    /// Decodes and resamples a part onto the canvas.
    fn draw(&mut self, bytes: &[u8], part: Part, size: usize, since: &mut Instant) -> Result<()> {
        let view = self.decoder.view(bytes, part.within, part.shrunk)?;
        lap(&mut self.spent.decode, since);
        self.resample.resample(&view, part.area, part.within, part.order, self.canvas.begin(size))?;
        lap(&mut self.spent.resample, since);
        Ok(())
    }

    fn finish(&mut self, normalise: &Normalise, out: &mut [f32]) {
        let Canvas { pixels, table, flipped, .. } = &self.canvas;
        normalise.apply(pixels, table.as_deref(), *flipped, out);
    }
}
