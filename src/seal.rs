//! The seal of a finished file: a text in HDF5's user block, the first 512 bytes of the file. The seal holds the length of the file
//! and the hash of all bytes after the block. So damage is found before HDF5 parses any byte. The hash may leave out a range of
//! bytes. In a pack this range holds the images, each with its own checksum, which is compared when the image is read.
//! ```text
//! incubate KIND, format VERSION
//! length BYTES
//! blake3 HEX
//! except FROM TO          only if a range is left out
//! An HDF5 file behind a user block of 512 bytes; …
//! ```

use crate::error::Failure;
use crate::usage;
use anyhow::Result;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The size of the user block in bytes.
pub const BLOCK: u64 = 512;

/// A kind of sealed file.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// `artefact` or `pack`.
    pub name: &'static str,
    /// The version of the format.
    pub version: i32,
    /// What to do about a damaged file, for the error text.
    pub cure: &'static str,
}

/// The content of a verified seal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// The hash of all bytes behind the user block, apart from the bytes in `except`, in hexadecimal.
    pub hash: String,
    /// The range of bytes that the hash leaves out; empty if the hash leaves out nothing.
    pub except: Range<u64>,
}

impl Kind {
    /// Whether a file begins with a seal of this kind, of any version.
    pub fn is(&self, path: &Path) -> bool {
        let magic = self.magic();
        let mut begin = vec![0; magic.len()];
        File::open(path).and_then(|mut file| file.read_exact(&mut begin)).is_ok() && begin == magic.as_bytes()
    }

    /// Writes the user block of a finished HDF5 file, which must have left room for the block. Returns the hash that
    /// [`Sealed::hash`] describes.
    pub fn set(&self, path: &Path, except: Range<u64>) -> Result<String> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = file.metadata()?.len();
        // The disk writes while the content, which is still in the page cache, is hashed.
        start_writing(&file);
        let hash = hash(&mut file, &except, length)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&self.block(length, &hash, &except))?;
        Ok(hash)
    }

    /// Verifies a file against its user block.
    ///
    /// # Errors
    /// [`Failure::Damaged`] if the file has no seal of this kind and version, or if any byte outside the left-out range has changed
    /// since [`Kind::set`]; a usage error if the file is missing or cannot be read.
    pub fn verify(&self, path: &Path) -> Result<Sealed> {
        let damaged = |what: String| Failure::Damaged { path: path.into(), what };
        // A read error does not mean damage: a shared file system may fail for a moment.
        let unreadable =
            |error: &Error| usage!("{}: cannot be read: {error}; try again, or check its disk", path.display());
        let mut file = File::open(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => usage!("{}: missing; {}", path.display(), self.cure_if_missing()),
            _ => unreadable(&error),
        })?;
        let length = file.metadata()?.len();
        let mut block = Vec::with_capacity(BLOCK as usize);
        (&mut file).take(BLOCK).read_to_end(&mut block).map_err(|error| unreadable(&error))?;
        let magic = self.magic();
        // The file may belong to another program, so do not advise deleting it.
        if !block.starts_with(&magic.as_bytes()[..magic.len().min(block.len())]) {
            return Err(damaged(format!(
                "not {} of incubate (its first bytes differ); name another file, or move this file away",
                self.with_article()
            ))
            .into());
        }
        if block.len() < BLOCK as usize {
            return Err(damaged(format!("truncated: only {length} bytes are left; {}", self.cure)).into());
        }
        let text = String::from_utf8_lossy(&block);
        let mut lines = text.lines();
        let version = lines.next().and_then(|line| line.strip_prefix(&magic)).unwrap_or_default();
        if version != self.version.to_string() {
            return Err(damaged(format!("format {version}, but this incubate reads format {}", self.version)).into());
        }
        let mut field = |name: &str| {
            lines.next().and_then(|l| l.strip_prefix(name)).map(|v| v.trim().to_string()).unwrap_or_default()
        };
        let (stored_length, stored_hash, except) = (field("length "), field("blake3 "), range(&field("except ")));
        if stored_length != length.to_string() {
            let what = format!("{length} bytes long, but {stored_length} were written; {}", self.cure);
            return Err(damaged(what).into());
        }
        let hash = hash(&mut file, &except, length).map_err(|error| unreadable(&error))?;
        // The whole block is compared, so that a change in any of its bytes is found.
        if hash != stored_hash || block != self.block(length, &hash, &except) {
            return Err(damaged(format!("its bytes have changed since it was written; {}", self.cure)).into());
        }
        Ok(Sealed { hash, except })
    }

    /// What to do about a missing file, for the error text.
    fn cure_if_missing(&self) -> &'static str {
        match self.name {
            "pack" => "write it with `incubate pack`, or name another file",
            _ => "run the phase that writes it (`incubate run CONFIG` runs them all), or name another file",
        }
    }

    fn magic(&self) -> String {
        format!("incubate {}, format ", self.name)
    }

    fn with_article(&self) -> String {
        let article = if self.name.starts_with('a') { "an" } else { "a" };
        format!("{article} {}", self.name)
    }

    fn block(&self, length: u64, hash: &str, except: &Range<u64>) -> Vec<u8> {
        let left_out =
            if except.is_empty() { String::new() } else { format!("except {} {}\n", except.start, except.end) };
        let text = format!(
            "{}{}\nlength {length}\nblake3 {hash}\n{left_out}\
             An HDF5 file behind a user block of {BLOCK} bytes; open it with h5py, h5dump or HDFView.\n",
            self.magic(),
            self.version
        );
        let mut bytes = text.into_bytes();
        bytes.resize(BLOCK as usize, 0);
        bytes
    }
}

/// Starts to write the present content of a file to the disk, and does not wait. Only a later sync makes the content durable.
pub fn start_writing(file: &File) {
    // SAFETY: the descriptor is open, and no memory is passed. A failure does not matter, because the later sync writes the rest.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Parses `FROM TO`. The empty text of a seal without such a line gives an empty range. A malformed text does too, and then
/// [`Kind::verify`] finds that the block differs.
fn range(text: &str) -> Range<u64> {
    let numbers = text.split_once(' ').and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
    numbers.map_or(0..0, |(from, to)| from..to)
}

/// The hash of all bytes behind the user block, apart from the range `except`.
fn hash(file: &mut File, except: &Range<u64>, length: u64) -> std::io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 4 << 20];
    let gap = if except.is_empty() { length..length } else { except.clone() };
    for part in [BLOCK..gap.start, gap.end..length] {
        file.seek(SeekFrom::Start(part.start))?;
        let mut part = file.take(part.end.saturating_sub(part.start));
        loop {
            match part.read(&mut buffer)? {
                0 => break,
                n => hasher.update_rayon(&buffer[..n]),
            };
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
