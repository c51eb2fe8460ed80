//! What can be refused without data: each message names the key, the value and the cure.

use super::{Config, Data, Format, Model, Ranks, Slurm, Training};
use crate::require;
use anyhow::Result;

impl Config {
    pub(super) fn validate(&self) -> Result<()> {
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
        self.slurm.validate()?;
        for (name, phase) in self.phases() {
            phase.validate(name)?;
        }
        Ok(())
    }
}

impl Slurm {
    fn validate(&self) -> Result<()> {
        for (key, value) in [("nodes", self.nodes), ("ranks", self.ranks), ("cpus_per_rank", self.cpus_per_rank)] {
            require!(value >= 1, "slurm.{key} = 0: it must be at least 1");
        }
        require!(
            self.ranks >= self.nodes,
            "slurm.ranks = {} leaves some of slurm.nodes = {} without a rank; raise it",
            self.ranks,
            self.nodes
        );
        require!(
            ["USR1", "USR2"].contains(&self.signal.as_str()),
            "slurm.signal = {:?}: give USR2, or USR1 (which NCCL may use); TERM is how Slurm cancels",
            self.signal
        );
        let words = [
            &self.partition,
            &self.account,
            &self.qos,
            &self.constraint,
            &self.time,
            &self.time_meta,
            &self.time_finalize,
        ];
        require!(
            !words.into_iter().chain(&self.options).any(|word| word.contains(['\n', '\r', '\0'])),
            "slurm: a line break in an option of sbatch; write each option in one line"
        );
        Ok(())
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
        probability("data.color_jitter", self.color_jitter)?;
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
            self.pack_from.as_os_str().is_empty() || (self.format == Format::Packed && self.train_images > 0),
            "data.pack_from = {:?} needs data.format = \"packed\" and data.train_images: how many it will hold",
            self.pack_from.display()
        );
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
