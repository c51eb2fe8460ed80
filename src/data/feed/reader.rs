//! Reads and transforms images with classes, one at a time. Each worker has a reader of its own.

use crate::config::Config;
use crate::data::image::pixels::View;
use crate::data::image::recipe::{Out, Recipe, RecipeBench};
use crate::data::source::bad_images::BadImages;
use crate::data::source::samples::{Split, Stored};
use crate::random::Random;
use crate::usage;
use anyhow::{Error, Result};
use std::sync::Arc;

/// The state that all readers of a split share.
#[derive(Clone)]
pub struct Reading {
    split: Split,
    recipe: Recipe,
    /// Whether images get the random transform of training. If not, they get the fixed transform of evaluation.
    training: bool,
    bad: Arc<BadImages>,
}

/// Reads the images of a split in one thread. Its memory is reused from image to image.
pub struct Reader {
    reading: Arc<Reading>,
    bytes: Vec<u8>,
    /// The memory for the transforms. None before the first image.
    bench: Option<RecipeBench>,
}

/// The largest memory, in bytes, that a reader keeps for the stored bytes of the next image. Larger memory is freed.
const MOST_KEPT: usize = 64 << 20;

impl Reading {
    /// The state of readers that apply the random transform of training.
    pub fn training(config: &Config, split: &Split, bad: &Arc<BadImages>) -> Arc<Reading> {
        Self::new(config, split, bad, true)
    }

    /// The state of readers that apply the fixed transform of evaluation.
    pub fn evaluation(config: &Config, split: &Split, bad: &Arc<BadImages>) -> Arc<Reading> {
        Self::new(config, split, bad, false)
    }

    fn new(config: &Config, split: &Split, bad: &Arc<BadImages>, training: bool) -> Arc<Reading> {
        Arc::new(Reading { split: split.clone(), recipe: Recipe::new(config), training, bad: bad.clone() })
    }

    /// A reader for one thread.
    pub fn reader(self: &Arc<Self>) -> Reader {
        Reader { reading: self.clone(), bytes: Vec::new(), bench: None }
    }
}

impl Reader {
    /// Writes an image (channel, row, column) or, if it is unreadable, the next readable image. Returns the label of the written
    /// image.
    ///
    /// # Errors
    /// A usage error if more images are unreadable than the config allows, or if all images are unreadable. If the image over the
    /// limit is in a damaged pack, the error is [`crate::error::Failure::Damaged`]. Another error if the operating system fails
    /// to read a file, which may be intact.
    pub fn read<'a>(&mut self, index: usize, random: &Random, out: impl Into<Out<'a>>) -> Result<u32> {
        let mut out = out.into();
        let images = self.reading.split.len();
        for other in (index..images).chain(0..index) {
            if self.try_read(other, random.clone(), out.reborrow())? {
                return Ok(self.reading.split.label(other));
            }
        }
        Err(usage!("none of the {images} images can be read; see the warnings above"))
    }

    /// Writes an image (channel, row, column) and returns its label. If the image is unreadable, returns none.
    ///
    /// # Errors
    /// As for [`Reader::read`], but it is no error if all images are unreadable within the limit, because no other image is tried.
    pub fn read_this<'a>(&mut self, index: usize, random: &Random, out: impl Into<Out<'a>>) -> Result<Option<u32>> {
        let read = self.try_read(index, random.clone(), out.into())?;
        Ok(read.then(|| self.reading.split.label(index)))
    }

    /// Writes an image for evaluation (channel, row, column). The class of the image need not be known.
    ///
    /// # Errors
    /// A usage error if the image is unreadable.
    pub fn image_alone(&mut self, index: usize, out: &mut [f32]) -> Result<()> {
        let transformed =
            self.transform(index, |recipe, bench, bytes, stored| recipe.evaluate_whole(bench, bytes, stored, out));
        transformed.map_err(|fault| unreadable(&self.reading.split, index, &fault))
    }

    /// All pixels of the image that [`Reader::image_alone`] has read last. The image is not turned by its EXIF orientation.
    ///
    /// # Panics
    /// If no image has been read. It may also panic if another function has read the last image.
    pub fn photo(&self) -> View<'_> {
        self.bench.as_ref().expect("an image was read").photo(&self.bytes)
    }

    /// Writes an image. If it is unreadable, skips it and returns false.
    fn try_read(&mut self, index: usize, mut random: Random, out: Out) -> Result<bool> {
        let training = self.reading.training;
        let transformed = self.transform(index, |recipe, bench, bytes, stored| match training {
            true => recipe.train(bench, bytes, stored, &mut random, out),
            false => recipe.evaluate(bench, bytes, stored, out),
        });
        match transformed {
            Ok(()) => Ok(true),
            Err(fault) => {
                let Reading { split, bad, .. } = self.reading.as_ref();
                bad.skip(split.name(index), fault).map(|()| false)
            }
        }
    }

    /// Reads an image, and calls `transform` with its stored bytes.
    fn transform(
        &mut self,
        index: usize,
        transform: impl FnOnce(&Recipe, &mut RecipeBench, &[u8], Stored) -> Result<()>,
    ) -> Result<()> {
        if self.bytes.capacity() > MOST_KEPT {
            self.bytes = Vec::new();
        }
        let Reading { split, recipe, .. } = self.reading.as_ref();
        let stored = split.read(index, &mut self.bytes)?;
        let bench = match &mut self.bench {
            Some(bench) => bench,
            none => none.insert(recipe.workbench()?),
        };
        transform(recipe, bench, &self.bytes, stored)
    }
}

/// The error for an unreadable image that a user has named.
pub(super) fn unreadable(split: &Split, index: usize, fault: &Error) -> Error {
    usage!("{}: {fault:#}; give JPEG or PNG images", split.name(index))
}
