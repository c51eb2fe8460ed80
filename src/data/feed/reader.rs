//! A split's images as the network takes them. Each worker has a reader of its own.

use crate::config::Config;
use crate::data::image::augment::Transform;
use crate::data::image::recipe::{Recipe, Workbench};
use crate::data::source::bad_images::BadImages;
use crate::data::source::samples::{Samples, Split};
use crate::random::Random;
use crate::usage;
use anyhow::Result;
use std::sync::Arc;

/// Everything that readers of one split share.
#[derive(Clone)]
pub struct Reading {
    split: Split,
    small: Transform,
    stored: Recipe,
    /// Random augmentation, not the fixed transform of an evaluation.
    training: bool,
    bad: Arc<BadImages>,
}

/// Reads images one at a time.
pub struct Reader {
    reading: Arc<Reading>,
    bytes: Vec<u8>,
    bench: Option<Workbench>,
}

/// Bytes of a file for which memory is kept.
const KEPT: usize = 64 << 20;

impl Reading {
    pub fn training(config: &Config, split: &Split, bad: &Arc<BadImages>) -> Arc<Reading> {
        let (split, bad) = (split.clone(), bad.clone());
        let (small, stored) = (Transform::training(config), Recipe::new(config));
        Arc::new(Reading { split, small, stored, training: true, bad })
    }

    pub fn evaluation(config: &Config, split: &Split, bad: &Arc<BadImages>) -> Arc<Reading> {
        let (split, bad) = (split.clone(), bad.clone());
        let (small, stored) = (Transform::evaluation(config), Recipe::new(config));
        Arc::new(Reading { split, small, stored, training: false, bad })
    }

    /// A reader for one thread.
    pub fn reader(self: &Arc<Self>) -> Reader {
        Reader { reading: self.clone(), bytes: Vec::new(), bench: None }
    }
}

impl Reader {
    /// Writes the image (channel, row, column), or, if that cannot be read, the next one that can. Returns its label.
    ///
    /// # Errors
    /// If more images are unreadable than the config allows.
    pub fn read(&mut self, index: usize, random: &Random, out: &mut [f32]) -> Result<u32> {
        let images = self.reading.split.len();
        for other in (index..images).chain(0..index) {
            if self.try_read(other, random.clone(), out)? {
                return Ok(self.reading.split.label(other));
            }
        }
        Err(usage!("none of the {images} images can be read; see the warnings above"))
    }

    /// As [`Reader::read`], but without another one in its place: none if it is unreadable.
    pub fn read_this(&mut self, index: usize, random: &Random, out: &mut [f32]) -> Result<Option<u32>> {
        let read = self.try_read(index, random.clone(), out)?;
        Ok(read.then(|| self.reading.split.label(index)))
    }

    fn try_read(&mut self, index: usize, mut random: Random, out: &mut [f32]) -> Result<bool> {
        let reading = self.reading.clone();
        match &reading.split {
            Split::Small(images) => reading.small.apply(images, index, random, out),
            Split::Stored(samples) => {
                if let Err(fault) = self.decode(samples.as_ref(), index, &mut random, out) {
                    reading.bad.skip(samples.name(index), fault)?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn decode(&mut self, samples: &dyn Samples, index: usize, random: &mut Random, out: &mut [f32]) -> Result<()> {
        if self.bytes.capacity() > KEPT {
            self.bytes = Vec::new();
        }
        let stored = samples.read(index, &mut self.bytes)?;
        let recipe = &self.reading.stored;
        let bench = match &mut self.bench {
            Some(bench) => bench,
            none => none.insert(recipe.workbench()?),
        };
        if self.reading.training {
            recipe.train(bench, &self.bytes, stored, random, out)
        } else {
            recipe.evaluate(bench, &self.bytes, stored, out)
        }
    }
}
