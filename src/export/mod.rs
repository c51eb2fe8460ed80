//! Exported models, one small file per format.

pub mod timm;

use crate::config::{Config, ExportFormat};
use crate::store::artefact;
use crate::{require, usage};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Writes `weights` (a whole target) in a format into a folder of its own; returns the folder.
pub fn export(config: &Config, weights: &Path, format: ExportFormat, into: &Path) -> Result<PathBuf> {
    require!(
        weights.exists(),
        "{}: missing; run the phases that write it first, or give --weights FILE",
        weights.display()
    );
    let artefact = artefact::read(weights)?;
    require!(
        artefact.header.index.is_none(),
        "{}: a single module cannot be exported; give a whole model, such as final.h5",
        weights.display()
    );
    let folder = match format {
        ExportFormat::Timm => into.join("timm"),
    };
    std::fs::create_dir_all(&folder).map_err(|e| usage!("{}: {e}", folder.display()))?;
    match format {
        ExportFormat::Timm => timm::write(config, &artefact, &folder)?,
    }
    Ok(folder)
}
