//! Batches of test images ahead of whoever looks at them.

use super::ahead::Ahead;
use super::batch_memory::{Lent, Spare, batch_bytes, room, shape};
use super::loader::workers;
use super::reader::{Reader, Reading};
use crate::config::Config;
use crate::data::source::Source;
use crate::random::Random;
use crate::weights::floats_mut;
use anyhow::Result;
use std::ops::Range;
use tch::{Device, Tensor};

/// Test images without augmentation. For a GPU they are in pinned memory.
pub struct TestBatch {
    /// (batch, channel, row, column), normalised.
    pub images_bchw: Tensor,
    /// The class of each.
    pub labels_b: Tensor,
    /// The images' memory, used again once the batch is dropped.
    _lent: Option<Lent>,
}

/// The test images of `range` in batches of `size` at most, and of no more than 128, in order; unreadable ones are left out.
pub fn test_batches(
    config: &Config,
    source: &Source,
    range: Range<usize>,
    size: usize,
    device: Device,
) -> impl Iterator<Item = Result<TestBatch>> + use<> {
    let reading = Reading::evaluation(config, &source.test, &source.bad);
    let (channels, side) = (config.model.channels(), config.model.image_size());
    let size = size.min(MOST_TESTED);
    let batches = range.len().div_ceil(size);
    let spare = Spare::default();
    Ahead::start(workers(config), batch_bytes(size, channels, side, device.is_cuda()), move || {
        let (mut reader, range, spare) = (reading.reader(), range.clone(), spare.clone());
        move |number| {
            let start = range.start + number * size;
            let batch = start..(start + size).min(range.end);
            let shape = shape(batch.len(), channels, side);
            (number < batches).then(|| test_batch(&mut reader, room(&spare, shape, device), batch))
        }
    })
}

/// Enough to fill a device that only looks at them.
const MOST_TESTED: usize = 128;

fn test_batch(
    reader: &mut Reader,
    (mut images_bchw, lent): (Tensor, Option<Lent>),
    range: Range<usize>,
) -> Result<TestBatch> {
    let image = images_bchw.numel() / range.len();
    let mut labels: Vec<i64> = Vec::with_capacity(range.len());
    let mut places = floats_mut(&mut images_bchw).chunks_exact_mut(image);
    let mut place = places.next();
    for index in range {
        let Some(out) = place.as_deref_mut() else { break };
        if let Some(label) = reader.read_this(index, &Random::new(&[]), out)? {
            labels.push(label.into());
            place = places.next();
        }
    }
    let images_bchw = images_bchw.narrow(0, 0, labels.len() as i64);
    Ok(TestBatch { images_bchw, labels_b: Tensor::from_slice(&labels), _lent: lent })
}
