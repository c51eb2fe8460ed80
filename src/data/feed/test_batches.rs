//! Loads batches of test images. Worker threads make them before they are needed.

use super::Feed;
use super::ahead::Ahead;
use super::batch_memory::{BatchMemory, Borrowed, allocate, batch_bytes, shape};
use super::objects::ObjectReading;
use super::pairs::PairReading;
use super::reader::{Reader, Reading};
use crate::config::{Config, TaskKind};
use crate::random::Random;
use crate::weights::{Staging, floats_mut};
use anyhow::Result;
use std::ops::Range;
use tch::Tensor;

/// Test images, transformed for evaluation. For a GPU, images of one size are in pinned memory.
pub struct TestBatch {
    /// (batch, channel, row, column), normalised: one tensor, or a tensor of the only image for each scale of the evaluation.
    pub images_bchw: Vec<Tensor>,
    /// The class of each image (batch), the label map of the only image (1, row, column) at its own size, or the objects of the only
    /// image (1, number) in its own pixels.
    pub labels: Tensor,
    /// The memory of the images, if it is reused.
    _memory: Option<Borrowed>,
}

/// Batches in order, or the error that ends them.
pub type TestBatches = Box<dyn Iterator<Item = Result<TestBatch>>>;

/// Streams the test images of `range` in order. Leaves out unreadable images. Images of one size come in batches of at most `size` and at
/// most 128, images with label maps or objects one by one.
pub fn test_batches(
    config: &Config,
    feed: Feed,
    range: Range<usize>,
    size: usize,
    staging: Staging,
) -> Result<TestBatches> {
    match config.task {
        TaskKind::Classification => Ok(Box::new(of_one_size(config, feed, range, size, staging)?)),
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

/// Batches of one image each. Their sizes may differ, so no memory is reused. `reader` makes the reader of a worker.
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
                Ok(TestBatch { images_bchw, labels, _memory: None })
            };
            range.contains(&index).then(make)
        }
    })
}

fn of_one_size(
    config: &Config,
    feed: Feed,
    range: Range<usize>,
    size: usize,
    staging: Staging,
) -> Result<impl Iterator<Item = Result<TestBatch>> + use<>> {
    let reading = Reading::evaluation(config, &feed.source.test, &feed.source.bad);
    let (channels, side) = (config.model.channels(), config.model.image_size());
    let size = size.min(LARGEST_BATCH);
    let batches = range.len().div_ceil(size);
    let memory = BatchMemory::default();
    let workers = feed.workers;
    Ahead::start(workers, batch_bytes(size, channels, side, staging.is_pinned()), move || {
        let (mut reader, range) = (reading.reader(), range.clone());
        let (memory, staging) = (memory.clone(), staging.clone());
        move |number| {
            let start = range.start + number * size;
            let batch = start..(start + size).min(range.end);
            let shape = shape(batch.len(), channels, side);
            let make = || test_batch(&mut reader, allocate(&memory, shape, &staging, workers)?, batch);
            (number < batches).then(make)
        }
    })
}

/// The largest batch, which is enough to keep a device busy without a backward pass.
const LARGEST_BATCH: usize = 128;

/// Reads the images of `range` in order. An unreadable image leaves no gap in the batch.
fn test_batch(
    reader: &mut Reader,
    (mut images_bchw, memory): (Tensor, Option<Borrowed>),
    range: Range<usize>,
) -> Result<TestBatch> {
    let image = images_bchw.numel() / range.len();
    let mut labels: Vec<i64> = Vec::with_capacity(range.len());
    let mut outs = floats_mut(&mut images_bchw).chunks_exact_mut(image);
    let mut next = outs.next();
    for index in range {
        let Some(out) = next.as_deref_mut() else { break };
        if let Some(label) = reader.read_this(index, &Random::new(&[]), out)? {
            labels.push(label.into());
            next = outs.next();
        }
    }
    let images_bchw = images_bchw.narrow(0, 0, labels.len() as i64);
    Ok(TestBatch { images_bchw: vec![images_bchw], labels: Tensor::from_slice(&labels), _memory: memory })
}
