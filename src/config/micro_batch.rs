//! The number of samples per forward pass of one replica, or `"auto"`.

use crate::usage;
use serde::{Deserialize, Serialize};
use toml::Value;

/// How many samples a replica computes at a time: its share of a global batch is split into pieces of at most this size. The number
/// changes memory and speed. Without batch norm, whose statistics are those of a micro-batch, it changes the result only by rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum MicroBatch {
    /// Chosen at the start of a phase so that it fits the memory; see `pipeline/micro_batch.rs`.
    Auto,
    Samples(usize),
}

/// The number for `Auto` in commands that choose no micro-batch by memory: estimates, `evaluate`, `assemble`, `bench`.
const SAMPLES_IF_AUTO: usize = 64;
/// The largest number that a config may give.
const MOST: i64 = 1 << 20;

impl MicroBatch {
    /// The number of samples that the config gives, or a fixed number for `Auto`.
    pub fn samples(self) -> usize {
        match self {
            MicroBatch::Auto => SAMPLES_IF_AUTO,
            MicroBatch::Samples(samples) => samples,
        }
    }
}

impl TryFrom<Value> for MicroBatch {
    type Error = anyhow::Error;

    fn try_from(value: Value) -> Result<MicroBatch, anyhow::Error> {
        match &value {
            Value::String(word) if word == "auto" => Ok(MicroBatch::Auto),
            Value::Integer(n) if *n > MOST => Err(usage!("at most {MOST}; lower it")),
            // Samples are mixed in pairs.
            Value::Integer(n) if *n >= 2 && n % 2 == 0 => Ok(MicroBatch::Samples(*n as usize)),
            Value::Integer(n) => Err(usage!(
                "it must be even and at least 2 (samples are mixed in pairs); try {}",
                (n / 2 * 2 + 2).max(2)
            )),
            _ => Err(usage!("give an even number of samples, or \"auto\"")),
        }
    }
}

impl From<MicroBatch> for Value {
    fn from(micro_batch: MicroBatch) -> Value {
        match micro_batch {
            MicroBatch::Auto => Value::String("auto".into()),
            MicroBatch::Samples(samples) => Value::Integer(samples as i64),
        }
    }
}
