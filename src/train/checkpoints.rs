//! Checkpoints beside the training: a thread writes the file. From host memory it writes the trainer's own flat buffers,
//! which the next update leaves alone until they are in the file; a GPU's it writes from a copy.

use super::Setting;
use super::trainer::Trainer;
use crate::config::Interval;
use crate::driver::{PinnedMemory, cuda};
use crate::model::Loan;
use crate::plan::PhasePlan;
use crate::store::lease::Fence;
use crate::store::{Header, RunDir, artefact};
use crate::weights::floats;
use anyhow::{Result, anyhow};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Writes a phase's checkpoints. Only the group's first replica has one.
pub struct Checkpoints {
    due: Due,
    header: Header,
    /// What to write from; none while the writer has it.
    spare: Option<Buffers>,
    to_writer: Option<Sender<Snapshot>>,
    written: Receiver<Result<Written>>,
    thread: Option<JoinHandle<()>>,
    /// The seconds that the last save took.
    save_s: Option<f64>,
}

/// Weights and optimiser state, in the order of [`crate::family::parameter::flat_order`].
struct Buffers {
    weights: Tensor,
    state: Vec<(&'static str, Tensor)>,
    /// What they lie in, where they are copies.
    pinned: Vec<PinnedMemory>,
}

struct Snapshot {
    header: Header,
    buffers: Buffers,
    /// Of the trainer's own buffers, where these are no copies.
    loan: Option<Loan>,
}

struct Written {
    buffers: Buffers,
    /// None where the weights are not finite, and so were not written.
    took: Option<Duration>,
}

/// Where and how the writer writes.
struct Writer {
    run: RunDir,
    phase: String,
    keep: usize,
    fence: Option<Fence>,
}

impl Checkpoints {
    /// Starts the writer of a phase; `header` is what its checkpoints say beside their step.
    ///
    /// # Errors
    /// There is no memory for the copies of a GPU's buffers.
    pub fn start(setting: &Setting, phase: &PhasePlan, header: Header, trainer: &Trainer) -> Result<Checkpoints> {
        let config = &setting.plan.config.run;
        let writer = Writer {
            run: setting.run.clone(),
            phase: phase.name.clone(),
            keep: config.keep_checkpoints,
            fence: setting.lease.map(|lease| lease.fence().clone()),
        };
        let buffers = Buffers::of(trainer)?;
        let (to_writer, snapshots) = channel();
        let (done, written) = channel();
        let thread = std::thread::spawn(move || writer.write_all(&snapshots, &done));
        Ok(Checkpoints {
            due: Due::new(config.checkpoint_every, phase.steps_per_epoch, header.step),
            header,
            spare: Some(buffers),
            to_writer: Some(to_writer),
            written,
            thread: Some(thread),
            save_s: None,
        })
    }

    /// Whether to begin one after `step`: the one before is no longer being written.
    ///
    /// # Errors
    /// What went wrong with an earlier one.
    pub fn is_due(&mut self, step: u64) -> Result<bool> {
        match self.written.try_recv() {
            Ok(written) => self.take_back(written?),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Err(anyhow!("the checkpoint writer has died")),
        }
        Ok(self.spare.is_some() && self.due.is_now(step, self.save_s))
    }

    /// Writes a checkpoint of this very step and waits until it is on disk. False where its weights are not finite.
    pub fn save_now(&mut self, trainer: &mut Trainer) -> Result<bool> {
        self.finish()?;
        self.begin(trainer)?;
        let written = self.receive()?;
        let is_saved = written.took.is_some();
        self.take_back(written);
        Ok(is_saved)
    }

    /// Waits for what is being written.
    pub fn finish(&mut self) -> Result<()> {
        if self.spare.is_none() {
            let written = self.receive()?;
            self.take_back(written);
        }
        Ok(())
    }

    fn receive(&self) -> Result<Written> {
        self.written.recv().map_err(|_| anyhow!("the checkpoint writer has died"))?
    }

    /// The orderly end, which gives back what copies lay in.
    pub fn close(mut self) -> Result<()> {
        self.finish()?;
        if let Some(Buffers { weights, state, pinned }) = self.spare.take() {
            drop((weights, state));
            pinned.into_iter().for_each(PinnedMemory::free);
        }
        Ok(())
    }

    /// The seconds that the last save took, from the copy to the file in its place.
    pub fn save_s(&self) -> Option<f64> {
        self.save_s
    }

    fn take_back(&mut self, written: Written) {
        self.save_s = written.took.map(|took| took.as_secs_f64()).or(self.save_s);
        self.spare = Some(written.buffers);
    }

    /// Has what there is now written; the one before must be done.
    pub fn begin(&mut self, trainer: &mut Trainer) -> Result<()> {
        let mut buffers = self.spare.take().expect("the writer has given them back");
        let loan = buffers.catch_up(trainer);
        let header = Header { step: trainer.step, ..self.header.clone() };
        let writer = self.to_writer.as_ref().expect("only dropping closes the channel");
        writer.send(Snapshot { header, buffers, loan }).map_err(|_| anyhow!("the checkpoint writer has died"))?;
        self.due.begun(trainer.step);
        Ok(())
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        // What has begun is worth finishing, also where the phase fails.
        self.to_writer = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Buffers {
    /// The trainer's own in host memory; for those of a GPU copies in pinned memory, to which they go at full speed.
    fn of(trainer: &Trainer) -> Result<Buffers> {
        let mut pinned = Vec::new();
        let mut host = |tensor: &Tensor| -> Result<Tensor> {
            if tensor.device() == Device::Cpu {
                return Ok(tensor.shallow_clone());
            }
            let memory = PinnedMemory::new(cuda()?, tensor.numel() * size_of::<f32>())?;
            let (start, size) = (memory.start().cast_const().cast(), tensor.size());
            pinned.push(memory);
            // SAFETY: the memory holds as many fp32 numbers and lives as long, in the same `Buffers`.
            Ok(unsafe { Tensor::from_blob(start, &size, &[1], Kind::Float, Device::Cpu) })
        };
        let weights = host(trainer.network.flat().buffer())?;
        let state = trainer.optimiser.state().into_iter().map(|(name, tensor)| Ok((name, host(tensor)?)));
        let state = state.collect::<Result<_>>()?;
        Ok(Buffers { weights, state, pinned })
    }

    /// Makes them what the trainer's are now, and stay so.
    fn catch_up(&mut self, trainer: &mut Trainer) -> Option<Loan> {
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
            let written = written.map(|is_written| Written { buffers, took: is_written.then(|| began.elapsed()) });
            if done.send(written).is_err() {
                break;
            }
        }
    }

    /// Whether it could: weights that are not finite are no checkpoint.
    fn write(&self, header: &Header, buffers: &Buffers, loan: Option<Loan>) -> Result<bool> {
        if !floats(&buffers.weights).iter().all(|weight| weight.is_finite()) {
            // The next step's loss says it loudly, and names the last good one.
            log::warn!("{}: the weights of step {} are not finite; no checkpoint of them", self.phase, header.step);
            return Ok(false);
        }
        let state = buffers.state.iter().map(|(name, tensor)| (*name, tensor));
        let all: Vec<(&str, &Tensor)> = std::iter::once(("weights", &buffers.weights)).chain(state).collect();
        let path = self.run.checkpoint(&self.phase, header.step);
        // What is left to do then, such as waiting for the disk, needs the buffers no more.
        artefact::write_checkpoint(&path, header, &all, self.fence.as_ref(), || drop(loan))?;
        self.run.prune_checkpoints(&self.phase, header.step, self.keep, self.fence.as_ref());
        Ok(true)
    }
}

/// Mean time between failures of one job, in seconds. The interval goes with its root, so the order of magnitude will do:
/// a day is what large jobs on large machines report.
const BETWEEN_FAILURES: f64 = 86_400.0;
/// The first checkpoint of `auto`, which measures the time to save; and the bounds of those after it.
const FIRST: Duration = Duration::from_secs(60);
const SHORTEST: f64 = 10.0;
const LONGEST: f64 = 3600.0;

/// When the next checkpoint is due.
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
        // By multiples of n, and not n steps after the last: a resumed run keeps the rhythm.
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

/// The interval that loses least to saving and to failures together: √(2 · time to save · time between failures)
/// (Young 1974, doi:10.1145/361147.361115; to first order also Daly 2006).
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
        assert!(waited(Interval::Auto, None), "the first measures the time to save");
        // √(2 · 0.01 s · 86,400 s) = 42 s; a save of a tenth of a second asks for 131 s.
        assert!(waited(Interval::Auto, Some(0.01)) && !waited(Interval::Auto, Some(0.1)));
    }
}
