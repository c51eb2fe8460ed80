//! The number of samples per forward pass of one replica, or `"auto"`.

use crate::usage;
use serde::{Deserialize, Serialize};
use toml::Value;

/// The number of samples into which a replica's share of a global batch is split. It changes memory and speed, and the result only
/// by rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum MicroBatch {
    /// The number of samples that the device's memory holds.
    Auto,
    Samples(usize),
}

/// The size for estimates that are made before a device is known.
const USUAL: usize = 64;
const MOST: i64 = 1 << 20;

impl MicroBatch {
    /// The number of samples that the config gives, or the size for estimates.
    pub fn samples(self) -> usize {
        match self {
            MicroBatch::Auto => USUAL,
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
            Value::Integer(n) => {
                Err(usage!("it must be even (samples are mixed in pairs); try {}", (n / 2 * 2 + 2).max(2)))
            }
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
