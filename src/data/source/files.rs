//! Image files that a user names one by one, without labels.

use super::Source;
use super::bad_images::BadImages;
use super::folder::read_file;
use super::samples::{Samples, Split, Stored};
use crate::require;
use anyhow::Result;
use std::path::PathBuf;
use std::sync::Arc;

/// The files, in the order in which they were named.
struct Files(Vec<PathBuf>);

/// Makes a source of these files. Each of its two splits holds all files, and no file may be unreadable.
///
/// # Errors
/// A usage error that names the first path that is not a file.
pub fn open(files: &[PathBuf]) -> Result<Source> {
    for file in files {
        require!(file.is_file(), "{}: no such file; give JPEG or PNG images", file.display());
    }
    let split: Split = Arc::new(Files(files.to_vec()));
    Ok(Source { train: split.clone(), test: split, bad: Arc::new(BadImages::new(0)) })
}

impl Samples for Files {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn label(&self, _: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        self.0[index].display().to_string()
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        read_file(&self.0[index], bytes)?;
        Ok(Stored::Encoded)
    }
}
