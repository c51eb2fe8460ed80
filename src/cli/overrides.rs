//! The arguments that name a config and override its keys.

use clap::Args;
use std::path::PathBuf;

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
