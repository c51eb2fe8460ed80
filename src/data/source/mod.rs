//! Where images come from: stored or drawn images of a training and a test split, each with its label and a name. A new
//! source is one file that implements [`samples::Samples`].

pub mod bad_images;
mod cifar;
pub mod folder;
mod idx;
pub mod images;
pub mod index;
pub mod names;
mod open_files;
pub mod packed;
pub mod samples;
mod shapes;
pub mod shard;
mod tar;

use crate::config::{Config, Format};
use crate::launcher::launched_rank;
use crate::{require, usage};
use anyhow::Result;
use bad_images::BadImages;
use index::Cache;
use samples::{Samples, Split, subset};
use std::path::Path;
use std::sync::Arc;

/// Training and test images of a config's source.
#[derive(Clone)]
pub struct Source {
    pub train: Split,
    pub test: Split,
    /// Those met so far, in both splits.
    pub bad: Arc<BadImages>,
}

/// Opens the config's source for its run: what is costly to find out, and which images are unreadable, is kept in the run
/// directory.
///
/// # Errors
/// A usage error that names the file if anything is missing, malformed or does not fit the model.
pub fn open(config: &Config) -> Result<Source> {
    let bad = Arc::new(BadImages::of_run(config.data.bad_images, &config.run.dir));
    checked(Source { bad, ..open_with(config, true)? }, config)
}

/// As [`open`], but writes nothing.
pub fn open_read_only(config: &Config) -> Result<Source> {
    checked(open_with(config, false)?, config)
}

fn checked(source: Source, config: &Config) -> Result<Source> {
    check(&source.train, "train", config)?;
    check(&source.test, "test", config)?;
    Ok(Source { train: subset(source.train, config.data.train_fraction, config.run.seed), ..source })
}

/// As [`open`], whole and whatever model the config describes.
pub fn open_unchecked(config: &Config) -> Result<Source> {
    open_with(config, true)
}

fn open_with(config: &Config, keep: bool) -> Result<Source> {
    let data = &config.data;
    require!(
        data.format == Format::Shapes || !data.path.as_os_str().is_empty(),
        "data.path is empty: name the folder of the images, or set data.format = \"shapes\" for drawn ones"
    );
    let run = &config.run.dir;
    let cache = (!run.as_os_str().is_empty()).then(|| Cache { path: run.join(CACHE), keep });
    let cache = cache.as_ref();
    let (train, test) = match data.format {
        Format::Idx => shared(idx::open(&data.path)?),
        Format::Cifar10 => shared(cifar::open(&data.path, cifar::Variant::Ten)?),
        Format::Cifar100 => shared(cifar::open(&data.path, cifar::Variant::Hundred)?),
        Format::Shapes => shared(shapes::draw(config)),
        Format::Folder => shared(folder::open(&data.path, cache)?),
        Format::Tar => shared(tar::open(&data.path, cache)?),
        Format::Packed => shared(packed::open(&data.path)?),
    };
    let bad = Arc::new(BadImages::new(data.bad_images));
    Ok(Source { train, test, bad })
}

/// The folder of the run directory where indexes of large sources are kept.
const CACHE: &str = "index";

/// The format of the stored images in a folder, if they are of one that is known by its names.
pub fn format_of(folder: &Path) -> Option<Format> {
    if packed::files(folder, "train").is_ok_and(|shards| !shards.is_empty()) {
        return Some(Format::Packed);
    }
    if tar::is_there(folder) {
        return Some(Format::Tar);
    }
    folder.join("train").is_dir().then_some(Format::Folder)
}

fn shared<S: Samples + 'static>((train, test): (S, S)) -> (Split, Split) {
    (Arc::new(train), Arc::new(test))
}

fn check(split: &Split, name: &str, config: &Config) -> Result<()> {
    let (model, data) = (&config.model, &config.data);
    let path = data.path.display();
    require!(!split.is_empty(), "{path}: the {name} split holds no images");
    // Other images are decoded to RGB and resized to the model's size.
    let (channels, size) = split.planes().unwrap_or((3, model.image_size()));
    require!(
        (channels, size) == (model.channels(), model.image_size()),
        "{path}: {name} images are {channels}×{size}×{size} (channels × height × width), but the model takes {}×{}×{}; set \
         model.channels = {channels} and model.image_size = {size}",
        model.channels(),
        model.image_size(),
        model.image_size(),
    );
    let named = split.classes().len();
    if name == "train" && named > 0 && named < model.classes() && launched_rank() == 0 {
        log::warn!("{path}: {named} classes, but model.classes = {}; set it to {named}", model.classes());
    }
    let beyond = (0..split.len()).find(|&index| split.label(index) as usize >= model.classes());
    if let Some(index) = beyond {
        return Err(usage!(
            "{path}: {name} {} has label {}, but model.classes = {}; set model.classes to at least {}",
            split.name(index),
            split.label(index),
            model.classes(),
            split.label(index) + 1
        ));
    }
    let expected = if name == "train" { data.train_images } else { data.test_images };
    require!(
        expected == 0 || expected == split.len(),
        "{path}: the {name} split holds {} images, but data.{name}_images = {expected}; correct the key or the path",
        split.len()
    );
    Ok(())
}

/// How many training images a run will use, without the data where the config says it.
pub fn train_images(config: &Config) -> Result<usize> {
    let data = &config.data;
    if data.train_images > 0 {
        return Ok((data.train_images as f64 * data.train_fraction).round() as usize);
    }
    Ok(open_read_only(config)?.train.len())
}
