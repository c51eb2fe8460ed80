//! The keys that change the results of a phase: its recipe.

use super::Config;
use super::overlay::flatten;

/// Keys that decide how, where or which phases run, but not the results, apart from rounding. There is an exception: some results
/// depend on the micro-batch, and the statistics of batch norm also on the number of replicas.
const EXECUTION_KEYS: [&str; 23] = [
    "run.name",
    "run.dir",
    "run.e2e",
    "run.dgl",
    "run.infopro",
    "run.device",
    "run.replicas",
    "run.threads",
    "run.workers",
    "run.micro_batch",
    "run.precision",
    "run.activation_checkpointing",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.log_steps",
    "run.preview_epochs",
    "run.export",
    "data.path",
    "segmentation.path",
    "segmentation.class_names",
    "detection.path",
    "data.pack_from",
    // This limit only decides when a run gives up.
    "data.bad_images",
];

/// Keys that are newer than the first artefacts, each by the end of its name and with its default. A recipe names such a key only
/// if its value differs from the default. So the recipes of older artefacts stay the same.
const LATER_KEYS: [(&str, &str); 13] = [
    (".epochs_before", "0"),
    ("module.start", "\"fresh\""),
    (".lr_drops", "[]"),
    (".optimiser", "\"adamw\""),
    (".decay_all", "false"),
    (".layer_decay", "1.0"),
    (".momentum", "0.9"),
    (".nesterov", "true"),
    ("segmentation.neck", "\"none\""),
    ("segmentation.test_scales", "[1.0]"),
    ("segmentation.test_flip", "false"),
    ("segmentation.norm_over", "\"micro_batch\""),
    ("data.crop_border", "\"zeros\""),
];

/// Whether recipes leave out a key. Such a key may change when a run is restarted.
fn changes_nothing(key: &str) -> bool {
    EXECUTION_KEYS.contains(&key) || key.starts_with("slurm.") || key.ends_with(".on")
}

impl Config {
    /// Every key, such as `meta.epochs`, with its value as TOML writes it.
    pub fn values(&self) -> Vec<(String, String)> {
        flatten(self)
    }

    /// The keys that change the result and differ between `self` and `other`, each with both values.
    pub fn differences(&self, other: &Config) -> Vec<String> {
        let (ours, theirs) = (flatten(self), flatten(other));
        ours.iter()
            .zip(&theirs)
            .filter(|((key, a), (_, b))| a != b && !changes_nothing(key))
            .map(|((key, a), (_, b))| format!("{key} ({b} there, {a} here)"))
            .collect()
    }

    /// The `key = value` lines of the given tables, with the keys that change the result. The recipe of an artefact is the hash of
    /// the seed and these lines.
    pub fn recipe(&self, tables: &[&str]) -> String {
        flatten(self)
            .into_iter()
            .filter(|(key, _)| tables.contains(&key.split('.').next().unwrap_or_default()) && !changes_nothing(key))
            .filter(|(key, value)| !LATER_KEYS.iter().any(|(later, default)| key.ends_with(later) && value == default))
            .map(|(key, value)| format!("{key} = {value}\n"))
            .collect()
    }
}
