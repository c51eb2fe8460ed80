//! Looks up the artefacts of a run's nodes in the run directory, and caches their headers.

use super::artefact::{self, Header};
use super::run_dir::RunDir;
use crate::run::data::DataRecord;
use crate::run::graph::Node;
use crate::run::state::{Found, Stamp};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The headers of the artefacts that were read, by path. Reading an artefact hashes the whole file, which takes too long to repeat
/// whenever `incubate status --watch` refreshes. So an artefact is read again only if its length or modification time has changed.
#[derive(Debug, Default)]
pub struct ArtefactCache(BTreeMap<PathBuf, Cached>);

/// The header of an artefact, with the length and modification time that the file had when it was read.
#[derive(Debug)]
struct Cached {
    length: u64,
    modified: SystemTime,
    header: Header,
    hash: String,
}

impl ArtefactCache {
    /// Finds the file of a node in the run directory. If the node writes an artefact, verifies the file and reads its header.
    ///
    /// # Errors
    /// The artefact or the record of the run's data cannot be read or is damaged.
    pub fn find(&mut self, run: &RunDir, node: &Node) -> Result<Found> {
        let path = run.file(&node.file);
        if node.file.is_empty() || !path.exists() {
            return Ok(Found::Nothing);
        }
        if node.expected.is_none() {
            return Ok(Found::Exists);
        }
        let data = run.data(node.row.task())?;
        let cached = self.read(&path)?;
        Ok(Found::Artefact(cached.header.stamp(&cached.hash, data.as_ref())))
    }

    /// The header of a node's artefact, if [`ArtefactCache::find`] has read it.
    pub fn header(&self, run: &RunDir, node: &Node) -> Option<&Header> {
        self.0.get(&run.file(&node.file)).map(|cached| &cached.header)
    }

    fn read(&mut self, path: &Path) -> Result<&Cached> {
        let metadata = std::fs::metadata(path)?;
        let (length, modified) = (metadata.len(), metadata.modified()?);
        let is_unchanged =
            self.0.get(path).is_some_and(|cached| (cached.length, cached.modified) == (length, modified));
        if !is_unchanged {
            self.0.remove(path);
            let (header, hash) = artefact::read_header(path)?;
            self.0.insert(path.into(), Cached { length, modified, header, hash });
        }
        Ok(&self.0[path])
    }
}

impl Header {
    /// The attributes by which a node recognises its artefact. `hash` is the content hash of the file, and `data` is the record of
    /// the run's data.
    pub fn stamp(&self, hash: &str, data: Option<&DataRecord>) -> Stamp {
        let own = self.data.as_ref().map(|data| &data.fingerprint);
        Stamp {
            index: self.index,
            depths: self.depths.clone(),
            recipe: self.recipe.clone(),
            is_of_other_data: data.zip(own).is_some_and(|(data, own)| !data.knows(own)),
            original: self.meta.clone(),
            hash: hash.into(),
        }
    }
}
