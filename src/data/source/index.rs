//! The index of a split: the file and label of each sample, and for tars also the sample's offset and length. In memory, a sample
//! takes the bytes of its name and 12 more bytes. In a tar it takes 24 more bytes. All samples share a few large allocations. A
//! file in the run directory keeps the index, so that a restarted run does not list its images a second time.
//!
//! # The file's format, version 2
//! ```text
//! line 1     «incubate index, format 2», a line break
//! 32 bytes   the BLAKE3 hash of all bytes after it
//! 32 bytes   the fingerprint: a hash of the names, sizes and modification times of the folders or tars, and of the folder that
//!            holds them
//! sections   each section is its length in bytes (u64), then its bytes; all numbers are little-endian. The sections are the
//!            names of the groups and their ends, the names of the samples and their ends, and then the columns group, label,
//!            offset and length of the samples. Offsets are u64, all other columns and the ends are u32
//! ```

use super::names::Names;
use anyhow::{Context, Result, ensure};
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8] = b"incubate index, format 2\n";

/// The folder of a source's index files.
#[derive(Debug, Clone)]
pub struct IndexFolder {
    pub path: PathBuf,
    /// Whether the files may be written. The files may always be read.
    pub may_write: bool,
}

/// The file that keeps a split's index.
#[derive(Debug, Clone)]
pub struct IndexFile {
    pub path: PathBuf,
    /// Whether the file may be written. The file may always be read.
    pub may_write: bool,
}

impl IndexFolder {
    /// The index file of one split.
    pub fn file(&self, split: &str) -> IndexFile {
        IndexFile { path: self.path.join(format!("{split}.index")), may_write: self.may_write }
    }
}

/// The samples of one split, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    /// The folders of images, as paths relative to the split's folder. Or the tars, as paths relative to the source's folder.
    pub groups: Names,
    /// The name of each sample: its file name in the folder, or the path of its member in the tar.
    pub names: Names,
    /// The index in `groups` of each sample's folder or tar.
    pub group: Vec<u32>,
    /// The class of each sample.
    pub label: Vec<u32>,
    /// The offset of each sample's bytes in its tar; empty for folders.
    pub offset: Vec<u64>,
    /// The length in bytes of each sample in its tar; empty for folders.
    pub length: Vec<u32>,
}

impl Index {
    pub fn len(&self) -> usize {
        self.label.len()
    }

    pub fn is_empty(&self) -> bool {
        self.label.is_empty()
    }

    /// The path of a sample's file relative to the split's folder. The samples must be in folders, not in tars.
    pub fn path(&self, index: usize) -> PathBuf {
        self.groups.path(self.group[index] as usize).join(self.names.path(index))
    }

    /// Reads the index from `file`, if the file is intact and the fingerprint of the groups has not changed. Otherwise builds the
    /// index and writes it to `file`, if the file may be written. Only warns if it cannot be written. Without a file, only builds
    /// the index.
    ///
    /// `fingerprint` computes the present fingerprint of the groups. It must change whenever a sample is added, removed or moved.
    /// `build` returns the index, and the fingerprint that it took before it listed the samples. If the fingerprint has changed
    /// during the listing, the index is not written.
    pub fn cached(
        file: Option<&IndexFile>,
        fingerprint: impl Fn(&Names) -> Result<blake3::Hash>,
        build: impl FnOnce() -> Result<(Index, blake3::Hash)>,
    ) -> Result<Index> {
        let Some(IndexFile { path, may_write }) = file else { return Ok(build()?.0) };
        if let Some((index, stored)) = fs::read(path).ok().and_then(|bytes| Self::decode(&bytes))
            && fingerprint(&index.groups).is_ok_and(|now| now == stored)
        {
            log::debug!("{}: {} samples", path.display(), index.len());
            return Ok(index);
        }
        let (index, before) = build()?;
        if *may_write {
            let written = fingerprint(&index.groups).and_then(|after| {
                ensure!(before == after, "files came or went while they were listed");
                write(path, &index.encode(before))
            });
            written.unwrap_or_else(|error| {
                log::warn!("{}: the index of the images is not kept: {error:#}", path.display())
            });
        }
        Ok(index)
    }

    /// The bytes of the index file.
    fn encode(&self, fingerprint: blake3::Hash) -> Vec<u8> {
        let mut body = fingerprint.as_bytes().to_vec();
        let mut section = |bytes: &[u8]| {
            body.extend((bytes.len() as u64).to_le_bytes());
            body.extend(bytes);
        };
        let words = |numbers: &[u32]| -> Vec<u8> { numbers.iter().flat_map(|n| n.to_le_bytes()).collect() };
        for names in [&self.groups, &self.names] {
            section(&names.text);
            section(&words(&names.ends));
        }
        section(&words(&self.group));
        section(&words(&self.label));
        section(&self.offset.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>());
        section(&words(&self.length));
        [MAGIC, blake3::hash(&body).as_bytes(), &body].concat()
    }

    /// Parses the bytes of [`Index::encode`] into the index and the fingerprint. Returns none for any other bytes.
    fn decode(bytes: &[u8]) -> Option<(Index, blake3::Hash)> {
        let (hash, body) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<32>()?;
        if blake3::hash(body) != *hash {
            return None;
        }
        let (fingerprint, mut rest) = body.split_first_chunk::<32>()?;
        let mut section = || {
            let (length, tail) = rest.split_first_chunk::<8>()?;
            let (bytes, tail) = tail.split_at_checked(u64::from_le_bytes(*length) as usize)?;
            rest = tail;
            Some(bytes)
        };
        let words =
            |bytes: &[u8]| -> Vec<u32> { bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect() };
        let mut names = || Some(Names { text: section()?.to_vec(), ends: words(section()?) });
        let (groups, names) = (names()?, names()?);
        let (group, label) = (words(section()?), words(section()?));
        let offset = section()?.as_chunks().0.iter().map(|&n| u64::from_le_bytes(n)).collect();
        let index = Index { groups, names, group, label, offset, length: words(section()?) };
        Some((index, blake3::Hash::from_bytes(*fingerprint)))
    }
}

/// Writes `bytes` to a file beside `path`, and renames the file to `path`. Does not sync the file, because a torn or lost index is
/// built anew.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().context("the index needs a folder")?;
    fs::create_dir_all(folder)?;
    let beside = path.with_extension(format!("partial-{}", std::process::id()));
    fs::write(&beside, bytes)?;
    Ok(fs::rename(&beside, path)?)
}

/// The size of a file (0 for a folder), and its modification time in seconds and nanoseconds. The stamp of a file changes if the
/// file changes. The stamp of a folder changes if an entry is added, removed or renamed.
pub type Stamp = [i64; 3];

/// The stamp of a file or folder. A link has the stamp of its target.
pub fn stamp(path: &Path) -> Result<Stamp> {
    Ok(stamp_of(&fs::metadata(path).with_context(|| format!("{}", path.display()))?))
}

/// The stamp in the metadata of a file or folder.
pub fn stamp_of(metadata: &Metadata) -> Stamp {
    let size = if metadata.is_file() { metadata.len() as i64 } else { 0 };
    [size, metadata.mtime(), metadata.mtime_nsec()]
}

/// A hash of the path and stamp of `root`, and of the names and stamps of the groups below `root`. The groups are folders or tars.
pub fn fingerprint(root: &Path, groups: &Names) -> Result<blake3::Hash> {
    let own = stamp(root)?;
    let stamps = (0..groups.len()).map(|index| stamp(&root.join(groups.path(index)))).collect::<Result<Vec<_>>>()?;
    fingerprint_of(root, own, groups.iter().zip(stamps))
}

/// Like [`fingerprint`], but from stamps that were taken earlier. `own` is the stamp of the folder `root`. `groups` gives the name
/// and stamp of each group.
pub fn fingerprint_of<'a>(
    root: &Path,
    own: Stamp,
    groups: impl Iterator<Item = (&'a [u8], Stamp)>,
) -> Result<blake3::Hash> {
    let root = root.canonicalize().with_context(|| format!("{}", root.display()))?;
    let mut hasher = blake3::Hasher::new();
    let mut add = |name: &[u8], stamp: Stamp| {
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name);
        for number in stamp {
            hasher.update(&number.to_le_bytes());
        }
    };
    add(root.as_os_str().as_bytes(), own);
    groups.for_each(|(name, stamp)| add(name, stamp));
    Ok(hasher.finalize())
}

/// The largest stored image that is read, in bytes: 256 MiB.
pub const LARGEST: u64 = 1 << 28;

/// Checks that the length of a sample in bytes is at most [`LARGEST`], and returns the length.
pub fn sample_length(length: u64) -> Result<u32> {
    ensure!(length <= LARGEST, "claims {length} bytes, more than any image that is read ({LARGEST})");
    Ok(length as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn index(samples: usize) -> Index {
        let mut index = Index::default();
        for group in 0..samples.div_ceil(10) {
            index.groups.push(format!("class-{group}").as_bytes()).unwrap();
        }
        for sample in 0..samples {
            index.names.push(format!("image-{sample}.jpg").as_bytes()).unwrap();
            index.group.push(sample as u32 / 10);
            index.label.push(sample as u32 / 10);
        }
        index
    }

    #[test]
    fn an_index_is_rebuilt_only_when_a_folder_changes_or_the_cache_is_damaged() {
        let root = tempfile::tempdir().unwrap();
        (0..3).for_each(|group| fs::create_dir(root.path().join(format!("class-{group}"))).unwrap());
        let cache = root.path().join("class-0/cache/train.index");
        fs::create_dir(cache.parent().unwrap()).unwrap();
        let built = Cell::new(0);
        let may_write = Cell::new(true);
        let meanwhile: Cell<fn(&Path)> = Cell::new(|_| {});
        let open = || {
            let build = || {
                built.set(built.get() + 1);
                let before = fingerprint(root.path(), &index(25).groups)?;
                meanwhile.get()(root.path());
                Ok((index(25), before))
            };
            let file = IndexFile { path: cache.clone(), may_write: may_write.get() };
            assert_eq!(
                Index::cached(Some(&file), |groups| fingerprint(root.path(), groups), build).unwrap(),
                index(25)
            );
            built.get()
        };
        assert_eq!([open(), open()], [1, 1]);
        fs::write(root.path().join("class-2/new.jpg"), b"").unwrap();
        assert_eq!([open(), open()], [2, 2]);
        let mut bytes = fs::read(&cache).unwrap();
        bytes[200] ^= 1;
        fs::write(&cache, &bytes).unwrap();
        assert_eq!([open(), open()], [3, 3]);
        fs::remove_file(&cache).unwrap();
        fs::create_dir(&cache).unwrap();
        assert_eq!([open(), open()], [4, 5], "no place to keep it");
        fs::remove_dir(&cache).unwrap();
        may_write.set(false);
        assert_eq!([open(), open()], [6, 7], "nothing is written");
        assert!(!cache.exists());
        may_write.set(true);
        meanwhile.set(|root| fs::write(root.join("class-1/late.jpg"), b"").unwrap());
        assert_eq!(open(), 8);
        assert!(!cache.exists(), "the listed folders were changing");
        fs::remove_file(root.path().join("class-1/late.jpg")).unwrap();
        meanwhile.set(|_| {});
        assert_eq!([open(), open()], [9, 9]);
    }

    #[test]
    fn a_truncated_file_is_no_index() {
        let bytes = index(12).encode(blake3::hash(b""));
        assert!(Index::decode(&bytes).is_some());
        assert!((0..bytes.len()).all(|length| Index::decode(&bytes[..length]).is_none()));
    }
}
