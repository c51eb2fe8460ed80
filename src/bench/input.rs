//! Estimates whether the cores of a node read images as fast as its devices train on them. The estimate times the reading of some
//! of the config's images on one core. `incubate plan` and `incubate doctor` report the result.

use crate::config::{Config, DeviceChoice, Format, Precision};
use crate::data::feed::reader::Reading;
use crate::data::feed::workers::workers;
use crate::data::image::recipe::Recipe;
use crate::data::image::shrink::{Form, Shrink};
use crate::data::open_read_only;
use crate::data::source::bad_images::BadImages;
use crate::data::source::samples::{Split, Stored};
use crate::data::source::shard::Encoding;
use crate::device::cuda;
use crate::model::matrix_product_rate;
use crate::plan::Plan;
use crate::plan::cost::training_flops;
use crate::random::Random;
use crate::usage;
use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind};

/// The largest number of different images that are timed.
const SAMPLE: usize = 64;

/// The training images per second that one core reads and transforms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// The rate with the images as they are stored now.
    pub now: f64,
    /// The rate with the images as `incubate pack` would store them. None if the images are packed already, if they lie decoded in
    /// memory, or if all timed images are damaged.
    pub packed: Option<f64>,
    /// The rate with the images as `incubate pack --raw` would store them. None if the images are packed in this way already, if
    /// they lie decoded in memory, or if all timed images are damaged.
    pub packed_raw: Option<f64>,
}

/// The images per second that a node's devices demand, and the images per second that its cores read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InputReport {
    pub images_per_s_core: Rates,
    /// The number of cores that this process may use.
    pub cores: usize,
    /// The number of devices of a node.
    pub devices: usize,
    /// The number of cores that the data workers of all devices can use together.
    pub cores_at_work: usize,
    /// The name of the phase with the least computation per image.
    pub phase: String,
    /// The images per second that all devices together would need in that phase at their full speed. Real training needs fewer.
    pub demanded_images_per_s: f64,
    /// The images per second that `cores_at_work` cores read as the images are stored now.
    pub given_images_per_s: f64,
    /// Whether the cores read at least as many images as the devices demand.
    pub feeds: bool,
}

/// Times the reading of a config's training images on one core. Compares the rate of the cores that read images with the demand of
/// the node's `devices` devices. Each device computes `rate` floating-point operations per second.
///
/// # Errors
/// The images cannot be opened or read.
pub fn input(config: &Config, rate: f64, devices: usize) -> Result<InputReport> {
    let rates = measure(config, &open_read_only(config)?.train)?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    Ok(compare(config, rates, rate, cores, devices))
}

/// The finding of `doctor`: whether the cores of this node read images as fast as its devices train on them.
///
/// # Errors
/// The images cannot be opened or read, or the cores read fewer images per second than the devices demand. In the second case the
/// error names cures.
pub fn finding(config: &Config) -> Result<String> {
    let kind = if config.run.precision == Precision::Bf16 { Kind::BFloat16 } else { Kind::Float };
    let gpus = if config.run.device == DeviceChoice::Cpu { 0 } else { cuda().map_or(0, |driver| driver.gpus().len()) };
    let device = if gpus > 0 { Device::Cuda(0) } else { Device::Cpu };
    let input = input(config, matrix_product_rate((kind, device)), gpus.max(config.run.replicas).max(1))?;
    if input.feeds { Ok(input.text()) } else { Err(usage!("{}", input.text())) }
}

/// Estimates whether the cores of a node feed its devices, if `ranks` ranks in all train `plan`. Returns the JSON of
/// [`InputReport`] with its `text`. If the images cannot be opened or read, the JSON has only a `text` that says why.
pub fn of_plan(plan: &Plan, ranks: usize, rate: f64) -> Value {
    let slurm = &plan.config.slurm;
    let devices = plan.replicas_per_rank() * ranks.min(slurm.ranks.div_ceil(slurm.nodes));
    let described = input(&plan.config, rate, devices).and_then(|input| {
        let mut value = serde_json::to_value(&input)?;
        value["text"] = input.text().into();
        Ok(value)
    });
    described.unwrap_or_else(|error| json!({"text": format!("not measured: {error:#}")}))
}

fn compare(config: &Config, rates: Rates, rate: f64, cores: usize, devices: usize) -> InputReport {
    let plan = Plan::without_data(config.clone());
    let demands =
        plan.wanted_phases().into_iter().map(|phase| (rate / training_flops(&config.model, &phase), phase.name));
    let (per_device, phase) = demands.max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are phases");
    let cores_at_work = (workers(config, cores, devices) * devices).min(cores);
    let (demanded, given) = (per_device * devices as f64, rates.now * cores_at_work as f64);
    InputReport {
        images_per_s_core: rates,
        cores,
        devices,
        cores_at_work,
        phase,
        demanded_images_per_s: demanded,
        given_images_per_s: given,
        feeds: given >= demanded,
    }
}

impl InputReport {
    /// One line for people with the verdict. If the cores read too few images, the line also names cures.
    pub fn text(&self) -> String {
        let InputReport { images_per_s_core: rates, cores, devices, demanded_images_per_s: demanded, .. } = self;
        let found = format!(
            "a core reads {:.0} images/s, and {} of {cores} core(s) read {:.0}; {devices} device(s) at full speed train on {demanded:.0} \
             in phase {}",
            rates.now, self.cores_at_work, self.given_images_per_s, self.phase
        );
        if self.feeds {
            return format!("{found}: this node feeds them");
        }
        let needs = |rate: f64| (demanded / rate).ceil();
        let mut cures = Vec::new();
        if self.cores_at_work + devices <= *cores && rates.now * *cores as f64 >= *demanded {
            cures.push("run.workers = 0 (as many as the cores allow) or more workers than now".into());
        }
        cures.push(format!("{:.0} cores for data", needs(rates.now)));
        for (name, rate) in [("`incubate pack`", rates.packed), ("`incubate pack --raw`", rates.packed_raw)] {
            cures.extend(rate.map(|rate| format!("{name} with {:.0} cores ({rate:.0} images/s each)", needs(rate))));
        }
        let share = 100.0 * self.given_images_per_s / demanded;
        format!("{found}: this node feeds {share:.0} % of that; it would take {}", cures.join(", or "))
    }
}

/// Reads and transforms images on the calling thread as training does, and times this. The images are evenly spread over the split.
/// The same images are also timed as `incubate pack` would store them.
///
/// # Errors
/// The operating system fails to read an image. A damaged image is no error.
pub fn measure(config: &Config, split: &Split) -> Result<Rates> {
    let images = split.len();
    let count = SAMPLE.min(images);
    let sample: Vec<usize> = (0..count).map(|i| i * images / count).collect();
    let mut out = vec![0.0; config.model.channels() * config.model.image_size().pow(2)];
    // Warnings name the damaged images. The rate `now` counts them, and the packed rates leave them out.
    let mut reader = Reading::training(config, split, &Arc::new(BadImages::new(count))).reader();
    let now = rate(count, |i, key| reader.read_this(sample[i], &Random::new(&[key]), &mut out).map(drop))?;
    if split.planes().is_some() {
        return Ok(Rates { now, packed: None, packed_raw: None });
    }
    let (mut shrink, mut packed, mut raw) = (Shrink::new()?, Vec::new(), Vec::new());
    let mut bytes = Vec::new();
    let mut is_raw = false;
    for &index in &sample {
        let Ok((stored, image)) = split.read(index, &mut bytes).and_then(|stored| {
            is_raw |= stored != Stored::Encoded;
            Ok((stored, shrink.shrink(&bytes, stored, Form::usual(Encoding::Raw))?))
        }) else {
            continue;
        };
        if config.data.format != Format::Packed {
            packed.push((shrink.shrink(&bytes, stored, Form::usual(Encoding::Jpeg))?.bytes, Stored::Encoded));
        }
        raw.push((image.bytes, Stored::Raw { height: image.height, width: image.width }));
    }
    if is_raw {
        raw.clear();
    }
    let recipe = Recipe::new(config);
    let mut workbench = recipe.workbench()?;
    let mut of = |images: &[(Vec<u8>, Stored)]| -> Result<Option<f64>> {
        let mut train = |i: usize, key| {
            let (bytes, stored) = &images[i];
            recipe.train(&mut workbench, bytes, *stored, &mut Random::new(&[key]), &mut out)
        };
        if images.is_empty() { Ok(None) } else { rate(images.len(), &mut train).map(Some) }
    };
    Ok(Rates { now, packed: of(&packed)?, packed_raw: of(&raw)? })
}

/// The images per second of `work` on `count` images. `work` gets the position of an image, and a running number of the call. After
/// up to four untimed calls, all images are processed again and again until at least 0.1 s have passed.
fn rate(count: usize, mut work: impl FnMut(usize, u64) -> Result<()>) -> Result<f64> {
    const ENOUGH: Duration = Duration::from_millis(100);
    (0..count.min(4)).try_for_each(|i| work(i, 0))?;
    let (began, mut done) = (Instant::now(), 0);
    while done == 0 || began.elapsed() < ENOUGH {
        (0..count).try_for_each(|i| work(i, (done + i) as u64))?;
        done += count;
    }
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::image::decode::jpeg;
    use crate::data::source::folder::Folder;

    fn config(sets: &[&str]) -> Config {
        Config::parse("", &sets.iter().map(|set| set.to_string()).collect::<Vec<_>>()).unwrap()
    }

    const RATES: Rates = Rates { now: 1000.0, packed: Some(2000.0), packed_raw: Some(4000.0) };

    #[test]
    fn the_cores_are_compared_with_what_the_devices_ask_for_in_the_cheapest_phase() {
        // The cheapest phase is the last module of ViT-B: three blocks train behind three thin stages, about 35 GFLOPs per image.
        let input = compare(&config(&[]), RATES, 400e12, 32, 8);
        assert_eq!((input.phase.as_str(), input.cores_at_work), ("module-3", 24));
        assert!((60e3..150e3).contains(&input.demanded_images_per_s), "{input:?}");
        assert!(!input.feeds);
        let text = input.text();
        let cores = (input.demanded_images_per_s / 1000.0).ceil();
        for words in [&format!("{cores:.0} cores for data"), "incubate pack", "--raw", "feeds"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        let slow = compare(&config(&[]), RATES, 1e12, 32, 8);
        assert!(slow.feeds && slow.text().contains("this node feeds them"), "{}", slow.text());
        assert!((slow.demanded_images_per_s * 400.0 / input.demanded_images_per_s - 1.0).abs() < 1e-9);
    }

    #[test]
    fn too_few_workers_for_the_cores_that_are_there_are_named() {
        let input = compare(&config(&["run.workers=1"]), RATES, 40e12, 64, 2);
        assert!(!input.feeds && input.text().contains("run.workers"), "{}", input.text());
    }

    #[test]
    fn images_of_a_folder_are_measured_as_they_are_and_as_they_would_be_packed() {
        let folder = tempfile::tempdir().unwrap();
        let rgb: Vec<u8> = (0..3 * 300 * 400).map(|i| (i / 7) as u8).collect();
        for number in 0..5 {
            let file = jpeg::encode(&rgb, 300, 400, 90).unwrap();
            std::fs::write(folder.path().join(format!("{number}.jpg")), file).unwrap();
        }
        // A damaged image does not make the measurement fail.
        std::fs::write(folder.path().join("2.jpg"), b"").unwrap();
        let split: Split = Arc::new(Folder::flat(folder.path()).unwrap());
        let rates = measure(&config(&[]), &split).unwrap();
        assert!(rates.now > 0.0 && rates.packed.unwrap() > 0.0 && rates.packed_raw.unwrap() > 0.0, "{rates:?}");
    }
}
