//! Sources of images with classes, label maps or objects. The images are read from files or drawn by the program. A source has a
//! training split and an evaluation split, which implement [`samples::Samples`]. Each kind of source has a module that opens both
//! splits.

pub mod bad_images;
mod cifar;
mod coco;
mod drawn_maps;
mod drawn_objects;
mod drawn_shapes;
pub mod files;
pub mod folder;
mod idx;
pub mod images;
pub mod index;
mod listed;
mod listing_hash;
pub mod names;
mod open_files;
pub mod packed;
mod pairs;
pub mod samples;
mod shapes;
pub mod shard;
mod splits;
mod tar;
mod tar_scan;

use crate::config::{Config, Format, MapFormat, ObjectFormat, TaskKind};
use crate::launcher::launched_rank;
use crate::{require, usage};
use anyhow::Result;
use bad_images::BadImages;
use index::IndexFolder;
pub use listing_hash::data_set;
use samples::{Samples, Split, subset, subset_size};
use splits::TRAINING;
use std::path::Path;
use std::sync::Arc;

/// The training and evaluation images of a config.
#[derive(Clone)]
pub struct Source {
    pub train: Split,
    /// The evaluation images.
    pub test: Split,
    /// Skips and counts the unreadable images of both splits.
    pub bad: Arc<BadImages>,
}

/// Opens the config's source. The run directory keeps the names of unreadable images. If the source is a folder or tars of images
/// with classes, the run directory also keeps its indexes.
///
/// # Errors
/// A usage error that names the file, if anything is missing or malformed, or if the images do not fit the config;
/// [`Failure::Damaged`](crate::error::Failure::Damaged) if a shard of a pack is damaged.
pub fn open(config: &Config) -> Result<Source> {
    let bad = Arc::new(BadImages::of_run(config.data.bad_images, &config.run.dir));
    checked(Source { bad, ..open_with(config, true)? }, config)
}

/// Opens the config's source as [`open`] does, but writes nothing. Only the unreadable images of this process count.
pub fn open_read_only(config: &Config) -> Result<Source> {
    checked(open_with(config, false)?, config)
}

/// For classification, checks that both splits fit the config, and keeps `data.train_fraction` of the training images. For other
/// tasks, returns the source unchanged.
fn checked(source: Source, config: &Config) -> Result<Source> {
    if config.task != TaskKind::Classification {
        return Ok(source);
    }
    check(&source.train, "train", config)?;
    check(&source.test, "test", config)?;
    Ok(Source { train: subset(source.train, config.data.train_fraction, config.run.seed), ..source })
}

/// Opens the config's source with all training images, whatever `data.train_fraction` says. Does not check that the images fit
/// the config.
pub fn open_unchecked(config: &Config) -> Result<Source> {
    open_with(config, true)
}

fn open_with(config: &Config, may_write: bool) -> Result<Source> {
    match config.task {
        TaskKind::Classification => {}
        TaskKind::Segmentation => return open_maps(config),
        TaskKind::Detection => return open_objects(config),
    }
    let data = &config.data;
    require!(
        data.format == Format::Shapes || !data.path.as_os_str().is_empty(),
        "data.path is empty: name the folder of the images, or set data.format = \"shapes\" for drawn ones"
    );
    let run = &config.run.dir;
    let indexes = (!run.as_os_str().is_empty()).then(|| IndexFolder { path: run.join(INDEXES), may_write });
    let (train, test) = match data.format {
        Format::Idx => shared(idx::open(&data.path)?),
        Format::Cifar10 => shared(cifar::open(&data.path, cifar::Variant::Ten)?),
        Format::Cifar100 => shared(cifar::open(&data.path, cifar::Variant::Hundred)?),
        Format::Shapes => shared(shapes::draw(config)),
        Format::Folder => shared(folder::open(&data.path, indexes.as_ref())?),
        Format::Tar => shared(tar::open(&data.path, indexes.as_ref())?),
        Format::Packed => shared(packed::open(&data.path)?),
    };
    for (split, name) in [(&train, "train"), (&test, "test")] {
        require!(!split.is_empty(), "{}: the {name} split holds no images; check data.path", data.path.display());
    }
    let bad = Arc::new(BadImages::new(data.bad_images));
    Ok(Source { train, test, bad })
}

/// Opens the images with label maps that the config's section `[segmentation]` names.
fn open_maps(config: &Config) -> Result<Source> {
    let keys = &config.segmentation;
    require!(
        keys.has_images(),
        "segmentation.path is empty: name the folder of the images and label maps, or set segmentation.format = \"shapes\" for \
         drawn ones"
    );
    let (train, test) = match keys.format {
        MapFormat::Folder => shared(pairs::open(&keys.path)?),
        MapFormat::Shapes => shared(drawn_maps::draw(config)),
    };
    Ok(Source { train, test, bad: Arc::new(BadImages::new(config.data.bad_images)) })
}

/// Opens the images with annotated objects that the config's section `[detection]` names.
fn open_objects(config: &Config) -> Result<Source> {
    let keys = &config.detection;
    require!(
        keys.has_images(),
        "detection.path is empty: name the folder of the images and annotations, or set detection.format = \"shapes\" for drawn \
         ones"
    );
    let (train, test) = match keys.format {
        ObjectFormat::Coco => shared(coco::open(keys)?),
        ObjectFormat::Shapes => shared(drawn_objects::draw(config)),
    };
    Ok(Source { train, test, bad: Arc::new(BadImages::new(config.data.bad_images)) })
}

/// The folder of the indexes in the run directory.
const INDEXES: &str = "index";

/// Finds out from the names of the files whether a folder is a pack, has tars, or has folders of classes. Returns none for any
/// other folder.
pub fn format_of(folder: &Path) -> Option<Format> {
    if packed::files(folder, TRAINING).is_ok_and(|shards| !shards.is_empty()) {
        return Some(Format::Packed);
    }
    if tar::has_training_tars(folder) {
        return Some(Format::Tar);
    }
    folder.join(TRAINING).is_dir().then_some(Format::Folder)
}

fn shared<S: Samples + 'static>((train, test): (S, S)) -> (Split, Split) {
    (Arc::new(train), Arc::new(test))
}

/// Checks that a split fits the model's input and classes. If the config gives a number of images, the split must have this number.
fn check(split: &Split, name: &str, config: &Config) -> Result<()> {
    let (model, data) = (&config.model, &config.data);
    let path = data.path.display();
    // Images that are not stored as planes are decoded to RGB and resized to the model's size.
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

/// The number of training images that a run uses. The source is opened only if the config does not give this number.
pub fn train_images(config: &Config) -> Result<usize> {
    let data = &config.data;
    match config.task {
        TaskKind::Classification if data.train_images > 0 => {
            // Each class keeps at least one image.
            let at_least = config.model.classes().min(data.train_images);
            Ok(subset_size(data.train_images, data.train_fraction).max(at_least))
        }
        TaskKind::Segmentation if config.segmentation.format == MapFormat::Shapes => {
            Ok(config.segmentation.train_images)
        }
        TaskKind::Detection if config.detection.format == ObjectFormat::Shapes => Ok(config.detection.train_images),
        _ => Ok(open_read_only(config)?.train.len()),
    }
}
