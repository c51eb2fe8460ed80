//! The arguments of `incubate bench`, and the call of the benchmark for each of its commands.

use super::load::{devices, start_libtorch};
use super::overrides::ConfigArgs;
use super::print_either;
use crate::bench;
use crate::device::memory;
use crate::libtorch::{Kernel, allow_attention};
use crate::model::off::{Off, Optimisation};
use crate::run::table::{DETECT_E2E, DGL, E2E, INFOPRO, MODULE, SEGMENT_E2E};
use anyhow::Result;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Time and memory of the index of a large source, with generated entries
    Index {
        /// The number of images in the index
        #[arg(long, default_value_t = 1_281_167, value_parser = clap::value_parser!(u32).range(1000..=100_000_000))]
        entries: u32,
        /// The folder for the temporary index
        #[arg(long, default_value = ".")]
        folder: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Images per second and core of decoding, the training and evaluation transforms and the loader, and the time of each part
    Data {
        /// The folder of images; all JPEG and PNG files below it are read
        #[arg(long, value_name = "DIR")]
        folder: PathBuf,
        /// How often each measurement reads each image
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
        passes: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// How fast this device trains, compared with its matrix products; tools/bench_step.py also compares PyTorch and timm
    Step(StepArgs),
    /// How much checkpoints slow training on the CPU, and how fast a checkpoint is written compared with dd
    Store {
        #[command(flatten)]
        config: ConfigArgs,
        /// How many steps of the meta model are timed together, without or with one checkpoint
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
        every: u64,
        /// How often each measurement is made: steps without and with a checkpoint in turn, then a checkpoint and dd in turn
        #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..))]
        pairs: u16,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub struct StepArgs {
    /// A model's name (tiny-28, deit-ti, deit-s, vit-b, vit-l, vit-h, deit-t-128) or a config file
    #[arg(long, value_name = "NAME|CONFIG", default_value = "deit-ti")]
    model: String,
    /// Train the module of this stage alone, inside the frozen meta model
    #[arg(long, value_name = "I")]
    stage: Option<usize>,
    /// Train the target end to end [default unless another of these options is given]
    #[arg(long, conflicts_with = "stage")]
    e2e: bool,
    /// Train the target with a loss for each stage (DGL)
    #[arg(long, conflicts_with_all = ["stage", "e2e", "infopro"])]
    dgl: bool,
    /// Train the target with InfoPro's losses for each stage
    #[arg(long, conflicts_with_all = ["stage", "e2e"])]
    infopro: bool,
    /// Train the target with the heads of `[segmentation]`, on crops with random labels
    #[arg(long, conflicts_with_all = ["stage", "e2e", "dgl", "infopro", "detect"])]
    segment: bool,
    /// Train the target with the pyramid and the heads of `[detection]`, on crops with seven random objects each
    #[arg(long, conflicts_with_all = ["stage", "e2e", "dgl", "infopro"])]
    detect: bool,
    /// Samples per step
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// The number of timed steps, after three steps to warm up, or one with --segment or --detect
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,
    /// The number of compute threads; 0 means one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// auto, cpu or cuda [default: the config's]
    #[arg(long)]
    device: Option<String>,
    /// fp32, bf16 or tf32 [default: the config's]
    #[arg(long)]
    precision: Option<String>,
    /// Switch off an optimisation of the step, to see how much time it saves: kernels, attention, optimiser, suffix, memory,
    /// kept-samples, fp32-sums, byte-images; may be given more than once
    #[arg(long, value_name = "NAME")]
    without: Vec<Optimisation>,
    /// The kernel of attention on a GPU [default: flash in bf16, else efficient]
    #[arg(long)]
    attention: Option<Attention>,
    /// Record the timed steps, which takes time itself, into a file in Chrome's trace format: libtorch's functions and a GPU's
    /// kernels
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Override a config key, such as --set run.micro_batch=16; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Attention {
    Flash,
    Efficient,
    Cudnn,
    /// Matrix products with a softmax between them
    Products,
}

impl Attention {
    fn kernels(self) -> &'static [Kernel] {
        match self {
            Attention::Flash => &[Kernel::Flash],
            Attention::Efficient => &[Kernel::Efficient],
            Attention::Cudnn => &[Kernel::Cudnn],
            Attention::Products => &[],
        }
    }
}

impl Bench {
    pub fn measure(&self) -> Result<()> {
        match self {
            Bench::Index { entries, folder, json } => {
                let report = bench::index::measure(*entries as usize, folder)?;
                print_either(*json, &report, || bench::index::text(&report))
            }
            Bench::Data { folder, passes, json } => {
                let report = bench::data::measure(folder, *passes as usize)?;
                print_either(*json, &report, || bench::data::text(&report))
            }
            Bench::Step(args) => args.measure(),
            Bench::Store { config, every, pairs, json } => {
                let report = bench::store::measure(config.load()?, *every, (*pairs).into())?;
                print_either(*json, &report, || bench::store::text(&report))
            }
        }
    }
}

impl StepArgs {
    fn measure(&self) -> Result<()> {
        let mut sets = vec![format!("run.threads={}", self.threads)];
        sets.extend(self.device.iter().map(|device| format!("run.device={device}")));
        sets.extend(self.precision.iter().map(|precision| format!("run.precision={precision}")));
        // With this path, the config has a downstream task, so its keys are checked. No image is read.
        let table =
            [("segmentation", self.segment), ("detection", self.detect)].into_iter().find(|(_, is_given)| *is_given);
        sets.extend(table.map(|(name, _)| format!("{name}.path=\".\"")));
        sets.extend_from_slice(&self.sets);
        let config = bench::step::config(&self.model, self.batch, &sets)?;
        let off: Off = self.without.iter().copied().collect();
        memory::keep_freed(!off.contains(Optimisation::Memory));
        start_libtorch(&config);
        let devices = devices(&config)?;
        devices.prepare_thread(0)?;
        if let Some(attention) = self.attention {
            allow_attention(attention.kernels());
        }
        let works = [
            (self.stage.is_some(), &MODULE),
            (self.dgl, &DGL),
            (self.infopro, &INFOPRO),
            (self.segment, &SEGMENT_E2E),
            (self.detect, &DETECT_E2E),
        ];
        let row = works.into_iter().find(|(is_given, _)| *is_given).map_or(&E2E, |(_, row)| row);
        let (stage, batch, steps, device) = (self.stage, self.batch, self.steps as usize, devices.device(0));
        let trace = self.trace.clone();
        let work = bench::step::Work { row, stage, batch, steps, device, off, trace };
        let report = bench::step::measure(config, &self.model, work)?;
        print_either(self.json, &report, || bench::step::text(&report))
    }
}
