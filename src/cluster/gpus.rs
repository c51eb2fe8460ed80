//! The checks of `incubate doctor` that concern GPUs: the driver, the devices, libtorch's CUDA, attention and NCCL.

use super::finding::{Finding, finding};
use crate::collective::nccl;
use crate::config::DeviceChoice;
use crate::device::{cuda, describe, loaded_library};
use crate::driver::Driver;
use crate::model::prove_attention;
use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

/// Checks the driver, the GPUs, libtorch's CUDA, attention and NCCL on this node. With run.device = "cpu" checks nothing. A node
/// without a driver passes, unless the config asks for GPUs or Slurm has given the job GPUs.
pub fn examine(choice: DeviceChoice) -> Vec<Finding> {
    let driver = match (choice, Driver::open()) {
        (DeviceChoice::Cpu, _) => return vec![finding("GPUs", Ok("not asked for (run.device = \"cpu\")".into()))],
        (DeviceChoice::Auto, Err(reason)) => {
            let given = as_many_as_slurm_gave(choice);
            return vec![finding("GPUs", given.map(|_| format!("none, computing on the CPU: {reason:#}")))];
        }
        (DeviceChoice::Cuda, Err(reason)) => {
            let cure = "run.device = \"cuda\" needs a GPU node, or set run.device = \"auto\"";
            return vec![finding("GPUs", Err(reason.context(cure)))];
        }
        (_, Ok(driver)) => driver,
    };
    let (major, minor) = driver.cuda_version();
    let gpus: Vec<String> = driver.gpus().iter().map(|gpu| format!("{} at {}", describe(gpu), gpu.address)).collect();
    vec![
        finding("driver", Ok(format!("NVIDIA, for CUDA up to {major}.{minor}"))),
        finding(
            "GPUs",
            as_many_as_slurm_gave(choice)
                .map(|_| if gpus.is_empty() { "none visible".into() } else { gpus.join("; ") }),
        ),
        finding("CUDA", cuda().map(|_| version()).context("run.device = \"auto\" computes on the CPU")),
        finding("attention", attention()),
        finding("NCCL", nccl()),
    ]
}

/// The version of CUDA in libtorch, as the text of a finding.
fn version() -> String {
    let number = tch::utils::version_cudart();
    format!("libtorch 2.11.0, built for CUDA {}.{}, computes on these GPUs", number / 1000, number % 1000 / 10)
}

/// Compares the number of GPUs that this process can use with the number that Slurm has given the job on this node.
///
/// # Errors
/// The process can use fewer GPUs than Slurm has given. Training would use only these few.
pub fn as_many_as_slurm_gave(choice: DeviceChoice) -> Result<String> {
    let given = std::env::var("SLURM_GPUS_ON_NODE").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let (seen, why) = match cuda() {
        _ if choice == DeviceChoice::Cpu || given == 0 => return Ok("none asked of Slurm".into()),
        Ok(driver) => (driver.gpus().len(), String::new()),
        Err(reason) => (0, format!(": {reason:#}")),
    };
    ensure!(
        seen >= given,
        "Slurm has given this job {given} GPU(s) on the node, and {seen} can be used{why}; start the program with the \
         driver's libraries in reach (in a container with --nv), without --gpus-per-task, or set run.device = \"cpu\""
    );
    Ok(format!("{seen} of {given}"))
}

/// Computes attention in bf16 as a ViT does, because the kernels of attention are the likeliest to be missing.
fn attention() -> Result<String> {
    let Ok(driver) = cuda() else { return Ok("not tried without CUDA".into()) };
    driver.make_current(0)?;
    prove_attention(Device::Cuda(0)).context(
        "attention does not work on this GPU; install torch 2.11.0 with all nvidia packages that it asks for, or set \
         run.device = \"cpu\"",
    )
}

/// Loads NCCL, and lets it sum over one GPU alone.
fn nccl() -> Result<String> {
    let version = nccl::version()?;
    let path = loaded_library("libnccl.so").map_or("?".into(), |path| path.display().to_string());
    let found = format!("NCCL {version} ({path})");
    let Ok(driver) = cuda() else { return Ok(format!("{found}, not tried without CUDA")) };
    driver.make_current(0)?;
    let mut values = Tensor::arange(1000, (Kind::Float, Device::Cuda(0)));
    nccl::sum_alone(&mut values).with_context(|| format!("{found} does not work"))?;
    let unchanged = values.to_device(Device::Cpu) == Tensor::arange(1000, (Kind::Float, Device::Cpu));
    ensure!(unchanged, "{found} gives a wrong sum; install another version");
    Ok(format!("{found}, a sum of one works"))
}
