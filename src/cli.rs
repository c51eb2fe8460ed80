//! The door: commands, their arguments, and what each prints.

use crate::cluster::{doctor, queue, status, submit};
use crate::collective::mpi::{World, ranks_on_this_node};
use crate::config::{Config, ExportFormat};
use crate::error::Failure;
use crate::pipeline::bars::Bars;
use crate::pipeline::{Job, evaluate, plan_report, report, summary};
use crate::plan::Plan;
use crate::plan::phases::{E2E, FINETUNE, META};
use crate::store::{RunDir, artefact};
use crate::train::stop_requested;
use crate::{data, export, usage};
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
    /// Evaluate an artefact on the test images; a module runs as its hybrid
    Evaluate {
        #[command(flatten)]
        config: ConfigArgs,
        /// meta.h5, module-i.h5, assembled.h5, final.h5 or e2e.h5 [default: final.h5 of the run directory]
        #[arg(long, value_name = "FILE")]
        weights: Option<PathBuf>,
        #[arg(long)]
        /// Print JSON: top1, top5, loss, images
        json: bool,
    },
    /// Export a trained model for another framework
    Export {
        #[command(flatten)]
        config: ConfigArgs,
        #[arg(long, default_value = "timm", value_parser = ["timm"])]
        format: String,
        /// The model to export [default: final.h5 of the run directory]
        #[arg(long, value_name = "FILE")]
        weights: Option<PathBuf>,
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
        run_dir: PathBuf,
        /// Show it anew every two seconds until everything is done
        #[arg(long, conflicts_with = "json")]
        watch: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Cancel what is queued or running of a submitted run
    Cancel { run_dir: PathBuf },
    /// Verify one artefact, or every artefact and checkpoint of a run directory
    Verify {
        path: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check this node: versions, cores, and with a config its data and run directory
    Doctor {
        config: Option<PathBuf>,
        #[command(flatten)]
        over: Overrides,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a shell's completion script
    Completions { shell: clap_complete::Shell },
    /// Write the man pages into a folder
    Man { folder: PathBuf },
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
        tch::set_num_threads(threads(&config) as i32);
        Ok(config)
    }
}

/// Compute threads of this rank.
fn threads(config: &Config) -> usize {
    match config.run.threads {
        0 => (std::thread::available_parallelism().map_or(1, |n| n.get()) / ranks_on_this_node()).max(1),
        n => n,
    }
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
        Command::Evaluate { config, weights, json } => {
            let config = config.load()?;
            let metrics = evaluate::evaluate(&config, &weights_or_final(&config, weights))?;
            if *json {
                println!("{}", serde_json::to_string(&metrics)?);
            } else {
                println!(
                    "top-1 {:.2} %, top-5 {:.2} %, loss {:.4} on {} images",
                    metrics["top1"], metrics["top5"], metrics["loss"], metrics["images"]
                );
            }
            Ok(())
        }
        Command::Export { config, weights, .. } => {
            let config = config.load()?;
            let into = config.run.dir.join("export");
            let folder = export::export(&config, &weights_or_final(&config, weights), ExportFormat::Timm, &into)?;
            println!("{}", folder.display());
            Ok(())
        }
        Command::Plan { config, ranks, rate, json } => {
            let config = config.load()?;
            let images = data::train_images(&config)?;
            let plan = Plan::new(config, images)?;
            let flops = rate.map_or_else(plan_report::measured_rate, |tera| tera * 1e12);
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
        Command::Verify { path, json } => verify(path, *json),
        Command::Doctor { config, over, json } => {
            let config = config.as_ref().map(|path| over.load(path)).transpose()?;
            let findings = doctor::examine(config.as_ref(), config.as_ref().map_or(1, threads));
            print_either(*json, &findings, || doctor::table(&findings))?;
            let bad = findings.iter().filter(|f| !f.ok).count();
            if bad > 0 { Err(usage!("{bad} finding(s) need a cure")) } else { Ok(()) }
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
    let config = args.load()?;
    let whole = world.whole();
    log::info!("{}: {} rank(s), {} thread(s) per rank", config.run.name, whole.size(), tch::get_num_threads());
    doctor::warn_of_trouble(&config, threads(&config), whole.is_zero());
    let job = Job::open(config, world)?;
    let bars = whole.is_zero().then(|| Bars::start(&job.plan, &job.run)).flatten();
    act(&job)?;
    drop(bars);
    Ok(())
}

/// Exports what the config asks for, if the final model is there, and prints the table.
fn conclude(job: &Job) -> Result<()> {
    let config = &job.plan.config;
    let weights = job.run.file(FINETUNE.writes);
    let mut exported = Vec::new();
    if weights.exists() {
        for format in &config.run.export {
            exported.push(export::export(config, &weights, *format, &job.run.file("export"))?);
        }
    }
    let rows = summary::rows(&job.plan, &job.run)?;
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
    let files = if path.is_dir() { artefacts_in(path)? } else { vec![path.to_path_buf()] };
    let mut first = None;
    let mut results = Vec::new();
    for file in files {
        let read = artefact::read(&file);
        let verdict = match &read {
            Ok(artefact) => format!("ok, {} parameters, blake3 {}", artefact.weights.len(), artefact.hash),
            Err(error) => format!("{error:#}"),
        };
        results.push(serde_json::json!({"file": file, "ok": read.is_ok(), "text": verdict}));
        if !json {
            println!("{}: {verdict}", file.display());
        }
        first = first.or(read.err());
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    }
    first.map_or(Ok(()), Err)
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
