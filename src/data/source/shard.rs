//! Writes and reads one shard of a pack: an HDF5 file of many samples. `incubate pack` decides how many samples a shard has.
//!
//! # Layout, format version 1
//! ```text
//! bytes 0–511     the seal (`seal.rs`): «incubate pack, format 1», the file's length, the BLAKE3 hash of every byte from
//!                 512 on except /bytes, and where /bytes begins and ends. The samples in /bytes have checksums of their own
//! from byte 512   HDF5 (libver earliest, which h5py, h5dump and HDFView open) of n samples:
//!   attributes of /   format_version, software, encoding ("jpeg" or "raw"), split (its name), shard (its number from
//!                     0), shards (their number in the split), recipe (a hash of the names and labels of the shard's images,
//!                     of the names of the classes, and of the form in which images are packed)
//!   /classes          text: the name of each class, in order of label
//!   /bytes            u8, contiguous: the samples, one after another. Each is a JPEG file, or height × width × 3 bytes of
//!                     red, green and blue, row after row
//!   /offset           u64, n + 1: sample i is bytes[offset[i] .. offset[i + 1]]
//!   /label            u32, n
//!   /height /width    u32, n: in pixels, as stored (a JPEG's EXIF orientation is not applied)
//!   /crc32c           u32, n: the CRC-32C of each sample's bytes
//!   /name             text, n: the name of each sample in the source from which it was packed
//! ```
//! Only one thread at a time may use the HDF5 library. So the library reads only the table of a shard, once, when the shard is
//! opened. Later, samples are read directly from the file at their offsets, without the library.

use super::names::Names;
use crate::error::Failure;
use crate::seal;
use anyhow::{Context, Result, ensure};
use hdf5::types::VarLenUnicode;
use hdf5::{File, H5Type};
use std::path::Path;
use std::str::FromStr;

/// The seal with which a shard begins.
pub const SEAL: seal::Kind = seal::Kind {
    name: "pack",
    version: 1,
    cure: "delete it and start `incubate pack` again, or restore it from a copy",
};

/// The form of a shard's samples: JPEG files, or rows of RGB bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Jpeg,
    Raw,
}

impl Encoding {
    /// The value of the attribute `encoding`.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Jpeg => "jpeg",
            Encoding::Raw => "raw",
        }
    }
}

/// A shard without its samples' bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    pub encoding: Encoding,
    pub split: String,
    /// The shard's number in the split, from 0.
    pub number: usize,
    /// The number of shards in the split.
    pub shards: usize,
    /// The attribute `recipe`.
    pub recipe: String,
    pub classes: Vec<String>,
    pub samples: Table,
    /// The offset of /bytes in the file; 0 if /bytes is empty. [`read`] sets the offset, and [`write()`] ignores it.
    pub bytes_offset: u64,
}

/// The columns of a shard. Each column has one row for each sample.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    pub name: Names,
    pub label: Vec<u32>,
    pub height: Vec<u32>,
    pub width: Vec<u32>,
    pub crc32c: Vec<u32>,
    /// The offset in /bytes at which each sample ends.
    pub end: Vec<u64>,
}

#[expect(clippy::len_without_is_empty, reason = "no caller asks whether a table is empty")]
impl Table {
    pub fn len(&self) -> usize {
        self.label.len()
    }

    /// The range of sample `i` in /bytes.
    pub fn range(&self, i: usize) -> std::ops::Range<u64> {
        i.checked_sub(1).map_or(0, |before| self.end[before])..self.end[i]
    }
}

/// Writes a shard to `path`, but does not sync the file. `bytes` holds the samples, one after another.
pub fn write(path: &Path, shard: &Shard, bytes: &[u8]) -> Result<()> {
    let file = File::with_options().with_fcpl(|p| p.userblock(seal::BLOCK)).create(path)?;
    file.new_attr::<i32>().create("format_version")?.write_scalar(&SEAL.version)?;
    for (name, text) in [
        ("software", concat!("incubate ", env!("CARGO_PKG_VERSION"))),
        ("encoding", shard.encoding.name()),
        ("split", &shard.split),
        ("recipe", &shard.recipe),
    ] {
        file.new_attr::<VarLenUnicode>().create(name)?.write_scalar(&text_of(text)?)?;
    }
    for (name, number) in [("shard", shard.number), ("shards", shard.shards)] {
        file.new_attr::<u64>().create(name)?.write_scalar(&(number as u64))?;
    }
    let samples = &shard.samples;
    column(&file, "bytes", bytes)?;
    column(&file, "offset", &[&[0], &samples.end[..]].concat())?;
    for (name, numbers) in
        [("label", &samples.label), ("height", &samples.height), ("width", &samples.width), ("crc32c", &samples.crc32c)]
    {
        column(&file, name, numbers)?;
    }
    column(&file, "classes", &shard.classes.iter().map(|class| text_of(class)).collect::<Result<Vec<_>>>()?)?;
    let names = samples.name.iter().map(|name| text_of(&String::from_utf8_lossy(name)));
    column(&file, "name", &names.collect::<Result<Vec<_>>>()?)?;
    let offset = bytes_offset(&file)?;
    file.close()?;
    SEAL.set(path, offset..offset + bytes.len() as u64)?;
    Ok(())
}

fn column<T: H5Type>(file: &File, name: &str, values: &[T]) -> Result<()> {
    // The dataset has no time stamps. So shards of the same content have the same bytes.
    let dataset = file.new_dataset::<T>().obj_track_times(false).shape(values.len()).create(name)?;
    dataset.write_raw(values).with_context(|| format!("writing {name}"))
}

fn text_of(text: &str) -> Result<VarLenUnicode> {
    VarLenUnicode::from_str(text)
        .with_context(|| format!("{text:?} contains a NUL byte, which HDF5 cannot store; rename it"))
}

/// The offset of /bytes in the file; 0 if /bytes is empty.
fn bytes_offset(file: &File) -> Result<u64> {
    let bytes = file.dataset("bytes")?;
    match bytes.offset() {
        Some(offset) => Ok(offset),
        None => {
            ensure!(bytes.size() == 0, "/bytes is not contiguous");
            Ok(0)
        }
    }
}

/// Verifies all of a shard except the bytes of its samples, and reads its table.
///
/// # Errors
/// [`Failure::Damaged`] if the verified part has changed since the shard was written, or if its table does not fit together. A
/// usage error if the shard is missing or cannot be read.
pub fn read(path: &Path) -> Result<Shard> {
    let sealed = SEAL.verify(path)?;
    let parsed = parse(path, &sealed).context("its table does not fit together");
    parsed.map_err(|error| Failure::Damaged { path: path.into(), what: format!("{error:#}") }.into())
}

fn parse(path: &Path, sealed: &seal::Sealed) -> Result<Shard> {
    let file = File::open(path)?;
    let text = |name: &str| -> Result<String> { Ok(file.attr(name)?.read_scalar::<VarLenUnicode>()?.to_string()) };
    let number = |name: &str| -> Result<usize> { Ok(file.attr(name)?.read_scalar::<u64>()? as usize) };
    let numbers = |name: &str| -> Result<Vec<u32>> { Ok(file.dataset(name)?.read_raw()?) };
    let texts = |name: &str| -> Result<Vec<VarLenUnicode>> { Ok(file.dataset(name)?.read_raw()?) };
    let mut name = Names::default();
    texts("name")?.iter().try_for_each(|text| name.push(text.as_bytes()))?;
    let offset: Vec<u64> = file.dataset("offset")?.read_raw()?;
    let encoding = match text("encoding")?.as_str() {
        "jpeg" => Encoding::Jpeg,
        "raw" => Encoding::Raw,
        other => anyhow::bail!("encoding {other:?} is unknown to this version"),
    };
    let shard = Shard {
        encoding,
        split: text("split")?,
        number: number("shard")?,
        shards: number("shards")?,
        recipe: text("recipe")?,
        classes: texts("classes")?.iter().map(|text| text.to_string()).collect(),
        samples: Table {
            name,
            label: numbers("label")?,
            height: numbers("height")?,
            width: numbers("width")?,
            crc32c: numbers("crc32c")?,
            end: offset.get(1..).context("/offset is empty")?.to_vec(),
        },
        bytes_offset: bytes_offset(&file)?,
    };
    check(&shard, &offset, file.dataset("bytes")?.size() as u64)?;
    let lies_at = shard.bytes_offset..shard.bytes_offset + shard.bytes();
    ensure!(sealed.except == lies_at || shard.bytes() == 0, "/bytes is not where the seal says");
    Ok(shard)
}

/// Checks that all columns have the same length, that /offset divides /bytes into samples, and that each label has a class. In a
/// shard of raw samples, also checks that each sample has height × width × 3 bytes.
fn check(shard: &Shard, offset: &[u64], bytes: u64) -> Result<()> {
    let samples = &shard.samples;
    for (name, length) in [
        ("name", samples.name.len()),
        ("height", samples.height.len()),
        ("width", samples.width.len()),
        ("crc32c", samples.crc32c.len()),
        ("offset", samples.end.len()),
    ] {
        ensure!(length == samples.len(), "/{name} has {length} rows, /label has {}", samples.len());
    }
    ensure!(offset[0] == 0 && offset.is_sorted() && shard.bytes() == bytes, "/offset does not divide /bytes");
    ensure!(
        samples.label.iter().all(|&label| (label as usize) < shard.classes.len()),
        "a label without a class is in /label"
    );
    if shard.encoding == Encoding::Raw {
        let size = |i| 3 * u64::from(samples.height[i]) * u64::from(samples.width[i]);
        let fits = |i| samples.range(i).end - samples.range(i).start == size(i);
        ensure!((0..samples.len()).all(fits), "the bytes of a raw sample are not height × width × 3");
    }
    Ok(())
}

impl Shard {
    /// The length of /bytes.
    fn bytes(&self) -> u64 {
        self.samples.end.last().copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard() -> (Shard, Vec<u8>) {
        let mut samples = Table { label: vec![0, 1, 1], height: vec![1, 2, 1], ..Table::default() };
        samples.width = vec![2, 1, 1];
        samples.end = vec![6, 12, 15];
        samples.crc32c = vec![1, 2, 3];
        ["a/1.jpg", "b/2.jpg", "b/é.jpg"].iter().for_each(|name| samples.name.push(name.as_bytes()).unwrap());
        let shard = Shard {
            encoding: Encoding::Raw,
            split: "train".into(),
            number: 1,
            shards: 2,
            recipe: "r".into(),
            classes: vec!["a".into(), "b".into()],
            samples,
            bytes_offset: 0,
        };
        (shard, (0..15).collect())
    }

    #[test]
    fn a_shard_is_read_as_written_and_its_bytes_are_at_their_offset() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.h5");
        let (shard, bytes) = shard();
        write(&path, &shard, &bytes).unwrap();
        let found = read(&path).unwrap();
        let offset = found.bytes_offset as usize;
        assert_eq!(std::fs::read(&path).unwrap()[offset..offset + 15], bytes);
        assert_eq!(Shard { bytes_offset: 0, ..found }, shard);
        assert!(SEAL.is(&path));
    }

    #[test]
    fn a_shard_without_samples_is_written_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.h5");
        let empty = Shard { samples: Table::default(), ..shard().0 };
        write(&path, &empty, &[]).unwrap();
        assert_eq!(read(&path).unwrap(), empty);
    }

    #[test]
    fn a_changed_bit_outside_the_samples_is_found_before_hdf5_sees_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.h5");
        let (shard, bytes) = shard();
        write(&path, &shard, &bytes).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let offset = read(&path).unwrap().bytes_offset as usize;
        for byte in (0..whole.len()).filter(|byte| !(offset..offset + 15).contains(byte)).step_by(61) {
            let mut damaged = whole.clone();
            damaged[byte] ^= 1 << (byte % 8);
            std::fs::write(&path, &damaged).unwrap();
            let error = read(&path).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 3, "byte {byte}: {error:#}");
        }
    }

    #[test]
    fn a_table_that_does_not_fit_together_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.h5");
        let (good, bytes) = shard();
        let refused = |change: fn(&mut Shard)| {
            let mut bad = good.clone();
            change(&mut bad);
            write(&path, &bad, &bytes).unwrap();
            format!("{:#}", read(&path).unwrap_err())
        };
        assert!(refused(|s| s.samples.label[0] = 2).contains("label without a class"));
        assert!(refused(|s| s.samples.end[0] = 13).contains("does not divide"));
        assert!(refused(|s| s.samples.width[0] = 9).contains("height × width"));
        assert!(refused(|s| s.samples.crc32c.truncate(2)).contains("/crc32c"));
    }
}
