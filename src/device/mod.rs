//! The devices of this rank: its share of the node's GPUs, or the CPU.
//!
//! The program is not linked with CUDA. If the config allows GPUs and the node has an NVIDIA driver, the program loads libtorch's
//! CUDA library at the start, because this library must register its backends before the first call of libtorch. So one binary
//! serves login nodes, CPU nodes and GPU nodes.

mod cores;
pub mod later;
mod libraries;
pub mod memory;
mod pool;
pub mod tf32;

use crate::config::{DeviceChoice, Precision};
pub use crate::driver::cuda;
use crate::driver::{CUDA, Driver, Gpu};
use crate::libtorch::{Kernel, allow_attention};
use crate::plan::gpus::GpuModel;
use crate::usage;
use anyhow::{Context, Result, anyhow, ensure};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::Device;

/// If this environment variable is set, the replicas of a rank may share a GPU, and gradients are summed in host memory. Tests set
/// the variable to run several replicas on one GPU.
const SHARED_GPU: &str = "INCUBATE_TEST_SHARED_GPU";

/// The number of a rank on its node, and the number of ranks on the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnNode {
    pub rank: usize,
    pub ranks: usize,
}

/// The devices of this rank, one for each replica. A thread drives each replica.
#[derive(Debug, Clone)]
pub struct Devices {
    list: Vec<Device>,
    /// Whether other ranks or replicas may compute on the same GPU.
    shared: bool,
    /// Why the device is the CPU. None if the devices are GPUs, or if the config asks for the CPU.
    reason: Option<String>,
    /// The cores on which the process may run.
    cores: BTreeSet<usize>,
}

/// Loads CUDA if the config allows GPUs and the node has GPUs. Must run before any other call of libtorch. Loading returns no
/// error, because planning and submitting need no GPU. If the config asks for GPUs, [`Devices::of_rank`] returns the error.
pub fn load(choice: DeviceChoice) {
    if choice != DeviceChoice::Cpu {
        CUDA.get_or_init(|| {
            let driver = Driver::open().map_err(|error| format!("{error:#}"))?;
            load_cuda(driver).map_err(|error| {
                if choice == DeviceChoice::Auto {
                    log::warn!("this node's GPUs are not used: {error:#}");
                }
                format!("{error:#}")
            })
        });
    }
}

/// Loads libtorch's CUDA part for the GPUs of this driver.
fn load_cuda(driver: Driver) -> Result<Driver> {
    ensure!(
        !driver.gpus().is_empty(),
        "the NVIDIA driver shows no GPU{}; ask for one (under Slurm: --gres=gpu:1)",
        std::env::var("CUDA_VISIBLE_DEVICES").map_or(String::new(), |v| format!(" (CUDA_VISIBLE_DEVICES={v})"))
    );
    load_libtorch_cuda().map_err(|error| {
        anyhow!(
            "there is a GPU, but libtorch's CUDA part cannot be loaded ({error:#}); install the whole of torch 2.11.0 (pip \
             install torch==2.11.0) and point LIBTORCH at its folder `torch`"
        )
    })?;
    let seen = tch::Cuda::device_count();
    ensure!(
        seen as usize == driver.gpus().len(),
        "the driver shows {} GPU(s), libtorch {seen}: the driver, for CUDA up to {}.{}, may be older than libtorch's CUDA; \
         update it, or point LIBTORCH at a libtorch 2.11.0 for that CUDA",
        driver.gpus().len(),
        driver.cuda_version().0,
        driver.cuda_version().1
    );
    // cuDNN's attention is not allowed, because it builds a plan for each shape and thread, and each plan takes half a second.
    allow_attention(&[Kernel::Flash, Kernel::Efficient]);
    Ok(driver)
}

/// Loads the library with which libtorch computes on GPUs. Before that, loads NVRTC, which compiles kernels at run time. libtorch
/// opens NVRTC and its built-in functions by name later, and the search path of that time may not lead to them.
fn load_libtorch_cuda() -> Result<()> {
    let folders = libraries::searched_by("libtorch_cpu.so")?;
    for compiler in ["libnvrtc-builtins.so", "libnvrtc.so"] {
        // Without NVRTC only some kernels are missing, so a missing file is no error.
        libraries::find(&folders, compiler).map_or(Ok(()), |path| libraries::load(&path))?;
    }
    let library =
        libraries::find(&folders, "libtorch_cuda.so").context("there is no libtorch_cuda.so beside libtorch_cpu.so")?;
    libraries::load(&library)
}

/// The real path of a library that this process has loaded. `name_start` is the start of its file name.
pub fn loaded_library(name_start: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| Some(Path::new(&line[line.find('/')?..])));
    paths
        .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name_start)))
        .map(Path::to_path_buf)
}

impl Devices {
    /// The devices of `replicas` replicas: this rank's share of the node's GPUs, or the CPU. If `replicas` is 0, each GPU of the
    /// rank gets one replica. Without GPUs, the CPU then gets one replica.
    ///
    /// # Errors
    /// The config asks for GPUs, but none can be used. Or the config asks for more replicas than this rank has
    /// GPUs.
    pub fn of_rank(choice: DeviceChoice, replicas: usize, on_node: OnNode) -> Result<Devices> {
        let cores = cores::allowed();
        let driver = match (choice, cuda()) {
            (DeviceChoice::Cuda, Err(reason)) => {
                return Err(usage!("run.device = \"cuda\": {reason:#}; or set run.device = \"cpu\""));
            }
            (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, Err(_)) => {
                let reason = (choice == DeviceChoice::Auto).then(|| cuda().err().map(|e| format!("{e:#}"))).flatten();
                let list = vec![Device::Cpu; replicas.max(1)];
                return Ok(Devices { list, shared: false, reason, cores });
            }
            (_, Ok(driver)) => driver,
        };
        let (own, mut shared) = gpus_of_rank(on_node, driver.gpus().len());
        let may_share = std::env::var_os(SHARED_GPU).is_some();
        shared |= may_share;
        let count = own.len();
        let gpus = gpus_of_replicas(own, replicas, may_share).ok_or_else(|| {
            usage!(
                "run.replicas = {replicas}, but this rank has {count} of the node's {} GPU(s); lower run.replicas, or start fewer ranks",
                driver.gpus().len()
            )
        })?;
        Ok(Devices { list: gpus.into_iter().map(Device::Cuda).collect(), shared, reason: None, cores })
    }

    /// How many replicas this rank has.
    pub fn replicas(&self) -> usize {
        self.list.len()
    }

    /// The device of one replica.
    pub fn device(&self, replica: usize) -> Device {
        self.list[replica]
    }

    /// Whether the devices are GPUs.
    pub fn are_gpus(&self) -> bool {
        self.list[0].is_cuda()
    }

    /// Whether NCCL can sum gradients over the devices. NCCL takes only GPUs, and refuses two members on one GPU.
    pub fn can_use_nccl(&self) -> bool {
        self.are_gpus() && !self.shared
    }

    /// A sentence that says how much faster bf16 would be on these GPUs than this precision. None if the precision is bf16, if the
    /// device is the CPU, or if the speed of the GPUs is not known.
    pub fn price_of(&self, precision: Precision) -> Option<String> {
        let Device::Cuda(first) = self.list[0] else { return None };
        GpuModel::of_device(&cuda().ok()?.gpus()[first].name)?.price(precision)
    }

    /// Prepares the calling thread to drive a replica's GPU: pins the thread to the cores near the GPU, and makes the GPU current.
    /// Does nothing on the CPU.
    pub fn prepare_thread(&self, replica: usize) -> Result<()> {
        let Device::Cuda(number) = self.list[replica] else { return Ok(()) };
        let driver = cuda()?;
        cores::pin(&cores::near(&driver.gpus()[number].address, &self.cores));
        driver.make_current(number)
    }

    /// The devices in words, such as `cuda:0, cuda:1 (NVIDIA H200, 139.8 GiB each)`.
    pub fn describe(&self) -> String {
        let Device::Cuda(first) = self.list[0] else {
            let replicas = if self.replicas() > 1 { format!(", {} replicas", self.replicas()) } else { String::new() };
            let reason = self.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})"));
            return format!("the CPU{replicas}{reason}");
        };
        let names: Vec<String> = self.list.iter().map(|device| name(*device)).collect();
        let gpu = cuda().map_or(String::new(), |driver| describe(&driver.gpus()[first]));
        let shared = if self.shared { ", shared with other ranks" } else { "" };
        format!("{} ({gpu}{}{shared})", names.join(", "), if names.len() > 1 { " each" } else { "" })
    }
}

/// The name and memory of a GPU, in words.
pub fn describe(gpu: &Gpu) -> String {
    format!("{}, {:.1} GiB", gpu.name, gpu.memory as f64 / (1u64 << 30) as f64)
}

/// The name of a device as libtorch writes it.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(number) => format!("cuda:{number}"),
        _ => "cpu".into(),
    }
}

/// The size of a GPU's memory in bytes. None for the CPU, because all processes share its memory.
pub fn memory_of(device: Device) -> Option<u64> {
    let Device::Cuda(number) = device else { return None };
    Some(cuda().ok()?.gpus()[number].memory)
}

/// The GPUs of one rank of the node, and whether ranks must share GPUs. Neighbouring ranks get neighbouring GPUs.
fn gpus_of_rank(on_node: OnNode, gpus: usize) -> (Range<usize>, bool) {
    let OnNode { rank, ranks } = on_node;
    if ranks <= gpus {
        (rank * gpus / ranks..(rank + 1) * gpus / ranks, false)
    } else {
        let own = rank * gpus / ranks;
        (own..own + 1, true)
    }
}

/// The GPU of each replica of a rank that has the GPUs `own`. If `replicas` is 0, each GPU gets one replica. None if there are more
/// replicas than GPUs and replicas may not share a GPU.
fn gpus_of_replicas(own: Range<usize>, replicas: usize, may_share: bool) -> Option<Vec<usize>> {
    match replicas {
        0 => Some(own.collect()),
        _ if replicas > own.len() && !may_share => None,
        _ => Some((0..replicas).map(|replica| own.start + replica % own.len()).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranks_of_a_node_divide_its_gpus_and_share_them_only_when_there_are_too_few() {
        for gpus in 1..9 {
            for ranks in 1..12 {
                let parts: Vec<_> = (0..ranks).map(|rank| gpus_of_rank(OnNode { rank, ranks }, gpus)).collect();
                assert!(parts.iter().all(|(own, _)| !own.is_empty()), "{ranks} ranks, {gpus} GPUs: {parts:?}");
                let given: Vec<usize> = parts.iter().flat_map(|(own, _)| own.clone()).collect();
                let used = given.iter().collect::<BTreeSet<_>>().len();
                assert_eq!(used, gpus, "{ranks} ranks leave out one of {gpus} GPUs: {parts:?}");
                assert!(parts.iter().all(|(_, shared)| *shared == (given.len() > gpus)));
            }
        }
        assert_eq!(gpus_of_rank(OnNode { rank: 1, ranks: 4 }, 8), (2..4, false));
        assert_eq!(gpus_of_rank(OnNode { rank: 3, ranks: 4 }, 2), (1..2, true));
    }

    #[test]
    fn replicas_have_a_gpu_each_and_share_one_only_in_a_test() {
        assert_eq!(gpus_of_replicas(2..4, 0, false), Some(vec![2, 3]));
        assert_eq!(gpus_of_replicas(2..4, 1, false), Some(vec![2]));
        assert_eq!(gpus_of_replicas(2..4, 3, false), None);
        assert_eq!(gpus_of_replicas(2..4, 3, true), Some(vec![2, 3, 2]));
        assert_eq!(gpus_of_replicas(5..6, 2, true), Some(vec![5, 5]));
    }

    #[test]
    fn the_loaded_libtorch_is_where_its_other_libraries_are() {
        assert!(loaded_library("libtorch_cpu.so").unwrap().with_file_name("libc10.so").exists());
    }

    #[test]
    fn on_the_cpu_there_are_as_many_replicas_as_asked_for() {
        let on_node = OnNode { rank: 0, ranks: 1 };
        let devices = |replicas| Devices::of_rank(DeviceChoice::Cpu, replicas, on_node).unwrap();
        assert_eq!((devices(0).replicas(), devices(3).replicas()), (1, 3));
        assert!(!devices(3).can_use_nccl() && devices(3).prepare_thread(2).is_ok());
        assert_eq!(devices(3).describe(), "the CPU, 3 replicas");
    }
}
