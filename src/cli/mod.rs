//! The door: commands, their arguments, and what each prints.

mod args;
mod bench;
mod evaluate;
mod load;
mod verify;

pub use args::{Cli, Command};

use crate::cluster::{doctor, queue, status, submit};
use crate::collective::agree;
use crate::collective::mpi::World;
use crate::config::{Config, DeviceChoice};
use crate::data;
use crate::data::image::shrink::Form;
use crate::data::source::shard::Encoding;
use crate::model::matrix_product_rate;
use crate::pipeline::bars::{self, Bars};
use crate::pipeline::{Job, check_jobs, check_shares, plan_report, report, summary};
use crate::plan::Plan;
use crate::run::table::{ASSEMBLE, E2E, FINETUNE, META, MODULE};
use crate::store::{RunDir, Seen};
use crate::train::stop_requested;
use crate::{device, export, import, model, pack, usage};
use anyhow::{Context, Result};
use args::ConfigArgs;
use clap::CommandFactory;
use evaluate::{evaluate_artefact, evaluate_downstream};
use load::{devices, threads};
use serde::Serialize;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use verify::verify;

/// Does what the command says, without MPI where it needs none.
pub fn dispatch(command: &Command, world: &World) -> Result<()> {
    match command {
        Command::Run { config, json } => train(world, config, |job| {
            job.run()?;
            if world.whole().is_zero() { conclude(job, *json) } else { Ok(()) }
        }),
        Command::Meta(args) => train(world, args, |job| job.row(&META)),
        Command::Module { config, index } => train(world, config, |job| job.modules(&MODULE, *index)),
        Command::Assemble(args) => train(world, args, |job| job.row(&ASSEMBLE)),
        Command::Finetune(args) => train(world, args, |job| job.row(&FINETUNE)),
        Command::E2e(args) => train(world, args, |job| job.row(&E2E)),
        Command::Evaluate(args) => match &args.downstream {
            Some(downstream) => evaluate_downstream(downstream),
            None => evaluate_artefact(args),
        },
        Command::Export { config, formats, weights, json } => {
            let config = config.load()?;
            let into = config.run.dir.join("export");
            let folders = export::export(&config, &weights_or_final(&config, weights), formats, &into)?;
            print_either(*json, &folders, || folders.iter().map(|folder| format!("{}\n", folder.display())).collect())
        }
        Command::Import { file, config, role, json } => {
            let written = import::import(&config.load()?, file, *role)?;
            print_either(*json, &serde_json::json!({"file": written}), || format!("{}\n", written.display()))
        }
        Command::Plan { config, ranks, rate, json } => {
            let config = config.load()?;
            let images = data::train_images(&config)?;
            let plan = Plan::new(config, images)?;
            check_shares(&plan, *ranks as usize, plan.replicas_per_rank())?;
            let flops = rate.map_or_else(|| matrix_product_rate(model::OPTIONS), |tera| tera * 1e12);
            let report = plan_report::report(&plan, *ranks as usize, flops);
            print_either(*json, &report, || plan_report::text(&report, rate.is_none()))
        }
        Command::Submit { config, dry_run, json } => {
            let config = config.load()?;
            let images = data::train_images(&config)?;
            let binary = std::env::current_exe().context("this program's own path")?;
            let plan = Plan::new(config, images)?;
            check_jobs(&plan)?;
            let jobs = submit::submit(&plan, &binary, *dry_run)?;
            print_either(*json, &jobs, || submit::table(&jobs))
        }
        Command::Status { run_dir, watch: true, .. } => watch(run_dir),
        Command::Status { run_dir, json, .. } => {
            let lines = status::status(run_dir, &mut Seen::default())?;
            print_either(*json, &lines, || status::table(&lines))
        }
        Command::Cancel { run_dir, json } => {
            RunDir::config_of(run_dir)?;
            let ids = queue::cancel(&RunDir { path: run_dir.clone() })?;
            print_either(*json, &serde_json::json!({"cancelled": ids}), || match ids.as_slice() {
                [] => "nothing to cancel\n".into(),
                ids => format!("cancelled {}\n", ids.join(", ")),
            })
        }
        Command::Pack { source, into, size, quality, raw, over, json } => {
            let (config, into) = over.packing(source, into.as_deref())?;
            let encoding = if *raw { Encoding::Raw } else { Encoding::Jpeg };
            let (size, threads) = (*size as usize, threads(&config));
            let options = pack::Options { form: Form { encoding, size, quality: *quality }, threads };
            let pack = || {
                let source = data::open_unchecked(&config)?;
                let bar = bars::counting("pack", source.train.len() + source.test.len());
                pack::pack(&source, &config, &into, &options, &|images| bar.iter().for_each(|bar| bar.inc(images)))
            };
            let report = pack().inspect_err(|error| pack::note_failure(&config.run.dir, error))?;
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
        Command::Bench { bench } => bench.measure(),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "incubate", &mut script);
            print(&String::from_utf8(script)?)
        }
        Command::Man { folder } => {
            std::fs::create_dir_all(folder).map_err(|e| usage!("{}: {e}", folder.display()))?;
            clap_mangen::generate_to(Cli::command(), folder).with_context(|| format!("{}", folder.display()))
        }
    }
}

/// The status, again and again, in place on a terminal.
fn watch(run_dir: &Path) -> Result<()> {
    let mut seen = Seen::default();
    while !stop_requested() {
        let lines = status::status(run_dir, &mut seen)?;
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        let is_read = is_read(&format!("{clear}{}", status::table(&lines)))?;
        if !is_read || status::is_over(&lines) {
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

/// What a run has come to.
#[derive(Serialize)]
struct Outcome<'a> {
    models: &'a [summary::Row],
    exported: Vec<PathBuf>,
    report: PathBuf,
    /// The folder of `metrics.jsonl` and the TensorBoard events.
    curves: PathBuf,
}

/// Exports what the config asks for, if the final model is there, and prints the table.
fn conclude(job: &Job, json: bool) -> Result<()> {
    let config = &job.plan.config;
    let weights = job.run.file(FINETUNE.writes);
    let exported = if weights.exists() && !config.run.export.is_empty() {
        export::export(config, &weights, &config.run.export, &job.run.file("export"))?
    } else {
        Vec::new()
    };
    let rows = summary::rows(&job.plan, &job.graph, &job.run, job.source.bad.count())?;
    summary::write(&job.run, &rows)?;
    report::write(&job.plan, &job.graph, &job.run, &rows)?;
    let (report, curves) = (job.run.file("report.html"), job.run.file("logs"));
    let outcome = Outcome { models: &rows, exported, report, curves };
    print_either(json, &outcome, || {
        let mut text = summary::table(&rows);
        outcome.exported.iter().for_each(|folder| text += &format!("exported: {}\n", folder.display()));
        text += &format!("report: {}\n", outcome.report.display());
        text + &format!("curves: {} (metrics.jsonl and TensorBoard events)\n", outcome.curves.display())
    })
}

fn weights_or_final(config: &Config, weights: &Option<PathBuf>) -> PathBuf {
    weights.clone().unwrap_or_else(|| config.run.dir.join(FINETUNE.writes))
}

fn print_either(json: bool, value: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<()> {
    print(&if json { serde_json::to_string_pretty(value)? + "\n" } else { text() })
}

fn print(text: &str) -> Result<()> {
    is_read(text).map(|_| ())
}

/// Prints a text; false if whoever reads has seen enough, as `head` may have.
fn is_read(text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        printed => printed.map(|()| true).context("standard output"),
    }
}
