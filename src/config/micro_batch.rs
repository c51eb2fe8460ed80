//! The number of samples per forward pass of one replica, or `"auto"`.

use crate::usage;
use serde::{Deserialize, Serialize};
use toml::Value;

/// How many samples a replica computes at a time: its share of a global batch is split into pieces of at most this size. The size
/// changes memory and speed. It also changes a result that depends on statistics of a micro-batch: those of batch norm, or the number
/// of labelled pixels with `segmentation.loss_mean = "labelled"`. Any other result changes only by rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum MicroBatch {
    /// Chosen at the start of a phase so that it fits the memory (see `pipeline/micro_batch.rs`).
    Auto,
    Samples(usize),
}

/// The number for `Auto` in commands that do not fit the micro-batch to the memory: estimates, `evaluate`, `assemble`, `bench`.
const SAMPLES_IF_AUTO: usize = 64;
/// The largest number of samples that a config may give.
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
            // The number is even because samples with classes are mixed in pairs. A detection may take images one by one.
            Value::Integer(n) if *n == 1 || *n >= 2 && n % 2 == 0 => Ok(MicroBatch::Samples(*n as usize)),
            Value::Integer(n) => Err(usage!(
                "it must be even and at least 2 (samples are mixed in pairs), or 1 for a detection alone; try {}",
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
