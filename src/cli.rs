//! The door: commands, their arguments, and what each prints.

use crate::cluster::{doctor, queue, status, submit};
use crate::collective::agree;
use crate::collective::mpi::{World, cores_of_this_rank, rank_on_this_node, ranks_on_this_node};
use crate::config::{Config, DeviceChoice, ExportFormat, Format, Precision};
use crate::data::shard::{self, Encoding};
use crate::data::{self, packed};
use crate::device::{self, Devices, OnNode, memory};
use crate::downstream::{ade20k, coco};
use crate::error::Failure;
use crate::import::Role;
use crate::model::matrix_product_rate;
use crate::model::off::{self, Part};
use crate::pipeline::bars::{self, Bars};
use crate::pipeline::{Job, evaluate, plan_report, report, summary};
use crate::plan::Plan;
use crate::plan::phases::{E2E, FINETUNE, META};
use crate::store::{RunDir, artefact};
use crate::train::stop_requested;
use crate::{bench, export, import, model, pack, usage};
use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Train a large Vision Transformer module by module (Deep Incubation, arXiv 2212.04129), on any number of MPI ranks.
///
/// Exit codes: 0 done; 1 failed; 2 bad usage, config, data or environment; 3 damaged artefact; 75 stopped by a signal
/// and resumable by the same command.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// More log lines (-v debug, -vv trace)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// Fewer log lines (-q warnings, -qq errors)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub quiet: u8,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Do everything: meta model, modules, assembly, fine-tuning, evaluation, export. Done parts are skipped
    Run(ConfigArgs),
    /// Train the meta model
    Meta(ConfigArgs),
    /// Train one module, or all of them
    Module {
        #[command(flatten)]
        config: ConfigArgs,
        /// The stage to train, from 0; all of them without it
        #[arg(long)]
        index: Option<usize>,
    },
    /// Assemble the target from the trained modules
    Assemble(ConfigArgs),
    /// Fine-tune the assembled target
    Finetune(ConfigArgs),
    /// Train the target from scratch, the baseline
    E2e(ConfigArgs),
    /// Evaluate an artefact on the test images (a module runs as its hybrid), or results on COCO or ADE20K
    Evaluate(EvaluateArgs),
    /// Export a trained model for another framework
    Export {
        #[command(flatten)]
        config: ConfigArgs,
        /// timm, hf, detectron2, mmdet, mmseg, safetensors, pth or all; may be given more than once
        #[arg(long = "format", value_name = "FORMAT", default_value = "timm")]
        formats: Vec<ExportFormat>,
        /// The model to export [default: final.h5 of the run directory]
        #[arg(long, value_name = "FILE")]
        weights: Option<PathBuf>,
    },
    /// Import weights of the official code, DeiT or timm (.pth, .safetensors) into the run directory; position embeddings of
    /// another image size are resampled
    Import {
        /// finished_checkpoint.pth, a .pth of timm or DeiT, or a .safetensors; nothing in it is executed
        file: PathBuf,
        #[command(flatten)]
        config: ConfigArgs,
        /// meta, assembled or final [default: meta or final, by the file's depth]
        #[arg(long = "as", value_name = "ROLE")]
        role: Option<Role>,
    },
    /// Show what a config means: parameters, steps, learning rates, memory, cost, each rank's part
    Plan {
        #[command(flatten)]
        config: ConfigArgs,
        /// The world to plan for
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        ranks: u32,
        /// Sustained TFLOP/s of one rank's device [default: this machine's matrix product, measured]
        #[arg(long, value_name = "TFLOPS")]
        rate: Option<f64>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Submit a run to Slurm: the meta model, an array of modules, the rest. What is done is not submitted again
    Submit {
        #[command(flatten)]
        config: ConfigArgs,
        /// Write the scripts and check them with sbatch --test-only, but submit nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where each phase of a run stands, and with Slurm what it waits for
    Status {
        /// The run directory: run.dir of the config, or what --run-dir named
        run_dir: PathBuf,
        /// Show it anew every two seconds until everything is done
        #[arg(long, conflicts_with = "json")]
        watch: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Cancel what is queued or running of a submitted run
    Cancel {
        /// The run directory: run.dir of the config, or what --run-dir named
        run_dir: PathBuf,
    },
    /// Pack images into HDF5 shards that any number of ranks read fast (data.format = "packed")
    Pack {
        /// A config, or a folder: of images (train/CLASS/*.jpg, val/CLASS/*.jpg), of tar shards, or of an earlier pack
        source: PathBuf,
        /// Where to write train-*.h5 and val-*.h5; what is there already is kept [default: the config's data.path, packed
        /// from its data.pack_from]
        into: Option<PathBuf>,
        /// Shrink images whose shorter side is longer than this
        #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=4096))]
        size: u32,
        /// Quality of JPEG
        #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u8).range(1..=100))]
        quality: u8,
        /// Store pixels, which take some ten times the space of JPEG and no time to decode
        #[arg(long, conflicts_with = "quality")]
        raw: bool,
        #[command(flatten)]
        over: Overrides,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Verify one artefact or packed shard, or all of a run directory or pack
    Verify {
        /// A file that incubate wrote (.h5), or a folder of them: a run directory or a pack
        path: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check this node: versions, cores, and with a config its data and run directory
    Doctor {
        /// The TOML file whose data and run directory to check as well
        config: Option<PathBuf>,
        #[command(flatten)]
        over: Overrides,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Measure, against a peer in the same run
    Bench {
        #[command(subcommand)]
        bench: Bench,
    },
    /// Print a shell's completion script
    Completions {
        /// The shell to complete for
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder
    Man {
        /// Made if it is not there
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct EvaluateArgs {
    #[command(subcommand)]
    downstream: Option<Downstream>,
    /// The TOML file; configs/default.toml lists every key
    #[arg(required = true)]
    config: Option<PathBuf>,
    #[command(flatten)]
    over: Overrides,
    /// meta.h5, module-i.h5, assembled.h5, final.h5 or e2e.h5 [default: final.h5 of the run directory]
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Also write logits, labels and the first 16 inputs as safetensors, to compare other programs with
    #[arg(long, value_name = "FILE")]
    outputs: Option<PathBuf>,
    /// Print JSON: top1, top5, loss, images
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Downstream {
    /// COCO's twelve figures of a results file
    Coco {
        /// Such as instances_val2017.json
        #[arg(long, value_name = "FILE")]
        annotations: PathBuf,
        /// A JSON list of detections
        #[arg(long, value_name = "FILE")]
        results: PathBuf,
        /// Compare boxes or masks
        #[arg(long, default_value = "bbox", value_parser = ["bbox", "segm"])]
        iou: String,
        /// Also draw precision over recall, as SVG
        #[arg(long, value_name = "FILE")]
        plot: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// ADE20K's mIoU, mAcc and aAcc of predicted label maps
    Ade20k {
        /// Label maps: 8-bit PNGs of 0 (ignored) to 150
        #[arg(long, value_name = "DIR")]
        labels: PathBuf,
        /// Predictions, named and numbered as the label maps
        #[arg(long, value_name = "DIR")]
        predictions: PathBuf,
        /// The predictions number the classes from 0
        #[arg(long)]
        zero_based: bool,
        /// Also draw the confusion matrix, as SVG
        #[arg(long, value_name = "FILE")]
        plot: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// What the index of a large source costs, with generated entries
    Index {
        /// How many images the index lists
        #[arg(long, default_value_t = 1_281_167, value_parser = clap::value_parser!(u32).range(1000..=100_000_000))]
        entries: u32,
        /// Where to keep it meanwhile
        #[arg(long, default_value = ".")]
        folder: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Images per second and core: decoding, the training and evaluation transforms, the loader; and where the time goes
    Data {
        /// Every JPEG and PNG below it is read
        #[arg(long, value_name = "DIR")]
        folder: PathBuf,
        /// How often each image is taken
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
        passes: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// How fast this device trains, against its own matrix product; tools/bench_step.py adds PyTorch and timm
    Step(StepArgs),
    /// What checkpoints cost the training, and how fast one is written, against dd
    Store {
        #[command(flatten)]
        config: ConfigArgs,
        /// Steps of the meta model between two checkpoints
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
        every: u64,
        /// How often each is measured, in turn
        #[arg(long, default_value_t = 15)]
        pairs: usize,
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
    /// The module to train in its hybrid
    #[arg(long, value_name = "I")]
    stage: Option<usize>,
    /// The target end to end [default without --stage]
    #[arg(long, conflicts_with = "stage")]
    e2e: bool,
    /// Samples per step
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Steps to time, after three to warm up
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,
    /// Compute threads; 0: as many as cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// auto, cpu or cuda [default: the config's]
    #[arg(long)]
    device: Option<String>,
    /// fp32, bf16 or tf32 [default: the config's]
    #[arg(long)]
    precision: Option<String>,
    /// Switch off what makes a step fast, to see what it gives: kernels, attention, optimiser, suffix, memory; may be given
    /// more than once
    #[arg(long, value_name = "PART")]
    without: Vec<Part>,
    /// Override a config key, such as --set run.micro_batch=16; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl StepArgs {
    fn measure(&self) -> Result<()> {
        let mut sets = vec![format!("run.threads={}", self.threads)];
        sets.extend(self.device.iter().map(|device| format!("run.device={device}")));
        sets.extend(self.precision.iter().map(|precision| format!("run.precision={precision}")));
        sets.extend_from_slice(&self.sets);
        let config = bench::step::config(&self.model, self.batch, &sets)?;
        self.without.iter().for_each(|part| off::switch_off(*part));
        memory::keep_freed(off::is_on(Part::Memory));
        start_libtorch(&config);
        let devices = devices(&config)?;
        devices.take_up(0)?;
        let (stage, batch, steps, device) = (self.stage, self.batch, self.steps as usize, devices.device(0));
        let report = bench::step::measure(config, &self.model, bench::step::Work { stage, batch, steps, device })?;
        print_either(self.json, &report, || bench::step::text(&report))
    }
}

#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// The TOML file; configs/default.toml lists every key
    pub config: PathBuf,
    #[command(flatten)]
    pub over: Overrides,
}

#[derive(Debug, Args)]
pub struct Overrides {
    /// Override a config key, such as --set module.epochs=10; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Override run.dir
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

impl ConfigArgs {
    fn load(&self) -> Result<Config> {
        self.over.load(&self.config)
    }
}

impl Overrides {
    fn load(&self, path: &Path) -> Result<Config> {
        let mut config = Config::load(path, &self.sets)?;
        if let Some(dir) = &self.run_dir {
            config.run.dir = dir.clone();
        }
        start_libtorch(&config);
        Ok(config)
    }
}

impl Overrides {
    /// The config of what is to be packed, and the folder to pack it into.
    fn packing(&self, source: &Path, into: Option<&Path>) -> Result<(Config, PathBuf)> {
        if let Some(into) = into {
            return Ok((self.source(source)?, into.into()));
        }
        let data = if source.is_dir() { None } else { Some(self.load(source)?.data) };
        match data.filter(|data| !data.pack_from.as_os_str().is_empty()) {
            Some(data) => Ok((self.source(&data.pack_from)?, data.path)),
            None => Err(usage!(
                "{}: say where to write, `incubate pack SOURCE INTO`, or give a config with data.pack_from",
                source.display()
            )),
        }
    }

    /// The config of a source of images: a file, or a folder whose format shows.
    fn source(&self, path: &Path) -> Result<Config> {
        if !path.is_dir() {
            return self.load(path);
        }
        let format = data::format_of(path).ok_or_else(|| {
            usage!(
                "{}: neither train/CLASS/… nor train-*.tar nor train-*.h5 is in it; give a config that says its data.format",
                path.display()
            )
        })?;
        let mut config = Config::parse("", &self.sets)?;
        (config.data.format, config.data.path) = (format, path.into());
        // Without a run there is no place to keep an index.
        config.run.dir = self.run_dir.clone().unwrap_or_default();
        Ok(config)
    }
}

/// What libtorch must be told before it is first used: CUDA first of all.
fn start_libtorch(config: &Config) {
    device::load(config.run.device);
    tch::set_num_interop_threads(1);
    tch::set_num_threads(threads(config) as i32);
}

/// Compute threads of this rank.
fn threads(config: &Config) -> usize {
    match config.run.threads {
        0 => cores_of_this_rank(),
        n => n,
    }
}

/// This rank's devices; its replicas divide its threads.
fn devices(config: &Config) -> Result<Devices> {
    let ranks = ranks_on_this_node().max(1);
    let place = OnNode { rank: rank_on_this_node().min(ranks - 1), ranks };
    let devices = Devices::of_rank(config.run.device, config.run.replicas, place)?;
    if devices.are_gpus() && config.run.precision == Precision::Tf32 {
        device::tf32::allow()?;
    }
    tch::set_num_threads((threads(config) / devices.replicas()).max(1) as i32);
    Ok(devices)
}

/// Does what the command says, without MPI where it needs none.
pub fn dispatch(command: &Command, world: &World) -> Result<()> {
    match command {
        Command::Run(args) => train(world, args, |job| {
            job.run()?;
            if world.whole().is_zero() { conclude(job) } else { Ok(()) }
        }),
        Command::Meta(args) => train(world, args, |job| job.phase(&META)),
        Command::Module { config, index } => train(world, config, |job| job.modules(*index)),
        Command::Assemble(args) => train(world, args, |job| job.assemble()),
        Command::Finetune(args) => train(world, args, |job| job.phase(&FINETUNE)),
        Command::E2e(args) => train(world, args, |job| job.phase(&E2E)),
        Command::Evaluate(args) => match &args.downstream {
            Some(downstream) => evaluate_downstream(downstream),
            None => evaluate_artefact(args),
        },
        Command::Export { config, formats, weights } => {
            let config = config.load()?;
            let into = config.run.dir.join("export");
            for folder in export::export(&config, &weights_or_final(&config, weights), formats, &into)? {
                println!("{}", folder.display());
            }
            Ok(())
        }
        Command::Import { file, config, role } => {
            println!("{}", import::import(&config.load()?, file, *role)?.display());
            Ok(())
        }
        Command::Plan { config, ranks, rate, json } => {
            let config = config.load()?;
            let images = data::train_images(&config)?;
            let plan = Plan::new(config, images)?;
            let flops = rate.map_or_else(|| matrix_product_rate(model::OPTIONS), |tera| tera * 1e12);
            let report = plan_report::report(&plan, *ranks as usize, flops);
            print_either(*json, &report, || plan_report::text(&report, rate.is_none()))
        }
        Command::Submit { config, dry_run, json } => {
            let config = config.load()?;
            let images = data::train_images(&config)?;
            let binary = std::env::current_exe().context("this program's own path")?;
            let jobs = submit::submit(&Plan::new(config, images)?, &binary, *dry_run)?;
            print_either(*json, &jobs, || submit::table(&jobs))
        }
        Command::Status { run_dir, watch: true, .. } => watch(run_dir),
        Command::Status { run_dir, json, .. } => {
            let lines = status::status(run_dir)?;
            print_either(*json, &lines, || status::table(&lines))
        }
        Command::Cancel { run_dir } => {
            RunDir::config_of(run_dir)?;
            let ids = queue::cancel(&RunDir { path: run_dir.clone() })?;
            println!(
                "{}",
                if ids.is_empty() { "nothing to cancel".into() } else { format!("cancelled {}", ids.join(", ")) }
            );
            Ok(())
        }
        Command::Pack { source, into, size, quality, raw, over, json } => {
            let (config, into) = over.packing(source, into.as_deref())?;
            let encoding = if *raw { Encoding::Raw } else { Encoding::Jpeg };
            let (size, threads) = (*size as usize, threads(&config));
            let options = pack::Options { encoding, size, quality: *quality, threads };
            let source = data::open_unchecked(&config)?;
            let bar = bars::counting("pack", source.train.len() + source.test.len());
            let report = pack::pack(&source, &config, &into, &options, &|images| {
                bar.iter().for_each(|bar| bar.inc(images));
            })?;
            print_either(*json, &report, || pack::text(&report, &into))
        }
        Command::Verify { path, json } => verify(path, *json),
        Command::Doctor { config, over, json } => {
            let config = config.as_ref().map(|path| over.load(path)).transpose()?;
            device::load(config.as_ref().map_or(DeviceChoice::Auto, |config| config.run.device));
            let findings = doctor::examine(config.as_ref(), config.as_ref().map_or(1, threads));
            print_either(*json, &findings, || doctor::table(&findings))?;
            let bad = findings.iter().filter(|f| !f.ok).count();
            if bad > 0 { Err(usage!("{bad} finding(s) need a cure")) } else { Ok(()) }
        }
        Command::Bench { bench: Bench::Data { folder, passes, json } } => {
            let report = bench::data::measure(folder, *passes as usize)?;
            print_either(*json, &report, || bench::data::text(&report))
        }
        Command::Bench { bench: Bench::Step(args) } => args.measure(),
        Command::Bench { bench: Bench::Store { config, every, pairs, json } } => {
            let report = bench::store::measure(config.load()?, *every, *pairs)?;
            print_either(*json, &report, || bench::store::text(&report))
        }
        Command::Bench { bench: Bench::Index { entries, folder, json } } => {
            let report = bench::index::measure(*entries as usize, folder)?;
            print_either(*json, &report, || bench::index::text(&report))
        }
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "incubate", &mut std::io::stdout());
            Ok(())
        }
        Command::Man { folder } => {
            std::fs::create_dir_all(folder).map_err(|e| usage!("{}: {e}", folder.display()))?;
            clap_mangen::generate_to(Cli::command(), folder).with_context(|| format!("{}", folder.display()))
        }
    }
}

impl Command {
    /// Whether the command looks at [`crate::train::STOP`] and ends in order; others just end.
    pub fn heeds_signals(&self) -> bool {
        self.trains() || matches!(self, Command::Pack { .. } | Command::Status { watch: true, .. })
    }

    /// Whether the command trains, and so joins the world of ranks that it was started in.
    pub fn trains(&self) -> bool {
        matches!(
            self,
            Command::Run(_)
                | Command::Meta(_)
                | Command::Module { .. }
                | Command::Assemble(_)
                | Command::Finetune(_)
                | Command::E2e(_)
        )
    }
}

/// The status, again and again, in place on a terminal.
fn watch(run_dir: &Path) -> Result<()> {
    while !stop_requested() {
        let lines = status::status(run_dir)?;
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        print!("{clear}{}", status::table(&lines));
        std::io::stdout().flush()?;
        if status::is_over(&lines) {
            break;
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    Ok(())
}

/// Opens the job and trains, with progress bars where somebody looks.
fn train(world: &World, args: &ConfigArgs, act: impl FnOnce(&Job) -> Result<()>) -> Result<()> {
    let whole = world.whole();
    let config = agree(whole, args.load())?;
    let devices = agree(whole, devices(&config))?;
    if whole.is_zero() || devices.are_gpus() {
        let (name, size, threads) = (&config.run.name, whole.size(), tch::get_num_threads());
        log::info!("{name}: {size} rank(s), {threads} thread(s) per replica, computing on {}", devices.describe());
    }
    doctor::warn_of_trouble(&config, threads(&config), whole.is_zero());
    let job = Job::open(config, world, devices)?;
    let bars = whole.is_zero().then(|| Bars::start(&job.plan, &job.run)).flatten();
    act(&job)?;
    drop(bars);
    Ok(())
}

/// Exports what the config asks for, if the final model is there, and prints the table.
fn conclude(job: &Job) -> Result<()> {
    let config = &job.plan.config;
    let weights = job.run.file(FINETUNE.writes);
    let exported = if weights.exists() && !config.run.export.is_empty() {
        export::export(config, &weights, &config.run.export, &job.run.file("export"))?
    } else {
        Vec::new()
    };
    let rows = summary::rows(&job.plan, &job.run, job.source.bad.count())?;
    summary::write(&job.run, &rows)?;
    report::write(&job.plan, &job.run, &rows)?;
    print!("{}", summary::table(&rows));
    for folder in exported {
        println!("exported: {}", folder.display());
    }
    println!("report: {}", job.run.file("report.html").display());
    println!("curves: {} (metrics.jsonl and TensorBoard events)", job.run.file("logs").display());
    Ok(())
}

fn evaluate_artefact(args: &EvaluateArgs) -> Result<()> {
    let config = args.over.load(args.config.as_ref().context("clap requires the config")?)?;
    let weights = weights_or_final(&config, &args.weights);
    let device = devices(&config)?.device(0);
    let metrics = evaluate::evaluate(&config, &weights, device)?;
    if let Some(file) = &args.outputs {
        evaluate::outputs(&config, &weights, device, file)?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&metrics)?);
    } else {
        println!(
            "top-1 {:.2} %, top-5 {:.2} %, loss {:.4} on {} images",
            metrics["top1"], metrics["top5"], metrics["loss"], metrics["images"]
        );
    }
    Ok(())
}

fn evaluate_downstream(results: &Downstream) -> Result<()> {
    let draw = |file: &Option<PathBuf>, picture: &dyn Fn() -> String| match file {
        Some(file) => std::fs::write(file, picture()).map_err(|e| usage!("{}: {e}", file.display())),
        None => Ok(()),
    };
    match results {
        Downstream::Coco { annotations, results, iou, plot, json } => {
            let report = coco::evaluate(annotations, results, iou == "segm")?;
            draw(plot, &|| report.plot())?;
            print_either(*json, &report, || report.text())
        }
        Downstream::Ade20k { labels, predictions, zero_based, plot, json } => {
            let report = ade20k::evaluate(labels, predictions, *zero_based)?;
            draw(plot, &|| report.plot())?;
            print_either(*json, &report, || report.text())
        }
    }
}

fn weights_or_final(config: &Config, weights: &Option<PathBuf>) -> PathBuf {
    weights.clone().unwrap_or_else(|| config.run.dir.join(FINETUNE.writes))
}

fn print_either(json: bool, value: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(value)?);
    } else {
        print!("{}", text());
    }
    Ok(())
}

/// Reads everything whole; names each damaged file and fails with the first.
fn verify(path: &Path, json: bool) -> Result<()> {
    let is_pack = path.is_dir() && data::format_of(path) == Some(Format::Packed);
    let files = match path.is_dir() {
        true if is_pack => {
            ["train", "val"].map(|split| packed::files(path, split)).into_iter().collect::<Result<Vec<_>>>()?.concat()
        }
        true => artefacts_in(path)?,
        false => vec![path.to_path_buf()],
    };
    let mut first = None;
    let mut results = Vec::new();
    for file in files {
        let read = verify_file(&file);
        let ok = read.is_ok();
        let verdict = read.as_ref().map_or_else(|error| format!("{error:#}"), |text| format!("ok, {text}"));
        results.push(serde_json::json!({"file": file, "ok": ok, "text": verdict}));
        if !json {
            // An error names its file.
            println!("{}", if ok { format!("{}: {verdict}", file.display()) } else { verdict });
        }
        first = first.or(read.err());
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    }
    // Whole shards may still be too few.
    first = first.or_else(|| if is_pack { packed::open(path).err() } else { None });
    first.map_or(Ok(()), Err)
}

/// What a file holds, if it is as it was written.
fn verify_file(file: &Path) -> Result<String> {
    if shard::SEAL.is(file) {
        let shard = packed::verify(file)?;
        return Ok(format!("{} {} samples, {}", shard.samples.len(), shard.split, shard.encoding.name()));
    }
    let artefact = artefact::read(file)?;
    Ok(format!("{} parameters, blake3 {}", artefact.weights.len(), artefact.hash))
}

fn artefacts_in(folder: &Path) -> Result<Vec<PathBuf>> {
    RunDir::config_of(folder)?;
    let run = RunDir { path: folder.into() };
    let in_folder = |path: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let mut found: Vec<PathBuf> =
            entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "h5")).collect();
        found.sort();
        found
    };
    let files: Vec<PathBuf> = in_folder(folder).into_iter().chain(in_folder(&run.file("checkpoints"))).collect();
    if files.is_empty() {
        return Err(Failure::Usage(format!("{}: no artefacts yet", folder.display())).into());
    }
    Ok(files)
}
