//! The curves of a phase, in `logs/{phase}/`: `metrics.jsonl` with one JSON object per line, and TensorBoard events.
//!
//! A phase that resumes at step s first removes the lines of all steps after s, and rewrites the events from the remaining lines.
//! So the curves do not show repeated steps twice.

use super::process::unix_time;
use super::tensorboard::EventFile;
use anyhow::{Context, Result};
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

/// The open logs of one phase.
pub struct Metrics {
    lines: File,
    events: EventFile,
}

impl Metrics {
    /// Opens the logs of a phase that continues after `step`.
    pub fn open(folder: &Path, step: u64) -> Result<Metrics> {
        std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
        let path = folder.join("metrics.jsonl");
        let kept: Vec<Map<String, Value>> = read(folder)?
            .into_iter()
            .filter(|line| line.get("step").and_then(Value::as_u64).is_some_and(|s| s <= step))
            .collect();
        let mut text = Vec::new();
        let mut events = EventFile::create(folder)?;
        for line in &kept {
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
            events.write(line)?;
        }
        super::durable::replace_bytes(&path, &text)?;
        let lines = OpenOptions::new().append(true).open(&path);
        let lines = lines.with_context(|| format!("{}: cannot be opened", path.display()))?;
        Ok(Metrics { lines, events })
    }

    /// Logs the values of one step.
    pub fn log(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut line = Map::from_iter([("step".into(), step.into()), ("time".into(), unix_time().into())]);
        line.extend(values.iter().map(|(name, value)| (name.to_string(), Value::from(*value))));
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        self.lines.write_all(&text).context("metrics.jsonl cannot be written")?;
        self.events.write(&line)
    }
}

/// The logged lines of a phase. Incomplete lines are skipped. If there is no file, there are no lines.
///
/// # Errors
/// The file exists and cannot be read.
pub fn read(folder: &Path) -> Result<Vec<Map<String, Value>>> {
    Ok(read_and_count(folder)?.0)
}

/// Reads as [`read`] does, and also returns how many lines were skipped.
pub fn read_and_count(folder: &Path) -> Result<(Vec<Map<String, Value>>, usize)> {
    let path = folder.join("metrics.jsonl");
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        read => read.with_context(|| format!("{}: cannot be read just now; try again", path.display()))?,
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let torn = text.lines().count() - lines.len();
    Ok((lines, torn))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_incomplete_line_is_lost_and_a_file_that_cannot_be_read_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(
            &path,
            b"{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"l\xff\0\0\n{\"step\":3,\"loss\":1.5}\n{\"step\":4",
        )
        .unwrap();
        drop(Metrics::open(folder.path(), 3).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":1,\"loss\":2.5}\n{\"step\":3,\"loss\":1.5}\n");
        // Reading a folder fails, as does reading a file whose server cannot be reached.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let error = format!("{:#}", Metrics::open(folder.path(), 3).err().unwrap());
        assert!(error.contains("metrics.jsonl: cannot be read just now"), "{error}");
    }
}
