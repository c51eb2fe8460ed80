//! How ranks speak to each other: a one-page trait with a stand-in for a world of one.

pub mod mpi;
mod solo;

pub use solo::Solo;

use crate::error::{Failure, exit_code};
use anyhow::Result;

/// A set of ranks that act together. Every method but `rank` and `size` is collective: all ranks call it, in the same
/// order, with the same lengths.
pub trait Collective {
    /// This rank's number, from 0.
    fn rank(&self) -> usize;
    /// How many ranks there are.
    fn size(&self) -> usize;
    /// Sums element-wise over all ranks, in place.
    fn all_reduce(&self, values: &mut [f32]) -> Result<()>;
    /// As [`Collective::all_reduce`], in double precision (counts and losses of an evaluation).
    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()>;
    /// Waits for all ranks without burning the core that another rank may be computing on.
    fn barrier(&self) -> Result<()>;

    /// Rank zero writes files, logs and reports.
    fn is_zero(&self) -> bool {
        self.rank() == 0
    }
}

/// Brings every rank to one conclusion about something that each has tried: if any failed, all fail, the first of them
/// with its own error and the others with [`Failure::Elsewhere`], so that one message is printed.
pub fn agree<T>(group: &dyn Collective, tried: Result<T>) -> Result<T> {
    let mut codes = vec![0.0; group.size()];
    codes[group.rank()] = tried.as_ref().err().map_or(0.0, |e| exit_code(e).into());
    group.all_reduce_f64(&mut codes)?;
    match codes.iter().position(|&code| code > 0.0) {
        Some(first) if first != group.rank() => Err(Failure::Elsewhere { code: codes[first] as u8 }.into()),
        _ => tried,
    }
}

/// Has rank zero do something that the others wait for, and fail with it if it fails.
pub fn on_zero<T>(group: &dyn Collective, act: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    let done = if group.is_zero() { act().map(Some) } else { Ok(None) };
    group.barrier()?;
    agree(group, done)
}

/// Whether rank zero says yes.
pub fn zero_says(group: &dyn Collective, ask: impl FnOnce() -> Result<bool>) -> Result<bool> {
    let answer = on_zero(group, ask)?;
    let mut votes = [f64::from(u8::from(answer == Some(true)))];
    group.all_reduce_f64(&mut votes)?;
    Ok(votes[0] > 0.0)
}
