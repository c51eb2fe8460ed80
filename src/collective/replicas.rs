//! The replicas of the network on one rank, each with a thread and a device. Together with the replicas of the group's other ranks
//! they form one collective, so that training code sees neither threads nor MPI.
//!
//! On CPUs, the numbers of a rank's replicas are added in shared memory, always in the same order. Replica zero of the rank runs on
//! the thread that owns MPI, so it also adds the numbers of the other ranks. On GPUs, NCCL adds the fp32 numbers if all ranks can
//! use NCCL. All other sums of GPUs go through host memory. If a replica fails, the replicas of its rank that wait for it fail too.

use super::nccl::{self, Nccl, UniqueId};
use super::{Collective, from_zero};
use crate::error::Failure;
use crate::thread;
use crate::weights::Pinning;
use anyhow::Result;
use std::cell::RefCell;
use std::panic::resume_unwind;
use std::sync::{Condvar, Mutex, MutexGuard};
use tch::{Device, Tensor};

/// One member of a group of replicas.
pub struct Replica<'a> {
    shared: &'a Shared,
    /// The number of the replica within its rank, from 0.
    pub local: usize,
    /// The group of ranks. Only replica zero of each rank has the group, because replica zero runs on the thread that owns MPI.
    ranks: Option<&'a dyn Collective>,
    nccl: RefCell<Option<Nccl>>,
}

/// The state that the replicas of one rank share.
struct Shared {
    /// The number that replica zero of this rank has in the whole group.
    first_replica: usize,
    /// The number of replicas in the whole group.
    size: usize,
    /// The id of the group's NCCL communicator. None if the group does not use NCCL.
    id: Option<UniqueId>,
    /// The tensor that each replica of this rank adds to the current sum.
    summands: Vec<Mutex<Option<Tensor>>>,
    sum: Mutex<Option<Tensor>>,
    meeting: Meeting,
    pinning: Pinning,
}

/// Runs `act` once for each replica of this rank. Replica zero runs on the calling thread. `can_use_nccl` says whether NCCL
/// supports this rank's devices. All ranks of the group must call this function. If `act` succeeds on one replica, or a signal
/// stops it, `act` must end in the same way on all replicas of the group. Otherwise the replicas cannot leave NCCL together.
///
/// # Errors
/// The error of the lowest-numbered replica of this rank that failed by itself. If other replicas or ranks caused all failures, the
/// [`Failure::OnOtherRank`] of the lowest-numbered replica that failed. If a replica's thread cannot be started, the error of that
/// start. If MPI or NCCL fails before the replicas start, its error.
pub fn on_replicas(
    group: &dyn Collective,
    replicas: usize,
    can_use_nccl: bool,
    act: &(dyn Fn(&Replica) -> Result<()> + Sync),
) -> Result<()> {
    let shared = Shared::new(group, replicas, can_use_nccl)?;
    let run = |local: usize, ranks: Option<&dyn Collective>| {
        let _close = CloseOnDrop(&shared.meeting);
        let replica = Replica { shared: &shared, local, ranks, nccl: RefCell::default() };
        let result = act(&replica);
        // After a success or a stop by a signal, all replicas of the group reach this line, so they can leave NCCL together.
        let is_orderly = result.as_ref().map_or_else(Failure::is_stop, |()| true);
        let leaving = if is_orderly { replica.nccl.into_inner().map_or(Ok(()), Nccl::leave) } else { Ok(()) };
        result.and(leaving)
    };
    let results = std::thread::scope(|scope| {
        let run = &run;
        let spawn = |local: usize| {
            let thread = thread::start_within(scope, &format!("replica-{local}"), move || run(local, None));
            // The replicas that have started must not wait for the replica that cannot start.
            thread.inspect_err(|_| shared.meeting.close())
        };
        let threads: Vec<_> = match (1..replicas).map(spawn).collect() {
            Ok(threads) => threads,
            Err(error) => return vec![Err(error)],
        };
        let mut results = vec![run(0, Some(group))];
        results.extend(threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))));
        results
    });
    let elsewhere = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(Failure::OnOtherRank { .. }));
    let (own, caused_elsewhere): (Vec<_>, Vec<_>) =
        results.into_iter().filter_map(Result::err).partition(|e| !elsewhere(e));
    own.into_iter().chain(caused_elsewhere).next().map_or(Ok(()), Err)
}

/// Closes the [`Meeting`] when a replica ends. If the replica ends with an error or a panic, other replicas may be waiting for it.
struct CloseOnDrop<'a>(&'a Meeting);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Shared {
    fn new(group: &dyn Collective, replicas: usize, can_use_nccl: bool) -> Result<Shared> {
        let mut counts = vec![0.0; group.size() + 1];
        counts[group.rank()] = replicas as f64;
        counts[group.size()] = f64::from(u8::from(can_use_nccl && nccl::version().is_ok()));
        group.all_reduce_f64(&mut counts)?;
        let all_have_nccl = counts.pop() == Some(group.size() as f64);
        let counts: Vec<usize> = counts.into_iter().map(|count| count as usize).collect();
        let size = counts.iter().sum();
        let id = if all_have_nccl && size > 1 {
            let own = if group.is_zero() { UniqueId::new()? } else { UniqueId::default() };
            Some(UniqueId::from(from_zero(group, own.into())?))
        } else {
            None
        };
        if can_use_nccl && id.is_none() && size > 1 {
            let elsewhere = || "another rank cannot load NCCL, or NCCL cannot join its devices".into();
            let why = nccl::version().err().map_or_else(elsewhere, |error| format!("{error:#}"));
            log::warn!("gradients travel through host memory, because NCCL does not join the GPUs: {why}");
        }
        Ok(Shared {
            first_replica: counts[..group.rank()].iter().sum(),
            size,
            id,
            summands: (0..replicas).map(|_| Mutex::default()).collect(),
            sum: Mutex::default(),
            meeting: Meeting::new(replicas),
            pinning: Pinning::default(),
        })
    }
}

impl Replica<'_> {
    /// The number of replicas of this replica's rank.
    pub fn in_rank(&self) -> usize {
        self.shared.summands.len()
    }

    /// Joins the group's NCCL communicator with the calling thread's current GPU. Does nothing if the group does not use NCCL. All
    /// replicas of the group must call this method.
    pub fn join_nccl(&self) -> Result<()> {
        if let Some(id) = self.shared.id {
            // If a replica of this rank has already failed, this wait fails. NCCL's own call would wait for that replica for ever.
            self.shared.meeting.wait()?;
            *self.nccl.borrow_mut() = Some(Nccl::join(id, self.rank(), self.size())?);
        }
        Ok(())
    }

    /// Adds the tensors `own` of this rank's replicas in the order of the replicas' numbers. Then `add_ranks` adds the sums of the
    /// other ranks. All replicas get the same sum.
    fn add(&self, own: Tensor, add_ranks: impl Fn(&dyn Collective, &mut Tensor) -> Result<()>) -> Result<Tensor> {
        let shared = self.shared;
        *lock(&shared.summands[self.local]) = Some(own);
        shared.meeting.wait()?;
        if let Some(ranks) = self.ranks {
            let mut summands = shared.summands.iter().map(|summand| lock(summand).take().expect("all have met"));
            let mut sum = summands.next().expect("there is a replica zero").copy();
            for summand in summands {
                let _ = sum.g_add_(&summand);
            }
            add_ranks(ranks, &mut sum)?;
            *lock(&shared.sum) = Some(sum);
        }
        shared.meeting.wait()?;
        let sum = lock(&shared.sum);
        Ok(sum.as_ref().expect("replica zero has stored it").shallow_clone())
    }

    /// The group of ranks, if this replica is the only replica of its rank.
    fn alone(&self) -> Option<&dyn Collective> {
        self.ranks.filter(|_| self.in_rank() == 1)
    }
}

impl Collective for Replica<'_> {
    fn wait_until(&self, is_done: &dyn Fn() -> Result<bool>) -> Result<()> {
        match self.nccl.borrow_mut().as_mut() {
            Some(nccl) => nccl.wait_until(is_done, &|| self.shared.meeting.is_closed()),
            None => crate::collective::wait_for(is_done),
        }
    }

    fn pinning(&self) -> Pinning {
        self.shared.pinning.clone()
    }

    fn rank(&self) -> usize {
        self.shared.first_replica + self.local
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn all_reduce(&self, values: &mut Tensor) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        if let Some(nccl) = self.nccl.borrow_mut().as_mut() {
            // The replicas of this rank begin a sum together, and do nothing else until all of them have begun it. This prevents
            // two deadlocks. First, NCCL's first sum connects the members in calls that cannot be cancelled, so these calls would
            // wait for ever for a failed replica. Second, one GPU may begin the sum before another. If a thread of this process
            // then allocates GPU memory or pinned memory, it may wait for the first GPU and block the second GPU.
            let meeting = &self.shared.meeting;
            meeting.wait()?;
            let _no_pinning = (self.local == 0).then(|| self.shared.pinning.forbid());
            meeting.wait()?;
            nccl.all_reduce(values)?;
            return meeting.wait();
        }
        match self.alone() {
            Some(ranks) if values.device() == Device::Cpu => ranks.all_reduce(values),
            _ => {
                let sum = self.add(values.to_device(Device::Cpu), |ranks, sum| ranks.all_reduce(sum))?;
                values.copy_(&sum);
                Ok(())
            }
        }
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        if let Some(ranks) = self.alone() {
            return ranks.all_reduce_f64(values);
        }
        let sum = self.add(Tensor::from_slice(values), |ranks, sum| {
            let mut numbers = Vec::<f64>::try_from(&*sum)?;
            ranks.all_reduce_f64(&mut numbers)?;
            *sum = Tensor::from_slice(&numbers);
            Ok(())
        })?;
        sum.f_copy_data(values, values.len())?;
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.shared.meeting.wait()?;
        self.ranks.map_or(Ok(()), Collective::barrier)?;
        self.shared.meeting.wait()
    }
}

/// A barrier for the replicas of one rank. Once the barrier is closed, every wait fails at once, except a wait for which all
/// members have already come.
struct Meeting {
    members: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// How often all members have met.
    round: u64,
    /// The number of members that wait for the others in the current round.
    waiting: usize,
    closed: bool,
}

impl Meeting {
    fn new(members: usize) -> Meeting {
        Meeting { members, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Waits until all members have come.
    ///
    /// # Errors
    /// The barrier is closed, because a member has ended or could not start, and so will not come.
    fn wait(&self) -> Result<()> {
        let mut state = lock(&self.state);
        let round = state.round;
        state.waiting += 1;
        if state.waiting == self.members && !state.closed {
            (state.round, state.waiting) = (round + 1, 0);
            self.changed.notify_all();
            return Ok(());
        }
        while state.round == round && !state.closed {
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        if state.round > round { Ok(()) } else { Err(Failure::OnOtherRank { code: 1 }.into()) }
    }

    fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }
}

/// Locks a mutex even if another thread has panicked while it held the lock. The value is still valid then, because each change is
/// a single assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Solo;
    use anyhow::anyhow;
    use tch::Kind;

    fn on_four(act: impl Fn(&Replica) -> Result<()> + Sync) -> Result<()> {
        on_replicas(&Solo, 4, false, &act)
    }

    #[test]
    fn every_replica_gets_the_same_sum_in_every_round() {
        on_four(|replica| {
            assert_eq!((replica.rank(), replica.size()), (replica.local, 4));
            for round in 0..100 {
                let mut values =
                    Tensor::full([5], replica.local as f64 + 0.1 * f64::from(round), (Kind::Float, Device::Cpu));
                replica.all_reduce(&mut values)?;
                let first = values.double_value(&[0]);
                assert!((first - 6.0 - 0.4 * f64::from(round)).abs() < 1e-4, "{first} in round {round}");
                let mut numbers = [1.0, replica.local as f64];
                replica.all_reduce_f64(&mut numbers)?;
                assert_eq!(numbers, [4.0, 6.0]);
                replica.barrier()?;
            }
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_sum_has_the_same_bits_every_time_and_everywhere() {
        // In some other orders of addition, these numbers have another sum.
        let parts = [1e8f32, 1.0, -1e8, 0.3];
        let in_order: f32 = parts.iter().sum();
        on_four(|replica| {
            for _ in 0..200 {
                let mut values = Tensor::from_slice(&parts[replica.local..=replica.local]);
                replica.all_reduce(&mut values)?;
                assert_eq!(f32::try_from(values)?.to_bits(), in_order.to_bits());
            }
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_replica_that_fails_inside_a_sum_ends_the_others_with_its_error() {
        for failing in 0..4 {
            let error = on_four(|replica| {
                for round in 0.. {
                    if replica.local == failing && round == 3 {
                        return Err(anyhow!("replica {failing} has lost its device"));
                    }
                    replica.all_reduce(&mut Tensor::ones([3], (Kind::Float, Device::Cpu)))?;
                }
                Ok(())
            })
            .unwrap_err();
            assert_eq!(error.to_string(), format!("replica {failing} has lost its device"));
        }
    }

    #[test]
    fn a_replica_that_panics_leaves_nobody_waiting() {
        for failing in 0..4 {
            let all = std::panic::catch_unwind(|| {
                on_four(|replica| {
                    if replica.local == failing {
                        panic!("replica {failing} breaks");
                    }
                    replica.barrier()
                })
            });
            let panic = all.unwrap_err();
            assert_eq!(panic.downcast_ref(), Some(&format!("replica {failing} breaks")));
        }
    }
}
