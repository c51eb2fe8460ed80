//! A phase's curves: `metrics.jsonl` (one JSON object per line) and TensorBoard events, in `logs/{phase}/`.
//!
//! A phase that resumes at step s first drops what was logged after s and rewrites the events from the lines that
//! stay, so that a restarted run shows one clean curve.

use super::progress::unix_time;
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
    /// Opens the logs of a phase that goes on after `step`.
    pub fn open(folder: &Path, step: u64) -> Result<Metrics> {
        std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
        let path = folder.join("metrics.jsonl");
        let kept: Vec<Map<String, Value>> = read(folder)
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
        let lines = OpenOptions::new().append(true).open(&path).with_context(|| format!("{}", path.display()))?;
        Ok(Metrics { lines, events })
    }

    /// Logs values of one step.
    pub fn log(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut line = Map::from_iter([("step".into(), step.into()), ("time".into(), unix_time().into())]);
        line.extend(values.iter().map(|(name, value)| (name.to_string(), Value::from(*value))));
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        self.lines.write_all(&text).context("metrics.jsonl")?;
        self.events.write(&line)
    }
}

/// The logged lines of a phase; a torn last line is left out.
pub fn read(folder: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
