//! Exactly what the TOML says, validated. What it means is `plan.rs`.
//!
//! `configs/default.toml` holds every key with its default and comment; a user's file and `--set` are laid over it, so
//! a key or type that the defaults do not have is a mistake and is refused by name. Phase tables inherit `[train]`.

use crate::{require, usage};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The commented list of every key with its default.
pub const DEFAULTS: &str = include_str!("../configs/default.toml");
/// The tables that inherit every key of `[train]`.
pub const PHASE_TABLES: [&str; 4] = ["meta", "module", "finetune", "e2e"];

/// Keys that do not change what is computed (beyond rounding): they may differ when a run is started again.
const EXECUTION_KEYS: [&str; 9] = [
    "run.name",
    "run.dir",
    "run.threads",
    "run.workers",
    "run.micro_batch",
    "run.checkpoint_steps",
    "run.keep_checkpoints",
    "run.log_steps",
    "data.path",
];

/// One validated config file. Every key is documented in `configs/default.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub run: Run,
    pub model: Model,
    pub data: Data,
    pub meta: Training,
    pub module: Training,
    pub finetune: Training,
    pub e2e: Training,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub name: String,
    pub dir: PathBuf,
    pub seed: u64,
    pub e2e: bool,
    pub threads: usize,
    pub workers: usize,
    pub micro_batch: usize,
    pub checkpoint_steps: u64,
    pub keep_checkpoints: usize,
    pub log_steps: u64,
    pub export: Vec<ExportFormat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    Timm,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub image_size: usize,
    pub channels: usize,
    pub classes: usize,
    pub patch_size: usize,
    pub width: usize,
    pub heads: usize,
    pub mlp_ratio: f64,
    pub depths: Vec<usize>,
    pub meta_depth: usize,
    pub qkv_bias: bool,
    pub layer_norm_eps: f64,
    pub dropout: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub format: Format,
    pub path: PathBuf,
    pub train_images: usize,
    pub test_images: usize,
    pub train_fraction: f64,
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
    pub crop_padding: usize,
    pub flip: f64,
    pub erase: f64,
    pub repeats: usize,
    pub mixup: f64,
    pub cutmix: f64,
    pub switch_probability: f64,
    pub label_smoothing: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Idx,
    Cifar10,
    Cifar100,
    Shapes,
    Folder,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    pub on: Ranks,
    pub epochs: usize,
    pub global_batch: usize,
    pub base_lr: f64,
    pub min_lr: f64,
    pub warmup_lr: f64,
    pub warmup_epochs: usize,
    pub schedule: Schedule,
    pub weight_decay: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub clip_grad: f64,
    pub drop_path: f64,
    pub ema: f64,
    pub eval_epochs: usize,
}

/// Which ranks train a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ranks {
    World,
    Group,
    Zero,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    Deit,
    Cosine,
}

impl Config {
    /// Reads a config file, lays `--set key=value` over it and checks everything that can be checked without data.
    pub fn load(path: &Path, sets: &[String]) -> Result<Config> {
        let text =
            std::fs::read_to_string(path).map_err(|e| usage!("{}: cannot read the config: {e}", path.display()))?;
        Self::parse(&text, sets).with_context(|| format!("in config {}", path.display()))
    }

    /// As [`Config::load`], from text.
    pub fn parse(text: &str, sets: &[String]) -> Result<Config> {
        let defaults: Table = DEFAULTS.parse().expect("the embedded defaults are TOML");
        let mut user: Table = text.parse().map_err(|e| usage!("not valid TOML: {e}"))?;
        for set in sets {
            lay_over(&mut user, parse_set(set)?);
        }
        check_keys(&user, &defaults)?;
        let mut all = defaults;
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
        let config: Config = Value::Table(all).try_into().map_err(|e| usage!("{e}"))?;
        config.validate()?;
        Ok(config)
    }

    /// The resolved config as TOML, as it is kept in the run directory.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a config is plain data")
    }

    /// The keys in which `self` and `other` differ, of those that change what is computed.
    pub fn differences(&self, other: &Config) -> Vec<String> {
        let (ours, theirs) = (flatten(self), flatten(other));
        ours.iter()
            .zip(&theirs)
            .filter(|((key, a), (_, b))| a != b && !EXECUTION_KEYS.contains(&key.as_str()))
            .map(|((key, a), (_, b))| format!("{key} ({b} there, {a} here)"))
            .collect()
    }

    /// The `key = value` lines of the given tables that change what is computed: what a recipe hash is made of.
    pub fn recipe(&self, tables: &[&str]) -> String {
        flatten(self)
            .into_iter()
            .filter(|(key, _)| {
                let table = key.split('.').next().unwrap_or_default();
                // `on` is where a phase runs; run.e2e and run.export choose phases, not what one computes.
                tables.contains(&table)
                    && !EXECUTION_KEYS.contains(&key.as_str())
                    && !["run.e2e", "run.export"].contains(&key.as_str())
                    && !key.ends_with(".on")
            })
            .map(|(key, value)| format!("{key} = {value}\n"))
            .collect()
    }

    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.data.validate(&self.model)?;
        let run = &self.run;
        require!(run.workers >= 1, "run.workers = 0: at least one data worker is needed; set 1");
        require!(
            run.micro_batch >= 2 && run.micro_batch.is_multiple_of(2),
            "run.micro_batch = {}: it must be even (samples are mixed in pairs); try {}",
            run.micro_batch,
            (run.micro_batch + 1).max(2)
        );
        require!(run.log_steps >= 1, "run.log_steps = 0: set at least 1");
        require!(
            run.keep_checkpoints >= 1,
            "run.keep_checkpoints = 0: at least one must be kept to resume from; set 2"
        );
        require!(
            !run.name.is_empty() && !run.name.contains(['/', '\0', '\n']),
            "run.name = {:?}: give a name without slashes or line breaks",
            run.name
        );
        for (name, phase) in self.phases() {
            phase.validate(name)?;
        }
        Ok(())
    }

    /// The four phase tables with their names.
    pub fn phases(&self) -> [(&'static str, &Training); 4] {
        [("meta", &self.meta), ("module", &self.module), ("finetune", &self.finetune), ("e2e", &self.e2e)]
    }
}

impl Model {
    /// Checks what every network needs: sizes that divide each other, at least one block per stage.
    pub fn validate(&self) -> Result<()> {
        for (key, value) in [
            ("image_size", self.image_size),
            ("channels", self.channels),
            ("classes", self.classes),
            ("patch_size", self.patch_size),
            ("width", self.width),
            ("heads", self.heads),
            ("meta_depth", self.meta_depth),
        ] {
            require!(value >= 1, "model.{key} = 0: it must be at least 1");
            require!(value <= 1 << 20, "model.{key} = {value}: larger than any model this program can train");
        }
        require!(
            self.image_size.is_multiple_of(self.patch_size),
            "model.image_size = {} is not a multiple of model.patch_size = {}; try image_size = {}",
            self.image_size,
            self.patch_size,
            self.image_size.div_ceil(self.patch_size) * self.patch_size
        );
        require!(
            self.width.is_multiple_of(self.heads),
            "model.width = {} is not divisible by model.heads = {}; try width = {}",
            self.width,
            self.heads,
            self.width.div_ceil(self.heads) * self.heads
        );
        require!(!self.depths.is_empty(), "model.depths is empty: give the blocks of each stage, such as [3, 3, 3, 3]");
        require!(
            self.depths.iter().all(|&d| (1..=10_000).contains(&d)) && self.depths.len() <= 10_000,
            "model.depths = {:?}: every stage needs between 1 and 10000 blocks",
            self.depths
        );
        let hidden = self.width as f64 * self.mlp_ratio;
        require!(
            hidden >= 1.0 && hidden.fract() == 0.0 && self.mlp_ratio <= 1024.0,
            "model.mlp_ratio = {} times model.width = {} is not a whole number; try mlp_ratio = 4.0",
            self.mlp_ratio,
            self.width
        );
        require!(self.layer_norm_eps > 0.0, "model.layer_norm_eps = {}: it must be positive", self.layer_norm_eps);
        probability("model.dropout", self.dropout)
    }

    /// Hidden units of the MLP.
    pub fn hidden(&self) -> usize {
        (self.width as f64 * self.mlp_ratio) as usize
    }

    /// Patches plus the class token.
    pub fn tokens(&self) -> usize {
        (self.image_size / self.patch_size).pow(2) + 1
    }

    /// K, the number of stages.
    pub fn stages(&self) -> usize {
        self.depths.len()
    }
}

impl Data {
    fn validate(&self, model: &Model) -> Result<()> {
        for (key, values) in [("mean", &self.mean), ("std", &self.std)] {
            require!(
                values.len() == model.channels,
                "data.{key} has {} values but model.channels = {}; give one per channel",
                values.len(),
                model.channels
            );
        }
        require!(self.std.iter().all(|&s| s > 0.0), "data.std = {:?}: every value must be positive", self.std);
        require!(
            self.train_fraction > 0.0 && self.train_fraction <= 1.0,
            "data.train_fraction = {}: give a share in (0, 1]",
            self.train_fraction
        );
        require!(self.repeats >= 1, "data.repeats = 0: 1 turns repeated augmentation off");
        for (key, value) in [("mixup", self.mixup), ("cutmix", self.cutmix)] {
            require!(value >= 0.0 && value.is_finite(), "data.{key} = {value}: give 0 (off) or a positive number");
        }
        for (key, value) in [
            ("flip", self.flip),
            ("erase", self.erase),
            ("switch_probability", self.switch_probability),
            ("label_smoothing", self.label_smoothing),
        ] {
            probability(&format!("data.{key}"), value)?;
        }
        require!(
            self.format != Format::Shapes || (self.train_images > 0 && self.test_images > 0),
            "data.format = \"shapes\" needs data.train_images and data.test_images: how many to draw, such as 6000 and 1000"
        );
        Ok(())
    }
}

impl Training {
    fn validate(&self, phase: &str) -> Result<()> {
        require!(self.epochs >= 1, "{phase}.epochs = 0: at least one epoch is needed");
        require!(
            (phase == "module") == (self.on == Ranks::Group),
            "{phase}.on = {:?}: modules train on a \"group\", every other phase on the \"world\" or on \"zero\"",
            format!("{:?}", self.on).to_lowercase()
        );
        require!(
            self.global_batch >= 2 && self.global_batch.is_multiple_of(2),
            "{phase}.global_batch = {}: it must be even (samples are mixed in pairs); try {}",
            self.global_batch,
            (self.global_batch + 1).max(2)
        );
        for (key, value) in [
            ("base_lr", self.base_lr),
            ("min_lr", self.min_lr),
            ("warmup_lr", self.warmup_lr),
            ("weight_decay", self.weight_decay),
            ("clip_grad", self.clip_grad),
        ] {
            require!(value >= 0.0 && value.is_finite(), "{phase}.{key} = {value}: it must be a number of at least 0");
        }
        require!(self.eps > 0.0, "{phase}.eps = {}: it must be positive", self.eps);
        for beta in self.betas {
            require!((0.0..1.0).contains(&beta), "{phase}.betas = {:?}: both must be in [0, 1)", self.betas);
        }
        require!(
            self.warmup_epochs < self.epochs || self.warmup_epochs == 0,
            "{phase}.warmup_epochs = {} leaves nothing of {phase}.epochs = {}; lower it",
            self.warmup_epochs,
            self.epochs
        );
        require!((0.0..1.0).contains(&self.drop_path), "{phase}.drop_path = {}: it must be in [0, 1)", self.drop_path);
        require!((0.0..1.0).contains(&self.ema), "{phase}.ema = {}: it must be in [0, 1)", self.ema);
        Ok(())
    }
}

fn probability(key: &str, value: f64) -> Result<()> {
    require!((0.0..=1.0).contains(&value), "{key} = {value}: a probability is between 0 and 1");
    Ok(())
}

/// `key.path=value` as a nested table; the value is TOML, or else a string.
fn parse_set(set: &str) -> Result<Table> {
    let (key, text) =
        set.split_once('=').ok_or_else(|| usage!("--set {set}: write key=value, such as --set module.epochs=10"))?;
    let value = format!("v = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(text.into()));
    Ok(key.trim().rsplit('.').fold(value, |inner, part| Value::Table(Table::from_iter([(part.to_string(), inner)]))))
        .and_then(|v| match v {
            Value::Table(table) => Ok(table),
            _ => Err(usage!("--set {set}: the key is missing")),
        })
}

/// Lays `over` on `base`: tables merge, everything else replaces.
fn lay_over(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => lay_over(inner, value),
            // `lr = 1` is a float wherever the default is one.
            (Some(Value::Float(slot)), Value::Integer(value)) => *slot = value as f64,
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Refuses keys and types that the defaults do not have.
fn check_keys(user: &Table, defaults: &Table) -> Result<()> {
    for (name, value) in user {
        let Some(known) = defaults.get(name).and_then(Value::as_table) else {
            return Err(usage!("unknown key `{name}`{}", suggestion(name, defaults.keys())));
        };
        let Some(table) = value.as_table() else {
            return Err(usage!("`{name}` is a table: write [{name}] and its keys below it"));
        };
        // A phase table may set any key of [train].
        let known =
            if PHASE_TABLES.contains(&name.as_str()) { &defaults["train"] } else { &Value::Table(known.clone()) };
        let known = known.as_table().expect("[train] is a table");
        for (key, value) in table {
            let Some(default) = known.get(key) else {
                return Err(usage!("unknown key `{name}.{key}`{}", suggestion(key, known.keys())));
            };
            let same = default.type_str() == value.type_str() || (default.is_float() && value.is_integer());
            require!(
                same,
                "`{name}.{key} = {value}` is a {}, but a {} is expected, such as {default}",
                value.type_str(),
                default.type_str()
            );
        }
    }
    Ok(())
}

/// «; did you mean `epochs`?» for the nearest known key, or the list of known keys.
fn suggestion<'a>(wrong: &str, known: impl Iterator<Item = &'a String>) -> String {
    let known: Vec<&String> = known.collect();
    match known.iter().map(|k| (distance(wrong, k), k)).min() {
        Some((d, key)) if d <= 2.max(wrong.len() / 3) => format!("; did you mean `{key}`?"),
        _ => format!("; known here: {}", known.iter().map(|k| k.as_str()).collect::<Vec<_>>().join(", ")),
    }
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

fn flatten(config: &Config) -> Vec<(String, String)> {
    let value = Value::try_from(config).expect("a config is plain data");
    let tables = value.as_table().expect("a config is a table");
    tables
        .iter()
        .flat_map(|(name, table)| {
            let table = table.as_table().expect("a config is a table of tables");
            table.iter().map(move |(key, value)| (format!("{name}.{key}"), value.to_string()))
        })
        .collect()
}
