//! `incubate verify`: reads and verifies artefacts and packed shards.

use super::print;
use crate::config::Format;
use crate::data;
use crate::data::source::{packed, shard};
use crate::error::Failure;
use crate::store::{RunDir, artefact};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Reads one file, all artefacts and checkpoints of a run directory, or all shards of a pack. Names each damaged file, and returns
/// the first error.
pub fn verify(path: &Path, json: bool) -> Result<()> {
    let is_pack = path.is_dir() && data::format_of(path) == Some(Format::Packed);
    let files = match path.is_dir() {
        true if is_pack => packed::all_files(path)?,
        true => artefacts_in(path)?,
        false => vec![path.to_path_buf()],
    };
    let mut first_error = None;
    let mut results = Vec::new();
    for file in files {
        let verified = verify_file(&file);
        let ok = verified.is_ok();
        let verdict = verified.as_ref().map_or_else(|error| format!("{error:#}"), |text| format!("ok, {text}"));
        results.push(serde_json::json!({"file": file, "ok": ok, "text": verdict}));
        if !json {
            // The text of an error already names the file.
            print(&if ok { format!("{}: {verdict}\n", file.display()) } else { verdict + "\n" })?;
        }
        first_error = first_error.or(verified.err());
    }
    if json {
        print(&(serde_json::to_string_pretty(&results)? + "\n"))?;
    }
    // Every shard in the folder may be intact although a shard of the pack is missing.
    first_error = first_error.or_else(|| if is_pack { packed::open(path).err() } else { None });
    first_error.map_or(Ok(()), Err)
}

/// Verifies a file and describes its content.
fn verify_file(file: &Path) -> Result<String> {
    if shard::SEAL.is(file) {
        let shard = packed::verify(file)?;
        return Ok(format!("{} {} samples, {}", shard.samples.len(), shard.split, shard.encoding.name()));
    }
    let artefact = artefact::read(file)?;
    Ok(format!("{} tensors, blake3 {}", artefact.weights.len(), artefact.hash))
}

fn artefacts_in(folder: &Path) -> Result<Vec<PathBuf>> {
    RunDir::config_of(folder)?;
    let run = RunDir { path: folder.into() };
    let mut files = Vec::new();
    for path in [folder, &run.file("checkpoints")] {
        let entries = match std::fs::read_dir(path).and_then(|entries| entries.collect::<Result<Vec<_>, _>>()) {
            // A copy of a run directory may leave out the folder of checkpoints.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.with_context(|| format!("{}: cannot be listed", path.display()))?,
        };
        let found = entries.into_iter().map(|entry| entry.path());
        let mut found: Vec<PathBuf> = found.filter(|p| p.extension().is_some_and(|e| e == "h5")).collect();
        found.sort();
        files.append(&mut found);
    }
    if files.is_empty() {
        return Err(Failure::Usage(format!("{}: no artefacts yet", folder.display())).into());
    }
    Ok(files)
}
