//! `incubate pack`: writes the images of any data source in the packed form (`data/source/shard.rs`), shard by shard. All threads
//! encode the images of one shard while another thread writes the previous shard. A shard is written completely or not at all. So
//! after a stop, the same command continues with the first missing shard.

mod image;

use crate::config::Config;
use crate::data::image::shrink::{Form, Image};
use crate::data::source::packed;
use crate::data::source::samples::Split;
use crate::data::source::shard::{self, Encoding, Shard, Table};
use crate::data::{BadImages, Source};
use crate::error::Failure;
use crate::run::state::Activity;
use crate::run::table::PACK;
use crate::stop::stop_requested;
use crate::store::durable;
use crate::store::progress::Progress;
use crate::{require, thread, usage};
use anyhow::{Result, anyhow};
use image::Encoder;
use rayon::prelude::*;
use serde::Serialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::Instant;

/// The options of packing.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub form: Form,
    pub threads: usize,
}

/// The result of packing: the contents of the folder.
#[derive(Debug, Default, Serialize)]
pub struct PackReport {
    pub train_images: usize,
    pub val_images: usize,
    pub shards: usize,
    /// The number of shards that an earlier call has written.
    pub kept_shards: usize,
    /// The number of images that could not be read and are not in the pack.
    pub skipped_images: usize,
    pub bytes: u64,
}

/// A shard of the pack, whether its file exists or not.
struct PlannedShard<'a> {
    split: &'static str,
    images: &'a Split,
    number: usize,
    shards: usize,
    range: Range<usize>,
    path: PathBuf,
    recipe: String,
}

/// The values that all shards share.
struct Work<'a> {
    options: &'a Options,
    /// The common beginning of the images' names in the source. The names in the pack omit it.
    root: String,
    /// The run directory in which `incubate status` looks for progress. It may not exist.
    run: &'a Path,
    classes: Vec<String>,
    bad: &'a BadImages,
    tick: &'a (dyn Fn(u64) + Sync),
}

impl Options {
    /// The number of images in a shard. With ImageNet's proportions and a shorter side of 256 pixels, a shard takes about 150 MB as
    /// JPEG and 250 MB raw.
    fn images_per_shard(&self) -> usize {
        match self.form.encoding {
            Encoding::Jpeg => 8192,
            Encoding::Raw => 1024,
        }
    }
}

/// Packs both splits of a config's source into a folder. Calls `tick` with the number of images that were done since the last call.
///
/// # Errors
/// A usage error if more than `data.bad_images` images cannot be read, or if the folder holds another pack. [`Failure::Damaged`] if
/// a shard in the folder is damaged, and [`Failure::Stopped`] after a signal.
pub fn pack(
    source: &Source,
    config: &Config,
    into: &Path,
    options: &Options,
    tick: &(dyn Fn(u64) + Sync),
) -> Result<PackReport> {
    std::fs::create_dir_all(into).map_err(|e| usage!("{}: cannot make the folder: {e}", into.display()))?;
    let work = Work {
        options,
        root: format!("{}/", config.data.path.display()),
        run: &config.run.dir,
        classes: classes(source),
        bad: &source.bad,
        tick,
    };
    work.pack(source, into)
}

/// Records for `incubate status` that packing failed or could not begin. Does nothing if `error` is a stop, or if `run` is not a
/// run directory.
pub fn note_failure(run: &Path, error: &anyhow::Error) {
    if !Failure::is_stop(error) && is_watched(run) {
        Progress::fail(run, PACK.name, &format!("{error:#}")).unwrap_or_else(|error| log::warn!("{error:#}"));
    }
}

/// Whether `run` is a run directory, in which `incubate status` reads progress.
fn is_watched(run: &Path) -> bool {
    run.join("progress").is_dir()
}

impl Work<'_> {
    fn pack(&self, source: &Source, into: &Path) -> Result<PackReport> {
        let shards = self.planned_shards(source, into);
        let mut report = PackReport { shards: shards.len(), ..PackReport::default() };
        self.beat(Activity::Running, 0, shards.len());
        let mut missing = Vec::new();
        for planned in &shards {
            match planned.existing()? {
                Some(shard) => {
                    report.add(planned, &shard)?;
                    report.kept_shards += 1;
                    (self.tick)(planned.range.len() as u64);
                }
                None => missing.push(planned),
            }
        }
        if report.kept_shards > 0 {
            self.beat(Activity::Running, report.kept_shards, shards.len());
            log::info!("{}: {} of {} shards exist already", into.display(), report.kept_shards, shards.len());
        }
        let ended = self.run(&missing, &mut report);
        match &ended {
            Ok(()) => self.beat(Activity::Done, shards.len(), shards.len()),
            Err(error) if Failure::is_stop(error) => {
                let done = shards.iter().filter(|planned| planned.path.exists()).count();
                self.beat(Activity::Stopped, done, shards.len())
            }
            Err(_) => {}
        }
        ended.map(|()| report)
    }

    /// Encodes the missing shards one after another, while a thread writes the previous shard.
    fn run(&self, missing: &[&PlannedShard], report: &mut PackReport) -> Result<()> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.options.threads).build();
        let pool = pool.map_err(|error| thread::cannot_start(&error))?;
        let (began, total) = (Instant::now(), report.shards);
        let mut done = total - missing.len();
        std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel::<(&PlannedShard, Shard, Vec<u8>)>(1);
            let writer = thread::start_within(scope, "shards", move || -> Result<()> {
                let mut images = 0;
                for (planned, shard, bytes) in receiver {
                    planned.write(&shard, &bytes)?;
                    report.add(planned, &shard)?;
                    (done, images) = (done + 1, images + shard.samples.len());
                    self.beat(Activity::Running, done, total);
                    log::info!(
                        "{}: {} images, {:.1} MB; shard {done} of {total}, {:.0} images/s",
                        planned.path.display(),
                        shard.samples.len(),
                        bytes.len() as f64 / 1e6,
                        images as f64 / began.elapsed().as_secs_f64()
                    );
                }
                Ok(())
            })?;
            let encoded = missing.iter().try_for_each(|planned| {
                let (shard, bytes) = pool.install(|| self.encode(planned))?;
                sender.send((planned, shard, bytes)).map_err(|_| anyhow!("the writer has stopped"))
            });
            drop(sender);
            // The writer ends early only if it fails. Then its error is returned instead of the error of the encoding.
            writer.join().expect("the writer does not panic").and(encoded)
        })
    }

    /// Records the number of finished shards for `incubate status`, if there is a run directory. If that fails, only warns.
    fn beat(&self, state: Activity, done: usize, total: usize) {
        if is_watched(self.run) {
            let progress = Progress { state, step: done as u64, steps: total as u64, ..Progress::begun(PACK.name) };
            progress.write(self.run).unwrap_or_else(|error| log::warn!("{error:#}"));
        }
    }

    /// All shards of the pack, in order.
    fn planned_shards<'a>(&self, source: &'a Source, into: &Path) -> Vec<PlannedShard<'a>> {
        let per_shard = self.options.images_per_shard();
        let mut planned = Vec::new();
        for (split, images) in [("train", &source.train), ("val", &source.test)] {
            let shards = images.len().div_ceil(per_shard);
            for number in 0..shards {
                let range = number * per_shard..((number + 1) * per_shard).min(images.len());
                let recipe = self.recipe(images, range.clone());
                let path = into.join(packed::file_name(split, number));
                planned.push(PlannedShard { split, images, number, shards, range, path, recipe });
            }
        }
        planned
    }

    /// The hash of the names and labels of a shard's images, of the names of all classes, and of the form in which the images are
    /// encoded.
    fn recipe(&self, images: &Split, range: Range<usize>) -> String {
        let Form { encoding, size, quality } = self.options.form;
        let mut text = format!("{} {size} {quality} {:?}\n", encoding.name(), self.classes);
        range.for_each(|index| text += &format!("{} {}\n", images.label(index), self.name(images, index)));
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }

    /// An image's name relative to the source's folder.
    fn name(&self, images: &Split, index: usize) -> String {
        let name = images.name(index);
        name.strip_prefix(&self.root).map(str::to_string).unwrap_or(name)
    }

    /// Encodes the images of one shard with all threads.
    fn encode(&self, planned: &PlannedShard) -> Result<(Shard, Vec<u8>)> {
        let images = planned.range.clone().into_par_iter().map_init(Encoder::new, |encoder, index| {
            if stop_requested() {
                return Err(Failure::Stopped { phase: PACK.name.into(), step: planned.number as u64 }.into());
            }
            let encoder = encoder.as_mut().map_err(|error| anyhow!("{error:#}"))?;
            let image = encoder.encode(planned.images, index, self.options);
            (self.tick)(1);
            match image {
                Ok(image) => Ok(Some((index, image))),
                Err(fault) => self.bad.skip(planned.images.name(index), fault).map(|()| None),
            }
        });
        let images: Vec<(usize, Image)> = images.filter_map(Result::transpose).collect::<Result<_>>()?;
        let mut samples = Table::default();
        let mut bytes = Vec::with_capacity(images.iter().map(|(_, image)| image.bytes.len()).sum());
        for (index, image) in images {
            bytes.extend_from_slice(&image.bytes);
            samples.name.push(self.name(planned.images, index).as_bytes())?;
            samples.label.push(planned.images.label(index));
            samples.height.push(image.height as u32);
            samples.width.push(image.width as u32);
            samples.crc32c.push(crc32c::crc32c(&image.bytes));
            samples.end.push(bytes.len() as u64);
        }
        let shard = Shard {
            encoding: self.options.form.encoding,
            split: planned.split.into(),
            number: planned.number,
            shards: planned.shards,
            recipe: planned.recipe.clone(),
            classes: self.classes.clone(),
            samples,
            bytes_offset: 0,
        };
        Ok((shard, bytes))
    }
}

impl PlannedShard<'_> {
    /// The shard, if an earlier call has written it. Fails if the file holds a shard of other images, labels or classes, or of
    /// another form.
    fn existing(&self) -> Result<Option<Shard>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let shard = shard::read(&self.path)?;
        require!(
            shard.recipe == self.recipe,
            "{}: packed from other images or in another way; choose another folder, or delete this file",
            self.path.display()
        );
        Ok(Some(shard))
    }

    fn write(&self, shard: &Shard, bytes: &[u8]) -> Result<()> {
        durable::require_space(&self.path, bytes.len() as u64 + (1 << 20))?;
        durable::replace(&self.path, |beside| shard::write(beside, shard, bytes))
    }
}

impl PackReport {
    fn add(&mut self, planned: &PlannedShard, shard: &Shard) -> Result<()> {
        let images = if planned.split == "train" { &mut self.train_images } else { &mut self.val_images };
        *images += shard.samples.len();
        self.skipped_images += planned.range.len() - shard.samples.len();
        self.bytes += std::fs::metadata(&planned.path)?.len();
        Ok(())
    }
}

/// The names of the classes in the source. If the source has no names, the numbers of the classes.
fn classes(source: &Source) -> Vec<String> {
    let named = source.train.classes();
    if !named.is_empty() {
        return named.to_vec();
    }
    let largest = |split: &Split| (0..split.len()).map(|index| split.label(index) + 1).max().unwrap_or(0);
    (0..largest(&source.train).max(largest(&source.test))).map(|class| class.to_string()).collect()
}

/// The report as a text for people.
pub fn text(report: &PackReport, into: &Path) -> String {
    format!(
        "{}: {} training and {} validation images in {} shards ({} of them existed already), {:.2} GB; {} unreadable\n",
        into.display(),
        report.train_images,
        report.val_images,
        report.shards,
        report.kept_shards,
        report.bytes as f64 / 1e9,
        report.skipped_images
    )
}
