//! Checks whether files exist. Lists each of their folders once, because asking a parallel file system for many files one by one
//! is slow.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// For each folder that was listed, the names in it.
#[derive(Default)]
pub struct Listed(BTreeMap<PathBuf, HashSet<OsString>>);

impl Listed {
    /// Whether the folder of `file` has an entry of this name. Lists each folder only once.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn holds(&mut self, file: &Path) -> io::Result<bool> {
        let (folder, name) = (file.parent().unwrap_or(Path::new("")), file.file_name().unwrap_or_default());
        if !self.0.contains_key(folder) {
            let names = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
            self.0.insert(folder.into(), names);
        }
        Ok(self.0[folder].contains(name))
    }
}
