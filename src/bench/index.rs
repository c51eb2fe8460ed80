//! `incubate bench index`: what the index of a large source costs, in time and memory, with generated entries.

use crate::data::index::{Index, fingerprint};
use crate::data::sampler::Sampler;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// Times in seconds, sizes in MiB.
#[derive(Debug, Serialize)]
pub struct Report {
    pub entries: usize,
    pub classes: usize,
    /// To generate the entries and keep them.
    pub build_s: f64,
    /// To open the kept index: compare the folders' fingerprint, read, verify.
    pub open_s: f64,
    /// Of the kept file.
    pub file_mib: f64,
    /// What the process grew by, with the index open and one epoch's order drawn.
    pub memory_mib: f64,
    /// The process's largest size over all of it, libtorch included.
    pub peak_mib: f64,
}

/// Measures in `folder`, and leaves nothing there.
pub fn measure(entries: usize, folder: &Path) -> Result<Report> {
    const CLASSES: usize = 1000;
    let root = folder.join("bench-index");
    let _ = fs::remove_dir_all(&root);
    (0..CLASSES).try_for_each(|class| fs::create_dir_all(root.join(name_of(class))))?;
    let cache = folder.join("bench-index.index");
    let began = Instant::now();
    let open = || Index::cached(Some(&cache), |groups| fingerprint(&root, groups), || generate(entries, CLASSES));
    drop(open()?);
    let build_s = began.elapsed().as_secs_f64();
    let before = resident_mib("VmRSS")?;
    let began = Instant::now();
    let index = open()?;
    let open_s = began.elapsed().as_secs_f64();
    let sampler = Sampler { images: index.len(), repeats: 3, global_batch: 2048, steps_per_epoch: 1, seed: 0 };
    let order = sampler.epoch(0);
    let memory_mib = resident_mib("VmRSS")? - before;
    drop(order);
    let file_mib = fs::metadata(&cache)?.len() as f64 / MIB;
    fs::remove_file(&cache)?;
    fs::remove_dir_all(&root)?;
    let peak_mib = resident_mib("VmHWM")?;
    Ok(Report { entries, classes: CLASSES, build_s, open_s, file_mib, memory_mib, peak_mib })
}

const MIB: f64 = (1 << 20) as f64;

/// As ImageNet's classes are named.
fn name_of(class: usize) -> String {
    format!("n{:08}", 1_440_764 + 1000 * class)
}

fn generate(entries: usize, classes: usize) -> Result<Index> {
    let mut index = Index::default();
    (0..classes).try_for_each(|class| index.groups.push(name_of(class).as_bytes()))?;
    for entry in 0..entries {
        let class = entry * classes / entries;
        index.names.push(format!("{}_{}.JPEG", name_of(class), entry % 100_000).as_bytes())?;
        index.group.push(class as u32);
        index.label.push(class as u32);
    }
    Ok(index)
}

fn resident_mib(field: &str) -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: f64 = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok()).context("/proc/self/status")?;
    Ok(kib / 1024.0)
}

/// The report for people.
pub fn text(r: &Report) -> String {
    format!(
        "{} entries in {} classes: built and kept in {:.2} s ({:.0} MiB), opened in {:.2} s; {:.0} MiB in memory; the \
         whole process at most {:.0} MiB\n",
        r.entries, r.classes, r.build_s, r.file_mib, r.open_s, r.memory_mib, r.peak_mib
    )
}
