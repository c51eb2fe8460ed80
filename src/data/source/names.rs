//! A list of names.

use anyhow::{Context, Result};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Names, one after another in one list of bytes. A million names take two large allocations instead of a million small ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// The bytes of all names.
    pub(super) text: Vec<u8>,
    /// The offset in `text` at which each name ends.
    pub(super) ends: Vec<u32>,
}

impl Names {
    /// Adds a name to the end.
    ///
    /// # Errors
    /// All names together exceed 4 GiB.
    pub fn push(&mut self, name: &[u8]) -> Result<()> {
        self.text.extend(name);
        self.ends.push(u32::try_from(self.text.len()).context("more than 4 GiB of file names")?);
        Ok(())
    }

    /// The bytes of a name.
    pub fn get(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        &self.text[start..self.ends[index] as usize]
    }

    /// A name as a path.
    pub fn path(&self, index: usize) -> &Path {
        Path::new(OsStr::from_bytes(self.get(index)))
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|index| self.get(index))
    }
}
