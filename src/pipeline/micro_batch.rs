//! Chooses the micro-batch if `run.micro_batch = "auto"`. A formula estimates the largest micro-batch that fits the memory of a
//! replica, and a trial step checks the estimate. If the memory does not suffice, the next trial has about half as many samples.

use crate::collective::replicas::Replica;
use crate::collective::{Collective, Solo};
use crate::config::MicroBatch;
use crate::data::feed::batch::Batch;
use crate::device::memory::{self, OutOfMemory};
use crate::device::{memory_of, name};
use crate::launcher::ranks_on_this_node;
use crate::model::{Network, fresh};
use crate::plan::cost::{fitting_micro_batch, smallest_micro_batch};
use crate::plan::groups::{micro_batches, share};
use crate::plan::{PhasePlan, Plan};
use crate::store::RunDir;
use crate::store::progress::Progress;
use crate::task::Objective;
use crate::train::optimiser::Optimiser;
use crate::train::step::Stepper;
use crate::usage;
use crate::weights::{Weights, on_device};
use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// The largest automatic micro-batch on a CPU. More samples at a time would not be faster there.
const MOST_ON_CPU: usize = 64;
/// The bytes of address space that the trial step leaves free for the rest of training, such as stacks of threads and images that
/// are read ahead. They matter if the process has a limit such as `ulimit -d`, which the formula ignores.
const LEFT_FREE: i64 = 64 << 20;

/// The config's micro-batch. If this is "auto", a micro-batch that fits the memory of every replica of the group. A phase that is
/// started again keeps the micro-batch of its earlier start if it fits, because another micro-batch rounds differently. All ranks
/// of the group must call this function together.
pub fn decide(
    plan: &Plan,
    run: &RunDir,
    phase: &PhasePlan,
    start: &Weights,
    replica: &Replica,
    device: Device,
) -> Result<usize> {
    if let MicroBatch::Samples(samples) = plan.config.run.micro_batch {
        return Ok(samples);
    }
    let own = share(phase.training.global_batch, replica.rank(), replica.size()).len();
    let earlier = if replica.is_zero() { Progress::read(&run.path, &phase.name) } else { None };
    let mut recorded = [earlier.and_then(|progress| progress.micro_batch).unwrap_or(0) as f64];
    replica.all_reduce_f64(&mut recorded)?;
    let mut samples = match recorded[0] as usize {
        0 => by_formula(plan, phase, own, replica, device)?,
        recorded => recorded,
    };
    while let Err(error) = memory::catch(|| try_step(plan, phase, start, samples)) {
        if !error.is::<OutOfMemory>() {
            return Err(error);
        }
        let smallest = smallest_micro_batch(plan.config.task);
        if samples <= smallest {
            return Err(too_large(plan, phase, device, &error.to_string()));
        }
        samples = (samples / 4 * 2).max(smallest);
    }
    let mut of_replicas = vec![0.0; replica.size()];
    of_replicas[replica.rank()] = samples as f64;
    replica.all_reduce_f64(&mut of_replicas)?;
    let smallest = of_replicas.into_iter().fold(f64::MAX, f64::min) as usize;
    if replica.is_zero() {
        log::info!("{}: micro-batches of {smallest} samples fit {}", phase.name, name(device));
    }
    Ok(smallest)
}

/// Estimates the micro-batch by the formula, for a replica with `own` samples in each step. The largest micro-batch that fits
/// decides the number of forward passes per step. The result is the smallest micro-batch that needs no more passes. The result is
/// even, unless only one sample fits.
fn by_formula(plan: &Plan, phase: &PhasePlan, own: usize, replica: &Replica, device: Device) -> Result<usize> {
    let replicas_here = || (ranks_on_this_node() * replica.in_rank()) as u64;
    let (memory, most) = match memory_of(device) {
        Some(memory) => (memory, own),
        None => (memory::free_on_host() / replicas_here(), own.min(MOST_ON_CPU)),
    };
    let fitting = fitting_micro_batch(plan, phase, memory, most, !device.is_cuda()).ok_or_else(|| {
        let gibibytes = memory as f64 / (1u64 << 30) as f64;
        too_large(plan, phase, device, &format!("{gibibytes:.1} GiB are free"))
    })?;
    let passes = micro_batches(0..own, fitting).len();
    let unit = fitting.min(2);
    Ok(own.div_ceil(unit * passes) * unit)
}

/// The error of a phase for which not even the smallest micro-batch fits.
fn too_large(plan: &Plan, phase: &PhasePlan, device: Device, why: &str) -> anyhow::Error {
    let samples = if smallest_micro_batch(plan.config.task) == 1 { "one sample fits" } else { "two samples fit" };
    usage!(
        "{}: not even {samples} {}: {why}; set run.activation_checkpointing = true or run.precision = \"bf16\", or use \
         a device with more memory",
        phase.name,
        name(device)
    )
}

/// Runs one step of the phase with a single micro-batch of `samples` samples. The step starts from the weights `start` and does not
/// change them.
fn try_step(plan: &Plan, phase: &PhasePlan, start: &Weights, samples: usize) -> Result<()> {
    let _left_free = Tensor::empty([LEFT_FREE], (Kind::Uint8, Device::Cpu));
    let objective = Objective::of(&plan.config, &phase.borders);
    let auxiliary = objective.auxiliary();
    let device = start.values().next().map_or(Device::Cpu, Tensor::device);
    let mut start = on_device(start, device);
    start.extend(on_device(&fresh(auxiliary.iter(), phase.seed), device));
    let mut network = Network::new(&plan.config, &phase.depths, phase.trained.clone(), &auxiliary, &start)?;
    let mut phase = phase.clone();
    if phase.training.drop_path > 0.0 {
        // With this tiny rate, every sample keeps every residual branch. So no step of the phase takes more memory than the trial
        // step.
        phase.training.drop_path = f64::MIN_POSITIVE;
    }
    let mut optimiser = Optimiser::new(&phase.training, network.flat());
    let model = &plan.config.model;
    let [b, channels, side] = [samples, model.channels(), model.image_size()].map(|n| n as i64);
    let images_bchw = Tensor::zeros([b, channels, side, side], (Kind::Float, Device::Cpu));
    let targets = objective.task().random_targets(samples);
    let batch = Batch::of(images_bchw, targets, 0..samples);
    let mut stepper = Stepper::new(plan, &phase, &Solo, 1);
    stepper.step(&mut network, &mut optimiser, &mut std::iter::once(Ok(batch)), 0, 0.0).map(|_| ())
}

/// If the memory did not suffice, adds advice to the error: a smaller micro-batch, or a device with more memory. `micro` is the
/// micro-batch that failed, and `own` is the number of the replica's samples in each step. Returns any other error as it is.
pub fn with_what_fits(
    error: anyhow::Error,
    (plan, phase): (&Plan, &PhasePlan),
    micro: usize,
    own: usize,
    device: Device,
) -> anyhow::Error {
    if !error.is::<OutOfMemory>() {
        return error;
    }
    let smallest = smallest_micro_batch(plan.config.task);
    let half = if micro.min(own) > smallest { (micro.min(own) / 4 * 2).max(smallest) } else { 0 };
    let (fitting, likelihood) = match memory_of(device) {
        Some(memory) => (fitting_micro_batch(plan, phase, memory, half, false), "should fit"),
        None => (Some(half).filter(|&half| half > 0), "may fit"),
    };
    let cure = match fitting {
        Some(fitting) => {
            format!("{fitting} {likelihood}: --set run.micro_batch={fitting} (the global batch stays the same)")
        }
        None => "no smaller one fits; this phase needs a device with more memory".into(),
    };
    usage!("{}: run.micro_batch = {micro} on {}: {error}; {cure}", phase.name, name(device))
}
