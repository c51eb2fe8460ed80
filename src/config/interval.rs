//! The interval between checkpoints: `"200 steps"`, `"1 epochs"`, `"10 minutes"`, `"auto"` or `"never"`.

use crate::usage;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The interval between two checkpoints of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Interval {
    /// The interval follows from the measured time to save, by the rule of Young and Daly.
    Auto,
    Steps(u64),
    Epochs(u64),
    Minutes(f64),
    /// A checkpoint is written only when a signal stops the run.
    Never,
}

impl TryFrom<String> for Interval {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Interval, anyhow::Error> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let interval = match words[..] {
            ["auto"] => Some(Interval::Auto),
            ["never"] => Some(Interval::Never),
            [n, "step" | "steps"] => n.parse().ok().filter(|&n| n > 0).map(Interval::Steps),
            [n, "epoch" | "epochs"] => n.parse().ok().filter(|&n| n > 0).map(Interval::Epochs),
            [n, "minute" | "minutes"] => {
                n.parse().ok().filter(|n: &f64| *n > 0.0 && n.is_finite()).map(Interval::Minutes)
            }
            _ => None,
        };
        interval.ok_or_else(|| {
            usage!(
                "not an interval; give \"auto\", \"200 steps\", \"1 epochs\", \"10 minutes\" or \"never\" (only when a signal \
                 stops the run)"
            )
        })
    }
}

impl From<Interval> for String {
    fn from(interval: Interval) -> String {
        interval.to_string()
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Interval::Auto => write!(f, "auto"),
            Interval::Never => write!(f, "never"),
            Interval::Steps(n) => write!(f, "{n} steps"),
            Interval::Epochs(n) => write!(f, "{n} epochs"),
            Interval::Minutes(n) => write!(f, "{n} minutes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_a_number_and_a_unit_and_anything_else_is_refused_with_examples() {
        for text in ["auto", "never", "200 steps", "3 epochs", "0.5 minutes"] {
            let interval = Interval::try_from(text.to_string()).unwrap();
            assert_eq!(interval.to_string(), text);
        }
        for bad in ["", "10", "0 steps", "-1 minutes", "inf minutes", "2 hours", "auto now"] {
            assert!(Interval::try_from(bad.to_string()).unwrap_err().to_string().contains("10 minutes"), "{bad}");
        }
    }
}
