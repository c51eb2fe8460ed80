//! Writes TensorBoard event files. They hold `Event` messages (tensorflow/core/util/event.proto) in TFRecord frames: length,
//! masked CRC-32C of the length, payload, masked CRC-32C of the payload.

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// The event file of a phase.
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// Creates the file in `folder`, or truncates the existing file.
    pub fn create(folder: &Path) -> Result<EventFile> {
        // TensorBoard reads files whose name contains «tfevents».
        let path = folder.join("events.out.tfevents.incubate");
        let file = File::create(&path).with_context(|| format!("{}: cannot be made", path.display()))?;
        let mut events = EventFile { file };
        let mut event = Vec::new();
        double(&mut event, 1, super::process::unix_time());
        bytes(&mut event, 3, b"brain.Event:2");
        events.record(&event)?;
        Ok(events)
    }

    /// Writes the numbers of a metrics line, except its step and time, as scalars of that step and time.
    pub fn write(&mut self, line: &Map<String, Value>) -> Result<()> {
        let number = |key: &str| line.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        for (name, value) in line.iter().filter(|(name, _)| !matches!(name.as_str(), "step" | "time")) {
            let Some(value) = value.as_f64() else { continue };
            let mut scalar = Vec::new();
            bytes(&mut scalar, 1, name.as_bytes());
            scalar.push(2 << 3 | 5);
            scalar.extend((value as f32).to_le_bytes());
            let mut summary = Vec::new();
            bytes(&mut summary, 1, &scalar);
            let mut event = Vec::new();
            double(&mut event, 1, number("time"));
            event.push(2 << 3);
            varint(&mut event, number("step") as u64);
            bytes(&mut event, 5, &summary);
            self.record(&event)?;
        }
        Ok(())
    }

    /// Writes a message in its frame.
    fn record(&mut self, payload: &[u8]) -> Result<()> {
        let length = (payload.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(payload.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length));
        record.extend(payload);
        record.extend(masked_crc(payload));
        self.file.write_all(&record).context("the TensorBoard events cannot be written")
    }
}

fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8).to_le_bytes()
}

/// Appends a number in Protocol Buffers' variable length: seven bits in each byte, the lowest first.
fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

fn double(out: &mut Vec<u8>, field: u8, value: f64) {
    out.push(field << 3 | 1);
    out.extend(value.to_le_bytes());
}
