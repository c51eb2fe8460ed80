//! Images in, batches out: sources, the small-image DeiT augmentation, the sampler and the loader.

pub mod augment;
mod cifar;
mod idx;
pub mod loader;
pub mod mix;
pub mod sampler;
mod shapes;

use crate::config::{Config, Format};
use crate::random::Random;
use crate::{require, usage};
use anyhow::Result;
use std::sync::Arc;

/// Images of one split, decoded, in memory.
#[derive(Debug)]
pub struct Images {
    /// Pixel bytes, image after image, each in planes (channel, row, column).
    pub pixels: Vec<u8>,
    pub labels: Vec<u32>,
    pub channels: usize,
    /// Height = width.
    pub size: usize,
}

/// Training and test images of a config's source.
#[derive(Debug, Clone)]
pub struct Source {
    pub train: Arc<Images>,
    pub test: Arc<Images>,
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The bytes of one image.
    pub fn image(&self, index: usize) -> &[u8] {
        let bytes = self.channels * self.size * self.size;
        &self.pixels[index * bytes..(index + 1) * bytes]
    }

    /// Keeps a share of each class, chosen by the seed (the paper's experiments with 50 % and 25 % of the data).
    fn subset(self, fraction: f64, seed: u64) -> Images {
        if fraction >= 1.0 {
            return self;
        }
        let classes = self.labels.iter().max().map_or(0, |&l| l as usize + 1);
        let mut by_class = vec![Vec::new(); classes];
        for (index, &label) in self.labels.iter().enumerate() {
            by_class[label as usize].push(index);
        }
        let mut kept: Vec<usize> = Vec::new();
        for (class, mut members) in by_class.into_iter().enumerate() {
            Random::new(&[seed, SUBSET, class as u64]).shuffle(&mut members);
            members.truncate((members.len() as f64 * fraction).ceil() as usize);
            kept.extend(members);
        }
        kept.sort_unstable();
        Images {
            pixels: kept.iter().flat_map(|&i| self.image(i)).copied().collect(),
            labels: kept.iter().map(|&i| self.labels[i]).collect(),
            ..self
        }
    }

    fn check(&self, split: &str, config: &Config) -> Result<()> {
        let (model, data) = (&config.model, &config.data);
        require!(!self.is_empty(), "{}: the {split} split holds no images", data.path.display());
        require!(
            (self.channels, self.size) == (model.channels, model.image_size),
            "{}: {split} images are {}×{}×{} (channels × height × width), but the model takes {}×{}×{}; set \
             model.channels = {} and model.image_size = {}",
            data.path.display(),
            self.channels,
            self.size,
            self.size,
            model.channels,
            model.image_size,
            model.image_size,
            self.channels,
            self.size
        );
        if let Some((index, label)) = self.labels.iter().enumerate().find(|(_, l)| **l as usize >= model.classes) {
            return Err(usage!(
                "{}: {split} image {index} has label {label}, but model.classes = {}; set model.classes to at least {}",
                data.path.display(),
                model.classes,
                label + 1
            ));
        }
        let expected = if split == "train" { data.train_images } else { data.test_images };
        require!(
            expected == 0 || expected == self.len(),
            "{}: the {split} split holds {} images, but data.{split}_images = {expected}; correct the key or the path",
            data.path.display(),
            self.len()
        );
        Ok(())
    }
}

const SUBSET: u64 = 0x5b5e7;

/// Opens the config's source.
///
/// # Errors
/// A usage error that names the file if anything is missing, malformed or does not fit the model.
pub fn open(config: &Config) -> Result<Source> {
    let data = &config.data;
    let (train, test) = match data.format {
        Format::Idx => idx::open(&data.path)?,
        Format::Cifar10 => cifar::open(&data.path, cifar::Variant::Ten)?,
        Format::Cifar100 => cifar::open(&data.path, cifar::Variant::Hundred)?,
        Format::Shapes => shapes::draw(config),
        Format::Folder => {
            return Err(usage!(
                "data.format = \"folder\": this version plans such a run but cannot read image folders yet; use idx, \
                 cifar10, cifar100 or shapes"
            ));
        }
    };
    train.check("train", config)?;
    test.check("test", config)?;
    Ok(Source { train: Arc::new(train.subset(data.train_fraction, config.run.seed)), test: Arc::new(test) })
}

/// How many training images a run will use, without the data where the config says it.
pub fn train_images(config: &Config) -> Result<usize> {
    let data = &config.data;
    if data.train_images > 0 {
        return Ok((data.train_images as f64 * data.train_fraction).round() as usize);
    }
    Ok(open(config)?.train.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_keeps_that_share_of_every_class_and_depends_on_the_seed() {
        let images = || Images {
            pixels: (0..=199).collect(),
            labels: (0..200).map(|i| u32::from(i >= 160) + u32::from(i >= 190)).collect(),
            channels: 1,
            size: 1,
        };
        let kept = images().subset(0.25, 1);
        let count = |class: u32| kept.labels.iter().filter(|&&l| l == class).count();
        assert_eq!([count(0), count(1), count(2)], [40, 8, 3]);
        assert!((0..kept.len()).all(|i| images().labels[kept.image(i)[0] as usize] == kept.labels[i]));
        assert_ne!(kept.pixels, images().subset(0.25, 2).pixels);
        assert_eq!(kept.pixels, images().subset(0.25, 1).pixels);
    }
}
