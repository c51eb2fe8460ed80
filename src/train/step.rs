//! One optimiser step: the forward and backward pass of each micro-batch, one all-reduce of the gradients, clipping, and the
//! update of the weights.
//!
//! The host reads the loss and the stop flag of a step while a GPU computes the next step. So with a GPU the loop gets the
//! outcome of a step one step late. On the CPU it gets the outcome at once. Within a step, the host waits for a GPU in two
//! cases: if it adds up tensors of several GPUs in host memory, and in detection, because the host selects and samples boxes.

use super::optimiser::Optimiser;
use crate::collective::Collective;
use crate::data::feed::batch::Batch;
use crate::device::later::Later;
use crate::model::{DropPath, EXTRAS, Network};
use crate::plan::{PhasePlan, Plan};
use crate::random::Random;
use crate::stop::stop_requested;
use crate::task::{Given, Loss, Objective, Part};
use crate::weights::Staging;
use anyhow::Result;
use std::time::{Duration, Instant};
use tch::Tensor;

/// The result of a step.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// The step, counted from 0.
    pub step: u64,
    /// The mean loss over the global batch.
    pub loss: f64,
    /// The norm of all gradients before clipping. If it is not finite, the step has changed no trained weight.
    pub norm: f64,
    /// Whether a signal has asked a rank of the group to stop.
    pub stop: bool,
    pub times: Times,
}

/// The time that this replica spent on each part of a step. A GPU computes while the host goes on. So with a GPU, the times of
/// computation tell how long the host takes to start the GPU's work. `device` tells how long the host waits for the results.
/// Detection also waits for the GPU within `forward`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Waiting for the loader.
    pub data: Duration,
    /// Copying the batch to the device, the forward pass through the stages, and the losses. The losses include the forward and
    /// backward passes of the task's and the local losses' heads.
    pub forward: Duration,
    /// The backward pass through the stages.
    pub backward: Duration,
    pub all_reduce: Duration,
    /// The optimiser, including the norm of the gradients.
    pub optimiser: Duration,
    /// Waiting until the device has done the work of the step.
    pub device: Duration,
}

impl std::ops::AddAssign for Times {
    fn add_assign(&mut self, other: Times) {
        self.data += other.data;
        self.forward += other.forward;
        self.backward += other.backward;
        self.all_reduce += other.all_reduce;
        self.optimiser += other.optimiser;
        self.device += other.device;
    }
}

/// Adds the time that `act` takes to `time`.
fn timed<T>(time: &mut Duration, act: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = act();
    *time += began.elapsed();
    result
}

/// A step whose work was given to the device and whose outcome the host has not read.
struct Unread {
    step: u64,
    /// A copy of three numbers: the loss, the number of replicas that a signal has asked to stop, and the norm of the gradients.
    extras: Later,
    times: Times,
}

/// Runs the steps of a phase.
pub struct Stepper<'a> {
    group: &'a dyn Collective,
    objective: Objective,
    global_batch: f64,
    micro_batches: usize,
    clip: f64,
    drop: DropPathRule,
    dropout: bool,
    seed: u64,
    /// The newest step, if the host has gone on before the step was done.
    unread: Option<Unread>,
    /// Whether the host goes on before a step is done.
    runs_ahead: bool,
}

impl<'a> Stepper<'a> {
    /// Prepares the steps of a phase. This replica has `micro_batches` micro-batches in every step.
    pub fn new(plan: &Plan, phase: &PhasePlan, group: &'a dyn Collective, micro_batches: usize) -> Stepper<'a> {
        Stepper {
            group,
            objective: Objective::of(&plan.config, &phase.borders),
            global_batch: phase.training.global_batch as f64,
            micro_batches,
            clip: phase.training.clip_grad,
            drop: DropPathRule {
                rates: plan.config.model.drop_rates(&phase.depths, phase.training.drop_path),
                seed: phase.seed,
            },
            dropout: plan.config.model.dropout() > 0.0,
            seed: phase.seed,
            unread: None,
            runs_ahead: false,
        }
    }

    /// Trains on one global batch, of which this replica takes its micro-batches from `batches`. If the loss or the norm of the
    /// gradients is not finite, the trained weights do not change. On a CPU, returns the outcome of this step. On a GPU, returns
    /// the outcome of the step before this step, or none if that outcome was returned before or there is no such step.
    pub fn step(
        &mut self,
        network: &mut Network,
        optimiser: &mut Optimiser,
        batches: &mut dyn Iterator<Item = Result<Batch>>,
        step: u64,
        lr: f64,
    ) -> Result<Option<Outcome>> {
        let mut times = Times::default();
        let _ = network.flat_mut().gradients_mut().zero_();
        if self.dropout {
            // libtorch's generator draws the dropout masks. With a seed for each step and rank, a resumed run draws the same
            // masks.
            tch::manual_seed(crate::random::key(&[self.seed, DROPOUT, step, self.group.rank() as u64]) as i64);
        }
        for _ in 0..self.micro_batches {
            let batch = timed(&mut times.data, || batches.next()).expect("a loader has no end")?;
            self.accumulate(network, batch, step, &mut times)?;
        }
        let extras = network.flat().len() as i64;
        let mut summed = network.flat_mut().summed();
        let _ = summed.narrow(0, extras + 1, 1).fill_(f64::from(u8::from(stop_requested())));
        timed(&mut times.all_reduce, || self.group.all_reduce(&mut summed))?;
        network.flat_mut().move_buffers(self.global_batch);
        timed(&mut times.optimiser, || optimiser.step(network.flat_mut(), self.clip, lr));
        let extras = Later::start(&network.flat().gradients().narrow(0, extras, EXTRAS as i64))?;
        let newest = Unread { step, extras, times };
        self.runs_ahead |= network.options().1.is_cuda();
        let done = if self.runs_ahead { self.unread.replace(newest) } else { Some(newest) };
        done.map(|done| self.read(done)).transpose()
    }

    /// Waits until the newest step is done and returns its outcome; none if the outcome was returned before.
    pub fn last(&mut self) -> Result<Option<Outcome>> {
        self.unread.take().map(|newest| self.read(newest)).transpose()
    }

    /// Waits until the newest step is done and returns whether its loss is finite; true if its outcome was returned before. The
    /// step remains unread.
    pub fn is_finite(&self) -> Result<bool> {
        let Some(Unread { extras, .. }) = &self.unread else { return Ok(true) };
        self.group.wait_until(&|| extras.is_done())?;
        Ok(extras.numbers()?[0].is_finite())
    }

    /// Waits until a step is done and returns its outcome.
    fn read(&self, unread: Unread) -> Result<Outcome> {
        let Unread { step, extras, mut times } = unread;
        timed(&mut times.device, || self.group.wait_until(&|| extras.is_done()))?;
        let extras = extras.numbers()?;
        Ok(Outcome { step, loss: extras[0].into(), norm: extras[2].into(), stop: extras[1] > 0.0, times })
    }

    /// Adds the loss and the gradients of one micro-batch to the sums in the flat buffer. Each is the micro-batch's contribution to
    /// the mean over the global batch.
    fn accumulate(&mut self, network: &mut Network, batch: Batch, step: u64, times: &mut Times) -> Result<()> {
        let positions = batch.positions.clone();
        let (group, global_batch) = (self.group, self.global_batch);
        let part = Part { group, seed: self.seed, step, positions: positions.clone(), global_batch };
        let began = Instant::now();
        let (_, device) = network.options();
        let staging = Staging::new(device, self.group.pinning());
        let scale = self.drop.draw(step, positions);
        let drop = scale.map_or_else(DropPath::none, |scale_rb| DropPath::new(&scale_rb, &staging));
        let (images_bchw, targets, _image_memory) = batch.on(device);
        let given = Given { images_bchw, targets };
        times.forward += began.elapsed();
        // The images and the input of the last segment are dropped before its backward pass.
        let (mut given, mut input) = (Some(given), None);
        for segment in self.objective.segments() {
            let (gradients, tape) = timed(&mut times.forward, || {
                let batch = given.take().expect("only the last segment takes the images");
                let x = input.take();
                let x = x.as_ref().unwrap_or(&batch.images_bchw);
                let (outputs, end, tape) = network.train_stages(segment.stages.clone(), x, &drop, &segment.taps);
                let Loss { sum, gradients } = segment.loss(network, &outputs, &batch, &part)?;
                let _ = network.flat().loss().g_add_(&sum);
                if segment.stages.end < network.stages() {
                    (given, input) = (Some(batch), Some(end));
                }
                anyhow::Ok((gradients, tape))
            })?;
            timed(&mut times.backward, || network.backward(tape, gradients));
        }
        Ok(())
    }
}

/// The number in a random key that marks the seeds of dropout.
const DROPOUT: u64 = 5;

/// Draws the residual branches that stochastic depth drops, for each sample.
struct DropPathRule {
    /// The drop rate of each residual branch of the network; empty if nothing is dropped.
    rates: Vec<f64>,
    seed: u64,
}

impl DropPathRule {
    /// Draws the factors (branches, b) of the residual branches for one micro-batch; none if nothing is dropped. The random key
    /// contains the position of a sample in the global batch. So the factors do not depend on how the global batch is split.
    fn draw(&self, step: u64, positions: std::ops::Range<usize>) -> Option<Tensor> {
        if self.rates.is_empty() {
            return None;
        }
        let (branches, samples) = (self.rates.len(), positions.len());
        let mut scale = vec![0.0f32; branches * samples];
        for (column, position) in positions.enumerate() {
            let mut random = Random::new(&[self.seed, DROP_PATH, step, position as u64]);
            for (branch, rate) in self.rates.iter().enumerate() {
                let keep_probability = 1.0 - rate;
                let is_kept = random.uniform() < keep_probability;
                scale[branch * samples + column] = if is_kept { (1.0 / keep_probability) as f32 } else { 0.0 };
            }
        }
        Some(Tensor::from_slice(&scale).view([branches as i64, samples as i64]))
    }
}

/// The number in a random key that marks the draws of stochastic depth.
const DROP_PATH: u64 = 6;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Solo;
    use crate::config::Config;
    use crate::model::{FP32_ON_HOST, fresh};
    use crate::run::table::META;
    use tch::Kind;

    #[test]
    fn drop_path_keeps_each_branch_at_its_rate_without_bias_and_depends_only_on_the_position() {
        let rates = Config::parse("", &[]).unwrap().model.drop_rates(&[1, 2], 0.5);
        assert_eq!(rates, [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]);
        let rule = DropPathRule { rates, seed: 1 };
        let all = rule.draw(7, 0..4000).unwrap();
        let mean = all.mean_dim([1i64].as_slice(), false, Kind::Float);
        assert!((&mean - 1.0).abs().max().double_value(&[]) < 0.06, "{mean}");
        assert_eq!(
            all.get(5).eq(0.0).sum(Kind::Int64).int64_value(&[]) / 100,
            20,
            "half of the last branch is dropped"
        );
        let two = rule.draw(7, 1000..1002).unwrap();
        assert_eq!(all.narrow(1, 1000, 2), two);
    }

    #[test]
    fn a_host_that_runs_ahead_gets_the_same_outcome_of_every_step_one_step_late() {
        let text = "[model]\nimage_size = 8\npatch_size = 4\nwidth = 8\nheads = 2\ndepths = [1, 1]\n\
                    classes = 3\n[train]\nglobal_batch = 8\nwarmup_epochs = 0\n[data]\nrepeats = 1";
        let plan = Plan::new(Config::parse(text, &[]).unwrap(), 8).unwrap();
        let phase = plan.phase(&META, None);
        let weights = fresh(phase.parameters(&plan).iter(), phase.seed);
        let losses = |runs_ahead: bool| -> Vec<f64> {
            let mut network = Network::new(&plan.config, &phase.depths, phase.trained.clone(), &[], &weights).unwrap();
            let mut optimiser = Optimiser::new(&phase.training, network.flat());
            let mut stepper = Stepper { runs_ahead, ..Stepper::new(&plan, &phase, &Solo, 2) };
            let mut batches = (0..).map(|number: usize| {
                let start = number % 2 * 4;
                let images_bchw = Tensor::ones([4, 3, 8, 8], FP32_ON_HOST) * (number as f64).sin();
                Ok(Batch::of(images_bchw, Tensor::full([4, 3], 1.0 / 3.0, FP32_ON_HOST), start..start + 4))
            });
            let mut outcomes = Vec::new();
            for step in 0..5 {
                let outcome = stepper.step(&mut network, &mut optimiser, &mut batches, step, 1e-2).unwrap();
                assert_eq!(outcome.map(|o| o.step), if runs_ahead { step.checked_sub(1) } else { Some(step) });
                // `is_finite`, which is asked before a checkpoint, changes nothing.
                assert!(step % 2 == 0 || stepper.is_finite().unwrap());
                outcomes.extend(outcome);
            }
            outcomes.extend(stepper.last().unwrap());
            assert!(stepper.last().unwrap().is_none());
            outcomes.iter().map(|outcome| outcome.loss).collect()
        };
        let at_once = losses(false);
        assert_eq!(at_once.len(), 5);
        assert_eq!(at_once, losses(true));
    }
}
