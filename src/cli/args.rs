//! The commands and their arguments. `overrides.rs` has the arguments that name a config, and `bench.rs` has the arguments of
//! `bench`. `mod.rs` and the other files of this folder execute the commands.

use super::bench::Bench;
use super::overrides::{ConfigArgs, Overrides, TrainArgs};
use crate::config::ExportFormat;
use crate::data::image::shrink::{QUALITY, SHORT_SIDE};
use crate::import::Role;
use crate::plan::gpus::GpuModel;
use crate::study::shares::Share;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

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
    /// Do everything: meta model, modules, assembly, fine-tuning, evaluation, export. Finished parts are skipped
    Run {
        #[command(flatten)]
        args: TrainArgs,
        /// Print JSON: the models with accuracy, cost and file, and the exported folders
        #[arg(long)]
        json: bool,
    },
    /// Train the meta model
    Meta(TrainArgs),
    /// Train one module, or all of them
    Module {
        #[command(flatten)]
        args: TrainArgs,
        /// The stage to train, from 0 [default: all stages]
        #[arg(long)]
        index: Option<usize>,
    },
    /// Assemble the target from the trained modules
    Assemble(TrainArgs),
    /// Fine-tune the assembled target
    Finetune(TrainArgs),
    /// Train the target from scratch, the baseline
    E2e(TrainArgs),
    /// Train the target from scratch with a loss for each stage (DGL), another baseline
    Dgl(TrainArgs),
    /// Train the target from scratch with InfoPro's losses for each stage, another baseline
    Infopro(TrainArgs),
    /// Fine-tune the final model on the images and label maps of segmentation.path, and evaluate it
    Segment(TrainArgs),
    /// Fine-tune the baseline on images with label maps in the same way, to compare
    #[command(name = "segment-e2e")]
    SegmentE2e(TrainArgs),
    /// Fine-tune the final model on the images and annotated objects of detection.path, and evaluate it
    Detect(TrainArgs),
    /// Fine-tune the baseline on images with annotated objects in the same way, to compare
    #[command(name = "detect-e2e")]
    DetectE2e(TrainArgs),
    /// Evaluate an artefact on the test images (a module runs inside the meta model), or results on COCO or ADE20K
    Evaluate(EvaluateArgs),
    /// Show what a model sees in images, as pictures: the likeliest classes, a mask of classes, or objects
    Predict(PredictArgs),
    /// Export a trained model for another framework
    Export {
        #[command(flatten)]
        config: ConfigArgs,
        /// timm, hf, detectron2, mmdet, mmseg, safetensors, pth or all; may be given more than once
        #[arg(long = "format", value_name = "FORMAT", default_value = "timm")]
        formats: Vec<ExportFormat>,
        /// The model to export [default: final.h5 of the run directory]; exports of another file, such as meta.h5, go into
        /// export/meta
        #[arg(long, value_name = "FILE")]
        weights: Option<PathBuf>,
        /// Print JSON: the folders that were written
        #[arg(long)]
        json: bool,
    },
    /// Import weights of the official code, DeiT, timm or another run (.pth, .safetensors, .h5) into the run directory; position
    /// embeddings of another image size are resampled
    Import {
        /// A .pth (of the official code, whose file is finished_checkpoint.pth, of timm or of DeiT), a .safetensors, or an .h5 of a
        /// run; nothing in it is executed
        file: PathBuf,
        #[command(flatten)]
        config: ConfigArgs,
        /// The part that the model plays in the run: meta, assembled or final [default: meta for a model as deep as the meta model,
        /// else final, or assembled with --new-head]
        #[arg(long = "as", value_name = "ROLE")]
        role: Option<Role>,
        /// Take the moving averages of the weights (model_ema, state_dict_ema or ema_state_dict)
        #[arg(long)]
        ema: bool,
        /// Initialise a new head, to train on other classes than the file's
        #[arg(long)]
        new_head: bool,
        /// Print JSON: the file that was written
        #[arg(long)]
        json: bool,
    },
    /// Show what follows from a config: parameters, steps, learning rates, memory, cost, each rank's part
    Plan {
        #[command(flatten)]
        config: ConfigArgs,
        /// The number of ranks to plan for
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        ranks: u32,
        /// Sustained TFLOP/s of one device [default: the measured rate of fp32 matrix products on this machine's CPU]
        #[arg(long, value_name = "TFLOPS", value_parser = positive)]
        rate: Option<f64>,
        /// The GPU to plan for, such as h100, with its memory; its speed is taken to be 40 % of its peak in run.precision
        #[arg(long, value_name = "NAME", conflicts_with = "rate")]
        gpu: Option<GpuModel>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Submit a run to Slurm, as several jobs or as one (slurm.mode). Finished parts are not submitted again
    Submit {
        #[command(flatten)]
        args: TrainArgs,
        /// Write the scripts and check them with sbatch --test-only, but submit nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the state of each phase of a run and, with Slurm, what it waits for
    Status {
        /// The run directory: run.dir of the config, or the folder given by --run-dir
        run_dir: PathBuf,
        /// Refresh every two seconds until every phase shown is done
        #[arg(long, conflicts_with = "json")]
        watch: bool,
        /// Instead, assemble what the modules have learnt so far, and evaluate it and each module on some test images. Computes on
        /// this machine; the report shows the newest preview
        #[arg(long, conflicts_with = "watch")]
        preview: bool,
        /// How many test images a preview evaluates
        #[arg(long, default_value_t = 1000, requires = "preview", value_parser = clap::value_parser!(u32).range(1..))]
        images: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write a page about one run or several: accuracy against cost of each method, curves, models, time, memory
    Report {
        /// Run directories, finished or not, or folders of run directories
        #[arg(required = true)]
        run_dirs: Vec<PathBuf>,
        /// The HTML file [default for a single folder: report.html in it, or report-so-far.html while its run goes on]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Also write each picture as SVG and PNG, and each table as CSV, into this folder
        #[arg(long, value_name = "DIR")]
        figures: Option<PathBuf>,
        /// Print JSON: the page, its first sentences, and the other files
        #[arg(long)]
        json: bool,
    },
    /// Train a grid of configs, each in a run directory of its own, and report on all of them. Finished cells are skipped
    Study(StudyArgs),
    /// Cancel the queued and running jobs of a submitted run
    Cancel {
        /// The run directory: run.dir of the config, or the folder given by --run-dir
        run_dir: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Pack images into HDF5 shards that any number of ranks read fast (data.format = "packed")
    Pack(PackArgs),
    /// Verify one artefact or packed shard, all artefacts and checkpoints of a run directory, or a pack
    Verify {
        /// A file that incubate wrote (.h5), or a folder of them: a run directory or a pack
        path: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check this node (versions, cores, GPUs) and, with CONFIG, whether it reads the config's data fast enough and can write its
    /// run directory
    Doctor {
        /// The TOML file whose data and run directory to check too
        config: Option<PathBuf>,
        #[command(flatten)]
        overrides: Overrides,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Measure performance; scripts in tools/ compare with PyTorch and timm
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
        /// The folder, which is created if it does not exist
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct PredictArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// JPEG or PNG images
    #[arg(required = true)]
    pub images: Vec<PathBuf>,
    /// The model [default: the first of segment.h5, detect.h5 and final.h5 that the run directory has]
    #[arg(long, value_name = "FILE")]
    pub weights: Option<PathBuf>,
    /// The folder for the pictures [default: predictions in the run directory]
    #[arg(long, value_name = "DIR")]
    pub into: Option<PathBuf>,
    /// Print JSON: the pictures, and the classes of each image in percent
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct StudyArgs {
    /// The study, a TOML file such as those of configs/studies
    pub study: PathBuf,
    /// Show the cells, their cost and the time that they need on this machine, and train nothing
    #[arg(long)]
    pub dry_run: bool,
    /// With --dry-run: the hours on one such GPU instead of this machine: b200, h200, gh200, h100, h100-pcie, a100, a100-40, l40s,
    /// a40 or l4
    #[arg(long, value_name = "NAME", requires = "dry_run")]
    pub gpu: Option<GpuModel>,
    /// Only this cell; may be given more than once
    #[arg(long, value_name = "CELL")]
    pub only: Vec<String>,
    /// Only share I of N, from 0/N: for a Slurm array [default: under mpirun, a share for each rank]
    #[arg(long, value_name = "I/N")]
    pub share: Option<Share>,
    /// Print JSON: with --dry-run the cells, else the page of the report with its first sentences
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PackArgs {
    /// A config, or a folder: of images (train/CLASS/*.jpg, val/CLASS/*.jpg), of tar shards, or of an earlier pack
    pub source: PathBuf,
    /// The folder for train-*.h5 and val-*.h5; shards that exist are not written again. Without it SOURCE is a config:
    /// data.pack_from is packed into data.path
    pub into: Option<PathBuf>,
    /// Shrink images whose shorter side is longer than this
    #[arg(long, default_value_t = SHORT_SIDE, value_parser = clap::value_parser!(u32).range(16..=4096))]
    pub size: u32,
    /// The quality of JPEG; a JPEG that is not shrunk keeps its bytes
    #[arg(long, default_value_t = QUALITY, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub quality: u8,
    /// Store pixels, which take about ten times the space of JPEG and no time to decode
    #[arg(long, conflicts_with = "quality")]
    pub raw: bool,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct EvaluateArgs {
    #[command(subcommand)]
    pub downstream: Option<Downstream>,
    /// The TOML file; configs/default.toml lists the keys
    #[arg(required = true)]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub overrides: Overrides,
    /// The artefact, such as meta.h5, module-0.h5, e2e.h5, segment.h5 or detect.h5 [default: final.h5 of the run directory]
    #[arg(long, value_name = "FILE")]
    pub weights: Option<PathBuf>,
    /// Also write logits, labels and inputs (only the first 16 if all exceed 256 MiB) as safetensors, for a comparison with other
    /// programs; of a detector its detections, as a results file of COCO's format
    #[arg(long, value_name = "FILE")]
    pub outputs: Option<PathBuf>,
    /// Print JSON: the metrics by name, and how many images were evaluated
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Downstream {
    /// Compute COCO's twelve metrics of a results file
    Coco {
        /// The annotations, such as instances_val2017.json
        #[arg(long, value_name = "FILE")]
        annotations: PathBuf,
        /// The results: a JSON list of detections
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
    /// Compute ADE20K's mIoU, mAcc and aAcc of predicted label maps
    Ade20k {
        /// The folder of label maps: 8-bit PNGs with values from 0 (ignored) to 150
        #[arg(long, value_name = "DIR")]
        labels: PathBuf,
        /// The folder of predictions, with the names and values of label maps
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

impl Command {
    /// Whether the command stops cleanly after a signal, because it checks [`crate::stop::STOP`], which a signal sets. A signal
    /// ends any other command at once.
    pub fn heeds_signals(&self) -> bool {
        self.joins_world() || matches!(self, Command::Pack(_) | Command::Study(_) | Command::Status { watch: true, .. })
    }

    /// Whether the command joins the MPI world in which it was started. Its ranks then train together or wait for each other.
    pub fn joins_world(&self) -> bool {
        matches!(
            self,
            Command::Run { .. }
                | Command::Meta(_)
                | Command::Module { .. }
                | Command::Assemble(_)
                | Command::Finetune(_)
                | Command::E2e(_)
                | Command::Dgl(_)
                | Command::Infopro(_)
                | Command::Segment(_)
                | Command::SegmentE2e(_)
                | Command::Detect(_)
                | Command::DetectE2e(_)
        )
    }
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().map_err(|_| "not a number".to_string())?;
    if number > 0.0 && f64::is_finite(number) { Ok(number) } else { Err("it must be a positive number".into()) }
}
