//! Lists the checkpoints in a run directory, finds the checkpoint to resume from, and removes checkpoints that are no longer
//! needed.

use super::artefact::{self, Artefact};
use super::lease::Fence;
use super::run_dir::RunDir;
use crate::error::Failure;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

impl RunDir {
    /// The checkpoints of a phase with their steps, the newest first.
    ///
    /// # Errors
    /// The folder cannot be listed, which must not be taken for an empty folder.
    pub fn checkpoints(&self, phase: &str) -> Result<Vec<(u64, PathBuf)>> {
        let step = |path: &Path| -> Option<u64> {
            path.file_name()?.to_str()?.strip_prefix(phase)?.strip_prefix('-')?.strip_suffix(".h5")?.parse().ok()
        };
        let paths = self.in_checkpoints()?;
        let mut found: Vec<(u64, PathBuf)> = paths.into_iter().filter_map(|path| Some((step(&path)?, path))).collect();
        found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
        Ok(found)
    }

    fn in_checkpoints(&self) -> Result<Vec<PathBuf>> {
        let folder = self.path.join("checkpoints");
        let paths = fs::read_dir(&folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
        paths.with_context(|| format!("{}: cannot be listed", folder.display()))
    }

    /// The path of a new checkpoint.
    pub fn checkpoint(&self, phase: &str, step: u64) -> PathBuf {
        self.path.join("checkpoints").join(format!("{phase}-{step:010}.h5"))
    }

    /// Removes the checkpoints that a phase at `step` no longer needs. Of the checkpoints up to `step`, it keeps the newest `keep`.
    /// It removes all checkpoints of later steps, because the phase refused them when it resumed. It also removes half-written
    /// files of killed writers. The caller must be the only writer of the phase and must not be writing a checkpoint. If `fence`
    /// says that another process has the phase, removes nothing. If a file cannot be removed, only warns.
    pub fn prune_checkpoints(&self, phase: &str, step: u64, keep: usize, fence: Option<&Fence>) {
        if let Err(error) = fence.map_or(Ok(()), Fence::check) {
            log::warn!("{error:#}");
            return;
        }
        let listed = self.in_checkpoints().and_then(|paths| Ok((paths, self.checkpoints(phase)?)));
        let (paths, checkpoints) = listed.unwrap_or_else(|error| {
            log::warn!("{error:#}");
            Default::default()
        });
        let half_written = paths.into_iter().filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&format!(".{phase}-")) && name.contains(".h5.partial-")
        });
        let (later, earlier): (Vec<_>, Vec<_>) = checkpoints.into_iter().partition(|(number, _)| *number > step);
        let old = earlier.into_iter().skip(keep).chain(later).map(|(_, path)| path);
        for path in half_written.chain(old) {
            if let Err(error) = fs::remove_file(&path) {
                log::warn!("{}: cannot be removed: {error}", path.display());
            }
        }
    }

    /// The newest undamaged checkpoint that was written with this recipe and whose weights derive from the artefact with the hash
    /// `meta`. Warns of every newer checkpoint that it skips.
    ///
    /// # Errors
    /// A checkpoint cannot be read. It may be undamaged, and skipping it could lose hours of work.
    pub fn newest_checkpoint(&self, phase: &str, recipe: &str, meta: Option<&str>) -> Result<Option<Artefact>> {
        for (_, path) in self.checkpoints(phase)? {
            let why = match artefact::read(&path) {
                Ok(checkpoint) if checkpoint.header.recipe != recipe => {
                    format!("{}: was written by another recipe", path.display())
                }
                Ok(checkpoint) if checkpoint.header.meta.as_deref() != meta => {
                    format!("{}: its weights derive from another model than this run's", path.display())
                }
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) if matches!(error.downcast_ref(), Some(Failure::Damaged { .. })) => format!("{error:#}"),
                Err(error) => {
                    return Err(error.context(
                        "cannot resume; if the error persists, delete this checkpoint to resume from the one before it",
                    ));
                }
            };
            log::warn!("{why}; trying the checkpoint before it");
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_checkpoints_never_displace_those_of_the_training_that_follows() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir { path: folder.path().into() };
        assert!(run.checkpoints("meta").is_err(), "a folder that cannot be listed is not an empty one");
        ["checkpoints", "leases"].iter().for_each(|name| fs::create_dir(run.file(name)).unwrap());
        let write = |step| fs::write(run.checkpoint("meta", step), "refused").unwrap();
        [80, 90].into_iter().for_each(write);
        assert!(run.newest_checkpoint("meta", "", None).unwrap().is_none(), "both are damaged");
        let steps = || run.checkpoints("meta").unwrap().into_iter().map(|(step, _)| step).collect::<Vec<_>>();
        for (step, kept) in [(5, vec![5]), (10, vec![10, 5]), (15, vec![15, 10])] {
            write(step);
            run.prune_checkpoints("meta", step, 2, None);
            assert_eq!(steps(), kept);
        }
    }
}
