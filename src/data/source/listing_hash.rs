//! Makes the record of a source's images, by which a run notices that they have changed. It holds their number, the names of the
//! classes, and hashes of the images' names, labels and objects and of the marks of their label maps.

use super::Source;
use super::samples::Split;
use crate::coco::objects::Scene;
use crate::config::{Config, TaskKind};
use crate::run::data::{DataSet, Listing};

/// The record of the images that a run of this config trains and evaluates on. The hashed names leave out the folder of the
/// source, so that the data may be moved.
pub fn data_set(config: &Config, source: &Source) -> DataSet {
    let root = config.images_path().display().to_string();
    DataSet {
        train: listing(&source.train, &root, config.task),
        evaluation: listing(&source.test, &root, config.task),
        classes: source.train.classes().to_vec(),
    }
}

fn listing(split: &Split, root: &str, task: TaskKind) -> Listing {
    let mut in_order = blake3::Hasher::new();
    // Four sums of the four parts of each image's hash. They do not depend on the order of the images.
    let mut sums = [0u64; 4];
    for index in 0..split.len() {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&split.label(index).to_le_bytes());
        hasher.update(split.listed_name(index, root).as_bytes());
        if let Some(mark) = split.map_mark(index) {
            hasher.update(&mark);
        }
        if task == TaskKind::Detection
            && let Ok(scene) = split.scene(index)
        {
            // The number is left out, because it says where the image is in the split.
            let row = Scene { image: 0, ..scene }.to_row();
            hasher.update(&row.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>());
        }
        let hash = *hasher.finalize().as_bytes();
        in_order.update(&hash);
        for (sum, word) in sums.iter_mut().zip(hash.as_chunks().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    Listing {
        images: split.len(),
        in_order: in_order.finalize().to_hex().to_string(),
        in_any_order: sums.map(|sum| format!("{sum:016x}")).concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::samples::{Samples, Stored};
    use anyhow::Result;
    use std::sync::Arc;

    /// Images that have only names and labels.
    struct Named(&'static [(&'static str, u32)]);

    impl Samples for Named {
        fn len(&self) -> usize {
            self.0.len()
        }

        fn label(&self, index: usize) -> u32 {
            self.0[index].1
        }

        fn name(&self, index: usize) -> String {
            self.0[index].0.into()
        }

        fn read(&self, _: usize, _: &mut Vec<u8>) -> Result<Stored> {
            unreachable!("no pixel is read")
        }
    }

    #[test]
    fn names_labels_and_order_count_and_the_folder_of_the_source_does_not() {
        let hashed = |samples, root| listing(&(Arc::new(Named(samples)) as Split), root, TaskKind::Classification);
        let one = hashed(&[("x/train/1.jpg", 0), ("x/train/2.jpg", 1)], "x");
        assert_eq!(one, hashed(&[("/data/y/train/1.jpg", 0), ("/data/y/train/2.jpg", 1)], "/data/y/"));
        let reversed = hashed(&[("x/train/2.jpg", 1), ("x/train/1.jpg", 0)], "x");
        assert!(reversed.in_order != one.in_order && reversed.in_any_order == one.in_any_order);
        for other in [&[("x/train/1.jpg", 0), ("x/train/2.jpg", 0)], &[("x/train/1.jpg", 0), ("x/train/3.jpg", 1)]] {
            assert_ne!(hashed(other, "x").in_any_order, one.in_any_order);
        }
    }
}
