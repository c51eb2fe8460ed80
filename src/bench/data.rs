//! `incubate bench data`: how many images per second one core decodes and transforms, where the time goes, and what the
//! whole loader gives. The peer is timm's transform on the same folder.

use crate::config::Config;
use crate::data::decode::Decoder;
use crate::data::folder::Folder;
use crate::data::loader::Loader;
use crate::data::pixels::{Pixels, Region};
use crate::data::recipe::{Recipe, Spent};
use crate::data::resize::Resample;
use crate::data::samples::{Samples, Split, Stored};
use crate::data::{BadImages, Source};
use crate::plan::Plan;
use crate::plan::phases::META;
use crate::random::Random;
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Images per second, on one thread where not said otherwise.
#[derive(Debug, Serialize)]
pub struct Report {
    pub images: usize,
    pub mean_bytes: usize,
    pub decode_per_s_core: f64,
    pub train_per_s_core: f64,
    pub eval_per_s_core: f64,
    /// The training transform from RGB bytes with a shorter side of 256 pixels.
    pub raw_train_per_s_core: f64,
    /// Files to mixed batches, with one and with two worker threads.
    pub loader_1_per_s: f64,
    pub loader_2_per_s: f64,
    /// Milliseconds of each part of one training transform.
    pub train_ms: Parts,
    pub raw_train_ms: Parts,
}

#[derive(Debug, Serialize)]
pub struct Parts {
    pub decode: f64,
    pub resample: f64,
    pub operations: f64,
    pub normalise: f64,
    pub erase: f64,
}

/// Measures the default recipe on every JPEG and PNG below a folder, in memory but for the loader.
pub fn measure(folder: &Path, passes: usize) -> Result<Report> {
    let files = Arc::new(Folder::flat(folder)?);
    let images = read(files.as_ref())?;
    let config = Config::parse("", &[])?;
    let (size, count) = (config.model.image_size, images.len());
    let recipe = Recipe::new(&config);
    let mut out = vec![0.0; 3 * size * size];
    let mut decoder = Decoder::new()?;
    let decode = rate(passes, &images, |_, image| {
        let (height, width) = decoder.open(&image.bytes, image.stored)?;
        decoder.view(&image.bytes, Region { left: 0, top: 0, width, height }, 1)?;
        Ok(())
    })?;
    let mut bench = recipe.workbench()?;
    let evaluate = rate(passes, &images, |_, image| recipe.evaluate(&mut bench, &image.bytes, image.stored, &mut out))?;
    let mut train = |images: &[Image]| -> Result<(f64, Parts)> {
        let mut bench = recipe.workbench()?;
        let rate = rate(passes, images, |key, image| {
            recipe.train(&mut bench, &image.bytes, image.stored, &mut Random::new(&[key]), &mut out)
        })?;
        Ok((rate, Parts::of(&bench.spent, passes * count)))
    };
    let (encoded_rate, train_ms) = train(&images)?;
    let (raw_rate, raw_train_ms) = train(&raw(&images)?)?;
    Ok(Report {
        images: count,
        mean_bytes: images.iter().map(|image| image.bytes.len()).sum::<usize>() / count,
        decode_per_s_core: decode,
        train_per_s_core: encoded_rate,
        eval_per_s_core: evaluate,
        raw_train_per_s_core: raw_rate,
        loader_1_per_s: loader(&files, passes, 1)?,
        loader_2_per_s: loader(&files, passes, 2)?,
        train_ms,
        raw_train_ms,
    })
}

struct Image {
    bytes: Vec<u8>,
    stored: Stored,
}

fn read(files: &Folder) -> Result<Vec<Image>> {
    let read = |index: usize| {
        let mut bytes = Vec::new();
        let stored = files.read(index, &mut bytes).with_context(|| files.name(index))?;
        Ok(Image { bytes, stored })
    };
    (0..files.len()).map(read).collect()
}

/// The same images as RGB bytes, resized to a shorter side of 256.
fn raw(images: &[Image]) -> Result<Vec<Image>> {
    let (mut decoder, mut resample, mut pixels) = (Decoder::new()?, Resample::default(), Pixels::default());
    let mut one = |image: &Image| {
        let (height, width) = decoder.open(&image.bytes, image.stored)?;
        let short = height.min(width);
        let whole = Region { left: 0, top: 0, width, height };
        let view = decoder.view(&image.bytes, whole, 1)?;
        let (height, width) = (height * 256 / short, width * 256 / short);
        pixels.resize(height, width);
        resample.resample(&view, whole.area(), whole, &mut pixels)?;
        let bytes = pixels.rgbx.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect();
        Ok(Image { bytes, stored: Stored::Raw { height, width } })
    };
    images.iter().map(&mut one).collect()
}

/// Images per second of some work on each, after a first few that are not counted.
fn rate(passes: usize, images: &[Image], mut work: impl FnMut(u64, &Image) -> Result<()>) -> Result<f64> {
    for image in images.iter().take(20) {
        work(0, image)?;
    }
    let began = Instant::now();
    for pass in 0..passes {
        for (index, image) in images.iter().enumerate() {
            work((pass * images.len() + index) as u64, image)?;
        }
    }
    Ok((passes * images.len()) as f64 / began.elapsed().as_secs_f64())
}

fn loader(files: &Arc<Folder>, passes: usize, workers: usize) -> Result<f64> {
    const BATCH: usize = 32;
    let count = files.len();
    let batch = BATCH.min(count / 2 * 2);
    let sets = [format!("train.global_batch={batch}"), format!("run.workers={workers}"), "data.repeats=1".into()];
    let plan = Plan::new(Config::parse("", &sets)?, count)?;
    let split = Split::Stored(files.clone());
    let source = Source { train: split.clone(), test: split, bad: Arc::new(BadImages::new(0)) };
    let mut loader = Loader::start(&plan, &plan.phase(&META, None), &source, 0, 1, 0);
    let batches = (passes * count).div_ceil(batch);
    // What was made ahead before the clock started must not count.
    for batch in loader.by_ref().take(4 * workers) {
        batch?;
    }
    let began = Instant::now();
    for batch in loader.take(batches) {
        batch?;
    }
    Ok((batches * batch) as f64 / began.elapsed().as_secs_f64())
}

impl Parts {
    fn of(spent: &Spent, images: usize) -> Parts {
        let [decode, resample, operations, normalise, erase] =
            spent.parts().map(|part| part.as_secs_f64() * 1e3 / images as f64);
        Parts { decode, resample, operations, normalise, erase }
    }
}

/// The report for people.
pub fn text(r: &Report) -> String {
    let parts = |p: &Parts| {
        format!(
            "decode {:.3}, resample {:.3}, operations {:.3}, normalise {:.3}, erase {:.3}",
            p.decode, p.resample, p.operations, p.normalise, p.erase
        )
    };
    format!(
        "{} images of {} bytes on average; images per second and core:\n\
         decode {:.0}, training {:.0}, evaluation {:.0}, training from raw 256 {:.0}\n\
         loader with 1 worker {:.0}/s, with 2 workers {:.0}/s\n\
         ms of a training image: {}\n\
         ms from raw 256:        {}\n",
        r.images,
        r.mean_bytes,
        r.decode_per_s_core,
        r.train_per_s_core,
        r.eval_per_s_core,
        r.raw_train_per_s_core,
        r.loader_1_per_s,
        r.loader_2_per_s,
        parts(&r.train_ms),
        parts(&r.raw_train_ms)
    )
}
