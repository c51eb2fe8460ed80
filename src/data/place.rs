//! Many files read at places, by many threads at the same time, with no lock and no shared position.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A process may usually hold 1024 files; the ones beyond this many are opened for each read.
const KEPT_OPEN: usize = 256;

/// Files that stay as they are while they are read.
#[derive(Debug)]
pub struct Files {
    paths: Vec<PathBuf>,
    open: Vec<OnceLock<File>>,
}

impl Files {
    pub fn new(paths: Vec<PathBuf>) -> Files {
        let open = paths.iter().take(KEPT_OPEN).map(|_| OnceLock::new()).collect();
        Files { paths, open }
    }

    pub fn path(&self, file: usize) -> &Path {
        &self.paths[file]
    }

    /// Replaces `bytes` by `length` bytes from `offset` on.
    pub fn read(&self, file: usize, offset: u64, length: usize, bytes: &mut Vec<u8>) -> std::io::Result<()> {
        bytes.resize(length, 0);
        match self.open.get(file) {
            None => File::open(&self.paths[file])?.read_exact_at(bytes, offset),
            Some(slot) => {
                if slot.get().is_none() {
                    // Another thread may have been faster; then this one's is closed again.
                    let _ = slot.set(File::open(&self.paths[file])?);
                }
                slot.get().expect("set above").read_exact_at(bytes, offset)
            }
        }
    }
}
