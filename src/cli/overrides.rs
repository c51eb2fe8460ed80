//! The arguments that name a config and override its keys.

use crate::pipeline::extend;
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// The TOML file; configs/default.toml lists the keys
    pub config: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
}

/// The arguments of the commands that train, and of `submit`.
#[derive(Debug, Clone, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Continue although the images or classes have changed since the run was started; its artefacts record the change
    #[arg(long)]
    pub accept_data: bool,
    /// Extend a finished fine-tuning to N epochs in all: --extend finetune.epochs=N
    #[arg(long, value_name = "KEY=VALUE", value_parser = extend::parse)]
    pub extend: Option<usize>,
}

impl TrainArgs {
    /// The same arguments with one more `--set` at the end, which overrides earlier values of its key.
    pub fn with(&self, set: &str) -> TrainArgs {
        let mut args = self.clone();
        args.config.overrides.sets.push(set.into());
        args
    }
}

#[derive(Debug, Clone, Args)]
pub struct Overrides {
    /// Override a config key, such as --set module.epochs=10; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Override run.dir
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}
