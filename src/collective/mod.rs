//! How ranks, and the replicas inside them, speak to each other: a one-page trait with a stand-in for a world of one.

pub mod mpi;
pub mod nccl;
pub mod replicas;
mod solo;

pub use solo::Solo;

use crate::error::{Failure, exit_code};
use anyhow::Result;
use std::time::Duration;
use tch::Tensor;

/// A set of ranks, or of their replicas, that act together. Every method but `rank` and `size` is collective: all
/// members call it, in the same order, with the same lengths.
pub trait Collective {
    /// This member's number, from 0.
    fn rank(&self) -> usize;
    /// How many there are.
    fn size(&self) -> usize;
    /// Sums element-wise over all members, in place: contiguous fp32, on this member's device.
    fn all_reduce(&self, values: &mut Tensor) -> Result<()>;
    /// As [`Collective::all_reduce`], in double precision (counts and losses of an evaluation).
    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()>;
    /// Waits for all members without burning the core that another may be computing on.
    fn barrier(&self) -> Result<()>;

    /// Returns when `is_here` says that something which follows a sum has happened on this member's device.
    ///
    /// # Errors
    /// It will not happen, as another member is gone.
    fn settle(&self, is_here: &dyn Fn() -> Result<bool>) -> Result<()> {
        wait_for(is_here)
    }

    /// Rank zero writes files, logs and reports.
    fn is_zero(&self) -> bool {
        self.rank() == 0
    }
}

fn wait_for(is_here: &dyn Fn() -> Result<bool>) -> Result<()> {
    while !is_here()? {
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
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

/// Gives everybody rank zero's bytes; meant for a few of them.
pub fn from_zero<const N: usize>(group: &dyn Collective, own: [u8; N]) -> Result<[u8; N]> {
    let mut values = own.map(|byte| if group.is_zero() { f64::from(byte) } else { 0.0 });
    group.all_reduce_f64(&mut values)?;
    Ok(values.map(|value| value as u8))
}

/// Whether rank zero says yes.
pub fn zero_says(group: &dyn Collective, ask: impl FnOnce() -> Result<bool>) -> Result<bool> {
    let answer = on_zero(group, ask)?;
    let mut votes = [f64::from(u8::from(answer == Some(true)))];
    group.all_reduce_f64(&mut votes)?;
    Ok(votes[0] > 0.0)
}
