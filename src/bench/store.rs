//! `incubate bench store`: measures how much checkpoints slow training down. It also compares the speed at which a checkpoint is
//! written with the speed of `dd … conv=fsync`.

use super::median;
use crate::collective::Solo;
use crate::config::{Config, Interval};
use crate::data;
use crate::data::feed::Feed;
use crate::data::feed::images::Handover;
use crate::data::feed::loader::Loader;
use crate::model::fresh;
use crate::plan::groups::micro_batches;
use crate::plan::{PhasePlan, Plan};
use crate::run::table::META;
use crate::store::{Header, RunDir, artefact};
use crate::train::checkpoints::Checkpoints;
use crate::train::step::Stepper;
use crate::train::trainer::Trainer;
use crate::train::{Clock, Setting};
use anyhow::{Result, ensure};
use serde::Serialize;
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// The result of the benchmark. Times are in seconds, and rates are in MB (10⁶ bytes) per second. Each time is a median over the
/// pairs of measurements. The rates and the overhead follow from these medians.
#[derive(Debug, Serialize)]
pub struct StoreReport {
    pub pairs: usize,
    pub every_steps: u64,
    /// The time of `every_steps` steps without a checkpoint.
    pub block_s: f64,
    /// The time of as many steps during which one checkpoint is written. The time ends when the steps are done and the checkpoint's
    /// file is in place.
    pub block_with_checkpoint_s: f64,
    pub overhead_percent: f64,
    pub written_mb: f64,
    pub write_mb_per_s: f64,
    pub dd_mb_per_s: f64,
    /// This program's rate divided by dd's rate: the median of the ratios of all pairs.
    pub write_ratio: f64,
}

/// Trains the config's meta model on the CPU in blocks of `every` steps, in turn without and with a checkpoint. Then writes, in
/// turn, a checkpoint of the target's size, and as many bytes (rounded up to MiB) with dd. Removes the files that it has written
/// into `config.run.dir`.
pub fn measure(mut config: Config, every: u64, pairs: usize) -> Result<StoreReport> {
    config.run.dir = config.run.dir.join(format!("bench-store-{}", std::process::id()));
    config.run.checkpoint_every = Interval::Never;
    let dir = config.run.dir.clone();
    let measured = measure_in(&dir, config, every, pairs);
    let _ = std::fs::remove_dir_all(&dir);
    let _ = dir.parent().map(std::fs::remove_dir);
    measured
}

fn measure_in(dir: &Path, config: Config, every: u64, pairs: usize) -> Result<StoreReport> {
    let checkpoint = Checkpoint::of(&config);
    let (without, with) = blocks(config, every, pairs)?;
    let (mut ours, mut dds) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        ours.push(checkpoint.write(&dir.join("checkpoint.h5"))?);
        dds.push(dd(&dir.join("dd"), checkpoint.bytes())?);
    }
    let ratios = ours.iter().zip(&dds).map(|(ours, dd)| dd / ours).collect();
    let megabytes = checkpoint.bytes() as f64 / 1e6;
    let (without, with) = (median(without), median(with));
    Ok(StoreReport {
        pairs,
        every_steps: every,
        block_s: without,
        block_with_checkpoint_s: with,
        overhead_percent: 100.0 * (with / without - 1.0),
        written_mb: megabytes,
        write_mb_per_s: megabytes / median(ours),
        dd_mb_per_s: megabytes / median(dds),
        write_ratio: median(ratios),
    })
}

/// The seconds of each block without a checkpoint, and of each block with a checkpoint.
fn blocks(config: Config, every: u64, pairs: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let source = data::open(&config)?;
    let run = RunDir::open(&config)?;
    let plan = Plan::new(config, source.train.len())?;
    let phase = plan.phase(&META, None);
    let setting = Setting {
        plan: &plan,
        run: &run,
        feed: Feed::of_replica(&plan.config, &source, 1),
        group: &Solo,
        device: Device::Cpu,
        micro_batch: plan.config.run.micro_batch.samples(),
        lease: None,
        clock: &Clock::of_process(),
        ranks: 1,
        data: None,
    };
    let mut blocks = Blocks::new(&setting, &phase, every)?;
    // The first block contains work that is done only once, so it is not counted.
    blocks.time(true)?;
    let pairs = (0..pairs).map(|_| Ok((blocks.time(false)?, blocks.time(true)?)));
    Ok(pairs.collect::<Result<Vec<_>>>()?.into_iter().unzip())
}

/// Trains the meta model in blocks of `steps` steps, and times each block.
struct Blocks<'a> {
    phase: &'a PhasePlan,
    steps: u64,
    trainer: Trainer,
    stepper: Stepper<'a>,
    loader: Loader,
    checkpoints: Checkpoints,
}

impl<'a> Blocks<'a> {
    fn new(setting: &Setting<'a>, phase: &'a PhasePlan, steps: u64) -> Result<Blocks<'a>> {
        let plan = setting.plan;
        let start = fresh(phase.parameters(plan).iter(), phase.seed);
        let trainer = Trainer::resume(setting, phase, start, None)?;
        let micro_batches = micro_batches(0..phase.training.global_batch, setting.micro_batch);
        let stepper = Stepper::new(plan, phase, setting.group, micro_batches.len());
        let loader = Loader::start(plan, phase, setting.feed, micro_batches, 0, Handover::Finished)?;
        let header = trainer.header(setting, phase, None, Default::default());
        let checkpoints = Checkpoints::start(setting, phase, header, &trainer)?;
        Ok(Blocks { phase, steps, trainer, stepper, loader, checkpoints })
    }

    /// Trains the next block and returns its seconds. If `with_checkpoint` is true, a checkpoint of the state before the block is
    /// written during the block. The seconds then include the wait for the checkpoint's file.
    fn time(&mut self, with_checkpoint: bool) -> Result<f64> {
        let began = Instant::now();
        if with_checkpoint {
            self.checkpoints.begin(&mut self.trainer)?;
        }
        for _ in 0..self.steps {
            let Trainer { network, optimiser, step, .. } = &mut self.trainer;
            self.stepper.step(network, optimiser, &mut self.loader, *step, self.phase.lr(*step))?;
            *step += 1;
        }
        self.checkpoints.finish()?;
        Ok(began.elapsed().as_secs_f64())
    }
}

/// A checkpoint with the size of the target's weights and optimiser state. Its numbers are random.
struct Checkpoint {
    header: Header,
    /// Random numbers that stand for the weights and for each of the optimiser's two moments.
    buffer: Tensor,
}

impl Checkpoint {
    fn of(config: &Config) -> Checkpoint {
        let table = config.model.parameters(config.model.depths());
        let numbers: usize = table.iter().map(|p| p.count()).sum();
        let buffer = Tensor::rand([numbers as i64], (Kind::Float, Device::Cpu));
        let header = Header {
            phase: "finetune".into(),
            index: None,
            depths: config.model.depths().to_vec(),
            step: 1,
            recipe: String::new(),
            meta: None,
            model: config.model.clone(),
            auxiliary: Vec::new(),
            metrics: Default::default(),
            class_names: Vec::new(),
            data: None,
        };
        Checkpoint { header, buffer }
    }

    fn bytes(&self) -> usize {
        12 * self.buffer.numel()
    }

    /// Writes the checkpoint into a file and removes the file. Returns the seconds until the file was synced to the disk.
    fn write(&self, path: &Path) -> Result<f64> {
        let began = Instant::now();
        let buffers = ["weights", "exp_avg", "exp_avg_sq"].map(|name| (name, &self.buffer));
        artefact::write_checkpoint(path, &self.header, &buffers, None, || ())?;
        let took = began.elapsed().as_secs_f64();
        std::fs::remove_file(path)?;
        Ok(took)
    }
}

/// Lets dd write `bytes` bytes, rounded up to MiB, into a file, and removes the file. Returns the seconds until the file was synced
/// to the disk.
fn dd(path: &Path, bytes: usize) -> Result<f64> {
    let began = Instant::now();
    let file = format!("of={}", path.display());
    let count = format!("count={}", bytes.div_ceil(1 << 20));
    let output = Command::new("dd").args(["if=/dev/zero", "bs=1M", "conv=fsync", &file, &count]).output()?;
    ensure!(output.status.success(), "dd: {}", String::from_utf8_lossy(&output.stderr));
    let took = began.elapsed().as_secs_f64();
    std::fs::remove_file(path)?;
    Ok(took)
}

/// The report as a text for people.
pub fn text(r: &StoreReport) -> String {
    format!(
        "{} steps: {:.3} s; with a checkpoint {:.3} s: {:+.2} % (medians of {} pairs)\n\
         a checkpoint of {:.0} MB: {:.0} MB/s; dd conv=fsync: {:.0} MB/s; ratio {:.2}\n",
        r.every_steps,
        r.block_s,
        r.block_with_checkpoint_s,
        r.overhead_percent,
        r.pairs,
        r.written_mb,
        r.write_mb_per_s,
        r.dd_mb_per_s,
        r.write_ratio
    )
}
