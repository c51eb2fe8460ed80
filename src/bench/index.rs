//! `incubate bench index`: measures the time and memory that the index of a large image source takes, and the memory of a loader
//! that uses the index. The entries of the index are generated, so no images are needed.

use crate::config::Config;
use crate::data::feed::Feed;
use crate::data::feed::images::Handover;
use crate::data::feed::loader::Loader;
use crate::data::image::decode::jpeg;
use crate::data::source::index::{Index, IndexFile, fingerprint};
use crate::data::source::samples::{Samples, Split, Stored};
use crate::data::{BadImages, Source};
use crate::plan::Plan;
use crate::plan::groups::micro_batches;
use crate::random::Random;
use crate::run::table::META;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The result of the benchmark. Times are in seconds, and sizes are in MiB.
#[derive(Debug, Serialize)]
pub struct IndexReport {
    pub entries: usize,
    pub classes: usize,
    /// The time to generate the entries and to write the index file.
    pub build_s: f64,
    /// The time to open the index file. Opening reads and verifies the file, and checks that the folders still have the fingerprint
    /// in the file.
    pub open_s: f64,
    /// The size of the index file.
    pub file_mib: f64,
    /// The growth of the process's resident memory from before the index was opened until it was open.
    pub index_mib: f64,
    pub workers: usize,
    /// The peak of the process's resident memory while the index is opened and the loader makes `batches` batches of 64 images of
    /// 224 × 224, minus the memory before. It counts the index, the epoch's order of images, and the batches that are ready or in
    /// progress.
    pub loader_mib: f64,
    pub batches: usize,
    /// The peak of the process's resident memory over the whole benchmark, including libtorch.
    pub peak_mib: f64,
}

const CLASSES: usize = 1000;
/// The number of the loader's worker threads. Each GPU gets about as many on a node with 64 cores and eight GPUs.
const WORKERS: usize = 8;
/// The number of batches that are taken from the loader: six for each worker.
const BATCHES: usize = 48;

/// Measures an index with this number of entries. Makes temporary files in `folder` and removes them at the end.
pub fn measure(entries: usize, folder: &Path) -> Result<IndexReport> {
    let root = folder.join(format!("bench-index-{}", std::process::id()));
    let index_file = IndexFile { path: root.with_extension("index"), may_write: true };
    (0..CLASSES).try_for_each(|class| fs::create_dir_all(root.join(name_of(class))))?;
    let measured = measure_in(entries, &root, &index_file);
    let _ = (fs::remove_dir_all(&root), fs::remove_file(&index_file.path));
    measured
}

fn measure_in(entries: usize, root: &Path, index_file: &IndexFile) -> Result<IndexReport> {
    let build = || {
        let index = generate(entries)?;
        let fingerprint = fingerprint(root, &index.groups)?;
        Ok((index, fingerprint))
    };
    let open = || Index::cached(Some(index_file), |groups| fingerprint(root, groups), build);
    let began = Instant::now();
    drop(open()?);
    let build_s = began.elapsed().as_secs_f64();
    let build_peak_mib = status_mib("VmHWM")?;
    let before_mib = status_mib("VmRSS")?;
    forget_peak()?;
    let began = Instant::now();
    let index = open()?;
    let open_s = began.elapsed().as_secs_f64();
    let index_mib = status_mib("VmRSS")? - before_mib;
    load(index)?;
    let loading_peak_mib = status_mib("VmHWM")?;
    Ok(IndexReport {
        entries,
        classes: CLASSES,
        build_s,
        open_s,
        file_mib: fs::metadata(&index_file.path)?.len() as f64 / MIB,
        index_mib,
        workers: WORKERS,
        loader_mib: loading_peak_mib - before_mib,
        batches: BATCHES,
        peak_mib: loading_peak_mib.max(build_peak_mib),
    })
}

/// Takes `BATCHES` batches from a loader that reads the index. The bytes of every image are the same JPEG file.
fn load(index: Index) -> Result<()> {
    let mut random = Random::new(&[1]);
    let (height, width) = (375, 500);
    let rgb: Vec<u8> = (0..3 * height * width).map(|i| (i / 600 % 200 + random.below(40)) as u8).collect();
    let jpeg = jpeg::encode(&rgb, height, width, 90)?;
    drop(rgb);
    let sets = ["run.micro_batch=64".into(), format!("model.classes={CLASSES}")];
    let plan = Plan::new(Config::parse("", &sets)?, index.len())?;
    let split: Split = Arc::new(Generated { index, jpeg });
    let source = Source { train: split.clone(), test: split, bad: Arc::new(BadImages::new(0)) };
    let phase = plan.phase(&META, None);
    let micro_batches = micro_batches(0..phase.training.global_batch, plan.config.run.micro_batch.samples());
    let loader =
        Loader::start(&plan, &phase, Feed { source: &source, workers: WORKERS }, micro_batches, 0, Handover::Finished)?;
    loader.take(BATCHES).try_for_each(|batch| batch.map(drop))
}

/// The images of the generated index. No files lie behind them.
struct Generated {
    index: Index,
    /// The JPEG file that stands for every image.
    jpeg: Vec<u8>,
}

impl Samples for Generated {
    fn len(&self) -> usize {
        self.index.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.index.label[index]
    }

    fn name(&self, index: usize) -> String {
        self.index.path(index).display().to_string()
    }

    fn read(&self, _index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        bytes.clear();
        bytes.extend_from_slice(&self.jpeg);
        Ok(Stored::Encoded)
    }
}

const MIB: f64 = (1 << 20) as f64;

/// A class name in the style of ImageNet, such as `n01440764`.
fn name_of(class: usize) -> String {
    format!("n{:08}", 1_440_764 + 1000 * class)
}

fn generate(entries: usize) -> Result<Index> {
    let mut index = Index::default();
    (0..CLASSES).try_for_each(|class| index.groups.push(name_of(class).as_bytes()))?;
    for entry in 0..entries {
        let class = entry * CLASSES / entries;
        index.names.push(format!("{}_{}.JPEG", name_of(class), entry % 100_000).as_bytes())?;
        index.group.push(class as u32);
        index.label.push(class as u32);
    }
    Ok(index)
}

/// Resets the kernel's record of this process's peak memory.
fn forget_peak() -> Result<()> {
    fs::write("/proc/self/clear_refs", "5").context("/proc/self/clear_refs cannot be written")
}

/// A field of /proc/self/status that the kernel gives in kB, such as `VmRSS`, converted to MiB.
fn status_mib(field: &str) -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status cannot be read")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: Option<f64> = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok());
    Ok(kib.with_context(|| format!("/proc/self/status has no {field} in kB"))? / 1024.0)
}

/// The report as a text for people.
pub fn text(r: &IndexReport) -> String {
    format!(
        "{} entries in {} classes: built and written in {:.2} s (a file of {:.0} MiB), opened in {:.2} s ({:.0} MiB in memory)\n\
         the loader with {} workers: at most {:.0} MiB over {} batches of 64, index included; the whole process: at most {:.0} MiB\n",
        r.entries,
        r.classes,
        r.build_s,
        r.file_mib,
        r.open_s,
        r.index_mib,
        r.workers,
        r.loader_mib,
        r.batches,
        r.peak_mib
    )
}
