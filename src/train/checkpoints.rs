//! Writes checkpoints in a thread while training continues. If the weights are in host memory, the thread borrows them, and the
//! next update waits until they are written into the file. Weights on a GPU are first copied to host memory.

use super::Setting;
use super::trainer::Trainer;
use crate::config::Interval;
use crate::driver::{PinnedMemory, cuda};
use crate::model::Loan;
use crate::plan::PhasePlan;
use crate::store::full_disk::{self, FIRST_PAUSE, LONGEST_PAUSE};
use crate::store::lease::Fence;
use crate::store::{Header, RunDir, artefact};
use crate::thread;
use crate::weights::floats;
use anyhow::{Result, anyhow};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// The checkpoints of a phase. Only the group's first replica writes them.
pub struct Checkpoints {
    due: Due,
    header: Header,
    /// The buffers to write; none while the thread has them.
    buffers: Option<Buffers>,
    to_writer: Option<Sender<Snapshot>>,
    written: Receiver<Result<Written>>,
    thread: Option<JoinHandle<()>>,
    /// The seconds that the last successful save took. None before the first successful save.
    save_s: Option<f64>,
    /// Why the last checkpoint is missing, if the disk was full.
    full: Option<Full>,
}

/// A checkpoint that could not be written because the disk was full. After the pause, a checkpoint is due again.
struct Full {
    text: String,
    tried: Instant,
    pause: Duration,
}

/// Weights and optimiser state, in the order of [`crate::family::parameter::flat_order`].
struct Buffers {
    weights: Tensor,
    state: Vec<(&'static str, Tensor)>,
    /// The pinned memory of the tensors; empty if they are the trainer's own tensors.
    pinned: Vec<PinnedMemory>,
}

/// A checkpoint that the thread must write.
struct Snapshot {
    header: Header,
    buffers: Buffers,
    /// The loan of the trainer's tensors; none if the buffers are copies.
    loan: Option<Loan>,
}

/// The thread's answer about one checkpoint.
struct Written {
    buffers: Buffers,
    /// The time that the save took. None if no file was written, because the weights are not finite or the disk is full.
    took: Option<Duration>,
    /// The error of a full disk.
    full: Option<anyhow::Error>,
}

/// The state of the thread that writes checkpoints.
struct Writer {
    run: RunDir,
    phase: String,
    keep_checkpoints: usize,
    fence: Option<Fence>,
}

impl Checkpoints {
    /// Starts the thread that writes the checkpoints of a phase. All checkpoints have this header, each with its own step.
    ///
    /// # Errors
    /// There is no memory for copies of a GPU's buffers, or the thread cannot be started.
    pub fn start(setting: &Setting, phase: &PhasePlan, header: Header, trainer: &Trainer) -> Result<Checkpoints> {
        let config = &setting.plan.config.run;
        let writer = Writer {
            run: setting.run.clone(),
            phase: phase.name.clone(),
            keep_checkpoints: config.keep_checkpoints,
            fence: setting.lease.map(|lease| lease.fence().clone()),
        };
        let buffers = Buffers::of(trainer)?;
        let (to_writer, snapshots) = channel();
        let (done, written) = channel();
        let thread = thread::start("checkpoints", move || writer.write_all(&snapshots, &done))?;
        Ok(Checkpoints {
            due: Due::new(config.checkpoint_every, phase.steps_per_epoch, header.step),
            header,
            buffers: Some(buffers),
            to_writer: Some(to_writer),
            written,
            thread: Some(thread),
            save_s: None,
            full: None,
        })
    }

    /// Whether a checkpoint is due after `step`. No checkpoint is due while the last checkpoint is still being written. After a
    /// full disk, the next checkpoint is due when the pause is over.
    ///
    /// # Errors
    /// An earlier checkpoint could not be written for a reason other than a full disk.
    pub fn is_due(&mut self, step: u64) -> Result<bool> {
        match self.written.try_recv() {
            Ok(written) => self.take_back(written?),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Err(anyhow!("the checkpoint writer has died")),
        }
        let is_now = match &self.full {
            Some(full) => full.tried.elapsed() >= full.pause,
            None => self.due.is_now(step, self.save_s),
        };
        Ok(self.buffers.is_some() && is_now)
    }

    /// Writes a checkpoint of the present step and waits until it is on the disk. While the disk is full, tries again for up to an
    /// hour and calls `tell` with the reason. Returns false, without a checkpoint, if the weights are not finite.
    pub fn save_now(&mut self, trainer: &mut Trainer, tell: &mut dyn FnMut(Option<&str>)) -> Result<bool> {
        self.finish()?;
        let save = || {
            self.begin(trainer)?;
            let mut written = self.receive()?;
            let (is_saved, full) = (written.took.is_some(), written.full.take());
            self.take_back(written);
            full.map_or(Ok(is_saved), Err)
        };
        full_disk::insist(save, tell)
    }

    /// Why the last checkpoint is missing, if the disk was full.
    pub fn trouble(&self) -> Option<&str> {
        self.full.as_ref().map(|full| full.text.as_str())
    }

    /// Waits until no checkpoint is being written.
    pub fn finish(&mut self) -> Result<()> {
        if self.buffers.is_none() {
            let written = self.receive()?;
            self.take_back(written);
        }
        Ok(())
    }

    fn receive(&self) -> Result<Written> {
        self.written.recv().map_err(|_| anyhow!("the checkpoint writer has died"))?
    }

    /// Waits until the last checkpoint is written, and frees the memory of the copies.
    pub fn close(mut self) -> Result<()> {
        self.finish()?;
        if let Some(Buffers { weights, state, pinned }) = self.buffers.take() {
            drop((weights, state));
            pinned.into_iter().for_each(PinnedMemory::free);
        }
        Ok(())
    }

    /// The seconds that the last successful save took: the write of its file and the removal of old checkpoints. None before the
    /// first successful save.
    pub fn save_s(&self) -> Option<f64> {
        self.save_s
    }

    fn take_back(&mut self, written: Written) {
        self.save_s = written.took.map(|took| took.as_secs_f64()).or(self.save_s);
        self.full = written.full.map(|error| {
            let pause = self.full.as_ref().map_or(FIRST_PAUSE, |full| (2 * full.pause).min(LONGEST_PAUSE));
            let text =
                format!("{}; the training goes on, and the checkpoint is tried again", full_disk::reason(&error));
            log::error!("{text} in {} s", pause.as_secs());
            Full { text, tried: Instant::now(), pause }
        });
        self.buffers = Some(written.buffers);
    }

    /// Starts to write a checkpoint of the present step. The write of the last checkpoint must be done.
    pub fn begin(&mut self, trainer: &mut Trainer) -> Result<()> {
        let mut buffers = self.buffers.take().expect("the writer has given them back");
        let loan = buffers.take_state(trainer);
        let header = Header { step: trainer.step, ..self.header.clone() };
        let writer = self.to_writer.as_ref().expect("only dropping closes the channel");
        writer.send(Snapshot { header, buffers, loan }).map_err(|_| anyhow!("the checkpoint writer has died"))?;
        self.due.begun(trainer.step);
        Ok(())
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        // The thread finishes a checkpoint that it has begun, even if the phase fails.
        self.to_writer = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Buffers {
    /// The trainer's own tensors if they are in host memory. If they are on a GPU, new tensors of the same sizes in pinned memory,
    /// because copies from a GPU to pinned memory are fastest. [`Buffers::take_state`] fills the new tensors.
    fn of(trainer: &Trainer) -> Result<Buffers> {
        let mut pinned = Vec::new();
        let mut host = |tensor: &Tensor| -> Result<Tensor> {
            if tensor.device() == Device::Cpu {
                return Ok(tensor.shallow_clone());
            }
            let memory = PinnedMemory::new(cuda()?, tensor.numel() * size_of::<f32>())?;
            let (start, size) = (memory.start().cast_const().cast(), tensor.size());
            pinned.push(memory);
            // SAFETY: the memory holds as many fp32 numbers as the tensor, and it lives in the same `Buffers`.
            Ok(unsafe { Tensor::from_blob(start, &size, &[1], Kind::Float, Device::Cpu) })
        };
        let weights = host(trainer.network.flat().buffer())?;
        let state = trainer.optimiser.state().into_iter().map(|(name, tensor)| Ok((name, host(tensor)?)));
        let state = state.collect::<Result<_>>()?;
        Ok(Buffers { weights, state, pinned })
    }

    /// Makes the buffers hold the present state of the trainer. Copies the state if it is on a GPU, and returns none. Else borrows
    /// the state until the returned loan ends.
    fn take_state(&mut self, trainer: &mut Trainer) -> Option<Loan> {
        let flat = trainer.network.flat_mut();
        if flat.buffer().device() == Device::Cpu {
            return Some(flat.lend());
        }
        self.weights.copy_(flat.buffer());
        for ((_, copy), (_, tensor)) in self.state.iter_mut().zip(trainer.optimiser.state()) {
            copy.copy_(tensor);
        }
        None
    }
}

impl Writer {
    fn write_all(&self, snapshots: &Receiver<Snapshot>, done: &Sender<Result<Written>>) {
        for Snapshot { header, buffers, loan } in snapshots {
            let began = Instant::now();
            let written = self.write(&header, &buffers, loan);
            let written = match written {
                Ok(is_written) => Ok(Written { buffers, took: is_written.then(|| began.elapsed()), full: None }),
                Err(error) if full_disk::is_full(&error) => Ok(Written { buffers, took: None, full: Some(error) }),
                Err(error) => Err(error),
            };
            if done.send(written).is_err() {
                break;
            }
        }
    }

    /// Writes a checkpoint and removes old checkpoints. Returns false, without a change, if the weights are not finite.
    fn write(&self, header: &Header, buffers: &Buffers, loan: Option<Loan>) -> Result<bool> {
        if !floats(&buffers.weights).iter().all(|weight| weight.is_finite()) {
            // The loss of the next step ends the phase, with an error that names the last good checkpoint.
            log::warn!(
                "{}: the weights of step {} are not finite, so no checkpoint of them is written",
                self.phase,
                header.step
            );
            return Ok(false);
        }
        let state = buffers.state.iter().map(|(name, tensor)| (*name, tensor));
        let all: Vec<(&str, &Tensor)> = std::iter::once(("weights", &buffers.weights)).chain(state).collect();
        let path = self.run.checkpoint(&self.phase, header.step);
        // The loan ends before the file is synced to the disk, because the buffers are no longer needed then.
        artefact::write_checkpoint(&path, header, &all, self.fence.as_ref(), || drop(loan))?;
        self.run.prune_checkpoints(&self.phase, header.step, self.keep_checkpoints, self.fence.as_ref());
        Ok(true)
    }
}

/// The mean time between failures of one job, in seconds: a day, as for large jobs on large machines. The interval grows with the
/// square root of this time, so the order of magnitude suffices.
const BETWEEN_FAILURES: f64 = 86_400.0;
/// With `auto`, the time until the first checkpoint after a start. Each later interval depends on the time of the last save.
const FIRST: Duration = Duration::from_secs(60);
/// The bounds of the interval between later checkpoints of `auto`, in seconds.
const SHORTEST: f64 = 10.0;
const LONGEST: f64 = 3600.0;

/// Decides when a checkpoint is due.
struct Due {
    every: Interval,
    steps_per_epoch: u64,
    last_step: u64,
    last: Instant,
}

impl Due {
    fn new(every: Interval, steps_per_epoch: u64, step: u64) -> Due {
        Due { every, steps_per_epoch, last_step: step, last: Instant::now() }
    }

    fn begun(&mut self, step: u64) {
        (self.last_step, self.last) = (step, Instant::now());
    }

    fn is_now(&self, step: u64, save_s: Option<f64>) -> bool {
        // A checkpoint is due as soon as a multiple of n is reached, so that a resumed run writes checkpoints at the same steps.
        let passed = |n: u64| step / n > self.last_step / n;
        match self.every {
            Interval::Never => false,
            Interval::Steps(n) => passed(n),
            Interval::Epochs(n) => passed(n * self.steps_per_epoch),
            Interval::Minutes(n) => self.last.elapsed().as_secs_f64() >= 60.0 * n,
            Interval::Auto => self.last.elapsed() >= save_s.map_or(FIRST, young_daly),
        }
    }
}

/// The interval that loses the least time to saves and failures together: √(2 · time of a save · time between failures)
/// (Young 1974, doi:10.1145/361147.361115; Daly 2006 agrees to first order).
fn young_daly(save_s: f64) -> Duration {
    Duration::from_secs_f64((2.0 * save_s * BETWEEN_FAILURES).sqrt().clamp(SHORTEST, LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_fall_due_by_steps_epochs_and_time() {
        let due = |every, step| Due::new(every, 10, 3).is_now(step, None);
        assert!(!due(Interval::Steps(5), 4) && due(Interval::Steps(5), 5) && due(Interval::Steps(5), 7));
        assert!(!due(Interval::Epochs(2), 19) && due(Interval::Epochs(2), 20));
        assert!(!due(Interval::Never, 1_000_000) && !due(Interval::Auto, 1_000_000));
        let long_ago = Instant::now() - Duration::from_secs(61);
        let waited = |every, save_s| Due { last: long_ago, ..Due::new(every, 10, 3) }.is_now(4, save_s);
        assert!(waited(Interval::Minutes(1.0), None) && !waited(Interval::Minutes(1.1), None));
        assert!(waited(Interval::Auto, None), "the first checkpoint measures the time of a save");
        // √(2 · 0.01 s · 86,400 s) = 42 s; a save of a tenth of a second asks for 131 s.
        assert!(waited(Interval::Auto, Some(0.01)) && !waited(Interval::Auto, Some(0.1)));
    }
}
