//! The contents of the TOML config file, after validation. [`crate::plan`] derives the training phases, their steps and their cost
//! from the config.
//!
//! `configs/default.toml` holds every key with its default. But the keys of `[model]` for another family than ViT are in that
//! family's own `defaults.toml`. A user's file and `--set` override these defaults. An unknown key, or a value of the wrong type,
//! is an error that names the key. The table of each phase, such as `[meta]`, inherits the keys of `[train]`.

mod auto_augment;
mod detection;
mod interval;
mod micro_batch;
mod objectives;
mod overlay;
mod recipe;
mod segmentation;
mod task;
mod validate;

use crate::family::{self, Model};
use crate::{require, usage};
use anyhow::{Context, Result};
pub use auto_augment::Policy;
pub use detection::{Detection, ObjectFormat};
pub use interval::Interval;
pub use micro_batch::MicroBatch;
pub use objectives::{Dgl, InfoPro, LabelLoss, LocalHead, ObjectiveKind};
use overlay::{check_keys, lay_over, parse_set, unreadable};
pub use segmentation::{IGNORED, Inference, MapFormat, Neck, NormOver, PixelMean, Segmentation, TAPS};
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
pub use task::TaskKind;
use toml::{Table, Value};

/// The text of `configs/default.toml`: every key with its default. The keys of `[model]` are the keys of a ViT.
pub const DEFAULTS: &str = include_str!("../../configs/default.toml");
/// The tables that inherit every key of `[train]`.
pub const PHASE_TABLES: [&str; 8] = ["meta", "module", "finetune", "e2e", "dgl", "infopro", "segment", "detect"];

/// A validated config. Its keys are documented in `configs/default.toml`, and the keys of another family than ViT in that family's
/// `defaults.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub run: Run,
    pub model: Model,
    pub data: Data,
    pub meta: Training,
    pub module: Module,
    pub finetune: Training,
    pub e2e: Training,
    pub dgl: Dgl,
    pub infopro: InfoPro,
    pub segment: Training,
    pub segmentation: Segmentation,
    pub detect: Training,
    pub detection: Detection,
    pub slurm: Slurm,
    /// The task of the phases that train with this config. A config that is read from a file has the task of classification.
    /// [`Config::of_task`] makes the config of another task.
    #[serde(skip)]
    pub task: TaskKind,
}

/// The table `[run]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub name: String,
    pub dir: PathBuf,
    pub seed: u64,
    pub e2e: bool,
    pub dgl: bool,
    pub infopro: bool,
    pub device: DeviceChoice,
    pub replicas: usize,
    pub threads: usize,
    pub workers: usize,
    pub micro_batch: MicroBatch,
    pub precision: Precision,
    pub activation_checkpointing: bool,
    pub checkpoint_every: Interval,
    pub keep_checkpoints: usize,
    pub log_steps: u64,
    pub preview_epochs: u64,
    pub export: Vec<ExportFormat>,
}

/// The numeric precision of the computation. The master weights, the sums of gradients and the optimiser's moments are always fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    Fp32,
    Bf16,
    Tf32,
}

/// The kind of device that a rank computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The node's GPUs if it has any, else its CPU.
    Auto,
    Cpu,
    Cuda,
}

/// A format in which a model is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    Timm,
    Hf,
    Detectron2,
    Mmdet,
    Mmseg,
    Safetensors,
    Pth,
    All,
}

impl ExportFormat {
    /// Fails if the programs that read this format do not support the model's family. `All` never fails, because it means all
    /// formats that support the family.
    pub fn check_takes(self, model: &Model) -> Result<()> {
        let is_for_all = matches!(self, ExportFormat::Safetensors | ExportFormat::Pth | ExportFormat::All);
        require!(
            is_for_all || matches!(model, Model::Vit(_)),
            "{}: this format takes Vision Transformers alone; give safetensors or pth",
            format!("{self:?}").to_lowercase()
        );
        Ok(())
    }
}

impl std::str::FromStr for ExportFormat {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<ExportFormat> {
        ExportFormat::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(text))
            .map_err(|e| usage!("{e}"))
    }
}

/// The table `[data]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub format: Format,
    pub path: PathBuf,
    pub pack_from: PathBuf,
    pub train_images: usize,
    pub test_images: usize,
    pub train_fraction: f64,
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
    pub crop_padding: usize,
    pub crop_border: Border,
    pub crop_scale: [f64; 2],
    pub crop_ratio: [f64; 2],
    pub auto_augment: String,
    pub color_jitter: f64,
    pub crop_percent: f64,
    pub reduced_decode: bool,
    pub bad_images: usize,
    pub flip: f64,
    pub erase: f64,
    pub repeats: usize,
    pub mixup: f64,
    pub cutmix: f64,
    pub switch_probability: f64,
    pub label_smoothing: f64,
}

/// The pixels of the border that training adds around an image before the random crop, if the network's input is small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Border {
    Zeros,
    /// The pixels of the image, mirrored about its outermost row or column.
    Reflect,
}

/// The source and format of the images for classification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Idx,
    Cifar10,
    Cifar100,
    Shapes,
    Folder,
    Tar,
    Packed,
}

/// The table `[module]`: how the modules train, and with which weights they start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Module {
    pub start: ModuleStart,
    #[serde(flatten)]
    pub training: Training,
}

/// The weights of a module at step 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModuleStart {
    /// Random weights, as in the paper on Deep Incubation.
    Fresh,
    /// The weights of the meta model's stage. Added blocks at first pass on their input unchanged. So the module at first computes
    /// the same function as the meta model's stage.
    Meta,
}

/// The table of a phase, after it has inherited the keys of `[train]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    pub on: Ranks,
    pub epochs: usize,
    /// How many of the `epochs` were done before `--extend` extended the phase. Only fine-tuning can be extended.
    pub epochs_before: usize,
    pub global_batch: usize,
    pub base_lr: f64,
    pub min_lr: f64,
    pub warmup_lr: f64,
    pub warmup_epochs: usize,
    pub schedule: Schedule,
    pub lr_drops: Vec<usize>,
    pub optimiser: Optimiser,
    pub weight_decay: f64,
    pub decay_all: bool,
    pub layer_decay: f64,
    pub momentum: f64,
    pub nesterov: bool,
    pub betas: [f64; 2],
    pub eps: f64,
    pub clip_grad: f64,
    pub drop_path: f64,
    pub ema: f64,
    pub eval_epochs: usize,
}

/// The table `[slurm]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slurm {
    pub mode: SlurmMode,
    pub partition: String,
    pub account: String,
    pub qos: String,
    pub constraint: String,
    pub time: String,
    pub time_meta: String,
    pub time_finalize: String,
    pub nodes: usize,
    pub ranks: usize,
    pub cpus_per_rank: usize,
    pub gpus_per_node: usize,
    pub array_limit: usize,
    pub signal: String,
    pub signal_lead: u64,
    pub max_requeues: u64,
    pub container: String,
    pub setup: Vec<String>,
    pub downstream: Vec<PathBuf>,
    pub options: Vec<String>,
}

/// Whether a run is submitted as several jobs, with a job array for the modules, or as one job. Packing the images is a separate
/// job in both modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SlurmMode {
    Array,
    Allocation,
}

/// Which ranks train a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ranks {
    /// All ranks, as one group.
    World,
    /// For each module, its own group of ranks.
    Group,
    /// Only rank zero. With GPUs, all ranks of its node.
    Zero,
}

/// The course of the learning rate over a phase, as `configs/default.toml` describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    Deit,
    Cosine,
    Poly,
    Isda,
    Steps,
}

/// The algorithm that updates the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimiser {
    AdamW,
    Sgd,
}

impl Config {
    /// Reads a config file, applies each `--set key=value`, and makes all checks that need no data.
    pub fn load(path: &Path, sets: &[String]) -> Result<Config> {
        let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
            ErrorKind::InvalidData => {
                usage!("{}: no config, because it is not text; check the order of the arguments", path.display())
            }
            _ => usage!("{}: cannot read the config: {error}", path.display()),
        })?;
        Self::parse(&text, sets).with_context(|| format!("in config {}", path.display()))
    }

    /// Like [`Config::load`], but from the text of a file.
    pub fn parse(text: &str, sets: &[String]) -> Result<Config> {
        let mut user: Table = text.parse().map_err(|e| not_toml(text, &e))?;
        for set in sets {
            lay_over(&mut user, parse_set(set)?);
        }
        let defaults = defaults_for(&user)?;
        check_keys(&user, &defaults)?;
        let read = |user: Table| Value::Table(over_defaults(&defaults, user)).try_into::<Config>();
        let config = read(user.clone()).map_err(|e| {
            unreadable(&user, &defaults, |one| read(one).err()).unwrap_or_else(|| usage!("{}", e.message()))
        })?;
        config.validate()?;
        Ok(config)
    }

    /// The complete config as TOML, including the keys that have their default. The run directory keeps this text.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a config is plain data")
    }

    /// This config with `epochs` epochs of fine-tuning in all, `before` of which were done before the extension.
    pub fn with_finetuning(mut self, epochs: usize, before: usize) -> Result<Config> {
        (self.finetune.epochs, self.finetune.epochs_before) = (epochs, before);
        self.validate()?;
        Ok(self)
    }
}

/// The defaults of every key. If the user's `model.family` names another family than ViT, that family's defaults replace the table
/// `[model]`. They also override any other keys that they contain.
fn defaults_for(user: &Table) -> Result<Table> {
    let mut defaults: Table = DEFAULTS.parse().expect("the embedded defaults are TOML");
    let named = user.get("model").and_then(|model| model.get("family")).and_then(Value::as_str);
    if let Some(name) = named {
        require!(
            family::names().contains(&name),
            "model.family = {name:?}: give one of {}",
            family::names().join(", ")
        );
        if let Some(own) = family::defaults(name) {
            defaults.remove("model");
            lay_over(&mut defaults, own);
        }
    }
    Ok(defaults)
}

/// The defaults, overridden by the user's tables. The table of each phase inherits the keys of `[train]`.
fn over_defaults(defaults: &Table, user: Table) -> Table {
    let mut all = defaults.clone();
    lay_over(&mut all, user);
    let Some(Value::Table(train)) = all.remove("train") else {
        unreachable!("the defaults have [train], and check_keys refuses another type");
    };
    for phase in PHASE_TABLES {
        let own = all.insert(phase.into(), Value::Table(train.clone()));
        if let (Some(Value::Table(own)), Some(Value::Table(merged))) = (own, all.get_mut(phase)) {
            lay_over(merged, own);
        }
    }
    all
}

/// The error for a file that is not TOML, in one line.
fn not_toml(text: &str, error: &toml::de::Error) -> anyhow::Error {
    let start = error.span().map_or(0, |span| span.start);
    let line = text.bytes().take(start).filter(|&byte| byte == b'\n').count() + 1;
    usage!("not valid TOML, line {line}: {}", error.message().replace('\n', "; "))
}
