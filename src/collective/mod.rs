//! Communication between ranks, and between the replicas of a rank: one trait with several implementations. The implementation for
//! a world of one rank is `Solo`.

pub mod mpi;
pub mod nccl;
pub mod replicas;
mod solo;

pub use solo::Solo;

use crate::error::{Failure, exit_code};
use crate::weights::Pinning;
use anyhow::Result;
use std::time::Duration;
use tch::Tensor;

/// A group of ranks or replicas that act together. The methods `all_reduce`, `all_reduce_f64`, `barrier` and `barrier_with` are
/// collective: all members must call them, in the same order and with values of the same length.
pub trait Collective {
    /// The number of this member, from 0.
    fn rank(&self) -> usize;
    /// The number of members.
    fn size(&self) -> usize;
    /// Sums contiguous fp32 numbers on this member's device, element by element over all members, in place. Over NCCL the GPU may
    /// still be computing the sum when this method returns.
    fn all_reduce(&self, values: &mut Tensor) -> Result<()>;
    /// Sums numbers in double precision, such as the counts of an evaluation, element by element over all members, in place.
    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()>;
    /// Waits until all members have called this method. The calling thread sleeps while it waits, because another member may be
    /// computing on the same core.
    fn barrier(&self) -> Result<()>;

    /// Waits as [`Collective::barrier`] does. An MPI rank calls `idle` many times per second while it waits. Other members do not
    /// call it.
    fn barrier_with(&self, _idle: &mut dyn FnMut()) -> Result<()> {
        self.barrier()
    }

    /// Waits until `is_done` returns true. `is_done` says whether this member's device has finished the work after an all-reduce.
    ///
    /// # Errors
    /// Fails if `is_done` fails. Over NCCL, also fails if another member has failed or does not begin the all-reduce in time,
    /// because the work may then never be finished.
    fn wait_until(&self, is_done: &dyn Fn() -> Result<bool>) -> Result<()> {
        wait_for(is_done)
    }

    /// The lock that a thread takes while it pins memory for this member's device. The replicas of a rank share one lock.
    fn pinning(&self) -> Pinning {
        Pinning::default()
    }

    /// Whether this is the first member, which writes the group's artefacts, checkpoints, metrics and heartbeats.
    fn is_zero(&self) -> bool {
        self.rank() == 0
    }
}

fn wait_for(is_done: &dyn Fn() -> Result<bool>) -> Result<()> {
    while !is_done()? {
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// Makes all ranks succeed or fail together, after each rank has tried something by itself. `tried` is the result of this rank. If
/// ranks have failed, the failed rank with the lowest number returns its own error. All other ranks return
/// [`Failure::OnOtherRank`], so that only one message is printed.
pub fn agree<T>(group: &dyn Collective, tried: Result<T>) -> Result<T> {
    let mut codes = vec![0.0; group.size()];
    codes[group.rank()] = tried.as_ref().err().map_or(0.0, |e| exit_code(e).into());
    group.all_reduce_f64(&mut codes)?;
    match codes.iter().position(|&code| code > 0.0) {
        Some(first) if first != group.rank() => Err(Failure::OnOtherRank { code: codes[first] as u8 }.into()),
        _ => tried,
    }
}

/// Calls `act` on rank zero alone, while the other ranks wait. Returns the result of `act` on rank zero, and none on the other
/// ranks. If `act` fails on rank zero, all ranks fail.
pub fn on_zero<T>(group: &dyn Collective, act: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    let done = if group.is_zero() { act().map(Some) } else { Ok(None) };
    group.barrier()?;
    agree(group, done)
}

/// Gives every rank the bytes of rank zero. This function is meant for few bytes, because each byte travels as a double.
pub fn from_zero<const N: usize>(group: &dyn Collective, own: [u8; N]) -> Result<[u8; N]> {
    let mut values = own.map(|byte| if group.is_zero() { f64::from(byte) } else { 0.0 });
    group.all_reduce_f64(&mut values)?;
    Ok(values.map(|value| value as u8))
}

/// Calls `ask` on rank zero alone, and gives every rank the answer. If `ask` fails, all ranks fail.
pub fn ask_zero(group: &dyn Collective, ask: impl FnOnce() -> Result<bool>) -> Result<bool> {
    let answer = on_zero(group, ask)?;
    let mut votes = [f64::from(u8::from(answer == Some(true)))];
    group.all_reduce_f64(&mut votes)?;
    Ok(votes[0] > 0.0)
}
