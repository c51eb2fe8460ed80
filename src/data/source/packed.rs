//! Reads packs, which `incubate pack` writes. A pack is a folder of shards `train-00000.h5`, … and `val-00000.h5`, … (or
//! `validation` or `test` in place of `val`). [`super::shard`] specifies the format of a shard.
//!
//! When a split is opened, the HDF5 library reads the tables of its shards. Afterwards many threads may read samples at the same
//! time, directly from the files. Each sample that is read is compared with its checksum.

use super::open_files::OpenFiles;
use super::samples::{Samples, Stored};
use super::shard::{self, Encoding, Shard};
use super::splits::{TRAINING, evaluation_split};
use crate::error::Failure;
use crate::{require, usage};
use anyhow::{Context, Result};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// The samples of one split.
#[derive(Debug)]
pub struct Packed {
    shards: Vec<Shard>,
    /// For each shard, the index of its first sample in the split. The last entry is the number of samples in all shards.
    starts: Vec<usize>,
    files: OpenFiles,
}

/// Opens the training and the evaluation split.
///
/// # Errors
/// A usage error if a shard is missing or belongs to another pack, or if the splits have different classes. [`Failure::Damaged`]
/// if a shard is damaged.
pub fn open(folder: &Path) -> Result<(Packed, Packed)> {
    let training = Packed::open(folder, TRAINING)?;
    let name = evaluation_name(folder)?;
    let evaluation = Packed::open(folder, name)?;
    require!(
        training.classes() == evaluation.classes(),
        "{}: the {TRAINING} and {name} shards were packed with different classes; pack both again from one source",
        folder.display()
    );
    Ok((training, evaluation))
}

fn evaluation_name(folder: &Path) -> Result<&'static str> {
    evaluation_split(folder, |name| Ok(!files(folder, name)?.is_empty()))
}

/// The paths of all shards in a folder: the training shards, and then the evaluation shards.
///
/// # Errors
/// The folder cannot be read or has several evaluation splits.
pub fn all_files(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok([files(folder, TRAINING)?, files(folder, evaluation_name(folder)?)?].concat())
}

/// The file name of a shard. Shards are numbered from 0.
pub fn file_name(split: &str, number: usize) -> String {
    format!("{split}-{number:05}.h5")
}

/// The paths of a split's shards in a folder, in order.
///
/// # Errors
/// The folder cannot be read.
pub fn files(folder: &Path, split: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|e| usage!("{}: {e}; check data.path", folder.display()))?;
    let mut found: Vec<PathBuf> = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .with_context(|| format!("{}", folder.display()))?;
    found.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix(split).is_some_and(|rest| rest.starts_with('-')) && name.ends_with(".h5")
    });
    found.sort();
    Ok(found)
}

impl Packed {
    /// Reads the tables of a split's shards.
    ///
    /// # Errors
    /// A usage error if a shard is missing or belongs to another pack. [`Failure::Damaged`] if a shard is damaged.
    pub fn open(folder: &Path, split: &str) -> Result<Packed> {
        let paths = files(folder, split)?;
        require!(
            !paths.is_empty(),
            "{}: no {split}-*.h5 is in the folder; `incubate pack SOURCE {}` writes them",
            folder.display(),
            folder.display()
        );
        let shards = paths.par_iter().map(|path| shard::read(path)).collect::<Result<Vec<Shard>>>()?;
        for (number, (shard, path)) in shards.iter().zip(&paths).enumerate() {
            let first = &shards[0];
            require!(
                shard.split == split
                    && shard.classes == first.classes
                    && shard.shards == first.shards
                    && shard.encoding == first.encoding,
                "{}: of another pack than {}; give each pack a folder of its own",
                path.display(),
                paths[0].display()
            );
            require!(
                shard.number == number && shards.len() == shard.shards,
                "{}: {} of {} shards of the split \"{split}\" are there; the same `incubate pack` command writes the missing ones",
                folder.display(),
                shards.len(),
                shard.shards
            );
        }
        let mut starts = vec![0];
        shards.iter().for_each(|shard| starts.push(starts[starts.len() - 1] + shard.samples.len()));
        Ok(Packed { shards, starts, files: OpenFiles::new(paths) })
    }

    /// The index of a sample's shard, and the sample's row in the shard.
    fn find(&self, index: usize) -> (usize, usize) {
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        (shard, index - self.starts[shard])
    }
}

impl Samples for Packed {
    fn len(&self) -> usize {
        self.starts[self.shards.len()]
    }

    fn label(&self, index: usize) -> u32 {
        let (shard, row) = self.find(index);
        self.shards[shard].samples.label[row]
    }

    fn name(&self, index: usize) -> String {
        let (shard, row) = self.find(index);
        let source = String::from_utf8_lossy(self.shards[shard].samples.name.get(row)).into_owned();
        format!("{}: sample {row} ({source})", self.files.path(shard).display())
    }

    /// The image's name in the source from which the pack was made. The name depends neither on the pack's folder nor on the shard.
    fn listed_name(&self, index: usize, _root: &str) -> String {
        let (shard, row) = self.find(index);
        String::from_utf8_lossy(self.shards[shard].samples.name.get(row)).into_owned()
    }

    fn classes(&self) -> &[String] {
        &self.shards[0].classes
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        let (number, row) = self.find(index);
        let (shard, samples) = (&self.shards[number], &self.shards[number].samples);
        let range = samples.range(row);
        self.files.read(number, shard.bytes_offset + range.start, (range.end - range.start) as usize, bytes)?;
        if crc32c::crc32c(bytes) != samples.crc32c[row] {
            let what = "its bytes have changed since it was packed; pack this shard again".into();
            return Err(Failure::Damaged { path: self.files.path(number).into(), what }.into());
        }
        Ok(match shard.encoding {
            Encoding::Jpeg => Stored::Encoded,
            Encoding::Raw => Stored::Raw { height: samples.height[row] as usize, width: samples.width[row] as usize },
        })
    }
}

/// Reads a whole shard and compares every sample with its checksum. Returns the shard without its samples' bytes.
///
/// # Errors
/// [`Failure::Damaged`] if the table or a sample is damaged. If samples are damaged, the error gives their number and the names of
/// the first five. Another error if the shard cannot be read.
pub fn verify(path: &Path) -> Result<Shard> {
    let shard = shard::read(path)?;
    let packed =
        Packed { starts: vec![0, shard.samples.len()], files: OpenFiles::new(vec![path.into()]), shards: vec![shard] };
    let mut bytes = Vec::new();
    let mut damaged = Vec::new();
    for row in 0..packed.len() {
        match packed.read(row, &mut bytes) {
            Ok(_) => {}
            Err(error) if error.is::<Failure>() => damaged.push(row),
            Err(error) => {
                return Err(error.context(format!("{}: the shard cannot be read now; try again", path.display())));
            }
        }
    }
    let names: Vec<String> = damaged
        .iter()
        .take(5)
        .map(|&row| format!("{row} ({})", String::from_utf8_lossy(packed.shards[0].samples.name.get(row))))
        .collect();
    if !damaged.is_empty() {
        let more = if damaged.len() > names.len() { ", …" } else { "" };
        let what = format!(
            "{} of {} samples are damaged: {}{more}; {}",
            damaged.len(),
            packed.len(),
            names.join(", "),
            shard::SEAL.cure
        );
        return Err(Failure::Damaged { path: path.into(), what }.into());
    }
    Ok(packed.shards.into_iter().next().expect("the list holds one shard"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shard::Table;

    /// Writes shard `number` of `shards` with two samples, whose numbers are `first` and `first + 1`. A sample is two bytes, which
    /// both are its number.
    fn write(folder: &Path, split: &str, number: usize, shards: usize, first: u8, classes: &[&str]) {
        let bytes: Vec<u8> = (first..first + 2).flat_map(|sample| [sample; 2]).collect();
        let mut samples = Table { label: vec![0, 1], end: vec![2, 4], ..Table::default() };
        (samples.height, samples.width) = (vec![1; 2], vec![1; 2]);
        samples.crc32c = bytes.chunks(2).map(crc32c::crc32c).collect();
        (first..first + 2).for_each(|sample| samples.name.push(format!("{sample}.jpg").as_bytes()).unwrap());
        let shard = Shard {
            encoding: Encoding::Jpeg,
            split: split.into(),
            number,
            shards,
            recipe: String::new(),
            classes: classes.iter().map(|class| class.to_string()).collect(),
            samples,
            bytes_offset: 0,
        };
        shard::write(&folder.join(file_name(split, number)), &shard, &bytes).unwrap();
    }

    #[test]
    fn samples_are_numbered_through_all_shards() {
        let folder = tempfile::tempdir().unwrap();
        (0..3).for_each(|number| write(folder.path(), "train", number, 3, 2 * number as u8, &["a", "b"]));
        let packed = Packed::open(folder.path(), "train").unwrap();
        let mut bytes = Vec::new();
        for sample in 0..6 {
            assert_eq!(packed.read(sample, &mut bytes).unwrap(), Stored::Encoded);
            assert_eq!((&bytes[..], packed.label(sample)), (&[sample as u8; 2][..], sample as u32 % 2));
        }
        assert!(
            packed.len() == 6 && packed.name(4).ends_with("train-00002.h5: sample 0 (4.jpg)"),
            "{}",
            packed.name(4)
        );
        assert_eq!(packed.listed_name(4, ""), "4.jpg");
    }

    #[test]
    fn a_missing_shard_and_one_of_another_pack_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = || format!("{:#}", open(folder.path()).map(|_| ()).unwrap_err());
        write(folder.path(), "val", 0, 1, 0, &["a", "b"]);
        write(folder.path(), "train", 0, 2, 0, &["a", "b"]);
        assert!(refused().contains("1 of 2 shards"), "{}", refused());
        write(folder.path(), "train", 1, 2, 2, &["a", "c"]);
        assert!(refused().contains("train-00001.h5: of another pack than"), "{}", refused());
        (0..2).for_each(|number| write(folder.path(), "train", number, 2, 0, &["a", "c"]));
        assert!(refused().contains("different classes"), "{}", refused());
        write(folder.path(), "test", 0, 1, 0, &["a", "b"]);
        assert!(refused().contains("val and test"), "{}", refused());
        std::fs::remove_file(folder.path().join("val-00000.h5")).unwrap();
        write(folder.path(), "test", 0, 1, 0, &["a", "c"]);
        assert_eq!(open(folder.path()).unwrap().1.len(), 2);
        assert_eq!(all_files(folder.path()).unwrap().len(), 3);
    }
}
