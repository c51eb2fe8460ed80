//! The loop that trains every phase. Read this file first. `step.rs` has the code of one optimiser step.

pub mod checkpoints;
mod clock;
pub mod evaluate;
mod logging;
pub mod optimiser;
pub mod step;
pub mod trainer;

pub use clock::Clock;

use crate::collective::Collective;
use crate::data::feed::Feed;
use crate::data::feed::images::Handover;
use crate::data::feed::loader::Loader;
use crate::device::memory;
use crate::error::Failure;
use crate::libtorch::empty_cache;
use crate::plan::groups::{micro_batches, share};
use crate::plan::{PhasePlan, Plan};
use crate::run::data::TrainedOn;
use crate::store::lease::Lease;
use crate::store::{RunDir, artefact, durable, full_disk};
use crate::weights::{Staging, Weights};
use anyhow::{Result, anyhow};
use checkpoints::Checkpoints;
use evaluate::Evaluation;
use logging::Logging;
use step::Stepper;
use tch::Device;
use trainer::Trainer;

/// The surroundings in which this replica trains a phase. [`PhasePlan`] describes the phase itself.
pub struct Setting<'a> {
    pub plan: &'a Plan,
    pub run: &'a RunDir,
    pub feed: Feed<'a>,
    /// The replicas that train the phase together.
    pub group: &'a dyn Collective,
    /// The device of this replica.
    pub device: Device,
    /// Samples per forward pass.
    pub micro_batch: usize,
    /// The right to write the phase's files, which only the group's first replica has.
    pub lease: Option<&'a Lease>,
    /// Counts the time of this rank.
    pub clock: &'a Clock,
    /// The number of ranks in the whole world, not only in the group.
    pub ranks: usize,
    /// The description of the data in the headers of artefacts and checkpoints.
    pub data: Option<&'a TrainedOn>,
}

/// Trains a phase to its end, from its newest checkpoint if there is one, and writes its artefact.
///
/// `start` holds all parameters at step 0. `meta` is the content hash of the artefact from which the phase derives, if any: the
/// meta model or, for segmentation and detection, the classifier.
///
/// # Errors
/// [`Failure::Stopped`] after a signal; a checkpoint is then written. Another error if the loss is not finite, or if a file cannot
/// be read or written.
pub fn run(setting: &Setting, phase: &PhasePlan, start: Weights, meta: Option<&str>) -> Result<()> {
    let trainer = Trainer::resume(setting, phase, start, meta)?;
    // Give free memory back to the system. Training would not reuse the memory of the start weights and of the trial step that
    // chose the micro-batch, because the tensors of training have other sizes.
    memory::give_back();
    empty_cache(setting.device);
    let logging = Logging::open(setting, phase, trainer.step)?;
    let header = trainer.checkpoint_header(setting, phase, meta);
    let checkpoints =
        setting.group.is_zero().then(|| Checkpoints::start(setting, phase, header, &trainer)).transpose()?;
    let mut training = Training { setting, phase, meta, trainer, logging, checkpoints };
    let result = training.train().and_then(|end| training.end(end));
    match &result {
        Ok(()) => training.logging.done(training.trainer.step),
        Err(error) if Failure::is_stop(error) => training.logging.stopped(training.trainer.step),
        // The caller reports the error.
        Err(_) => {}
    }
    result
}

/// A phase that is being trained.
struct Training<'a> {
    setting: &'a Setting<'a>,
    phase: &'a PhasePlan,
    meta: Option<&'a str>,
    trainer: Trainer,
    logging: Logging<'a>,
    /// Only the group's first replica writes checkpoints.
    checkpoints: Option<Checkpoints>,
}

/// Why the steps of a phase end.
enum End {
    /// The last step is done.
    Complete,
    /// A signal asked a rank to stop.
    Stop,
    /// The loss of this step, counted from 0, is not finite.
    NotFinite(u64),
}

impl Training<'_> {
    /// The loop: step, log, evaluate, checkpoint.
    fn train(&mut self) -> Result<End> {
        let Training { setting, phase, .. } = *self;
        let Setting { plan, feed, group, device, lease, .. } = *setting;
        let share = share(phase.training.global_batch, group.rank(), group.size());
        let micro_batches = micro_batches(share, setting.micro_batch);
        let mut stepper = Stepper::new(plan, phase, group, micro_batches.len());
        let handover = Handover::new(Staging::new(device, group.pinning()), true);
        let mut loader = Loader::start(plan, phase, feed, micro_batches, self.trainer.step, handover)?;
        let eval_steps = phase.training.eval_epochs as u64 * phase.steps_per_epoch;

        while self.trainer.step < phase.steps {
            let Trainer { network, optimiser, step, .. } = &mut self.trainer;
            let done = stepper.step(network, optimiser, &mut loader, *step, phase.lr(*step))?;
            *step += 1;
            let is_last = *step == phase.steps;
            let evaluates = eval_steps > 0 && step.is_multiple_of(eval_steps);
            // An evaluation, the end of the phase and a stop first wait for the outcome of the newest step. Its loss is then
            // known to be finite.
            let waits = is_last || evaluates || done.is_some_and(|outcome| outcome.stop);
            let newest = if waits { stepper.last()? } else { None };
            let outcomes = || done.iter().chain(&newest);
            for outcome in outcomes() {
                if !outcome.loss.is_finite() {
                    return Ok(End::NotFinite(outcome.step));
                }
                self.logging.step(outcome, phase.lr(outcome.step), plan.config.run.log_steps);
            }
            let mut stop = outcomes().any(|outcome| outcome.stop);
            if evaluates && !is_last && !stop {
                stop = self.evaluate()?.is_none();
            }
            if let Some(lease) = lease.filter(|lease| lease.is_lost()) {
                lease.fence().check()?;
            }
            if stop {
                return Ok(End::Stop);
            }
            if !is_last {
                self.checkpoint_if_due(&stepper)?;
            }
        }
        Ok(End::Complete)
    }

    /// Evaluates and logs the metrics; none if a signal asked a rank to stop.
    fn evaluate(&mut self) -> Result<Option<Evaluation>> {
        let evaluation = self.trainer.evaluate(self.setting)?;
        if let Some(Evaluation { metrics, .. }) = &evaluation {
            self.logging.evaluation(self.trainer.step, metrics);
        }
        Ok(evaluation)
    }

    fn checkpoint_if_due(&mut self, stepper: &Stepper) -> Result<()> {
        if let Some(checkpoints) = &mut self.checkpoints {
            if checkpoints.is_due(self.trainer.step)? && stepper.is_finite()? {
                checkpoints.begin(&mut self.trainer)?;
            }
            self.logging.saved(checkpoints.save_s());
            self.logging.trouble(checkpoints.trouble());
        }
        Ok(())
    }

    /// Ends the phase: writes its artefact, or returns the error that says why there is none.
    fn end(&mut self, end: End) -> Result<()> {
        match end {
            End::NotFinite(step) => return self.not_finite(step),
            End::Stop => return self.stop(),
            End::Complete => {}
        }
        let Some(Evaluation { metrics, classes }) = self.evaluate()? else { return self.stop() };
        if !metrics.values().all(|value| value.is_finite()) {
            return self.not_finite(self.trainer.step - 1);
        }
        let Training { setting, phase, .. } = *self;
        if let Some(checkpoints) = self.checkpoints.take() {
            checkpoints.close()?;
            let fence = setting.lease.map(Lease::fence);
            let header = self.trainer.header(setting, phase, self.meta, metrics);
            let (path, weights) = (setting.run.file(&phase.file), self.trainer.result(&header));
            let write = || artefact::write(&path, &header, &weights, fence);
            full_disk::insist(write, &mut |why| self.logging.trouble(why))?;
            if !classes.is_empty() {
                durable::replace_bytes(&setting.run.classes(&phase.name), &serde_json::to_vec_pretty(&classes)?)?;
            }
            setting.run.prune_checkpoints(&phase.name, self.trainer.step, 0, fence);
        }
        setting.group.barrier()
    }

    /// Ends the phase after a signal. Writes a checkpoint of the newest step even if only the final evaluation remains.
    fn stop(&mut self) -> Result<()> {
        if let Some(checkpoints) = &mut self.checkpoints {
            if !checkpoints.save_now(&mut self.trainer, &mut |why| self.logging.trouble(why))? {
                // The weights are not finite, so the loss of the next step would not be finite either.
                return self.not_finite(self.trainer.step);
            }
            self.logging.saved(checkpoints.save_s());
        }
        // No replica leaves while another replica may still be in the all-reduce of the request to stop.
        self.setting.group.barrier()?;
        Err(Failure::Stopped { phase: self.phase.name.clone(), step: self.trainer.step }.into())
    }

    /// Ends the phase because the loss of `step`, counted from 0, is not finite. All replicas have the same loss, and the first
    /// replica reports the error.
    fn not_finite(&mut self, step: u64) -> Result<()> {
        let phase = self.phase;
        self.checkpoints.as_mut().map_or(Ok(()), Checkpoints::finish)?;
        // Without the barrier, the other replicas could abort all ranks before the first replica has finished writing its
        // checkpoint.
        self.setting.group.barrier()?;
        if self.checkpoints.is_none() {
            return Err(Failure::OnOtherRank { code: 1 }.into());
        }
        let good = self.setting.run.checkpoints(&phase.name)?;
        let good = good.first().map_or("none".into(), |(_, path)| path.display().to_string());
        Err(anyhow!(
            "{}: the loss is no longer finite at step {} (learning rate {:.3e}); last good checkpoint: {good}. Lower \
             base_lr, lengthen warmup_epochs or set clip_grad, in another --run-dir",
            phase.name,
            step + 1,
            phase.lr(step)
        ))
    }
}

#[cfg(test)]
mod tests;
