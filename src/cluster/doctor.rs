//! `incubate doctor`: checks this node, and whether it can run a config. Prints one line for each finding.

use super::finding::{Finding, finding};
use super::gpus;
use crate::collective::mpi;
use crate::config::{Config, DeviceChoice, Precision};
use crate::data;
use crate::device::{cuda, loaded_library};
use crate::launcher::{cores_of_this_rank, rank_on_this_node, ranks_on_this_node};
use crate::plan::Plan;
use crate::plan::cost::cost;
use crate::run::table::E2E;
use crate::store::durable;
use anyhow::{Context, Result, anyhow};
use std::fmt::Write;
use std::path::Path;

/// Checks the node. If there is a config, also checks its precision, data, input and run directory. `input` finds out whether the
/// node's cores read images as fast as its devices train on them.
pub fn examine(config: Option<&Config>, threads: usize, input: impl Fn(&Config) -> Result<String>) -> Vec<Finding> {
    let mut findings = vec![
        finding("program", Ok(concat!("incubate ", env!("CARGO_PKG_VERSION")).to_string())),
        finding("MPI", Ok(mpi::library_version())),
        finding("HDF5", {
            let (major, minor, patch) = hdf5::library_version();
            Ok(format!("HDF5 {major}.{minor}.{patch}"))
        }),
        finding("libtorch", libtorch()),
        finding("ranks", mpi::launch()),
        finding("cores", cores(threads)),
    ];
    findings.extend(gpus::examine(config.map_or(DeviceChoice::Auto, |config| config.run.device)));
    if let Some(config) = config {
        findings.push(finding("precision", precision(config)));
        findings.push(finding("data", readable(config)));
        findings.push(finding("input", input(config)));
        findings.push(finding("run directory", writable(config)));
    }
    findings
}

/// Warns, in the first seconds of training, of problems that would slow the training down or stop it later. Every rank checks its
/// cores and the precision. The first rank of each node also checks the GPUs. Rank zero also checks how the ranks were started, and
/// the run directory. The training continues in any case, because ending it would waste the allocated nodes.
pub fn warn_of_trouble(config: &Config, threads: usize, is_zero: bool) {
    let mut findings = vec![finding("cores", cores(threads)), finding("precision", precision(config))];
    if rank_on_this_node() == 0 {
        findings.push(finding("GPUs", gpus::as_many_as_slurm_gave(config.run.device)));
    }
    if is_zero {
        findings.push(finding("ranks", mpi::launch()));
        findings.push(finding("run directory", writable(config)));
    }
    for trouble in findings.into_iter().filter(|finding| !finding.ok) {
        log::warn!("{}: {}", trouble.subject, trouble.text);
    }
}

fn libtorch() -> Result<String> {
    let path = loaded_library("libtorch_cpu.so").context("libtorch_cpu.so is not among the loaded libraries")?;
    Ok(format!("libtorch 2.11.0 ({})", path.display()))
}

fn cores(threads: usize) -> Result<String> {
    let (cores, ranks) = (cores_of_this_rank(), ranks_on_this_node());
    if threads > cores {
        return Err(anyhow!(
            "{ranks} rank(s) of {threads} thread(s) on this node have {cores} core(s) each; lower run.threads, or start \
             fewer ranks; under mpirun give --bind-to none"
        ));
    }
    Ok(format!("{cores} core(s) for this rank, {threads} thread(s)"))
}

/// Fails if the config asks for bf16 on a CPU that computes slowly in bf16. All GPUs that libtorch 2.11 supports compute in every
/// precision that a config can name.
fn precision(config: &Config) -> Result<String> {
    let on_cpu = config.run.device == DeviceChoice::Cpu || cuda().is_err();
    Ok(match config.run.precision {
        Precision::Fp32 => "fp32".into(),
        Precision::Tf32 if on_cpu => "tf32, which on a CPU is fp32".into(),
        Precision::Tf32 => "tf32".into(),
        Precision::Bf16 if on_cpu && !cpu_has_bf16() => {
            return Err(anyhow!(
                "bf16, but this CPU has no AVX512-BF16 and so computes it more slowly than fp32; set run.precision = \"fp32\""
            ));
        }
        Precision::Bf16 => "bf16".into(),
    })
}

fn cpu_has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

fn readable(config: &Config) -> Result<String> {
    let source = data::open_read_only(config)?;
    Ok(format!("{} training and {} test images", source.train.len(), source.test.len()))
}

/// Fails if the run directory cannot be used. Leaves no new file and no new folder behind.
fn writable(config: &Config) -> Result<String> {
    let folder = &config.run.dir;
    let existing = folder.ancestors().find(|folder| folder.exists());
    std::fs::create_dir_all(folder).map_err(|e| anyhow!("{}: {e}; choose another --run-dir", folder.display()))?;
    let tried = try_to_write(folder, needed_space(config));
    for made in folder.ancestors().take_while(|folder| existing != Some(folder)) {
        let _ = std::fs::remove_dir(made);
    }
    tried
}

/// Writes a file durably. Then tries to create the same file again, which must fail, because otherwise two processes could both get
/// the lease of a phase. Also tries a lock, which may fail, because nothing needs locks. Finally compares the free space with the
/// space that a run needs.
fn try_to_write(folder: &Path, needed: u64) -> Result<String> {
    let probe = folder.join(format!("doctor-probe-{}", std::process::id()));
    durable::replace_bytes(&probe, b"probe")?;
    let second_creation = std::fs::File::options().write(true).create_new(true).open(&probe);
    let locks = durable::can_lock(&probe);
    std::fs::remove_file(&probe)?;
    let system = durable::file_system(folder).unwrap_or_else(|| "an unknown file system".into());
    if second_creation.is_ok() {
        return Err(anyhow!(
            "{}: this file system lets two processes create the same file, so leases do not work; choose a --run-dir on another file system",
            folder.display()
        ));
    }
    let free = durable::free_space(folder)?;
    if free < needed {
        return Err(anyhow!(
            "{}: {} free, {} needed; free some or choose another --run-dir",
            shown(folder),
            size(free),
            size(needed)
        ));
    }
    let locks = if locks { "locks work" } else { "no locks (none are needed)" };
    Ok(format!("{} on {system} is writable, {locks}, {} free, {} needed", shown(folder), size(free), size(needed)))
}

/// Estimates the bytes that a run needs. The estimate counts five artefacts of the size of the target, and `keep_checkpoints` + 1
/// checkpoints of three times that size.
fn needed_space(config: &Config) -> u64 {
    // The number of parameters does not depend on the data.
    let plan = Plan::without_data(config.clone());
    let target = 4 * cost(&plan, &plan.phase(&E2E, None)).parameters;
    target * (5 + 3 * (config.run.keep_checkpoints as u64 + 1))
}

fn size(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// The findings as a text for people.
pub fn table(findings: &[Finding]) -> String {
    let mut out = String::new();
    for f in findings {
        let _ = writeln!(out, "{} {:<14} {}", if f.ok { "ok " } else { "NOT" }, f.subject, f.text);
    }
    out
}
