//! `incubate bench step`: measures how fast one device trains on random images in memory. `tools/bench_step.py` compares the result
//! with PyTorch and timm.

use super::median;
use crate::collective::Solo;
use crate::config::{Config, Precision, TaskKind};
use crate::data::feed::batch::Batch;
use crate::data::feed::images::{BatchImages, Handover};
use crate::device::{self, memory};
use crate::family::parameter::Parameter;
use crate::libtorch::Trace;
use crate::model::off::{Off, Optimisation};
use crate::model::{self, Network, fresh};
use crate::plan::Plan;
use crate::plan::cost::{sample_flops, smallest_micro_batch};
use crate::plan::groups::micro_batches;
use crate::require;
use crate::run::table::Row;
use crate::task::{Objective, Task};
use crate::train::optimiser::Optimiser;
use crate::train::step::{Outcome, Stepper, Times};
use crate::usage;
use crate::weights::{Pinning, Staging, on_device};
use anyhow::Result;
use serde::Serialize;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// The result of the benchmark.
#[derive(Debug, Serialize)]
pub struct StepReport {
    pub model: String,
    /// The phase in which the target trains. The text is `stage I` if only the module of stage I trains.
    pub work: String,
    pub blocks: usize,
    pub trained_parameters: usize,
    pub batch: usize,
    pub micro_batch: usize,
    pub precision: Precision,
    pub activation_checkpointing: bool,
    pub device: String,
    pub threads: usize,
    pub steps: usize,
    pub step_s: f64,
    pub images_per_s: f64,
    /// Billions of floating-point operations per second. The operations of a step come from a formula, in which recomputed
    /// operations count once.
    pub gflops: f64,
    /// Billions of floating-point operations per second of large square matrix products, in the same precision and on the same
    /// device.
    pub matrix_product_gflops: f64,
    /// `gflops` divided by `matrix_product_gflops`.
    pub utilisation: f64,
    /// The peak of the process's resident memory. On a GPU, the memory that all processes use after the steps. This process then
    /// still holds the peak of its memory, because libtorch gives no memory back by itself.
    pub peak_mib: f64,
    /// The same measure as `peak_mib`, taken before the network is built. It counts the program and libtorch, and on a GPU also all
    /// other processes.
    pub base_mib: f64,
    pub share: Shares,
}

/// The share of each part in the time of a step. The shares add up to 1. A GPU computes while the host goes on. So with a GPU, the
/// parts of computation measure how long the host takes to start the GPU's work. `device` measures how long the host waits for the
/// GPU. The forward pass of detection also contains waits for the GPU.
#[derive(Debug, Serialize)]
pub struct Shares {
    pub data: f64,
    pub forward: f64,
    pub backward: f64,
    pub all_reduce: f64,
    pub optimiser: f64,
    /// Waiting for a GPU to finish its work.
    pub device: f64,
}

/// Models with four equally deep stages: the name, then image size, patch size, width, depth, heads, channels and classes.
const MODELS: [(&str, [usize; 7]); 7] = [
    ("tiny-28", [28, 7, 48, 16, 4, 1, 10]),
    ("deit-ti", [224, 16, 192, 12, 3, 3, 1000]),
    ("deit-s", [224, 16, 384, 12, 6, 3, 1000]),
    ("vit-b", [224, 16, 768, 12, 12, 3, 1000]),
    ("vit-l", [224, 16, 1024, 24, 16, 3, 1000]),
    ("vit-h", [224, 14, 1280, 32, 16, 3, 1000]),
    ("deit-t-128", [32, 4, 192, 128, 3, 3, 100]),
];

/// The config of a model in `MODELS`, or the config in the file `model`. A model in `MODELS` trains in one micro-batch, like
/// the PyTorch and timm programs of the comparison. Like them, it has no stochastic depth, except in the phases of DGL and
/// InfoPro.
pub fn config(model: &str, batch: usize, sets: &[String]) -> Result<Config> {
    let Some((_, sizes)) = MODELS.iter().find(|(name, _)| *name == model) else {
        require!(
            Path::new(model).exists(),
            "--model {model}: neither a file nor one of {}",
            MODELS.map(|(name, _)| name).join(", ")
        );
        return Config::load(Path::new(model), sets);
    };
    let [image, patch, width, depth, heads, channels, classes] = sizes;
    let list = vec!["0.5"; *channels].join(", ");
    let text = format!(
        "[run]\nmicro_batch = {batch}\n[model]\nimage_size = {image}\npatch_size = {patch}\nwidth = {width}\nheads = {heads}\nchannels = {channels}\n\
         classes = {classes}\ndepths = {:?}\n[data]\nmean = [{list}]\nstd = [{list}]\n[module]\ndrop_path = 0\n\
         [e2e]\ndrop_path = 0\n[segment]\ndrop_path = 0\n[detect]\ndrop_path = 0",
        [depth / 4; 4]
    );
    Config::parse(&text, sets)
}

/// The work to measure.
pub struct Work {
    /// The phase that trains.
    pub row: &'static Row,
    /// The stage whose module trains alone, inside the frozen meta model. None if the whole target trains.
    pub stage: Option<usize>,
    /// The number of samples in a global batch.
    pub batch: usize,
    /// How many steps are timed.
    pub steps: usize,
    pub device: Device,
    /// The optimisations that `--without` switches off.
    pub off: Off,
    /// The file for a recording of the timed steps. None if nothing is recorded.
    pub trace: Option<PathBuf>,
}

/// Trains on one device and measures the time of the steps.
pub fn measure(mut config: Config, name: &str, work: Work) -> Result<StepReport> {
    let Work { row, stage, batch, steps, device, off, trace } = work;
    config = config.of_task(row.task());
    let stages = config.model.stages();
    require!(stage.is_none_or(|s| s < stages), "--stage {}: stages are 0 to {}", stage.unwrap_or(0), stages - 1);
    let smallest = smallest_micro_batch(row.task());
    let is_even = batch >= 2 && batch.is_multiple_of(2);
    require!(is_even || batch == smallest, "--batch {batch}: it must be even and at least {smallest}");
    (config.module.training.global_batch, config.e2e.global_batch) = (batch, batch);
    (config.dgl.training.global_batch, config.infopro.training.global_batch) = (batch, batch);
    (config.segment.global_batch, config.detect.global_batch) = (batch, batch);
    memory::begin_peak();
    let base_mib = peak_mib(device)?;
    // The number of images sets the length of the phase. No timed step depends on this length.
    let plan = Plan { config, train_images: 256 * batch };
    let mut phase = plan.phase(row, stage);
    // Count the operations before `--without` changes the phase. So the rate does not count the unneeded operations that
    // `--without` adds.
    let flops = sample_flops(&plan, &phase) * batch as f64;
    if off.contains(Optimisation::Suffix) {
        // The stages after the module count as trained, so that their weight gradients are computed too.
        phase.trained.end = stages;
    }
    let auxiliary = Objective::of(&plan.config, &phase.borders).auxiliary();
    let start = fresh(phase.parameters(&plan).iter().chain(&auxiliary), phase.seed);
    let start = on_device(&start, device);
    let mut network = Network::without(off, &plan.config, &phase.depths, phase.trained.clone(), &auxiliary, &start)?;
    drop(start);
    let mut optimiser = Optimiser::new(&phase.training, network.flat());
    if off.contains(Optimisation::Optimiser) {
        optimiser = optimiser.by_libtorch();
    }
    let micro_batches = micro_batches(0..batch, plan.config.run.micro_batch.samples());
    let mut stepper = Stepper::new(&plan, &phase, &Solo, micro_batches.len());
    let handover = Handover::new(Staging::new(device, Pinning::default()), !off.contains(Optimisation::ByteImages));
    let mut batches = random_batches(&plan, micro_batches, &handover);
    let mut step = |number: u64| stepper.step(&mut network, &mut optimiser, &mut batches, number, 1e-3);
    // A step of segmentation or detection takes long, so one step of warm-up must do.
    let warm_up = if row.task() == TaskKind::Classification { WARM_UP } else { 1 };
    let (seconds, times) = time_steps(&mut step, (warm_up, steps as u64), trace.as_deref(), device)?;
    // Read the peak before the matrix products, which take more memory.
    let peak_mib = peak_mib(device)?;
    let step_s = median(seconds);
    let gflops = flops / step_s / 1e9;
    let matrix_product_gflops = model::matrix_product_rate(network.options()) / 1e9;
    let run = &plan.config.run;
    Ok(StepReport {
        model: name.to_string(),
        work: stage.map_or(row.name.into(), |s| format!("stage {s}")),
        blocks: phase.depths.iter().sum(),
        trained_parameters: network.flat().trainable() - auxiliary.iter().map(Parameter::count).sum::<usize>(),
        batch,
        micro_batch: run.micro_batch.samples().min(batch),
        precision: run.precision,
        activation_checkpointing: run.activation_checkpointing,
        device: device::name(device),
        threads: tch::get_num_threads() as usize,
        steps,
        step_s,
        images_per_s: batch as f64 / step_s,
        gflops,
        matrix_product_gflops,
        utilisation: gflops / matrix_product_gflops,
        peak_mib,
        base_mib,
        share: Shares::of(&times),
    })
}

/// The number of warm-up steps before the timed steps if the task is classification.
const WARM_UP: u64 = 3;

/// Makes `warm_up` steps, then `steps` timed steps. Writes a recording of the timed steps to the file `trace`, if a file is given.
/// Returns the seconds of each timed step, and the time of each part, summed over the steps. On a GPU, a step returns the outcome
/// of the step before it. So on a GPU, the sums include the last warm-up step and leave out the last timed step.
fn time_steps(
    step: &mut dyn FnMut(u64) -> Result<Option<Outcome>>,
    (warm_up, steps): (u64, u64),
    trace: Option<&Path>,
    device: Device,
) -> Result<(Vec<f64>, Times)> {
    (0..warm_up).try_for_each(|number| step(number).map(|_| ()))?;
    let recording = trace.map(|path| start_trace(path, device)).transpose()?;
    let mut seconds = Vec::new();
    let mut times = Times::default();
    for number in warm_up..warm_up + steps {
        let began = Instant::now();
        let outcome = step(number)?;
        seconds.push(began.elapsed().as_secs_f64());
        times += outcome.map_or(Times::default(), |outcome| outcome.times);
    }
    if let (Some(recording), Some(path)) = (recording, trace) {
        recording.write(path)?;
    }
    Ok((seconds, times))
}

/// Begins to record for the file `path`.
fn start_trace(path: &Path, device: Device) -> Result<Trace> {
    // Find out now whether the file can be written, because libtorch reports no error later.
    File::create(path).map_err(|error| usage!("--trace {}: {error}", path.display()))?;
    Trace::start(device)
}

impl Shares {
    fn of(times: &Times) -> Shares {
        let parts = [times.data, times.forward, times.backward, times.all_reduce, times.optimiser, times.device];
        let total = parts.iter().sum::<std::time::Duration>().as_secs_f64();
        let [data, forward, backward, all_reduce, optimiser, device] = parts.map(|part| part.as_secs_f64() / total);
        Shares { data, forward, backward, all_reduce, optimiser, device }
    }
}

/// The micro-batches of each step, which are the same for all steps. If the images are bytes, they have no random erasing.
fn random_batches(
    plan: &Plan,
    micro_batches: Vec<Range<usize>>,
    handover: &Handover,
) -> impl Iterator<Item = Result<Batch>> + use<> {
    let (model, task) = (&plan.config.model, Task::of(&plan.config));
    let (channels, side) = (model.channels() as i64, model.image_size() as i64);
    tch::manual_seed(0);
    let (staging, numbers) = (handover.staging(), handover.numbers(&plan.config));
    let random = |positions: Range<usize>| {
        let shape = [positions.len() as i64, channels, side, side];
        let images: BatchImages = match &numbers {
            None => staging.staged(Tensor::randn(shape, (Kind::Float, Device::Cpu))).into(),
            Some(numbers) => BatchImages::Bytes {
                bytes_bchw: staging.staged(Tensor::randint(256, shape, (Kind::Uint8, Device::Cpu))),
                numbers: numbers.shallow_clone(),
                erased: None,
            },
        };
        let targets = staging.staged(task.random_targets(positions.len()));
        (images, targets, positions)
    };
    let batches: Vec<_> = micro_batches.into_iter().map(random).collect();
    (0..).map(move |n: usize| {
        let (images, targets, positions) = &batches[n % batches.len()];
        Ok(Batch::of(images.shallow_clone(), targets.shallow_clone(), positions.clone()))
    })
}

/// The memory in use now on a GPU, or the process's peak of resident memory on a CPU, in MiB.
fn peak_mib(device: Device) -> Result<f64> {
    if device.is_cuda() {
        return Ok(device::cuda()?.memory_in_use()? as f64 / (1 << 20) as f64);
    }
    Ok(memory::peak_on_host() as f64 / (1 << 20) as f64)
}

/// The report for people.
pub fn text(r: &StepReport) -> String {
    format!(
        "{} {} on {}, batch {}, {:?}, {} thread(s): {:.2} images/s ({:.3} s per step, the median of {})\n\
         {:.0} of {:.0} GFLOP/s, {:.0} % of the matrix product; peak memory {:.0} MiB, {:.0} MiB of it before training\n\
         data {:.0} %, forward {:.0} %, backward {:.0} %, all-reduce {:.0} %, optimiser {:.0} %, waiting for the GPU {:.0} %\n",
        r.model,
        r.work,
        r.device,
        r.batch,
        r.precision,
        r.threads,
        r.images_per_s,
        r.step_s,
        r.steps,
        r.gflops,
        r.matrix_product_gflops,
        100.0 * r.utilisation,
        r.peak_mib,
        r.base_mib,
        100.0 * r.share.data,
        100.0 * r.share.forward,
        100.0 * r.share.backward,
        100.0 * r.share.all_reduce,
        100.0 * r.share.optimiser,
        100.0 * r.share.device
    )
}
