//! Loads batches of test images. Worker threads make the batches before they are needed.

use super::Feed;
use super::ahead::Ahead;
use super::batch_memory::{BatchMemory, Borrowed, allocate, batch_bytes, shape};
use super::images::{BatchImages, Handover, kind, out};
use super::objects::ObjectReading;
use super::pairs::PairReading;
use super::reader::{Reader, Reading};
use crate::config::{Config, TaskKind};
use crate::data::image::erase::Erased;
use crate::random::Random;
use anyhow::Result;
use std::ops::Range;
use tch::Tensor;

/// Test images, transformed for evaluation. For a GPU, images with classes are in pinned memory.
pub struct TestBatch {
    /// For classification and detection, one entry with all images of the batch. For segmentation, an entry for each scale of the
    /// evaluation with the batch's only image.
    pub images: Vec<BatchImages>,
    /// For classification, the class of each image (batch). For segmentation, the label map of the only image (1, row, column), at
    /// the image's original size. For detection, the objects of the only image in fp64 (1, number), in pixels of the image's
    /// original size.
    pub labels: Tensor,
    /// The memory of the images, if it is reused.
    _memory: Option<Borrowed>,
}

/// Batches in order. An item may be an error.
pub type TestBatches = Box<dyn Iterator<Item = Result<TestBatch>>>;

/// Streams the test images of `range` in order. Leaves out unreadable images, so a batch may be empty. Images with classes come in
/// batches of at most `size` images, but never more than 128. Images with label maps or objects come one by one.
pub fn test_batches(
    config: &Config,
    feed: Feed,
    range: Range<usize>,
    size: usize,
    handover: Handover,
) -> Result<TestBatches> {
    match config.task {
        TaskKind::Classification => Ok(Box::new(of_one_size(config, feed, range, size, handover)?)),
        TaskKind::Segmentation => Ok(Box::new(with_maps(config, feed, range)?)),
        TaskKind::Detection => Ok(Box::new(with_objects(config, feed, range)?)),
    }
}

/// Images with label maps, one by one.
fn with_maps(
    config: &Config,
    feed: Feed,
    range: Range<usize>,
) -> Result<impl Iterator<Item = Result<TestBatch>> + use<>> {
    let reading = PairReading::new(config, &feed.source.test, &feed.source.bad);
    one_by_one(feed.workers, reading.largest_bytes(), range, move || {
        let mut reader = reading.reader();
        move |index| reader.evaluate(index)
    })
}

/// Images with objects, one by one.
fn with_objects(
    config: &Config,
    feed: Feed,
    range: Range<usize>,
) -> Result<impl Iterator<Item = Result<TestBatch>> + use<>> {
    let reading = ObjectReading::new(config, &feed.source.test, &feed.source.bad);
    one_by_one(feed.workers, reading.image_bytes(), range, move || {
        let mut reader = reading.reader();
        move |index| reader.evaluate(index)
    })
}

/// Batches of one image each. An image takes about `bytes` bytes. Sizes may differ, so no memory is reused. `reader` makes the
/// reader of a worker.
fn one_by_one<R>(
    workers: usize,
    bytes: usize,
    range: Range<usize>,
    reader: impl Fn() -> R,
) -> Result<impl Iterator<Item = Result<TestBatch>>>
where
    R: FnMut(usize) -> Result<(Vec<Tensor>, Tensor)> + Send + 'static,
{
    Ahead::start(workers, bytes, move || {
        let (mut read, range) = (reader(), range.clone());
        move |number| {
            let index = range.start + number;
            let make = || {
                let (images_bchw, labels) = read(index)?;
                let images = images_bchw.into_iter().map(BatchImages::from).collect();
                Ok(TestBatch { images, labels, _memory: None })
            };
            range.contains(&index).then(make)
        }
    })
}

/// Images with classes, which all have the size of the model's input, in batches.
fn of_one_size(
    config: &Config,
    feed: Feed,
    range: Range<usize>,
    size: usize,
    handover: Handover,
) -> Result<impl Iterator<Item = Result<TestBatch>> + use<>> {
    let reading = Reading::evaluation(config, &feed.source.test, &feed.source.bad);
    let (channels, side) = (config.model.channels(), config.model.image_size());
    let size = size.min(LARGEST_BATCH);
    let batches = range.len().div_ceil(size);
    let memory = BatchMemory::default();
    let workers = feed.workers;
    let (staging, numbers) = (handover.staging(), handover.numbers(config));
    let kind = kind(&numbers);
    Ahead::start(workers, batch_bytes([size, channels, side], kind, staging.is_pinned()), move || {
        let (mut reader, range) = (reading.reader(), range.clone());
        let (memory, staging) = (memory.clone(), staging.clone());
        let numbers = numbers.as_ref().map(Tensor::shallow_clone);
        move |number| {
            let start = range.start + number * size;
            let batch = start..(start + size).min(range.end);
            let shape = shape(batch.len(), channels, side);
            let make = || {
                let (mut images_bchw, memory) = allocate(&memory, (shape, kind), &staging, workers)?;
                let labels = read_batch(&mut reader, &mut images_bchw, batch)?;
                let images_bchw = images_bchw.narrow(0, 0, labels.len() as i64);
                // An evaluation has no RandomErasing.
                let images = vec![BatchImages::written(images_bchw, &Erased::default(), &numbers, &staging)];
                Ok(TestBatch { images, labels: Tensor::from_slice(&labels), _memory: memory })
            };
            (number < batches).then(make)
        }
    })
}

/// The largest number of images in a batch. It is enough to keep a device busy without a backward pass.
const LARGEST_BATCH: usize = 128;

/// Reads the images of `range` into a host tensor, in order, and returns their labels. An unreadable image leaves no gap in the
/// batch.
fn read_batch(reader: &mut Reader, images_bchw: &mut Tensor, range: Range<usize>) -> Result<Vec<i64>> {
    let mut labels: Vec<i64> = Vec::with_capacity(range.len());
    let mut erased = Erased::default();
    for index in range {
        let out = out(images_bchw, labels.len(), &mut erased);
        labels.extend(reader.read_this(index, &Random::new(&[]), out)?.map(i64::from));
    }
    Ok(labels)
}
