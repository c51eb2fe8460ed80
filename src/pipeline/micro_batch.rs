//! `run.micro_batch = "auto"`: the micro-batch that a replica's memory holds, by formula and one step to try it.

use crate::collective::replicas::Replica;
use crate::collective::{Collective, Solo};
use crate::config::{DeviceChoice, MicroBatch};
use crate::data::feed::loader::Batch;
use crate::device::memory::{self, OutOfMemory};
use crate::device::{memory_of, name};
use crate::launcher::ranks_on_this_node;
use crate::model::Network;
use crate::plan::cost::fitting_micro_batch;
use crate::plan::groups::{micro_batches, share};
use crate::plan::{PhasePlan, Plan};
use crate::store::RunDir;
use crate::store::progress::Progress;
use crate::train::adamw::AdamW;
use crate::train::step::Stepper;
use crate::usage;
use crate::weights::Weights;
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// A CPU gains nothing from more samples at a time.
const MOST_ON_CPU: usize = 64;

/// The phase with a micro-batch that all replicas of the group can take; as it is where the config has a number. What an
/// earlier start took is taken again, as another cut of a batch rounds differently. Collective.
pub fn decide(
    plan: &Plan,
    run: &RunDir,
    phase: &PhasePlan,
    start: &Weights,
    replica: &Replica,
    device: Device,
) -> Result<PhasePlan> {
    let mut phase = phase.clone();
    if plan.config.run.micro_batch != MicroBatch::Auto {
        return Ok(phase);
    }
    let own = share(phase.training.global_batch, replica.rank(), replica.size()).len();
    let earlier = if replica.is_zero() { Progress::read(&run.path, &phase.name) } else { None };
    let mut recorded = [earlier.and_then(|progress| progress.micro_batch).unwrap_or(0) as f64];
    replica.all_reduce_f64(&mut recorded)?;
    phase.micro_batch = match recorded[0] as usize {
        0 => by_formula(plan, &phase, own, replica, device)?,
        recorded => recorded,
    };
    while let Err(error) = memory::caught(|| try_step(plan, &phase, start)) {
        if !error.is::<OutOfMemory>() || phase.micro_batch < 4 {
            return Err(error);
        }
        phase.micro_batch = phase.micro_batch / 4 * 2;
    }
    let mut all = vec![0.0; replica.size()];
    all[replica.rank()] = phase.micro_batch as f64;
    replica.all_reduce_f64(&mut all)?;
    phase.micro_batch = all.into_iter().fold(f64::MAX, f64::min) as usize;
    if replica.is_zero() {
        log::info!("{}: micro-batches of {} samples fit {}", phase.name, phase.micro_batch, name(device));
    }
    Ok(phase)
}

/// The smallest even size that needs no more passes than the largest that fits: passes of one size.
fn by_formula(plan: &Plan, phase: &PhasePlan, own: usize, replica: &Replica, device: Device) -> Result<usize> {
    let mut plan = plan.clone();
    let (memory, most) = match memory_of(device) {
        Some(memory) => (memory, own),
        None => {
            // Also where the config's nodes have GPUs.
            plan.config.run.device = DeviceChoice::Cpu;
            (memory::free_on_host() / (ranks_on_this_node() * replica.in_rank()) as u64, own.min(MOST_ON_CPU))
        }
    };
    let fitting = fitting_micro_batch(&plan, phase, memory, most).ok_or_else(|| {
        usage!(
            "{}: not even two samples fit the {:.1} GiB of {}; set run.activation_checkpointing = true or run.precision = \
             \"bf16\", or use a device with more memory",
            phase.name,
            memory as f64 / (1u64 << 30) as f64,
            name(device)
        )
    })?;
    let passes = micro_batches(0..own, fitting).len();
    Ok(own.div_ceil(2 * passes) * 2)
}

/// One step on a batch of zeros, as the phase would make it, on copies of its weights.
fn try_step(plan: &Plan, phase: &PhasePlan, start: &Weights) -> Result<()> {
    let mut phase = phase.clone();
    phase.training.global_batch = phase.micro_batch;
    let mut network = Network::new(&plan.config, &phase.depths, phase.trained.clone(), start)?;
    let mut optimiser = AdamW::new(&phase.training, network.flat());
    let model = &plan.config.model;
    let (b, options) = (phase.micro_batch as i64, (Kind::Float, Device::Cpu));
    let [channels, side, classes] = [model.channels(), model.image_size(), model.classes()].map(|n| n as i64);
    let images_bchw = Tensor::zeros([b, channels, side, side], options);
    let batch = Batch::of(images_bchw, Tensor::zeros([b, classes], options), 0..phase.micro_batch);
    let mut stepper = Stepper::new(plan, &phase, &Solo);
    stepper.step(&mut network, &mut optimiser, &mut std::iter::once(Ok(batch)), 0, 0.0).map(|_| ())
}
