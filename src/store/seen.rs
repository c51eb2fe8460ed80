//! What the files of a run directory say of its nodes.

use super::artefact::{self, Header};
use super::run_dir::RunDir;
use crate::run::graph::Node;
use crate::run::state::{Found, Stamp};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The artefacts that were read, by path. An artefact is hashed whole before it is believed, which is too much for every
/// look of `incubate status --watch`: it is read again only if its length or time of change differs.
#[derive(Debug, Default)]
pub struct Seen(BTreeMap<PathBuf, Read>);

/// An artefact as it was when it was read.
#[derive(Debug)]
struct Read {
    length: u64,
    changed: SystemTime,
    header: Header,
    hash: String,
}

impl Seen {
    /// What is in the place of a node's file in the run directory.
    ///
    /// # Errors
    /// There is an artefact that cannot be read, or is damaged.
    pub fn look(&mut self, run: &RunDir, node: &Node) -> Result<Found> {
        let path = run.file(&node.file);
        if node.file.is_empty() || !path.exists() {
            return Ok(Found::Nothing);
        }
        if node.expected.is_none() {
            return Ok(Found::Whole);
        }
        let read = self.read(&path)?;
        Ok(Found::Artefact(read.header.stamp(&read.hash)))
    }

    /// The header of a node's artefact, if [`Seen::look`] has read it.
    pub fn header(&self, run: &RunDir, node: &Node) -> Option<&Header> {
        self.0.get(&run.file(&node.file)).map(|read| &read.header)
    }

    fn read(&mut self, path: &Path) -> Result<&Read> {
        let found = std::fs::metadata(path)?;
        let (length, changed) = (found.len(), found.modified()?);
        let is_unchanged = self.0.get(path).is_some_and(|read| (read.length, read.changed) == (length, changed));
        if !is_unchanged {
            self.0.remove(path);
            let (header, hash) = artefact::read_header(path)?;
            self.0.insert(path.into(), Read { length, changed, header, hash });
        }
        Ok(&self.0[path])
    }
}

impl Header {
    /// What tells whose artefact it is, given its hash.
    pub fn stamp(&self, hash: &str) -> Stamp {
        Stamp {
            index: self.index,
            depths: self.depths.clone(),
            recipe: self.recipe.clone(),
            original: self.meta.clone(),
            hash: hash.into(),
        }
    }
}
