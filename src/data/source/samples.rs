//! Stored images: what a source of large images gives. A new source is one file that implements [`Samples`].

use super::images::Images;
use crate::random::Random;
use anyhow::Result;
use std::collections::BTreeMap;
use std::sync::Arc;

/// One split of stored images of any size, read one at a time by any thread.
pub trait Samples: Send + Sync {
    /// How many there are.
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The class of a sample, from 0.
    fn label(&self, index: usize) -> u32;

    /// What names the sample in a message: a path, or shard and member.
    fn name(&self, index: usize) -> String;

    /// The classes' names in order of label; empty if the source has none.
    fn classes(&self) -> &[String] {
        &[]
    }

    /// Reads the stored bytes into `bytes`, whose memory is reused: on return it holds them and nothing else.
    ///
    /// # Errors
    /// Whatever keeps the sample from being read. It need not name the sample: the caller does.
    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored>;
}

/// What the bytes of a sample are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// A JPEG or PNG file, told apart by its first bytes.
    Encoded,
    /// `height` rows of `width` RGB pixels, 3 · height · width bytes.
    Raw { height: usize, width: usize },
}

/// One split of a source.
#[derive(Clone)]
pub enum Split {
    /// Images of the model's size, decoded, in memory.
    Small(Arc<Images>),
    /// Images of any size, read and decoded when they are needed.
    Stored(Arc<dyn Samples>),
}

impl Split {
    pub fn len(&self) -> usize {
        match self {
            Split::Small(images) => images.len(),
            Split::Stored(samples) => samples.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The class of an image.
    pub fn label(&self, index: usize) -> u32 {
        match self {
            Split::Small(images) => images.labels[index],
            Split::Stored(samples) => samples.label(index),
        }
    }

    /// The classes' names in order of label; empty if the source has none.
    pub fn classes(&self) -> &[String] {
        match self {
            Split::Small(_) => &[],
            Split::Stored(samples) => samples.classes(),
        }
    }

    /// What names the image in a message.
    pub fn name(&self, index: usize) -> String {
        match self {
            Split::Small(_) => format!("image {index}"),
            Split::Stored(samples) => samples.name(index),
        }
    }

    /// Keeps a share of each class, chosen by the seed (the paper's experiments with 50 % and 25 % of the data).
    pub(super) fn subset(self, fraction: f64, seed: u64) -> Split {
        if fraction >= 1.0 {
            return self;
        }
        let mut by_class: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for index in 0..self.len() {
            by_class.entry(self.label(index)).or_default().push(index as u32);
        }
        let mut kept: Vec<u32> = Vec::new();
        for (class, mut members) in by_class {
            Random::new(&[seed, SUBSET, class.into()]).shuffle(&mut members);
            members.truncate((members.len() as f64 * fraction).ceil() as usize);
            kept.extend(members);
        }
        kept.sort_unstable();
        match self {
            Split::Small(images) => Split::Small(Arc::new(images.select(&kept))),
            Split::Stored(samples) => Split::Stored(Arc::new(Subset { samples, kept })),
        }
    }
}

const SUBSET: u64 = 0x5b5e7;

/// Some of a split's samples.
struct Subset {
    samples: Arc<dyn Samples>,
    kept: Vec<u32>,
}

impl Samples for Subset {
    fn len(&self) -> usize {
        self.kept.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.samples.label(self.kept[index] as usize)
    }

    fn name(&self, index: usize) -> String {
        self.samples.name(self.kept[index] as usize)
    }

    fn classes(&self) -> &[String] {
        self.samples.classes()
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        self.samples.read(self.kept[index] as usize, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images() -> Images {
        Images {
            pixels: (0..=199).collect(),
            labels: (0..200).map(|i| u32::from(i >= 160) + u32::from(i >= 190)).collect(),
            channels: 1,
            size: 1,
        }
    }

    /// The same images as a source of large ones would give them.
    impl Samples for Images {
        fn len(&self) -> usize {
            Images::len(self)
        }

        fn label(&self, index: usize) -> u32 {
            self.labels[index]
        }

        fn name(&self, index: usize) -> String {
            index.to_string()
        }

        fn classes(&self) -> &[String] {
            static CLASSES: std::sync::LazyLock<Vec<String>> =
                std::sync::LazyLock::new(|| ["a", "b", "c"].map(str::to_string).to_vec());
            &CLASSES
        }

        fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
            bytes.clear();
            bytes.extend([self.pixels[index]; 3]);
            Ok(Stored::Raw { height: 1, width: 1 })
        }
    }

    #[test]
    fn a_fraction_keeps_that_share_of_every_class_and_depends_on_the_seed() {
        let kept = |seed| match Split::Small(Arc::new(images())).subset(0.25, seed) {
            Split::Small(images) => images,
            Split::Stored(_) => unreachable!("the kind stays"),
        };
        let one = kept(1);
        let count = |class: u32| one.labels.iter().filter(|&&l| l == class).count();
        assert_eq!([count(0), count(1), count(2)], [40, 8, 3]);
        assert!((0..one.len()).all(|i| images().labels[one.image(i)[0] as usize] == one.labels[i]));
        assert_ne!(one.pixels, kept(2).pixels);
        assert_eq!(one.pixels, kept(1).pixels);
    }

    #[test]
    fn a_fraction_of_stored_images_is_the_same_choice() {
        let (small, stored) =
            (Split::Small(Arc::new(images())).subset(0.25, 1), Split::Stored(Arc::new(images())).subset(0.25, 1));
        let (Split::Small(small), Split::Stored(samples)) = (&small, &stored) else { unreachable!("the kinds stay") };
        assert_eq!(small.len(), stored.len());
        assert_eq!(stored.classes(), ["a", "b", "c"]);
        let mut bytes = Vec::new();
        for index in 0..small.len() {
            samples.read(index, &mut bytes).unwrap();
            assert_eq!((small.image(index)[0], small.labels[index]), (bytes[0], stored.label(index)));
        }
    }
}
