//! Loads the config that the command's arguments describe, and sets libtorch up before its first use.

use super::overrides::{ConfigArgs, Overrides};
use crate::config::{Config, Precision};
use crate::device::{self, Devices, OnNode};
use crate::launcher::{cores_of_this_rank, rank_on_this_node, ranks_on_this_node};
use crate::{data, thread, usage};
use anyhow::Result;
use rayon::ThreadPoolBuilder;
use std::path::{Path, PathBuf};

impl ConfigArgs {
    pub fn load(&self) -> Result<Config> {
        self.overrides.load(&self.config)
    }
}

impl Overrides {
    pub fn load(&self, path: &Path) -> Result<Config> {
        let mut config = Config::load(path, &self.sets)?;
        if let Some(dir) = &self.run_dir {
            config.run.dir = dir.clone();
        }
        start_libtorch(&config);
        Ok(config)
    }

    /// The config of the images to pack, and the folder for the pack. `source` is a config file or a folder of images.
    pub fn packing(&self, source: &Path, into: Option<&Path>) -> Result<(Config, PathBuf)> {
        if let Some(into) = into {
            return Ok((self.source(source)?, into.into()));
        }
        let data = if source.is_dir() { None } else { Some(self.load(source)?.data) };
        match data.filter(|data| !data.pack_from.as_os_str().is_empty()) {
            Some(data) => Ok((self.source(&data.pack_from)?, data.path)),
            None => Err(usage!(
                "{}: say where to write, `incubate pack SOURCE INTO`, or give a config with data.pack_from",
                source.display()
            )),
        }
    }

    /// The config for a source of images. `path` is a config file, or a folder whose files show the format of the source.
    fn source(&self, path: &Path) -> Result<Config> {
        if !path.is_dir() {
            return self.load(path);
        }
        let format = data::format_of(path).ok_or_else(|| {
            usage!(
                "{}: neither train/CLASS/… nor train-*.tar nor train-*.h5 is in it; give a config that says its data.format",
                path.display()
            )
        })?;
        let mut config = Config::parse("", &self.sets)?;
        (config.data.format, config.data.path) = (format, path.into());
        // If the user gives no run directory, the index of the images is not written to a file.
        config.run.dir = self.run_dir.clone().unwrap_or_default();
        Ok(config)
    }
}

/// Sets libtorch up before it is first used. CUDA must be loaded before any call of libtorch.
pub fn start_libtorch(config: &Config) {
    // Count the cores before any thread is pinned, because a pinned thread sees fewer cores.
    cores_of_this_rank();
    device::load(config.run.device);
    tch::set_num_interop_threads(1);
    tch::set_num_threads(threads(config) as i32);
}

/// Starts rayon's global threads, which compute checksums and draw fresh weights, among other work. The threads start early,
/// because training may later take the memory that their stacks need.
///
/// # Errors
/// A usage error if a thread cannot be started.
pub fn start_threads() -> Result<()> {
    ThreadPoolBuilder::new().build_global().map_err(|error| thread::cannot_start(&error))
}

/// The number of compute threads of this rank, which its replicas share.
pub fn threads(config: &Config) -> usize {
    match config.run.threads {
        0 => cores_of_this_rank(),
        n => n,
    }
}

/// Finds the devices of this rank, and divides its threads among its replicas. Allows TF32 on GPUs if the config asks for it.
pub fn devices(config: &Config) -> Result<Devices> {
    let ranks = ranks_on_this_node().max(1);
    let on_node = OnNode { rank: rank_on_this_node().min(ranks - 1), ranks };
    let devices = Devices::of_rank(config.run.device, config.run.replicas, on_node)?;
    if devices.are_gpus() && config.run.precision == Precision::Tf32 {
        device::tf32::allow()?;
    }
    tch::set_num_threads((threads(config) / devices.replicas()).max(1) as i32);
    Ok(devices)
}
