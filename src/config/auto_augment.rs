//! timm's notation of RandAugment policies (timm 1.0: `auto_augment.py`, `rand_augment_transform`).

use crate::{require, usage};
use anyhow::Result;

/// A RandAugment policy, such as `rand-m9-mstd0.5-inc1`.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// The strength of the operations, from 0 to 10.
    pub magnitude: f64,
    /// The standard deviation of the magnitude.
    pub deviation: f64,
    /// How many operations are drawn for each image.
    pub layers: usize,
    /// The probability that a drawn operation is applied.
    pub probability: f64,
    /// Whether a higher magnitude strengthens every operation that depends on the magnitude. If false, a higher magnitude weakens
    /// some operations, such as posterization and solarization.
    pub increasing: bool,
}

impl Policy {
    /// Reads timm's notation: `rand`, then in any order `-m9` for the magnitude, `-n2` for the operations per image, `-p0.5` for
    /// the probability of each, `-mstd0.5` for the deviation, and `-inc1` for increasing. An empty text means no policy.
    pub fn parse(text: &str) -> Result<Option<Policy>> {
        if text.is_empty() {
            return Ok(None);
        }
        let mut sections = text.split('-');
        let fault = |section: &str| {
            usage!(
                "data.auto_augment = {text:?}: {section:?} is not understood; give \"\" or a policy such as \
                 \"rand-m9-mstd0.5-inc1\" (also n and p)"
            )
        };
        let first = sections.next().unwrap_or_default();
        require!(first == "rand", "{}", fault(first));
        let mut policy = Policy { magnitude: 10.0, deviation: 0.0, layers: 2, probability: 0.5, increasing: false };
        for section in sections {
            let digits = section.find(|c: char| c.is_ascii_digit()).ok_or_else(|| fault(section))?;
            let (key, value) = section.split_at(digits);
            let number: f64 = value.parse().map_err(|_| fault(section))?;
            match key {
                "m" if number <= 10.0 => policy.magnitude = number,
                "mstd" => policy.deviation = number,
                "n" if number.fract() == 0.0 && number <= 16.0 => policy.layers = number as usize,
                "p" if number <= 1.0 => policy.probability = number,
                "inc" if number == 0.0 || number == 1.0 => policy.increasing = number == 1.0,
                _ => return Err(fault(section)),
            }
        }
        Ok(Some(policy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timms_notation_is_read_and_what_it_does_not_know_is_refused() {
        let policy = Policy::parse("rand-m9-mstd0.5-inc1").unwrap().unwrap();
        let expected = Policy { magnitude: 9.0, deviation: 0.5, layers: 2, probability: 0.5, increasing: true };
        assert_eq!(policy, expected);
        let other = Policy::parse("rand-n3-p1").unwrap().unwrap();
        assert_eq!((other.layers, other.probability, other.magnitude, other.increasing), (3, 1.0, 10.0, false));
        assert_eq!(Policy::parse("").unwrap(), None);
        for wrong in ["augmix-m5", "rand-m11", "rand-x1", "rand-m", "rand-inc2", "rand-n1.5"] {
            let error = Policy::parse(wrong).unwrap_err().to_string();
            assert!(error.contains("data.auto_augment") && error.contains(wrong), "{error}");
        }
    }
}
