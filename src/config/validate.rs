//! Checks of a config that need no data. Each error names the key, its value and the cure.

use super::{Border, Config, Data, Format, ModuleStart, Policy, Ranks, Schedule, Slurm, Training};
use crate::bounds::{at_most, positive, probability};
use crate::family::Model;
use crate::require;
use anyhow::{Context, Result};

/// The largest number of bytes that drawn images may take in memory.
const MOST_DRAWN: usize = 256 << 30;

impl Config {
    pub(super) fn validate(&self) -> Result<()> {
        // Only a model that `Config::of_task` derives from this config may have no classes.
        require!(self.model.classes() >= 1, "model.classes = 0: it must be at least 1");
        self.model.validate()?;
        self.data.validate(&self.model)?;
        let run = &self.run;
        for (key, value, most) in [
            ("workers", run.workers, 4096),
            ("replicas", run.replicas, 1024),
            ("threads", run.threads, 4096),
            ("keep_checkpoints", run.keep_checkpoints, 1_000_000),
        ] {
            at_most(&format!("run.{key}"), value, most)?;
        }
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
        for format in &run.export {
            format.check_takes(&self.model).context("run.export")?;
        }
        self.slurm.validate()?;
        for (name, phase) in self.phases() {
            phase.validate(name)?;
            require!(
                phase.layer_decay == 1.0 || self.model.has_layers(),
                "{name}.layer_decay = {}: the learning rates of this model.family are the same in all layers; leave it out",
                phase.layer_decay
            );
        }
        self.infopro.validate(&self.data)?;
        require!(
            self.module.start == ModuleStart::Fresh || self.model.can_grow(),
            "module.start = \"meta\": the stages of this model.family cannot start as those of the meta model; set \"fresh\""
        );
        if self.segmentation.has_images() {
            self.segment.validate("segment")?;
        }
        self.segmentation.validate(&self.model)?;
        if self.detection.has_images() {
            self.detect.validate("detect")?;
        }
        self.detection.validate(&self.model)
    }
}

impl Slurm {
    fn validate(&self) -> Result<()> {
        for (key, value) in [("nodes", self.nodes), ("ranks", self.ranks), ("cpus_per_rank", self.cpus_per_rank)] {
            require!(value >= 1, "slurm.{key} = 0: it must be at least 1");
        }
        require!(
            self.ranks >= self.nodes,
            "slurm.ranks = {} leaves some of slurm.nodes = {} without a rank; raise slurm.ranks",
            self.ranks,
            self.nodes
        );
        require!(
            ["USR1", "USR2"].contains(&self.signal.as_str()),
            "slurm.signal = {:?}: give USR2, or USR1 (which NCCL may use); TERM is the signal with which Slurm cancels a job",
            self.signal
        );
        for (key, text) in self.sbatch_options() {
            require!(
                !text.chars().any(char::is_control),
                "{key} = {text:?}: an option of sbatch cannot hold a line break or another control character; take it out"
            );
        }
        // A text of `slurm.setup` may hold several lines of shell commands, so line breaks and tabs are allowed.
        for line in &self.setup {
            let text = line.replace(['\n', '\t'], "");
            require!(
                !text.chars().any(char::is_control),
                "slurm.setup = {line:?}: it holds a control character; take it out"
            );
        }
        Ok(())
    }

    /// The texts that become options of sbatch, each with its key. In a script each option has a line of its own.
    pub fn sbatch_options(&self) -> Vec<(&'static str, &str)> {
        let named = [
            ("slurm.partition", &self.partition),
            ("slurm.account", &self.account),
            ("slurm.qos", &self.qos),
            ("slurm.constraint", &self.constraint),
            ("slurm.time", &self.time),
            ("slurm.time_meta", &self.time_meta),
            ("slurm.time_finalize", &self.time_finalize),
            ("slurm.signal", &self.signal),
        ];
        let options = self.options.iter().map(|option| ("slurm.options", option));
        named.into_iter().chain(options).map(|(key, text)| (key, text.as_str())).collect()
    }
}

impl Data {
    fn validate(&self, model: &Model) -> Result<()> {
        self.validate_channels(model)?;
        self.validate_amounts(model)?;
        self.validate_augmentation()?;
        self.validate_source(model)
    }

    fn validate_channels(&self, model: &Model) -> Result<()> {
        require!(
            [1, 3].contains(&model.channels()),
            "model.channels = {}: images have 1 channel (gray) or 3 (red, green, blue)",
            model.channels()
        );
        for (key, values) in [("mean", &self.mean), ("std", &self.std)] {
            require!(
                values.len() == model.channels(),
                "data.{key} has {} values but model.channels = {}; give one per channel",
                values.len(),
                model.channels()
            );
        }
        require!(
            self.mean.iter().all(|mean| mean.is_finite()),
            "data.mean = {:?}: give each channel's mean as a number, such as 0.5",
            self.mean
        );
        require!(
            self.std.iter().all(|&std| std > 0.0 && std.is_finite()),
            "data.std = {:?}: every value must be a positive number, such as 0.5",
            self.std
        );
        Ok(())
    }

    fn validate_amounts(&self, model: &Model) -> Result<()> {
        for (key, value, most) in [
            ("train_images", self.train_images, 1 << 32),
            ("test_images", self.test_images, 1 << 32),
            ("repeats", self.repeats, 1000),
            ("crop_padding", self.crop_padding, model.image_size()),
        ] {
            at_most(&format!("data.{key}"), value, most)?;
        }
        require!(
            self.crop_border == Border::Zeros || self.crop_padding < model.image_size(),
            "data.crop_padding = {}: with crop_border = \"reflect\" it must be less than model.image_size = {}",
            self.crop_padding,
            model.image_size()
        );
        require!(
            self.train_fraction > 0.0 && self.train_fraction <= 1.0,
            "data.train_fraction = {}: give a share in (0, 1]",
            self.train_fraction
        );
        Ok(())
    }

    fn validate_augmentation(&self) -> Result<()> {
        for (key, [low, high], most) in
            [("crop_scale", self.crop_scale, 1.0), ("crop_ratio", self.crop_ratio, f64::MAX)]
        {
            require!(
                low > 0.0 && low <= high && high <= most,
                "data.{key} = [{low}, {high}]: give a range of positive numbers, the smaller one first"
            );
        }
        require!(
            self.crop_percent > 0.0 && self.crop_percent <= 1.0,
            "data.crop_percent = {}: give a share in (0, 1], such as 0.875",
            self.crop_percent
        );
        Policy::parse(&self.auto_augment)?;
        probability("data.color_jitter", self.color_jitter)?;
        require!(self.repeats >= 1, "data.repeats = 0: set at least 1; 1 turns repeated augmentation off");
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
        Ok(())
    }

    /// Checks the numbers of images that a config promises to pack or to draw.
    fn validate_source(&self, model: &Model) -> Result<()> {
        require!(
            self.pack_from.as_os_str().is_empty() || (self.format == Format::Packed && self.train_images > 0),
            "data.pack_from = {:?} needs data.format = \"packed\" and data.train_images, the number of images that it will hold",
            self.pack_from.display()
        );
        require!(
            self.format != Format::Shapes || (self.train_images > 0 && self.test_images > 0),
            "data.format = \"shapes\" needs data.train_images and data.test_images, the numbers of images to draw, such as 6000 and 1000"
        );
        let used = (self.train_images as f64 * self.train_fraction).round();
        require!(
            self.train_images == 0 || used >= 2.0,
            "data.train_images = {} with data.train_fraction = {} leaves {used}: at least 2 are needed, as samples are mixed \
             in pairs",
            self.train_images,
            self.train_fraction
        );
        let bytes = (self.train_images + self.test_images).saturating_mul(model.channels() * model.image_size().pow(2));
        require!(
            self.format != Format::Shapes || bytes <= MOST_DRAWN,
            "data.train_images = {} and data.test_images = {}: drawn images are kept in memory, and these take {} GiB; lower them",
            self.train_images,
            self.test_images,
            bytes >> 30
        );
        Ok(())
    }
}

impl Training {
    fn validate(&self, phase: &str) -> Result<()> {
        require!(self.epochs >= 1, "{phase}.epochs = 0: at least one epoch is needed");
        at_most(&format!("{phase}.epochs"), self.epochs, 1_000_000)?;
        at_most(&format!("{phase}.global_batch"), self.global_batch, 1 << 24)?;
        require!(
            (phase == "module") == (self.on == Ranks::Group),
            "{phase}.on = {:?}: modules train on a \"group\", every other phase on the \"world\" or on \"zero\"",
            format!("{:?}", self.on).to_lowercase()
        );
        require!(
            self.global_batch >= 2 && self.global_batch.is_multiple_of(2),
            "{phase}.global_batch = {}: it must be even and at least 2 (samples are mixed in pairs); try {}",
            self.global_batch,
            (self.global_batch + 1).max(2)
        );
        self.validate_rates(phase)?;
        positive(&format!("{phase}.eps"), self.eps, 1e-8)?;
        for beta in self.betas {
            require!((0.0..1.0).contains(&beta), "{phase}.betas = {:?}: both must be in [0, 1)", self.betas);
        }
        let before = self.epochs_before;
        require!(
            before == 0 || phase == "finetune" && before < self.epochs,
            "{phase}.epochs_before = {before}: `--extend finetune.epochs=N` sets this key; leave it out"
        );
        let of = if before > 0 { format!(" without the {before} before") } else { String::new() };
        require!(
            self.warmup_epochs < self.epochs - before || self.warmup_epochs == 0,
            "{phase}.warmup_epochs = {} must be less than {phase}.epochs = {}{of}; lower the former",
            self.warmup_epochs,
            self.epochs
        );
        require!((0.0..1.0).contains(&self.drop_path), "{phase}.drop_path = {}: it must be in [0, 1)", self.drop_path);
        require!((0.0..1.0).contains(&self.ema), "{phase}.ema = {}: it must be in [0, 1)", self.ema);
        Ok(())
    }

    /// Checks the learning rates, and the other numbers that decide how a step changes the weights.
    fn validate_rates(&self, phase: &str) -> Result<()> {
        for (key, value) in [
            ("base_lr", self.base_lr),
            ("min_lr", self.min_lr),
            ("warmup_lr", self.warmup_lr),
            ("weight_decay", self.weight_decay),
            ("clip_grad", self.clip_grad),
        ] {
            require!(value >= 0.0 && value.is_finite(), "{phase}.{key} = {value}: it must be a number of at least 0");
        }
        require!(
            (0.0..1.0).contains(&self.momentum),
            "{phase}.momentum = {}: it must be in [0, 1), such as 0.9",
            self.momentum
        );
        require!(
            self.lr_drops.is_sorted() && self.lr_drops.iter().all(|&epoch| (1..self.epochs).contains(&epoch)),
            "{phase}.lr_drops = {:?}: give rising epochs from 1 to {}, after which the learning rate falls",
            self.lr_drops,
            self.epochs.saturating_sub(1)
        );
        require!(
            self.schedule != Schedule::Steps || !self.lr_drops.is_empty(),
            "{phase}.schedule = \"steps\" needs {phase}.lr_drops, such as [{}, {}]",
            self.epochs / 2,
            self.epochs * 3 / 4
        );
        require!(
            self.layer_decay > 0.0 && self.layer_decay <= 1.0,
            "{phase}.layer_decay = {}: it must be above 0 and at most 1, such as 0.75",
            self.layer_decay
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn only_a_start_from_the_meta_model_is_part_of_a_recipe_and_only_if_the_family_can_grow() {
        let recipe = |set: &str| Config::parse("", &[set.to_string()]).unwrap().recipe(&["module"]);
        assert!(!recipe("module.start=fresh").contains("start"));
        assert!(recipe("module.start=meta").contains("module.start = \"meta\"\n"));
        let toy = ["model.family=toy".to_string(), "module.start=meta".to_string()];
        let error = Config::parse("", &toy).unwrap_err().to_string();
        assert!(error.contains("module.start = \"meta\"") && error.contains("set \"fresh\""), "{error}");
        let error = Config::parse("", &["module.start=deep".to_string()]).unwrap_err().to_string();
        assert!(error.contains("module.start") && error.contains("`meta`"), "{error}");
        let error = Config::parse("", &["meta.start=meta".to_string()]).unwrap_err().to_string();
        assert!(error.contains("unknown key `meta.start`"), "{error}");
    }
}
