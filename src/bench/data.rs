//! `incubate bench data`: measures how many images per second one core reads, decodes and transforms, from files and from packs. It
//! also measures the time of each part of a transform, and the rate of the whole loader. `tools/bench_data.py` compares the rates
//! with the rates of timm's transforms on the same folder.

use crate::config::Config;
use crate::data::feed::Feed;
use crate::data::feed::images::Handover;
use crate::data::feed::loader::Loader;
use crate::data::image::decode::Decoder;
use crate::data::image::normalise::Normalise;
use crate::data::image::pixels::Region;
use crate::data::image::randaugment::{Canvas, Operation};
use crate::data::image::recipe::{Recipe, StepTimes};
use crate::data::image::resize::{Order, Resample};
use crate::data::image::shrink::{Form, Image, Shrink};
use crate::data::source::folder::Folder;
use crate::data::source::packed::{self, Packed};
use crate::data::source::samples::{Samples, Split, Stored};
use crate::data::source::shard::{self, Encoding, Shard, Table};
use crate::data::{BadImages, Source};
use crate::plan::Plan;
use crate::plan::groups::micro_batches;
use crate::random::Random;
use crate::run::table::META;
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The result of the benchmark. Fields that end in `per_s_core` are images per second on one thread. Their time includes the
/// reading of the file or pack.
#[derive(Debug, Serialize)]
pub struct DataReport {
    pub images: usize,
    /// The mean size of a file in bytes.
    pub mean_bytes: usize,
    pub decode_per_s_core: f64,
    pub train_per_s_core: f64,
    /// The rate of the training transform on packed JPEGs, as `incubate pack` writes them.
    pub train_packed_jpeg_per_s_core: f64,
    /// The rate of the training transform on packed pixels, as `incubate pack --raw` writes them.
    pub train_packed_raw_per_s_core: f64,
    pub eval_per_s_core: f64,
    pub eval_packed_jpeg_per_s_core: f64,
    pub eval_packed_raw_per_s_core: f64,
    /// The images per second of the whole loader with one worker thread. The loader reads files and makes training batches,
    /// including Mixup and CutMix.
    pub loader_1_per_s: f64,
    /// The same rate with two worker threads.
    pub loader_2_per_s: f64,
    /// The mean milliseconds of each part of a transform of one image. The same holds for the next three fields.
    pub train_ms: Parts,
    pub train_packed_jpeg_ms: Parts,
    pub train_packed_raw_ms: Parts,
    pub eval_ms: Parts,
    /// The mean milliseconds of each RandAugment operation at magnitude 9, measured on the first image.
    pub operations_ms: BTreeMap<&'static str, f64>,
}

/// The mean milliseconds that each part of a transform takes for one image.
#[derive(Debug, Serialize)]
pub struct Parts {
    pub read: f64,
    pub decode: f64,
    pub resample: f64,
    pub operations: f64,
    pub normalise: f64,
    pub erase: f64,
}

/// Takes all measurements on the JPEG and PNG files below a folder, with the transforms of the default config. A rate is measured
/// over `passes` passes over all files.
pub fn measure(folder: &Path, passes: usize) -> Result<DataReport> {
    let files = Arc::new(Folder::flat(folder)?);
    let config = Config::parse("", &[])?;
    let bytes = (0..files.len()).map(|index| read(files.as_ref(), index).map(|(bytes, _)| bytes.len()));
    let mean_bytes = bytes.sum::<Result<usize>>()? / files.len();
    let mut decoder = Decoder::new()?;
    let (decode_per_s_core, _) = rate(passes, files.as_ref(), |_, bytes, stored| {
        let (height, width) = decoder.open(bytes, stored)?;
        decoder.view(bytes, Region { left: 0, top: 0, width, height }, 1).map(drop)
    })?;
    let packs = Packs::write(files.as_ref())?;
    let (train_per_s_core, train_ms) = transform(&config, passes, files.as_ref(), true)?;
    let (eval_per_s_core, eval_ms) = transform(&config, passes, files.as_ref(), false)?;
    let (train_packed_jpeg_per_s_core, train_packed_jpeg_ms) = transform(&config, passes, &packs.jpeg, true)?;
    let (train_packed_raw_per_s_core, train_packed_raw_ms) = transform(&config, passes, &packs.raw, true)?;
    let (eval_packed_jpeg_per_s_core, _) = transform(&config, passes, &packs.jpeg, false)?;
    let (eval_packed_raw_per_s_core, _) = transform(&config, passes, &packs.raw, false)?;
    Ok(DataReport {
        images: files.len(),
        mean_bytes,
        decode_per_s_core,
        train_per_s_core,
        train_packed_jpeg_per_s_core,
        train_packed_raw_per_s_core,
        eval_per_s_core,
        eval_packed_jpeg_per_s_core,
        eval_packed_raw_per_s_core,
        loader_1_per_s: loader(&files, passes, 1)?,
        loader_2_per_s: loader(&files, passes, 2)?,
        train_ms,
        train_packed_jpeg_ms,
        train_packed_raw_ms,
        eval_ms,
        operations_ms: operations(&config, files.as_ref())?,
    })
}

fn read(samples: &dyn Samples, index: usize) -> Result<(Vec<u8>, Stored)> {
    let mut bytes = Vec::new();
    let stored = samples.read(index, &mut bytes).with_context(|| samples.name(index))?;
    Ok((bytes, stored))
}

/// Two packs of the folder's images, in a temporary folder that is removed on drop.
struct Packs {
    folder: PathBuf,
    jpeg: Packed,
    raw: Packed,
}

impl Drop for Packs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Packs {
    fn write(files: &dyn Samples) -> Result<Packs> {
        let folder = std::env::temp_dir().join(format!("incubate-bench-data-{}", std::process::id()));
        let packed = |encoding: Encoding| {
            let folder = folder.join(encoding.name());
            std::fs::create_dir_all(&folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
            pack(files, encoding, &folder)?;
            Packed::open(&folder, "train")
        };
        let both = packed(Encoding::Jpeg).and_then(|jpeg| Ok((jpeg, packed(Encoding::Raw)?)));
        match both {
            Ok((jpeg, raw)) => Ok(Packs { folder, jpeg, raw }),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&folder);
                Err(error)
            }
        }
    }
}

/// Writes all images into one shard, in the form in which `incubate pack` stores them by default.
fn pack(files: &dyn Samples, encoding: Encoding, folder: &Path) -> Result<()> {
    let (mut shrink, mut samples, mut all) = (Shrink::new()?, Table::default(), Vec::new());
    for index in 0..files.len() {
        let (file, stored) = read(files, index)?;
        let image = shrink.shrink(&file, stored, Form::usual(encoding)).with_context(|| files.name(index))?;
        let Image { bytes, height, width } = image;
        samples.name.push(index.to_string().as_bytes())?;
        samples.label.push(0);
        samples.height.push(height as u32);
        samples.width.push(width as u32);
        samples.crc32c.push(crc32c::crc32c(&bytes));
        all.extend_from_slice(&bytes);
        samples.end.push(all.len() as u64);
    }
    let (split, classes, recipe) = ("train".into(), vec!["all".into()], String::new());
    let shard = Shard { encoding, split, number: 0, shards: 1, recipe, classes, samples, bytes_offset: 0 };
    shard::write(&folder.join(packed::file_name("train", 0)), &shard, &all)
}

/// The images per second of the training or evaluation transform, including the reading, and the mean milliseconds of each part.
fn transform(config: &Config, passes: usize, samples: &dyn Samples, training: bool) -> Result<(f64, Parts)> {
    let recipe = Recipe::new(config);
    let mut workbench = recipe.workbench()?;
    let mut out = vec![0.0; 3 * config.model.image_size().pow(2)];
    let (rate, reading) = rate(passes, samples, |number, bytes, stored| {
        if number == 0 {
            workbench.spent = StepTimes::default();
        }
        match training {
            true => recipe.train(&mut workbench, bytes, stored, &mut Random::new(&[number]), &mut out),
            false => recipe.evaluate(&mut workbench, bytes, stored, &mut out),
        }
    })?;
    Ok((rate, Parts::of(reading, &workbench.spent, passes * samples.len())))
}

/// The images per second if each image is read and then given to `work`, and the total time of the reading. Each pass reads all
/// images. `work` gets the running number of the image over all passes, from 0. Before the timed passes, up to 20 images are
/// processed untimed as a warm-up, each with the number 0.
fn rate(
    passes: usize,
    samples: &dyn Samples,
    mut work: impl FnMut(u64, &[u8], Stored) -> Result<()>,
) -> Result<(f64, Duration)> {
    let (mut bytes, mut reading) = (Vec::new(), Duration::ZERO);
    let mut process = |number: u64, index: usize| -> Result<Duration> {
        let began = Instant::now();
        let stored = samples.read(index, &mut bytes).with_context(|| samples.name(index))?;
        let read = began.elapsed();
        work(number, &bytes, stored).with_context(|| samples.name(index))?;
        Ok(read)
    };
    (0..samples.len().min(20)).try_for_each(|index| process(0, index).map(drop))?;
    let began = Instant::now();
    for pass in 0..passes {
        for index in 0..samples.len() {
            reading += process((pass * samples.len() + index) as u64, index)?;
        }
    }
    Ok(((passes * samples.len()) as f64 / began.elapsed().as_secs_f64(), reading))
}

/// The images per second of the whole loader with `workers` worker threads.
fn loader(files: &Arc<Folder>, passes: usize, workers: usize) -> Result<f64> {
    const BATCH: usize = 32;
    let count = files.len();
    let batch = BATCH.min(count / 2 * 2);
    let sets = [format!("train.global_batch={batch}"), "data.repeats=1".into()];
    let plan = Plan::new(Config::parse("", &sets)?, count)?;
    let split: Split = files.clone();
    let source = Source { train: split.clone(), test: split, bad: Arc::new(BadImages::new(0)) };
    let phase = plan.phase(&META, None);
    let micro_batches = micro_batches(0..batch, plan.config.run.micro_batch.samples());
    let mut loader =
        Loader::start(&plan, &phase, Feed { source: &source, workers }, micro_batches, 0, Handover::Finished)?;
    let batches = (passes * count).div_ceil(batch);
    // Before the clock starts, each worker can make up to four batches ahead. Take as many batches first, so that the measured rate
    // is not too high.
    for batch in loader.by_ref().take(4 * workers) {
        batch?;
    }
    let began = Instant::now();
    for batch in loader.take(batches) {
        batch?;
    }
    Ok((batches * batch) as f64 / began.elapsed().as_secs_f64())
}

/// The milliseconds that each operation adds to the normalisation of the first image. Some operations only set a table that maps
/// bytes, and normalisation applies this table. So each operation is timed together with normalisation.
fn operations(config: &Config, files: &dyn Samples) -> Result<BTreeMap<&'static str, f64>> {
    const ALL: [(&str, Operation); 15] = [
        ("auto_contrast", Operation::AutoContrast),
        ("equalize", Operation::Equalize),
        ("invert", Operation::Invert),
        ("rotate", Operation::Rotate(27.0)),
        ("posterize", Operation::Posterize(1)),
        ("solarize", Operation::Solarize(26)),
        ("solarize_add", Operation::SolarizeAdd(99)),
        ("color", Operation::Color(1.81)),
        ("contrast", Operation::Contrast(1.81)),
        ("brightness", Operation::Brightness(1.81)),
        ("sharpness", Operation::Sharpness(1.81)),
        ("shear_x", Operation::ShearX(0.27)),
        ("shear_y", Operation::ShearY(0.27)),
        ("translate_x", Operation::TranslateX(0.405)),
        ("translate_y", Operation::TranslateY(0.405)),
    ];
    const TIMES: usize = 200;
    let size = config.model.image_size();
    let (bytes, stored) = read(files, 0)?;
    let (mut decoder, mut resample) = (Decoder::new()?, Resample::default());
    let (height, width) = decoder.open(&bytes, stored)?;
    let whole = Region { left: 0, top: 0, width, height };
    let mut canvas = Canvas::new([124, 116, 104, 255]);
    resample.resample(
        &decoder.view(&bytes, whole, 1)?,
        whole.area(),
        whole,
        Order::ColumnsFirst,
        canvas.begin(size),
    )?;
    let image = canvas.pixels.rgbx.clone();
    let normalise = Normalise::new(&config.data.mean, &config.data.std);
    let mut out = vec![0.0; 3 * size * size];
    let mut milliseconds = |operation: Option<Operation>| {
        let mut spent = Duration::ZERO;
        for _ in 0..TIMES {
            canvas.begin(size).rgbx.copy_from_slice(&image);
            let began = Instant::now();
            operation.into_iter().for_each(|operation| canvas.apply(operation));
            normalise.apply(&canvas.pixels, canvas.table.as_deref(), canvas.flipped, &mut out);
            spent += began.elapsed();
        }
        spent.as_secs_f64() * 1e3 / TIMES as f64
    };
    milliseconds(None);
    let none = milliseconds(None);
    Ok(ALL.into_iter().map(|(name, operation)| (name, (milliseconds(Some(operation)) - none).max(0.0))).collect())
}

impl Parts {
    fn of(reading: Duration, spent: &StepTimes, images: usize) -> Parts {
        let each = |part: Duration| part.as_secs_f64() * 1e3 / images as f64;
        let [decode, resample, operations, normalise, erase] = spent.steps().map(each);
        Parts { read: each(reading), decode, resample, operations, normalise, erase }
    }
}

/// The report as a text for people.
pub fn text(r: &DataReport) -> String {
    let parts = |p: &Parts| {
        format!(
            "read {:.3}, decode {:.3}, resample {:.3}, operations {:.3}, normalise {:.3}, erase {:.3}",
            p.read, p.decode, p.resample, p.operations, p.normalise, p.erase
        )
    };
    let operations: Vec<String> = r.operations_ms.iter().map(|(name, ms)| format!("{name} {ms:.3}")).collect();
    format!(
        "{} images of {} bytes on average; images per second and core, reading included:\n\
         decode {:.0}; training {:.0}, from packed JPEG {:.0}, from packed raw {:.0}; evaluation {:.0}, from packed JPEG \
         {:.0}, from packed raw {:.0}\n\
         loader with 1 worker {:.0}/s, with 2 workers {:.0}/s\n\
         ms of a training image:   {}\n\
         ms from packed JPEG:      {}\n\
         ms from packed raw:       {}\n\
         ms of an evaluated image: {}\n\
         ms of an operation: {}\n",
        r.images,
        r.mean_bytes,
        r.decode_per_s_core,
        r.train_per_s_core,
        r.train_packed_jpeg_per_s_core,
        r.train_packed_raw_per_s_core,
        r.eval_per_s_core,
        r.eval_packed_jpeg_per_s_core,
        r.eval_packed_raw_per_s_core,
        r.loader_1_per_s,
        r.loader_2_per_s,
        parts(&r.train_ms),
        parts(&r.train_packed_jpeg_ms),
        parts(&r.train_packed_raw_ms),
        parts(&r.eval_ms),
        operations.join(", ")
    )
}
