//! Checks of numbers in a config. Each error names the key, the value and the cure.

use crate::require;
use anyhow::Result;

/// Refuses a number that is not positive and finite. `usual` is the example in the error.
pub fn positive(key: &str, value: f64, usual: f64) -> Result<()> {
    require!(value > 0.0 && value.is_finite(), "{key} = {value}: it must be a positive number, such as {usual:e}");
    Ok(())
}

/// Refuses a number that is far too large, for example because of a typing error, before an allocation of that size fails.
pub fn at_most(key: &str, value: usize, most: usize) -> Result<()> {
    require!(value <= most, "{key} = {value}: at most {most}; lower it");
    Ok(())
}

/// Refuses a number that is not between 0 and 1.
pub fn probability(key: &str, value: f64) -> Result<()> {
    require!((0.0..=1.0).contains(&value), "{key} = {value}: a probability is between 0 and 1");
    Ok(())
}
