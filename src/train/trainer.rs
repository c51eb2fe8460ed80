//! The network and the optimiser of a phase: starts or resumes them, evaluates the network, and prepares the contents of artefacts
//! and checkpoints.

use super::evaluate::Evaluation;
use super::optimiser::Optimiser;
use super::{Setting, evaluate};
use crate::family::parameter::Parameter;
use crate::model::{Network, fresh};
use crate::plan::PhasePlan;
use crate::store::{Artefact, Header, artefact};
use crate::task::{Objective, Task};
use crate::weights::{Weights, on_device};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

/// The network and the optimiser of a phase after some step.
pub struct Trainer {
    pub network: Network,
    pub optimiser: Optimiser,
    /// How many steps are done.
    pub step: u64,
    /// The parameters of the task and of the heads of local losses ([`Objective::auxiliary`]).
    auxiliary: Vec<Parameter>,
}

impl Trainer {
    /// Resumes from the newest valid checkpoint, which the first replica chooses, or starts from `start` if there is none. Frozen
    /// stages always have the weights of `start`. Collective over the group.
    pub fn resume(setting: &Setting, phase: &PhasePlan, mut start: Weights, meta: Option<&str>) -> Result<Trainer> {
        let Setting { plan, run, group, device, .. } = *setting;
        let auxiliary = Objective::of(&plan.config, &phase.borders).auxiliary();
        start.extend(fresh(auxiliary.iter(), phase.seed));
        let rates = phase.rates(plan, &auxiliary);
        let network = |weights: &Weights| {
            Network::new(&plan.config, &phase.depths, phase.trained.clone(), &auxiliary, &on_device(weights, device))
        };
        let newest = if group.is_zero() { run.newest_checkpoint(&phase.name, &phase.recipe, meta)? } else { None };
        // The first number is 1 if there is a checkpoint, otherwise 0. The second number is the step of the checkpoint.
        let mut chosen = newest.as_ref().map_or([0.0; 2], |checkpoint| [1.0, checkpoint.header.step as f64]);
        group.all_reduce_f64(&mut chosen)?;
        let checkpoint = match (chosen, newest) {
            ([0.0, _], _) => None,
            (_, Some(newest)) => Some(newest),
            ([_, step], None) => Some(artefact::read(&run.checkpoint(&phase.name, step as u64))?),
        };
        let Some(Artefact { header, weights, state, .. }) = checkpoint else {
            let network = network(&start)?;
            let optimiser = Optimiser::new(&phase.training, network.flat()).with_rates(rates);
            return Ok(Trainer { network, optimiser, step: 0, auxiliary });
        };
        if group.is_zero() {
            log::info!("{}: resuming at step {} of {}", phase.name, header.step, phase.steps);
        }
        // The checkpoint of a module has no weights of the frozen stages, so they stay as in `start`.
        start.extend(weights);
        let network = network(&start)?;
        let optimiser = Optimiser::resume(&phase.training, network.flat(), state, header.step)
            .with_context(|| format!("{}: checkpoint of step {}", phase.name, header.step))?
            .with_rates(rates);
        Ok(Trainer { network, optimiser, step: header.step, auxiliary })
    }

    /// The header of a checkpoint of the present step. Unlike artefacts of finished phases, checkpoints also hold the heads of
    /// local losses.
    pub fn checkpoint_header(&self, setting: &Setting, phase: &PhasePlan, meta: Option<&str>) -> Header {
        Header { auxiliary: self.auxiliary.clone(), ..self.header(setting, phase, meta, BTreeMap::new()) }
    }

    /// The header of an artefact with the weights of the present step.
    pub fn header(
        &self,
        setting: &Setting,
        phase: &PhasePlan,
        meta: Option<&str>,
        metrics: BTreeMap<String, f64>,
    ) -> Header {
        let config = &setting.plan.config;
        Header {
            phase: phase.row.to_string(),
            index: phase.index,
            depths: phase.depths.clone(),
            step: self.step,
            recipe: phase.recipe.clone(),
            meta: meta.map(str::to_string),
            model: config.model.clone(),
            auxiliary: Task::of(config).parameters(phase.depths.len()),
            metrics,
            class_names: setting.feed.source.train.classes().to_vec(),
            data: setting.data.cloned(),
        }
    }

    /// The weights that are evaluated and that the phase's artefact with this header holds, in host memory. They are the moving
    /// average if the phase keeps one. The heads of local losses are left out.
    pub(super) fn result(&self, header: &Header) -> Weights {
        let flat = self.network.flat();
        let evaluated = self.optimiser.average().unwrap_or(flat.buffer());
        let mut weights = flat.layout().named(&evaluated.to_device(Device::Cpu));
        let of_task = |name: &str| header.auxiliary.iter().any(|parameter| parameter.name == name);
        weights.retain(|(stage, name), _| *stage < header.depths.len() || of_task(name));
        weights
    }

    /// Evaluates the weights that [`Trainer::result`] returns. Returns none if a signal asked a rank to stop. Collective over the
    /// group.
    pub(super) fn evaluate(&mut self, setting: &Setting) -> Result<Option<Evaluation>> {
        let Setting { plan, feed, group, micro_batch, .. } = *setting;
        let weights: Option<Tensor> = self.optimiser.average().map(|average| {
            let weights = self.network.flat().buffer().copy();
            self.network.flat_mut().set(average);
            weights
        });
        let evaluation = evaluate::evaluate(&self.network, feed, &plan.config, micro_batch, group, &mut |_, _| ());
        if let Some(weights) = weights {
            self.network.flat_mut().set(&weights);
        }
        evaluation
    }
}
