//! The run directory: where everything of one config lies.
//! ```text
//! config.toml                     the resolved config; a different one is refused
//! meta.h5 module-{i}.h5 assembled.h5 final.h5 e2e.h5     artefacts
//! checkpoints/{phase}-{step}.h5   the newest of a phase that is not done
//! leases/{phase}.{generation}.json  who may write a phase
//! progress/{phase}.json           heartbeats
//! index/{split}.index             where the images of a large source lie
//! unreadable/{host}-{pid}.txt     images that could not be read
//! logs/{phase}/                   metrics.jsonl and TensorBoard events
//! export/{format}/                exported models
//! summary.json  report.html
//! ```

use super::artefact::{self, Artefact};
use super::{durable, lease};
use crate::config::Config;
use crate::error::Failure;
use crate::{require, usage};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// The files of one run.
#[derive(Debug, Clone)]
pub struct RunDir {
    pub path: PathBuf,
}

impl RunDir {
    /// Makes the folder and writes its config, or checks that the config is the one it was started with.
    /// Rank zero does this before the others use the folder.
    pub fn open(config: &Config) -> Result<RunDir> {
        let run = RunDir { path: config.run.dir.clone() };
        for folder in ["checkpoints", "leases", "progress", "logs"] {
            fs::create_dir_all(run.path.join(folder)).map_err(|e| {
                usage!("{}: cannot make the run directory: {e}; choose another --run-dir", run.path.display())
            })?;
        }
        let file = run.config_file();
        if file.exists() {
            let before = Self::config_of(&run.path)?;
            let differences = config.differences(&before);
            require!(
                differences.is_empty(),
                "{}: this run was started with another config: {}; restore those keys, or choose another --run-dir",
                run.path.display(),
                differences.join(", ")
            );
        } else {
            durable::replace_bytes(&file, config.to_toml().as_bytes())
                .map_err(|e| usage!("{e:#}; the run directory must be writable"))?;
        }
        Ok(run)
    }

    /// The config that the run directory was started with.
    pub fn config_of(path: &Path) -> Result<Config> {
        let file = path.join("config.toml");
        let text = fs::read_to_string(&file).map_err(|e| usage!("{}: not a run directory: {e}", path.display()))?;
        // Laid over today's defaults, so that a run directory outlives a new key.
        let config = Config::parse(&text, &[])
            .map_err(|e| Failure::Damaged { path: file, what: format!("not a config: {e:#}") })?;
        Ok(config)
    }

    fn config_file(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// An artefact's path by its file name.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Where a phase keeps its metrics.
    pub fn logs(&self, phase: &str) -> PathBuf {
        self.path.join("logs").join(phase)
    }

    /// A phase's checkpoints, newest first.
    pub fn checkpoints(&self, phase: &str) -> Vec<(u64, PathBuf)> {
        let step = |path: &Path| -> Option<u64> {
            path.file_name()?.to_str()?.strip_prefix(phase)?.strip_prefix('-')?.strip_suffix(".h5")?.parse().ok()
        };
        let entries = fs::read_dir(self.path.join("checkpoints")).into_iter().flatten().flatten();
        let mut found: Vec<(u64, PathBuf)> = entries.filter_map(|e| Some((step(&e.path())?, e.path()))).collect();
        found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
        found
    }

    /// The path of a new checkpoint.
    pub fn checkpoint(&self, phase: &str, step: u64) -> PathBuf {
        self.path.join("checkpoints").join(format!("{phase}-{step:010}.h5"))
    }

    /// Removes all but the newest `keep` checkpoints of a phase, and what killed writers left half written: the caller is
    /// the phase's one writer, and has none in the making. One that has lost the phase removes nothing.
    pub fn prune_checkpoints(&self, phase: &str, keep: usize) -> Result<()> {
        if lease::is_anothers(self, phase) {
            return Ok(());
        }
        for entry in fs::read_dir(self.path.join("checkpoints")).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!(".{phase}-")) && name.contains(".h5.partial-") {
                let _ = fs::remove_file(entry.path());
            }
        }
        for (_, path) in self.checkpoints(phase).into_iter().skip(keep) {
            fs::remove_file(&path).with_context(|| format!("{}", path.display()))?;
        }
        Ok(())
    }

    /// The newest checkpoint that verifies and belongs to this recipe and meta model; warns loudly about every one that
    /// does not.
    pub fn newest_checkpoint(&self, phase: &str, recipe: &str, meta: Option<&str>) -> Option<Artefact> {
        self.checkpoints(phase).into_iter().find_map(|(_, path)| match artefact::read(&path) {
            Ok(Artefact { header, .. }) if header.recipe != recipe => {
                log::warn!("{}: written by another recipe; trying the checkpoint before it", path.display());
                None
            }
            Ok(Artefact { header, .. }) if header.meta.as_deref() != meta => {
                log::warn!("{}: grew in another meta model; trying the checkpoint before it", path.display());
                None
            }
            Ok(checkpoint) => Some(checkpoint),
            Err(error) => {
                log::warn!("{error:#}; trying the checkpoint before it");
                None
            }
        })
    }
}
