//! Transforms images for classification by DeiT's recipe (its `datasets.py: build_transform`, with timm 1.0's
//! `transforms_factory.py`). The recipe is the same for all sources.
//!
//! Training: random crop, horizontal flip, RandAugment or colour jitter, normalisation, RandomErasing. The random crop is a
//! RandomCrop with padding if the side of the network's input is at most 32 pixels; otherwise it is a RandomResizedCrop.
//!
//! Evaluation: resize, centre crop, normalisation.

use super::decode::Decoder;
use super::erase::Erased;
use super::normalise::{Normalise, byte_planes};
use super::pixels::{Area, Pixels, Region, View};
use super::randaugment::{self, Canvas, Policy};
use super::resize::{Order, Resample};
use super::{crop, erase};
use crate::config::{Border, Config, Data};
use crate::data::source::samples::Stored;
use crate::random::Random;
use anyhow::Result;
use std::time::{Duration, Instant};

/// The largest side, in pixels, of a small input of the network. If the input is small, training pads and crops images, and
/// evaluation crops nothing from the shorter side.
const LARGEST_PADDED: usize = 32;

/// The side of evaluation's centre crop, as a share of the resized image's shorter side.
pub fn evaluated_share(config: &Config) -> f64 {
    if config.model.image_size() <= LARGEST_PADDED { 1.0 } else { config.data.crop_percent }
}

/// The transforms of a config. All worker threads share them.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The height and the width of the network's input.
    size: usize,
    data: Data,
    evaluated_share: f64,
    /// RandAugment, if the config has it.
    policy: Option<Policy>,
    normalise: Normalise,
}

/// The memory of one worker thread. It is reused from image to image.
pub struct RecipeBench {
    decoder: Decoder,
    resample: Resample,
    /// The whole resized image, from which a padded crop is copied. It is used only if the network's input is small.
    resized: Pixels,
    canvas: Canvas,
    pub spent: StepTimes,
}

/// The memory into which a transformed image is written (channel, row, column).
pub enum Out<'a> {
    /// Receives the normalised image.
    Normalised(&'a mut [f32]),
    /// Receives the image as bytes, which a device normalises later.
    Bytes {
        bytes: &'a mut [u8],
        /// The index of the image's first byte among all bytes of the batch.
        start: usize,
        /// Receives the noise of RandomErasing. The device writes the noise into the image after it has normalised the bytes.
        erased: &'a mut Erased,
    },
}

impl<'a, Numbers: AsMut<[f32]> + ?Sized> From<&'a mut Numbers> for Out<'a> {
    fn from(numbers: &'a mut Numbers) -> Out<'a> {
        Out::Normalised(numbers.as_mut())
    }
}

impl Out<'_> {
    /// Borrows the same memory for a shorter lifetime.
    pub fn reborrow(&mut self) -> Out<'_> {
        match self {
            Out::Normalised(numbers) => Out::Normalised(numbers),
            Out::Bytes { bytes, start, erased } => Out::Bytes { bytes, start: *start, erased },
        }
    }

    /// Replaces a rectangle of an image of `size` × `size` pixels with noise. If `self` takes bytes, the noise is only recorded,
    /// and the device writes it into the image later.
    fn erase(&mut self, size: usize, region: Region, random: &mut Random) {
        match self {
            Out::Normalised(numbers) => erase::fill(numbers, size, region, |row| erase::noise(row, random)),
            Out::Bytes { bytes, start, erased } => {
                erased.add((*start, bytes.len() / (size * size)), size, region, random);
            }
        }
    }
}

/// The part of a stored image that becomes the network's input, and how the part is decoded and resampled.
struct Crop {
    area: Area,
    /// Resampling reads no pixels outside of this region, even if the kernel extends beyond the region.
    within: Region,
    /// A JPEG is decoded at 1/`reduction` of its height and width.
    reduction: usize,
    order: Order,
}

/// The time of each step of the transforms, summed over all images.
#[derive(Debug)]
pub struct StepTimes {
    decode: Duration,
    resample: Duration,
    operations: Duration,
    normalise: Duration,
    erase: Duration,
    /// When the present step began.
    since: Instant,
}

impl Default for StepTimes {
    fn default() -> StepTimes {
        let none = Duration::ZERO;
        StepTimes {
            decode: none,
            resample: none,
            operations: none,
            normalise: none,
            erase: none,
            since: Instant::now(),
        }
    }
}

impl StepTimes {
    /// The times of decoding, resampling, RandAugment or colour jitter, normalisation, and RandomErasing, in this order.
    pub fn steps(&self) -> [Duration; 5] {
        [self.decode, self.resample, self.operations, self.normalise, self.erase]
    }

    /// Begins the first step of an image.
    fn begin(&mut self) {
        self.since = Instant::now();
    }

    /// Adds the time since the present step began to the total that `step` chooses, and begins the next step.
    fn end(&mut self, step: impl FnOnce(&mut StepTimes) -> &mut Duration) {
        let now = Instant::now();
        let spent = now - std::mem::replace(&mut self.since, now);
        *step(self) += spent;
    }
}

impl Recipe {
    /// The recipe of a config that passed validation.
    pub fn new(config: &Config) -> Recipe {
        Recipe {
            size: config.model.image_size(),
            data: config.data.clone(),
            evaluated_share: evaluated_share(config),
            policy: Policy::parse(&config.data.auto_augment).expect("the config was validated"),
            normalise: Normalise::new(&config.data.mean, &config.data.std),
        }
    }

    /// Allocates the memory of one worker thread.
    pub fn workbench(&self) -> Result<RecipeBench> {
        let mean = &self.data.mean;
        // The config of gray images has one mean, which is used for red, green and blue.
        let byte = |channel: usize| (255.0 * mean[channel % mean.len()]).round_ties_even().min(255.0) as u8;
        Ok(RecipeBench {
            decoder: Decoder::new()?,
            resample: Resample::default(),
            resized: Pixels::default(),
            canvas: Canvas::new([byte(0), byte(1), byte(2), 255]),
            spent: StepTimes::default(),
        })
    }

    /// Transforms an image for training, and writes it to `out` (channel, row, column). All its randomness comes from `random`.
    ///
    /// # Errors
    /// The image cannot be decoded.
    pub fn train<'a>(
        &self,
        bench: &mut RecipeBench,
        bytes: &[u8],
        stored: Stored,
        random: &mut Random,
        out: impl Into<Out<'a>>,
    ) -> Result<()> {
        let (data, mut out) = (&self.data, out.into());
        bench.spent.begin();
        let size = bench.decoder.open(bytes, stored)?;
        self.draw_random_crop(bench, bytes, size, random)?;
        bench.canvas.flipped = random.uniform() < data.flip;
        match &self.policy {
            Some(policy) => policy.apply(&mut bench.canvas, random),
            None if data.color_jitter > 0.0 => randaugment::jitter(&mut bench.canvas, data.color_jitter, random),
            None => {}
        }
        bench.spent.end(|spent| &mut spent.operations);
        bench.normalise(&self.normalise, &mut out);
        if random.uniform() < data.erase
            && let Some(region) = erase::rectangle(self.size, random)
        {
            out.erase(self.size, region, random);
        }
        bench.spent.end(|spent| &mut spent.erase);
        Ok(())
    }

    /// Transforms an image for evaluation, and writes it to `out` (channel, row, column). The image is decoded at its full size,
    /// whatever `data.reduced_decode` says, and resampled in Pillow's order. So programs that use Pillow see the same pixels.
    ///
    /// # Errors
    /// The image cannot be decoded.
    pub fn evaluate<'a>(
        &self,
        bench: &mut RecipeBench,
        bytes: &[u8],
        stored: Stored,
        out: impl Into<Out<'a>>,
    ) -> Result<()> {
        bench.spent.begin();
        let size = bench.decoder.open(bytes, stored)?;
        self.evaluate_opened(bench, bytes, size, out.into())
    }

    /// Like [`Recipe::evaluate`], but decodes the whole image. [`RecipeBench::photo`] then returns the whole image.
    ///
    /// # Errors
    /// The image cannot be decoded.
    pub fn evaluate_whole(&self, bench: &mut RecipeBench, bytes: &[u8], stored: Stored, out: &mut [f32]) -> Result<()> {
        bench.spent.begin();
        let size = bench.decoder.open(bytes, stored)?;
        bench.decoder.keep_whole(bytes, size)?;
        self.evaluate_opened(bench, bytes, size, out.into())
    }

    fn evaluate_opened(
        &self,
        bench: &mut RecipeBench,
        bytes: &[u8],
        (height, width): (usize, usize),
        mut out: Out,
    ) -> Result<()> {
        let (area, within) = crop::centre(height, width, self.size, self.evaluated_share);
        let crop = Crop { area, within, reduction: 1, order: Order::RowsFirst };
        bench.draw(bytes, crop, self.size)?;
        bench.normalise(&self.normalise, &mut out);
        Ok(())
    }

    /// Chooses a random part of the image, resizes it to the size of the network's input, and writes it onto the canvas. If the
    /// input is small, the order differs: the shorter side of the image is resized to the input's side, a border is added, and then
    /// a random part of the input's size is chosen.
    fn draw_random_crop(
        &self,
        bench: &mut RecipeBench,
        bytes: &[u8],
        (height, width): (usize, usize),
        random: &mut Random,
    ) -> Result<()> {
        if self.size > LARGEST_PADDED {
            let region = crop::random_resized(random, height, width, self.data.crop_scale, self.data.crop_ratio);
            return bench.draw(bytes, self.training_crop(region), self.size);
        }
        let (resized_height, resized_width) = crop::resized(height, width, self.size);
        let whole = Region { left: 0, top: 0, width, height };
        bench.resized.free_if_huge();
        bench.resized.resize(resized_height, resized_width);
        let RecipeBench { decoder, resample, resized, canvas, spent } = bench;
        draw(decoder, resample, spent, bytes, self.training_crop(whole), resized)?;
        let start =
            crop::random_padded_start(random, (resized_height, resized_width), self.size, self.data.crop_padding);
        let part = canvas.begin(self.size);
        match self.data.crop_border {
            Border::Zeros => part.copy_part(resized, start),
            Border::Reflect => part.copy_mirrored_part(resized, start),
        }
        Ok(())
    }

    fn training_crop(&self, region: Region) -> Crop {
        let area = region.area();
        let reduction = if self.data.reduced_decode { crop::reduction(area, self.size) } else { 1 };
        Crop { area, within: region, reduction, order: Order::ColumnsFirst }
    }
}

impl RecipeBench {
    /// The whole stored image. [`Recipe::evaluate_whole`] must have decoded the image before, from the same `bytes`.
    pub fn photo<'a>(&'a self, bytes: &'a [u8]) -> View<'a> {
        self.decoder.whole(bytes)
    }

    /// Decodes a part of the opened image, and resamples it onto the canvas. The canvas then has the side `size`.
    fn draw(&mut self, bytes: &[u8], crop: Crop, size: usize) -> Result<()> {
        let RecipeBench { decoder, resample, canvas, spent, .. } = self;
        draw(decoder, resample, spent, bytes, crop, canvas.begin(size))
    }

    /// Writes the image of the canvas to `out`. If `out` takes bytes, a device normalises the image later.
    fn normalise(&mut self, normalise: &Normalise, out: &mut Out) {
        let Canvas { pixels, table, flipped, .. } = &self.canvas;
        match out {
            Out::Normalised(out) => normalise.apply(pixels, table.as_deref(), *flipped, out),
            Out::Bytes { bytes, .. } => byte_planes(pixels, table.as_deref(), *flipped, bytes),
        }
        self.spent.end(|spent| &mut spent.normalise);
    }
}

/// Decodes a part of the opened image and resamples it to the size of `out`.
fn draw(
    decoder: &mut Decoder,
    resample: &mut Resample,
    spent: &mut StepTimes,
    bytes: &[u8],
    crop: Crop,
    out: &mut Pixels,
) -> Result<()> {
    let view = decoder.view(bytes, crop.within, crop.reduction)?;
    spent.end(|spent| &mut spent.decode);
    resample.resample(&view, crop.area, crop.within, crop.order, out)?;
    spent.end(|spent| &mut spent.resample);
    Ok(())
}
