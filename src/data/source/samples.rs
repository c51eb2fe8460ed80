//! The trait that the splits of all sources implement, [`Samples`], and subsets of a split.

use crate::coco::objects::Scene;
use crate::coco::results::Ids;
use crate::random::Random;
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The images of one split with their labels, label maps or objects. Many threads may read images at the same time.
pub trait Samples: Send + Sync {
    /// How many images the split holds.
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The class of an image, from 0. It is always 0 if the images have no classes.
    fn label(&self, index: usize) -> u32;

    /// The image's name in messages, such as its path, or the path of its tar and the name of the member.
    fn name(&self, index: usize) -> String;

    /// The image's name relative to `root`, the folder of its source. The name stays the same if the source is moved or packed.
    fn listed_name(&self, index: usize, root: &str) -> String {
        let name = self.name(index);
        name.strip_prefix(root).map_or(name.as_str(), |below| below.trim_start_matches('/')).to_string()
    }

    /// The names of the classes in the order of their labels. Empty if the source does not name its classes.
    fn classes(&self) -> &[String] {
        &[]
    }

    /// The number of channels and the side of the images, if all images are [`Stored::Planes`] of one size.
    fn planes(&self) -> Option<(usize, usize)> {
        None
    }

    /// Replaces the content of `bytes` by the stored bytes of an image.
    ///
    /// # Errors
    /// The image cannot be read. The caller adds the image's name to the error.
    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored>;

    /// The name of an image's label map in messages.
    fn map_name(&self, index: usize) -> String {
        self.name(index)
    }

    /// Bytes that change if an image's label map changes: the length of the map's file, and the end of the file. None if there is
    /// no such file, or if the file cannot be read.
    fn map_mark(&self, _index: usize) -> Option<Vec<u8>> {
        None
    }

    /// Replaces the content of `bytes` by the stored bytes of an image's label map.
    ///
    /// # Errors
    /// The label map cannot be read, or the source has no label maps.
    fn read_map(&self, _index: usize, _bytes: &mut Vec<u8>) -> Result<StoredMap> {
        bail!("the images of this source have no label maps")
    }

    /// The objects of an image. The size of the scene is the size that the annotations give for the image.
    ///
    /// # Errors
    /// The source has no objects.
    fn scene(&self, _index: usize) -> Result<Scene> {
        bail!("the images of this source have no objects")
    }

    /// The ids of the images and the classes in the source's annotations. None if the source has no annotations.
    fn ids(&self) -> Option<Ids> {
        None
    }
}

/// The form of a label map's stored bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredMap {
    /// A PNG file whose grey values or palette indices are the labels.
    Png,
    /// `height` rows of `width` classes, one byte each.
    Classes { height: usize, width: usize },
}

/// The form of an image's stored bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// A JPEG or PNG file. Its first bytes tell the two apart.
    Encoded,
    /// `height` rows of `width` RGB pixels, which are 3 · height · width bytes.
    Raw { height: usize, width: usize },
    /// 1 (gray) or 3 (red, green, blue) planes of `size` rows of `size` bytes.
    Planes { channels: usize, size: usize },
}

/// One split of a source.
pub type Split = Arc<dyn Samples>;

/// The number of images that a subset holds if it keeps `fraction` of `images` images.
pub fn subset_size(images: usize, fraction: f64) -> usize {
    (images as f64 * fraction).round() as usize
}

/// Keeps `fraction` of the images of each class, but at least one image of each class. The seed decides which images are kept.
/// (Deep Incubation's paper also trains on 50 % and 25 % of the data.) The subset has [`subset_size`] images, or one image of each
/// class if there are more classes than that.
pub fn subset(split: Split, fraction: f64, seed: u64) -> Split {
    if fraction >= 1.0 {
        return split;
    }
    let mut by_class: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for index in 0..split.len() {
        by_class.entry(split.label(index)).or_default().push(index as u32);
    }
    let sizes = class_sizes(&by_class.values().map(Vec::len).collect::<Vec<_>>(), fraction);
    let mut kept: Vec<u32> = Vec::new();
    for ((class, mut members), size) in by_class.into_iter().zip(sizes) {
        Random::new(&[seed, SUBSET, class.into()]).shuffle(&mut members);
        members.truncate(size);
        kept.extend(members);
    }
    kept.sort_unstable();
    Arc::new(Subset { split, kept })
}

/// Chooses at most `images` images of a split. The seed decides the choice and the order.
pub fn sample(split: &Split, images: usize, seed: u64) -> Split {
    let mut kept: Vec<u32> = (0..split.len() as u32).collect();
    Random::new(&[seed, SAMPLE]).shuffle(&mut kept);
    kept.truncate(images);
    Arc::new(Subset { split: split.clone(), kept })
}

/// The number of images to keep of each class. First, each class keeps its share, rounded down, but at least one image. Then the
/// classes with the largest remainders keep one image more, until the sum is [`subset_size`]. If the sum is already larger, the
/// classes with the smallest remainders keep one image less, again and again. A class never loses its last image.
fn class_sizes(images: &[usize], fraction: f64) -> Vec<usize> {
    let share = |class: usize| images[class] as f64 * fraction;
    let mut sizes: Vec<usize> = (0..images.len()).map(|class| (share(class).floor() as usize).max(1)).collect();
    let remainder = |sizes: &[usize], class: usize| share(class) - sizes[class] as f64;
    let mut by_remainder: Vec<usize> = (0..images.len()).collect();
    by_remainder.sort_by(|&a, &b| remainder(&sizes, b).total_cmp(&remainder(&sizes, a)));
    let (wanted, kept) = (subset_size(images.iter().sum(), fraction), sizes.iter().sum::<usize>());
    if wanted >= kept {
        by_remainder.iter().take(wanted - kept).for_each(|&class| sizes[class] = images[class].min(sizes[class] + 1));
    } else {
        let mut surplus = kept - wanted.max(images.len());
        for &class in by_remainder.iter().rev().cycle() {
            if surplus == 0 {
                break;
            }
            if sizes[class] > 1 {
                sizes[class] -= 1;
                surplus -= 1;
            }
        }
    }
    sizes
}

/// The parts of the random keys that set [`subset`] and [`sample`] apart from other uses of the same seed.
const SUBSET: u64 = 0x5b5e7;
const SAMPLE: u64 = 0x5a3b1e;

/// A subset of a split's images, with their classes, but without label maps and objects.
struct Subset {
    split: Split,
    /// The index in `split` of each image of the subset.
    kept: Vec<u32>,
}

impl Samples for Subset {
    fn len(&self) -> usize {
        self.kept.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.split.label(self.kept[index] as usize)
    }

    fn name(&self, index: usize) -> String {
        self.split.name(self.kept[index] as usize)
    }

    fn listed_name(&self, index: usize, root: &str) -> String {
        self.split.listed_name(self.kept[index] as usize, root)
    }

    fn classes(&self) -> &[String] {
        self.split.classes()
    }

    fn planes(&self) -> Option<(usize, usize)> {
        self.split.planes()
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        self.split.read(self.kept[index] as usize, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 160 images of class 0, 30 images of class 1 and 10 images of class 2. Each image is one byte, the image's number.
    struct Numbered {
        classes: Vec<String>,
    }

    impl Samples for Numbered {
        fn len(&self) -> usize {
            200
        }

        fn label(&self, index: usize) -> u32 {
            u32::from(index >= 160) + u32::from(index >= 190)
        }

        fn name(&self, index: usize) -> String {
            index.to_string()
        }

        fn classes(&self) -> &[String] {
            &self.classes
        }

        fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
            bytes.clear();
            bytes.push(index as u8);
            Ok(Stored::Planes { channels: 1, size: 1 })
        }
    }

    #[test]
    fn a_fraction_keeps_that_share_of_every_class_and_depends_on_the_seed() {
        let all: Split = Arc::new(Numbered { classes: ["a", "b", "c"].map(str::to_string).to_vec() });
        let kept = |seed| subset(all.clone(), 0.25, seed);
        let one = kept(1);
        assert_eq!(one.classes(), ["a", "b", "c"]);
        let count = |class: u32| (0..one.len()).filter(|&index| one.label(index) == class).count();
        assert_eq!([count(0), count(1), count(2)], [40, 8, 2], "7.5 and 2.5 of the 50 images that the plan says");
        let numbers = |split: &Split| -> Vec<u8> {
            let mut bytes = Vec::new();
            let mut number = |index| {
                split.read(index, &mut bytes).unwrap();
                assert_eq!(split.label(index), all.label(bytes[0] as usize));
                assert_eq!(split.name(index), bytes[0].to_string());
                bytes[0]
            };
            (0..split.len()).map(&mut number).collect()
        };
        assert_eq!(numbers(&one), numbers(&kept(1)));
        assert_ne!(numbers(&one), numbers(&kept(2)));
    }

    #[test]
    fn a_sample_has_each_image_at_most_once_in_an_order_of_the_seed() {
        let whole: Split = Arc::new(Numbered { classes: Vec::new() });
        let names = |images, seed| -> Vec<String> {
            let sample = sample(&whole, images, seed);
            (0..sample.len()).map(|index| sample.name(index)).collect()
        };
        let some = names(30, 1);
        assert_eq!((some.len(), &some), (30, &names(30, 1)));
        assert_ne!(some, names(30, 2));
        let all: std::collections::BTreeSet<String> = names(1000, 1).into_iter().collect();
        assert_eq!(all.len(), 200);
    }

    #[test]
    fn a_subset_has_as_many_images_as_the_plan_says_and_loses_no_class() {
        for (images, fraction, sizes) in [
            (&[10, 10][..], 0.5, &[5, 5][..]),
            (&[3, 3, 3], 0.5, &[2, 2, 1]),
            (&[9, 2, 2], 0.3, &[2, 1, 1]),
            (&[1, 1, 1, 1], 0.25, &[1, 1, 1, 1]),
            (&[1300; 3], 0.29, &[377, 377, 377]),
            // Each of four small classes keeps one image, although its share is a quarter. So the large class loses three images.
            (&[40, 1, 1, 1, 1], 0.25, &[7, 1, 1, 1, 1]),
        ] {
            let found = class_sizes(images, fraction);
            assert_eq!(found, sizes);
            let planned = subset_size(images.iter().sum(), fraction).max(images.len());
            assert_eq!(found.iter().sum::<usize>(), planned, "{images:?}");
        }
    }
}
