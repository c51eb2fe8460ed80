//! A world of one rank.

use super::Collective;
use anyhow::Result;
use tch::Tensor;

/// One rank alone. Its sums and barriers have nothing to do.
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn all_reduce(&self, _values: &mut Tensor) -> Result<()> {
        Ok(())
    }
    fn all_reduce_f64(&self, _values: &mut [f64]) -> Result<()> {
        Ok(())
    }
    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
