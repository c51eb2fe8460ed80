//! The loop that trains every phase. Read this first; one optimiser step is `step.rs`.

pub mod adamw;
mod checkpoints;
pub mod evaluate;
mod logging;
pub mod step;

use crate::collective::Collective;
use crate::data::Source;
use crate::data::feed::loader::{Loader, Mixing};
use crate::device::memory;
use crate::error::Failure;
use crate::libtorch::empty_cache;
use crate::model::Network;
use crate::plan::{PhasePlan, Plan};
use crate::store::lease::Lease;
use crate::store::{Artefact, Header, RunDir, artefact};
use crate::weights::{Weights, on_device};
use adamw::AdamW;
use anyhow::{Context, Result, anyhow};
use checkpoints::Checkpoints;
pub use checkpoints::time_checkpoints;
use logging::Logging;
pub use logging::waited;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use step::Stepper;
use tch::{Device, Tensor};

/// Set by a signal handler; the replicas of a group agree on it at every step boundary.
pub static STOP: AtomicBool = AtomicBool::new(false);

/// What one phase needs beside its plan.
pub struct Setting<'a> {
    pub plan: &'a Plan,
    pub run: &'a RunDir,
    pub source: &'a Source,
    /// The replicas that train the phase together.
    pub group: &'a dyn Collective,
    /// Where this replica is.
    pub device: Device,
    /// The right to write the phase; the group's first replica has it.
    pub lease: Option<&'a Lease>,
}

/// Weights and optimiser of a phase, as they stand after some step.
struct Trainer {
    network: Network,
    optimiser: AdamW,
    step: u64,
}

/// Trains a phase to its end, from its newest checkpoint if there is one, and writes its artefact.
///
/// `start` holds every parameter at step 0; `meta` is the content hash of the meta model it derives from.
///
/// # Errors
/// [`Failure::Stopped`] after a signal, with a checkpoint written; an error if the loss is not finite.
pub fn run(setting: &Setting, phase: &PhasePlan, start: Weights, meta: Option<&str>) -> Result<()> {
    let mut trainer = Trainer::resume(setting, phase, start, meta)?;
    // What it started from and a step to try the micro-batch took; the training's tensors are of other sizes.
    memory::give_back();
    empty_cache(setting.device);
    let mut logging = Logging::open(setting.run, phase, setting.group, trainer.step)?;
    let result = trainer.train(setting, phase, meta, &mut logging);
    match &result {
        Ok(()) => logging.done(trainer.step),
        Err(error) if Failure::is_stop(error) => logging.stopped(trainer.step),
        // The caller tells.
        Err(_) => {}
    }
    result
}

impl Trainer {
    /// From the newest checkpoint that verifies, else from `start`, of which only the frozen stages are kept. Collective:
    /// the first replica chooses.
    fn resume(setting: &Setting, phase: &PhasePlan, mut start: Weights, meta: Option<&str>) -> Result<Trainer> {
        let Setting { plan, run, group, device, .. } = *setting;
        let network = |weights: &Weights| {
            Network::new(&plan.config, &phase.depths, phase.trained.clone(), &on_device(weights, device))
        };
        let newest = if group.is_zero() { run.newest_checkpoint(&phase.name, &phase.recipe, meta)? } else { None };
        // Whether there is one, and its step.
        let mut chosen = newest.as_ref().map_or([0.0; 2], |checkpoint| [1.0, checkpoint.header.step as f64]);
        group.all_reduce_f64(&mut chosen)?;
        let checkpoint = match (chosen, newest) {
            ([0.0, _], _) => None,
            (_, Some(newest)) => Some(newest),
            ([_, step], None) => Some(artefact::read(&run.checkpoint(&phase.name, step as u64))?),
        };
        let Some(Artefact { header, weights, state, .. }) = checkpoint else {
            let network = network(&start)?;
            let optimiser = AdamW::new(&phase.training, network.flat());
            return Ok(Trainer { network, optimiser, step: 0 });
        };
        if group.is_zero() {
            log::info!("{}: resuming at step {} of {}", phase.name, header.step, phase.steps);
        }
        // A module's checkpoint holds its own stage; the frozen ones are the start's.
        start.extend(weights);
        let network = network(&start)?;
        let optimiser = AdamW::resume(&phase.training, network.flat(), state, header.step)
            .with_context(|| format!("{}: checkpoint of step {}", phase.name, header.step))?;
        Ok(Trainer { network, optimiser, step: header.step })
    }

    fn train(&mut self, setting: &Setting, phase: &PhasePlan, meta: Option<&str>, logging: &mut Logging) -> Result<()> {
        let Setting { plan, run, source, group, device, lease } = *setting;
        let mut stepper = Stepper::new(plan, phase, group);
        let mixing = if device.is_cuda() { Mixing::Device(device) } else { Mixing::Host };
        let mut loader = Loader::start(plan, phase, source, group.rank(), group.size(), self.step, mixing);
        let eval_steps = phase.training.eval_epochs as u64 * phase.steps_per_epoch;
        let header = self.header(plan, phase, meta, BTreeMap::new());
        let mut checkpoints = group.is_zero().then(|| Checkpoints::start(setting, phase, header, self)).transpose()?;

        while self.step < phase.steps {
            let lr = phase.lr(self.step);
            let told = stepper.step(&mut self.network, &mut self.optimiser, &mut loader, self.step, lr)?;
            self.step += 1;
            let is_last = self.step == phase.steps;
            let evaluates = eval_steps > 0 && self.step.is_multiple_of(eval_steps);
            // What is about to look at the weights waits for them.
            let waits = is_last || evaluates || told.is_some_and(|outcome| outcome.stop);
            let rest = if waits { stepper.last()? } else { None };
            for outcome in told.iter().chain(&rest) {
                if !outcome.loss.is_finite() {
                    return self.not_finite(setting, phase, outcome.step, checkpoints.as_mut());
                }
                logging.step(outcome, phase.lr(outcome.step), plan.config.run.log_steps);
            }
            let mut stop = told.iter().chain(&rest).any(|outcome| outcome.stop);
            if evaluates && !is_last && !stop {
                match self.evaluate(setting, phase.micro_batch)? {
                    Some(metrics) => logging.evaluation(self.step, &metrics),
                    None => stop = true,
                }
            }
            if let Some(lease) = lease.filter(|lease| lease.is_lost()) {
                lease.fence().check()?;
            }
            if stop {
                return self.stop(setting, phase, checkpoints.as_mut(), logging);
            }
            if let Some(checkpoints) = checkpoints.as_mut().filter(|_| !is_last) {
                if checkpoints.is_due(self.step)? && stepper.is_finite()? {
                    checkpoints.begin(self)?;
                }
                logging.saved(checkpoints.save_s());
            }
        }
        let Some(metrics) = self.evaluate(setting, phase.micro_batch)? else {
            return self.stop(setting, phase, checkpoints.as_mut(), logging);
        };
        logging.evaluation(self.step, &metrics);
        if !metrics["loss"].is_finite() {
            return self.not_finite(setting, phase, self.step - 1, checkpoints.as_mut());
        }
        if let Some(checkpoints) = checkpoints {
            checkpoints.close()?;
            let header = self.header(plan, phase, meta, metrics);
            let weights = self.network.flat().layout().named(&self.evaluated_weights().to_device(Device::Cpu));
            artefact::write(&run.file(&phase.file), &header, &weights, lease.map(Lease::fence))?;
            run.prune_checkpoints(&phase.name, self.step, 0, lease.map(Lease::fence));
        }
        group.barrier()
    }

    /// The orderly end after a signal, with a checkpoint of this very step, also of the last one if it is yet to be evaluated.
    fn stop(
        &mut self,
        setting: &Setting,
        phase: &PhasePlan,
        checkpoints: Option<&mut Checkpoints>,
        logging: &mut Logging,
    ) -> Result<()> {
        if let Some(checkpoints) = checkpoints {
            if !checkpoints.save_now(self)? {
                // Nor will be the next step's loss.
                return self.not_finite(setting, phase, self.step, Some(checkpoints));
            }
            logging.saved(checkpoints.save_s());
        }
        // None leaves while another may still be at the sum that told it to.
        setting.group.barrier()?;
        Err(Failure::Stopped { phase: phase.name.clone(), step: self.step }.into())
    }

    /// The error for a step, counted from 0, whose loss is not finite. All replicas have seen the same; the first one says so.
    fn not_finite(
        &self,
        setting: &Setting,
        phase: &PhasePlan,
        step: u64,
        checkpoints: Option<&mut Checkpoints>,
    ) -> Result<()> {
        let writer = checkpoints.is_some();
        checkpoints.map_or(Ok(()), Checkpoints::finish)?;
        // The others end the world when they have waited for the reason long enough; writing may take longer.
        setting.group.barrier()?;
        if !writer {
            return Err(Failure::Elsewhere { code: 1 }.into());
        }
        let good = setting.run.checkpoints(&phase.name)?;
        let good = good.first().map_or("none".into(), |(_, path)| path.display().to_string());
        Err(anyhow!(
            "{}: the loss is no longer finite at step {} (learning rate {:.3e}); last good checkpoint: {good}. Lower \
             base_lr, lengthen warmup_epochs or set clip_grad, in another --run-dir",
            phase.name,
            step + 1,
            phase.lr(step)
        ))
    }

    fn header(&self, plan: &Plan, phase: &PhasePlan, meta: Option<&str>, metrics: BTreeMap<String, f64>) -> Header {
        Header {
            phase: phase.row.to_string(),
            index: phase.index,
            depths: phase.depths.clone(),
            step: self.step,
            recipe: phase.recipe.clone(),
            meta: meta.map(str::to_string),
            model: plan.config.model.clone(),
            metrics,
        }
    }

    /// What gets evaluated and written: the moving average where there is one, else the weights.
    fn evaluated_weights(&self) -> &Tensor {
        self.optimiser.average().unwrap_or(self.network.flat().buffer())
    }

    fn evaluate(&mut self, setting: &Setting, micro_batch: usize) -> Result<Option<BTreeMap<String, f64>>> {
        let Setting { plan, source, group, .. } = *setting;
        let weights: Option<Tensor> = self.optimiser.average().map(|average| {
            let kept = self.network.flat().buffer().copy();
            self.network.flat_mut().set(average);
            kept
        });
        let metrics = evaluate::evaluate(&self.network, source, &plan.config, micro_batch, group, &mut |_, _| ());
        if let Some(weights) = weights {
            self.network.flat_mut().set(&weights);
        }
        metrics
    }
}

/// Whether a signal asked this process to stop.
pub fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests;
