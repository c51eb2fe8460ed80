//! Reads images with label maps in the layout of ADE20K. JPEG and PNG files are at any depth below `images/SPLIT/`. The label map
//! of an image is the PNG file of the same path and name below `annotations/SPLIT/`. The training split is called `training` or
//! `train`, and the evaluation split `validation`, `val` or `test`. Images are numbered in the order of their paths.

use super::folder::{Folder, read_file};
use super::listed::Listed;
use super::samples::{Samples, Stored, StoredMap};
use super::splits::{TRAINING, evaluation_split};
use crate::{require, usage};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

const IMAGES: &str = "images";
const MAPS: &str = "annotations";
/// The number of bytes at the end of a label map's file that show whether the map has changed. The pixel data of a PNG end with a
/// checksum of all pixels (zlib, RFC 1950). After the checksum there are only short chunks, such as texts.
const END: u64 = 256;

/// One split of images with label maps.
#[derive(Debug)]
pub struct Pairs {
    images: Folder,
    /// The folder of the label maps.
    maps: PathBuf,
}

/// Opens the training and the evaluation split.
///
/// # Errors
/// A usage error if a split is missing or has fewer than two images. Also if there are several evaluation splits, or if an image
/// has no label map.
pub fn open(folder: &Path) -> Result<(Pairs, Pairs)> {
    let images = folder.join(IMAGES);
    require!(
        images.is_dir(),
        "{}: no such folder; segmentation.path must hold images/SPLIT/*.jpg (or .jpeg, .png) and annotations/SPLIT/*.png, where \
         SPLIT is training or train, and validation, val or test",
        images.display()
    );
    let is_there = |name: &str| images.join(name).is_dir();
    let training = ["training", TRAINING].into_iter().find(|name| is_there(name)).unwrap_or(TRAINING);
    let evaluation = evaluation_split(&images, |name| Ok(is_there(name)))?;
    Ok((Pairs::open(folder, training)?, Pairs::open(folder, evaluation)?))
}

impl Pairs {
    fn open(folder: &Path, split: &str) -> Result<Pairs> {
        let pairs =
            Pairs { images: Folder::flat(&folder.join(IMAGES).join(split))?, maps: folder.join(MAPS).join(split) };
        pairs.require_maps()?;
        Ok(pairs)
    }

    /// Fails if an image has no label map.
    fn require_maps(&self) -> Result<()> {
        let mut listed = Listed::default();
        for index in 0..self.len() {
            let map = self.map(index);
            let is_there = listed.holds(&map).map_err(|e| {
                let folder = map.parent().unwrap_or(Path::new(""));
                usage!("{}: {e}; it must hold the label maps", folder.display())
            })?;
            require!(
                is_there,
                "{}: its label map {} is missing; add it, or remove the image",
                self.name(index),
                map.display()
            );
        }
        Ok(())
    }

    /// The path of an image's label map.
    fn map(&self, index: usize) -> PathBuf {
        // The path of an image begins with `./`, because the index calls the split's folder `.`. `components` removes the dot.
        self.maps.join(self.images.path(index).with_extension("png")).components().collect()
    }
}

impl Samples for Pairs {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn label(&self, _: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        Path::new(&self.images.name(index)).components().collect::<PathBuf>().display().to_string()
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        self.images.read(index, bytes)
    }

    fn map_name(&self, index: usize) -> String {
        self.map(index).display().to_string()
    }

    fn map_mark(&self, index: usize) -> Option<Vec<u8>> {
        let mut map = File::open(self.map(index)).ok()?;
        let length = map.metadata().ok()?.len();
        map.seek(SeekFrom::Start(length.saturating_sub(END))).ok()?;
        let mut mark = length.to_le_bytes().to_vec();
        map.take(END).read_to_end(&mut mark).ok()?;
        Some(mark)
    }

    fn read_map(&self, index: usize, bytes: &mut Vec<u8>) -> Result<StoredMap> {
        read_file(&self.map(index), bytes).context("it cannot be read")?;
        Ok(StoredMap::Png)
    }
}

#[cfg(test)]
mod tests {
    use super::super::folder::tests::folder;
    use super::*;

    const WHOLE: [&str; 8] = [
        "images/training/b.jpg",
        "images/training/sub/a.png",
        "images/validation/1.jpeg",
        "images/validation/2.JPG",
        "annotations/training/b.png",
        "annotations/training/sub/a.png",
        "annotations/validation/1.png",
        "annotations/validation/2.png",
    ];

    #[test]
    fn every_image_has_the_label_map_of_its_name() {
        let folder = folder(&WHOLE);
        let (training, evaluation) = open(folder.path()).unwrap();
        assert_eq!((training.len(), evaluation.len()), (2, 2));
        let mut bytes = Vec::new();
        for (pairs, index, image, map) in [
            (&training, 0, WHOLE[0], WHOLE[4]),
            (&training, 1, WHOLE[1], WHOLE[5]),
            (&evaluation, 1, WHOLE[3], WHOLE[7]),
        ] {
            assert_eq!(pairs.name(index), folder.path().join(image).display().to_string());
            assert_eq!(pairs.map_name(index), folder.path().join(map).display().to_string());
            pairs.read_map(index, &mut bytes).unwrap();
            assert_eq!(bytes, map.as_bytes());
        }
    }

    #[test]
    fn a_label_in_the_first_row_changes_the_mark_of_a_map_that_keeps_its_length() {
        let folder = folder(&WHOLE);
        let (training, _) = open(folder.path()).unwrap();
        let mark = |first: u8| {
            let mut encoder = png::Encoder::new(File::create(folder.path().join(WHOLE[4])).unwrap(), 100, 100);
            encoder.set_compression(png::Compression::NoCompression);
            let mut labels: Vec<u8> = (0..10_000u32).map(|pixel| (pixel % 7) as u8).collect();
            labels[3] = first;
            encoder.write_header().unwrap().write_image_data(&labels).unwrap();
            let mark = training.map_mark(0).unwrap();
            assert_eq!(mark.len(), 8 + 256);
            mark
        };
        let (one, other) = (mark(3), mark(4));
        assert_eq!(one[..8], other[..8], "the files have one length");
        assert!(one != other && one == mark(3));
        assert_eq!(training.map_mark(1).unwrap()[8..], *WHOLE[5].as_bytes(), "a short file is taken whole");
    }

    #[test]
    fn a_missing_label_map_folder_or_split_is_named_with_the_cure() {
        let fault = |missing: &str| {
            let files: Vec<&str> = WHOLE.into_iter().filter(|file| !file.starts_with(missing)).collect();
            open(folder(&files).path()).unwrap_err().to_string()
        };
        for (missing, words) in [
            ("annotations/training/sub/a.png", &["images/training/sub/a.png", "annotations/training/sub: "][..]),
            ("annotations/validation/2.png", &["images/validation/2.JPG", "annotations/validation/2.png is missing"]),
            ("images/training", &["images/train"]),
            ("images", &["segmentation.path must hold"]),
        ] {
            let error = fault(missing);
            assert!(words.iter().any(|word| error.contains(word)), "{missing}: {error}");
        }
    }
}
