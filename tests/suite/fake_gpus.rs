//! Replicas in one or two processes with the fake driver and the fake NCCL of tests/fake: which GPU each replica takes up, in
//! which order the replicas give their GPUs work, and how failures end. The tensors stay in host memory. A misuse that real GPUs
//! would answer by waiting for ever ends a process with a message of the fake.

use crate::gpus::fake_driver;
use crate::incubate::{Ended, ended};
use anyhow::{Result, bail, ensure};
use incubate::collective::replicas::{Replica, on_replicas};
use incubate::collective::{Collective, Solo};
use incubate::config::DeviceChoice;
use incubate::device::{Devices, OnNode, cuda};
use incubate::driver::{CUDA, Driver, Event, PinnedMemory};
use incubate::weights::Pinning;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// The environment variable that tells a started test process its rank.
const RANK: &str = "TEST_RANK";

/// Two processes as a group of ranks. They exchange numbers through two connected sockets, one as the standard input of each.
struct Pair {
    rank: usize,
    other: UnixStream,
}

impl Collective for Pair {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        2
    }

    fn all_reduce(&self, _: &mut Tensor) -> Result<()> {
        bail!("NCCL sums gradients, not the ranks")
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        for value in values {
            let mut bytes = [0; 8];
            (&self.other).write_all(&value.to_le_bytes())?;
            (&self.other).read_exact(&mut bytes)?;
            *value += f64::from_le_bytes(bytes);
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.all_reduce_f64(&mut [0.0])
    }
}

/// A test whose processes run replicas on fake GPUs.
struct Case {
    /// The name of the test, with its module.
    test: &'static str,
    processes: usize,
    gpus: usize,
    /// The environment of the processes.
    env: &'static [(&'static str, &'static str)],
}

impl Case {
    /// Two processes, which have two of four GPUs each.
    fn two_by_two(test: &'static str) -> Case {
        Case { test, processes: 2, gpus: 4, env: &[] }
    }

    /// Runs `act` on two replicas in each process, and returns how the processes ended. A started process does not return.
    fn run(&self, act: impl Fn(&Devices, &Replica) -> Result<()> + Sync) -> Vec<Ended> {
        let Some(rank) = std::env::var(RANK).ok() else { return self.start() };
        thread::spawn(|| {
            thread::sleep(Duration::from_secs(60));
            eprintln!("the process hangs");
            std::process::exit(124);
        });
        let code = self.member(rank.parse().unwrap(), act).map_or_else(
            |error| {
                eprintln!("{error:#}");
                1
            },
            |()| 0,
        );
        std::process::exit(code)
    }

    /// Starts this test's executable as the processes of the test.
    fn start(&self) -> Vec<Ended> {
        let fakes = fake_driver();
        let (first, second) = UnixStream::pair().unwrap();
        let start = |(rank, socket): (usize, UnixStream)| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args([self.test, "--exact", "--nocapture"]).envs(self.env.iter().copied());
            command.env(RANK, rank.to_string()).env("FAKE_GPUS", self.gpus.to_string());
            command.env("LD_LIBRARY_PATH", fakes.path()).stdin(OwnedFd::from(socket));
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let children: Vec<_> = [first, second].into_iter().enumerate().take(self.processes).map(start).collect();
        let waiting: Vec<_> =
            children.into_iter().map(|child| thread::spawn(move || ended(child.wait_with_output().unwrap()))).collect();
        waiting.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    /// One process: its part of the GPUs, with a replica on each.
    fn member(&self, rank: usize, act: impl Fn(&Devices, &Replica) -> Result<()> + Sync) -> Result<()> {
        CUDA.get_or_init(|| Driver::open().map_err(|error| format!("{error:#}")));
        let devices = Devices::of_rank(DeviceChoice::Cuda, 2, OnNode { rank, ranks: self.processes })?;
        let pair = Pair { rank, other: UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?) };
        let group: &dyn Collective = if self.processes == 2 { &pair } else { &Solo };
        on_replicas(group, 2, devices.can_use_nccl(), &|replica| {
            devices.prepare_thread(replica.local)?;
            replica.join_nccl()?;
            act(&devices, replica)
        })
    }
}

/// Begins three sums, and then waits for an event after the last of them, as a step waits for its loss.
fn sum_thrice(replica: &Replica, round: usize) -> Result<()> {
    let summand =
        |factor: usize| Tensor::full([5], (replica.rank() + factor * round) as f64, (Kind::Float, Device::Cpu));
    let mut values = [1, 2, 3].map(summand);
    values.iter_mut().try_for_each(|values| replica.all_reduce(values))?;
    let event = Event::now(cuda()?)?;
    replica.wait_until(&|| event.has_passed())?;
    let (size, ranks) = (replica.size(), (0..replica.size()).sum::<usize>());
    for (values, factor) in values.iter().zip(1..) {
        let expected = (ranks + size * factor * round) as f64;
        ensure!(*values == Tensor::full([5], expected, (Kind::Float, Device::Cpu)), "{values:?} is not {expected}");
    }
    Ok(())
}

/// Waits until the other process has ended.
fn wait_for_the_end_of_the_other_process() {
    let _ = std::io::stdin().read(&mut [0]);
}

/// Pins memory for a GPU and frees it over and over, as a data worker pins its batches.
fn pin(number: usize, pinning: &Pinning, is_done: &AtomicBool) {
    let driver = cuda().unwrap();
    driver.make_current(number).unwrap();
    while !is_done.load(Ordering::Relaxed) {
        let _may_pin = pinning.allow();
        PinnedMemory::new(driver, 64).unwrap().free();
    }
}

#[test]
fn replicas_of_two_processes_sum_on_their_own_gpus_while_other_threads_pin_memory() {
    let case =
        Case::two_by_two("fake_gpus::replicas_of_two_processes_sum_on_their_own_gpus_while_other_threads_pin_memory");
    let ends = case.run(|devices, replica| {
        assert_eq!(devices.device(replica.local), Device::Cuda(replica.rank()));
        let (number, pinning, is_done) = (replica.rank(), replica.pinning(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| pin(number, &pinning, &is_done));
            let sums = (0..100).try_for_each(|round| sum_thrice(replica, round));
            is_done.store(true, Ordering::Relaxed);
            sums
        })?;
        replica.barrier()
    });
    assert_eq!((ends[0].code, ends[1].code), (Some(0), Some(0)), "{}\n{}", ends[0].err, ends[1].err);
}

#[test]
fn a_process_that_dies_in_a_sum_ends_the_other_with_an_error() {
    let ends =
        Case::two_by_two("fake_gpus::a_process_that_dies_in_a_sum_ends_the_other_with_an_error").run(|_, replica| {
            (0..).try_for_each(|round| {
                if round == 3 && replica.rank() == 3 {
                    std::process::exit(9);
                }
                sum_thrice(replica, round)
            })
        });
    assert_eq!((ends[0].code, ends[1].code), (Some(1), Some(9)), "{}", ends[0].err);
    assert!(
        ends[0].err.contains("a peer failed while gradients were summed: remote process exited"),
        "{}",
        ends[0].err
    );
}

#[test]
fn a_replica_that_fails_ends_its_process_with_its_error_and_then_the_other_process() {
    let case =
        Case::two_by_two("fake_gpus::a_replica_that_fails_ends_its_process_with_its_error_and_then_the_other_process");
    let ends = case.run(|_, replica| {
        (0..).try_for_each(|round| {
            ensure!(round < 3 || replica.rank() != 3, "the GPU has fallen off the bus");
            sum_thrice(replica, round)
        })
    });
    assert_eq!((ends[0].code, ends[1].code), (Some(1), Some(1)), "{}", ends[0].err);
    assert!(ends[1].err.contains("the GPU has fallen off the bus"), "{}", ends[1].err);
    assert!(ends[0].err.contains("remote process exited"), "{}", ends[0].err);
}

#[test]
fn a_replica_that_fails_in_a_sum_that_another_process_never_begins_ends_its_process_with_its_error() {
    let case = Case::two_by_two(
        "fake_gpus::a_replica_that_fails_in_a_sum_that_another_process_never_begins_ends_its_process_with_its_error",
    );
    let ends = case.run(|_, replica| {
        let ones = || Tensor::ones([5], (Kind::Float, Device::Cpu));
        sum_thrice(replica, 1)?;
        match replica.rank() {
            0 => {
                replica.all_reduce(&mut ones())?;
                replica.wait_until(&|| Ok(false))
            }
            1 => {
                replica.all_reduce(&mut ones())?;
                bail!("the GPU has fallen off the bus")
            }
            _ => {
                wait_for_the_end_of_the_other_process();
                Ok(())
            }
        }
    });
    assert_eq!(ends[0].code, Some(1), "{}", ends[0].err);
    assert!(ends[0].err.contains("the GPU has fallen off the bus"), "{}", ends[0].err);
}

#[test]
fn two_replicas_that_share_a_gpu_sum_through_host_memory_and_have_events_of_their_own() {
    let test = "fake_gpus::two_replicas_that_share_a_gpu_sum_through_host_memory_and_have_events_of_their_own";
    let env = &[("INCUBATE_TEST_SHARED_GPU", "1")];
    let ends = Case { test, processes: 1, gpus: 1, env }.run(|devices, replica| {
        assert_eq!(devices.device(replica.local), Device::Cuda(0));
        (0..20).try_for_each(|round| sum_thrice(replica, round))
    });
    assert_eq!(ends[0].code, Some(0), "{}", ends[0].err);
}
