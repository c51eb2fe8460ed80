//! The command line: the commands, their arguments, and their output.

mod args;
mod bench;
mod cluster;
mod evaluate;
mod load;
mod overrides;
mod predict;
mod study;
mod verify;

pub use args::{Cli, Command};

use crate::bench::input;
use crate::cluster::doctor;
use crate::collective::agree;
use crate::collective::mpi::World;
use crate::config::{Config, TaskKind};
use crate::data;
use crate::data::image::shrink::Form;
use crate::data::source::shard::Encoding;
use crate::model::matrix_product_rate;
use crate::pipeline::bars::{self, Bars};
use crate::pipeline::plan_report::{self, Speed};
use crate::pipeline::{Job, check_shares, extend};
use crate::plan::Plan;
use crate::plan::gpus::GpuModel;
use crate::report::{self, summary};
use crate::run::table::{
    ASSEMBLE, DETECT, DETECT_E2E, DGL, E2E, FINETUNE, INFOPRO, META, MODULE, Row, SEGMENT, SEGMENT_E2E,
};
use crate::store::ArtefactCache;
use crate::task::Task;
use crate::{export, import, model, pack, require, usage};
use anyhow::{Context, Result};
use args::PackArgs;
use clap::CommandFactory;
use load::{devices, start_threads, threads};
use overrides::{ConfigArgs, TrainArgs};
use serde::Serialize;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use study::study;
use verify::verify;

/// Executes a command. Only commands for which [`Command::joins_world`] is true use `world`.
pub fn dispatch(command: &Command, world: &World) -> Result<()> {
    match command {
        Command::Run { args, json } => train(world, args, |job| {
            job.run()?;
            if world.all_ranks().is_zero() { conclude(job, *json) } else { Ok(()) }
        }),
        Command::Meta(args) => train(world, args, |job| job.row(&META)),
        Command::Module { args, index } => train(world, args, |job| job.modules(&MODULE, *index)),
        Command::Assemble(args) => train(world, args, |job| job.row(&ASSEMBLE)),
        Command::Finetune(args) => train(world, args, |job| job.row(&FINETUNE)),
        Command::E2e(args) => train(world, args, |job| job.row(&E2E)),
        Command::Dgl(args) => train(world, &args.with("run.dgl=true"), |job| job.row(&DGL)),
        Command::Infopro(args) => train(world, &args.with("run.infopro=true"), |job| job.row(&INFOPRO)),
        Command::Segment(args) => downstream(world, args, &SEGMENT),
        Command::SegmentE2e(args) => downstream(world, args, &SEGMENT_E2E),
        Command::Detect(args) => downstream(world, args, &DETECT),
        Command::DetectE2e(args) => downstream(world, args, &DETECT_E2E),
        Command::Evaluate(args) => evaluate::evaluate(args),
        Command::Predict(args) => predict::predict(args),
        Command::Export { config, formats, weights, json } => {
            let config = config.load()?;
            let weights = weights_or_final(&config, weights);
            let folders = export::export(&config, &weights, formats, &export::folder_for(&config, &weights))?;
            print_either(*json, &folders, || folders.iter().map(|folder| format!("{}\n", folder.display())).collect())
        }
        Command::Import { file, config, role, ema, new_head, json } => {
            let choice = import::Choice { role: *role, ema: *ema, new_head: *new_head };
            let written = import::import(&config.load()?, file, choice)?;
            print_either(*json, &serde_json::json!({"file": written}), || format!("{}\n", written.display()))
        }
        Command::Plan { config, ranks, rate, gpu, json } => print_plan(config, *ranks as usize, (*rate, *gpu), *json),
        Command::Submit { args, dry_run, json } => cluster::submit(args, *dry_run, *json),
        Command::Status { run_dir, watch: true, .. } => cluster::watch(run_dir),
        Command::Status { run_dir, preview: true, images, json, .. } => {
            cluster::preview(run_dir, *images as usize, *json)
        }
        Command::Status { run_dir, json, .. } => cluster::status(run_dir, *json),
        Command::Study(args) => study(args),
        Command::Report { run_dirs, out, figures, json } => {
            let written = report::write(run_dirs, out.as_deref(), figures.as_deref())?;
            print_either(*json, &written, || {
                let lead = written.summary.iter().map(|sentence| format!("{sentence}\n"));
                let files = written.files.iter().chain([&written.page]).map(|file| format!("{}\n", file.display()));
                lead.chain(files).collect()
            })
        }
        Command::Cancel { run_dir, json } => cluster::cancel(run_dir, *json),
        Command::Pack(args) => pack_images(args),
        Command::Verify { path, json } => verify(path, *json),
        Command::Doctor { config, overrides, json } => cluster::doctor(config.as_deref(), overrides, *json),
        Command::Bench { bench } => bench.measure(),
        Command::Completions { shell } => print_completions(*shell),
        Command::Man { folder } => {
            std::fs::create_dir_all(folder).map_err(|e| usage!("{}: {e}", folder.display()))?;
            clap_mangen::generate_to(Cli::command(), folder)
                .with_context(|| format!("{}: cannot write the man pages", folder.display()))
        }
    }
}

fn print_completions(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "incubate", &mut script);
    print(&String::from_utf8(script)?)
}

/// The speed of `gpu`, if the user names a GPU. Otherwise `rate` in TFLOP/s, if the user gives it. Otherwise the measured speed of
/// fp32 matrix products on this machine's CPU.
fn speed(rate: Option<f64>, gpu: Option<GpuModel>) -> Speed {
    match (rate, gpu) {
        (_, Some(gpu)) => Speed::Gpu(gpu),
        (Some(tera), None) => Speed::Given(tera * 1e12),
        (None, None) => Speed::Measured(matrix_product_rate(model::FP32_ON_HOST)),
    }
}

/// Prints what follows from a config for a world of `ranks` ranks.
fn print_plan(
    config: &ConfigArgs,
    ranks: usize,
    (rate, gpu): (Option<f64>, Option<GpuModel>),
    json: bool,
) -> Result<()> {
    let config = config.load()?;
    let images = data::train_images(&config)?;
    let others: Vec<Plan> = config.downstream().map(|task| plan_of(&config, task)).collect::<Result<_>>()?;
    let plan = Plan::new(config, images)?;
    check_shares(&plan, ranks, plan.replicas_per_rank())?;
    let speed = speed(rate, gpu);
    let input = input::of_plan(&plan, ranks, speed.rate(plan.config.run.precision));
    let report = plan_report::report(&plan, &others, ranks, speed, input);
    print_either(json, &report, || plan_report::text(&report, speed))
}

/// The plan of the run's phases for one downstream task, with the number of the task's training images.
fn plan_of(config: &Config, task: TaskKind) -> Result<Plan> {
    let config = config.of_task(task);
    let images = data::train_images(&config)?;
    Plan::new(config, images)
}

/// Packs images, with a progress bar on a terminal.
fn pack_images(args: &PackArgs) -> Result<()> {
    let (config, into) = args.overrides.packing(&args.source, args.into.as_deref())?;
    let encoding = if args.raw { Encoding::Raw } else { Encoding::Jpeg };
    let form = Form { encoding, size: args.size as usize, quality: args.quality };
    let options = pack::Options { form, threads: threads(&config) };
    let pack = || {
        let source = data::open_unchecked(&config)?;
        let bar = bars::counting("pack", source.train.len() + source.test.len());
        pack::pack(&source, &config, &into, &options, &|images| bar.iter().for_each(|bar| bar.inc(images)))
    };
    let report = pack().inspect_err(|error| pack::note_failure(&config.run.dir, error))?;
    print_either(args.json, &report, || pack::text(&report, &into))
}

/// Fine-tunes for a downstream task (segmentation or detection). Opens only the images of this task.
fn downstream(world: &World, args: &TrainArgs, row: &'static Row) -> Result<()> {
    let all_ranks = world.all_ranks();
    agree(all_ranks, refuse_extension(args))?;
    let config = agree(all_ranks, args.config.load())?;
    agree(all_ranks, start_threads())?;
    on_config(world, config, (args.accept_data, row.task()), |job| job.row(row))
}

fn refuse_extension(args: &TrainArgs) -> Result<()> {
    require!(args.extend.is_none(), "--extend: only fine-tuning can be extended; leave it out");
    Ok(())
}

/// Opens the run of a config as a [`Job`] and lets `act` train. If the user has given `--extend`, first extends the fine-tuning.
fn train(world: &World, args: &TrainArgs, act: impl FnOnce(&Job) -> Result<()>) -> Result<()> {
    let all_ranks = world.all_ranks();
    let config = agree(all_ranks, args.config.load())?;
    agree(all_ranks, start_threads())?;
    let config = match args.extend {
        Some(epochs) => agree(all_ranks, extend::extend(all_ranks, config, epochs))?,
        None => config,
    };
    on_config(world, config, (args.accept_data, TaskKind::Classification), act)
}

/// Opens the run of a config as a [`Job`] with the images of a task, and lets `act` train. Shows progress bars on a terminal.
/// Refuses images that have changed since the run was started, unless `accept_data` is true.
fn on_config(
    world: &World,
    config: Config,
    (accept_data, task): (bool, TaskKind),
    act: impl FnOnce(&Job) -> Result<()>,
) -> Result<()> {
    let all_ranks = world.all_ranks();
    let devices = agree(all_ranks, devices(&config))?;
    if all_ranks.is_zero() || devices.are_gpus() {
        let (name, size, threads) = (&config.run.name, all_ranks.size(), tch::get_num_threads());
        log::info!("{name}: {size} rank(s), {threads} thread(s) per replica, computing on {}", devices.describe());
        devices.price_of(config.run.precision).iter().for_each(|price| log::warn!("{price}"));
    }
    doctor::warn_of_trouble(&config, threads(&config), all_ranks.is_zero());
    let job = Job::open(config, world, devices, accept_data, task)?;
    let bars = if all_ranks.is_zero() { Bars::start(&job.plan, &job.run)? } else { None };
    act(&job)?;
    drop(bars);
    Ok(())
}

/// The results of a finished run.
#[derive(Serialize)]
struct Outcome {
    models: Vec<summary::Row>,
    exported: Vec<PathBuf>,
    report: PathBuf,
    /// The folder that contains a folder for each phase, with `metrics.jsonl` and TensorBoard events.
    curves: PathBuf,
}

/// Finishes a run with [`finish`], and prints its results.
fn conclude(job: &Job, json: bool) -> Result<()> {
    let outcome = finish(job)?;
    print_either(json, &outcome, || {
        let mut text = summary::table(Task::of(&job.plan.config), &outcome.models);
        outcome.exported.iter().for_each(|folder| text += &format!("exported: {}\n", folder.display()));
        text += &format!("report: {}\n", outcome.report.display());
        text + &format!("curves: {} (metrics.jsonl and TensorBoard events)\n", outcome.curves.display())
    })
}

/// Exports the final model in the formats of the config, if the run has a final model. Writes the summary and the report.
fn finish(job: &Job) -> Result<Outcome> {
    let config = &job.plan.config;
    let weights = job.run.file(FINETUNE.writes);
    let exported = if weights.exists() && !config.run.export.is_empty() {
        export::export(config, &weights, &config.run.export, &export::folder_for(config, &weights))?
    } else {
        Vec::new()
    };
    let mut artefacts = ArtefactCache::default();
    let rows = summary::rows(&job.plan, &job.graph, &job.run, job.source.bad.count(), &mut artefacts)?;
    summary::write(&job.run, &rows)?;
    let report = report::conclude(&job.run.path, &mut artefacts)?;
    Ok(Outcome { models: rows, exported, report, curves: job.run.file("logs") })
}

/// The given path of a model, or else the path of the run's final model.
fn weights_or_final(config: &Config, weights: &Option<PathBuf>) -> PathBuf {
    weights.clone().unwrap_or_else(|| config.run.dir.join(FINETUNE.writes))
}

/// Prints `value` as JSON if `json` is true. Otherwise prints `text`, which is for people.
fn print_either(json: bool, value: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<()> {
    print(&if json { serde_json::to_string_pretty(value)? + "\n" } else { text() })
}

fn print(text: &str) -> Result<()> {
    print_unless_closed(text).map(|_| ())
}

/// Prints a text. Returns false if the reader has closed the pipe, as `head` does.
fn print_unless_closed(text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        printed => printed.map(|()| true).context("standard output cannot be written"),
    }
}
