//! Loads micro-batches of training images. Worker threads make the micro-batches before a step needs them.

use super::Feed;
use super::ahead::Ahead;
use super::batch::{Batch, Piece, is_rows};
use super::batch_memory::{BatchMemory, allocate, batch_bytes, shape};
use super::images::{BatchImages, Handover, kind, out};
use super::objects::{ObjectReader, ObjectReading};
use super::pairs::{PairReader, PairReading};
use super::reader::{Reader, Reading};
use super::sampler::{Epoch, Sampler};
use crate::config::{Data, TaskKind};
use crate::data::image::erase::Erased;
use crate::data::image::mix::{BLOCK, Mix};
use crate::plan::{PhasePlan, Plan};
use crate::random::Random;
use crate::weights::{Staging, floats_mut};
use anyhow::Result;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Kind, Tensor};

/// The largest number of samples of a micro-batch that a worker makes at a time. So several workers share a large micro-batch.
const PIECE: usize = 64;
const _: () = assert!(BLOCK.is_multiple_of(PIECE) && PIECE.is_multiple_of(2));

/// Divides the positions of a micro-batch into pieces, at multiples of [`PIECE`] in the global batch. So each piece lies in one
/// block of [`BLOCK`] samples, which share one draw of Mixup or CutMix.
fn pieces(micro_batch: &Range<usize>) -> Vec<Range<usize>> {
    let starts = (micro_batch.start / PIECE..micro_batch.end.div_ceil(PIECE)).map(|piece| piece * PIECE);
    starts.map(|start| start.max(micro_batch.start)..(start + PIECE).min(micro_batch.end)).collect()
}

/// The endless stream of a replica's micro-batches.
pub struct Loader {
    pieces: Ahead<Result<Piece>>,
    /// For each micro-batch of a step, its positions in the global batch and its number of pieces.
    micro_batches: Vec<(Range<usize>, usize)>,
    /// The index in `micro_batches` of the next micro-batch.
    next: usize,
}

/// The state that all workers of a loader share.
struct Shared {
    images: Images,
    sampler: Sampler,
    data: Data,
    classes: usize,
    channels: usize,
    /// Height = width of the images.
    size: usize,
    handover: Handover,
    staging: Staging,
    /// The kind of the images that the workers write.
    kind: Kind,
    /// The positions in the global batch of each piece of a step, for all micro-batches of the replica.
    pieces: Vec<Range<usize>>,
    first_step: u64,
    memory: BatchMemory,
    workers: usize,
    /// The number of the epoch that a worker asked for last, and the epoch's order of images. Workers in the same epoch share the
    /// order.
    epoch: Mutex<Option<(u64, Arc<Epoch>)>>,
}

/// The images that the workers read: with classes, label maps or objects as their targets.
enum Images {
    OfClasses(Arc<Reading>),
    WithMaps(Arc<PairReading>),
    WithObjects(Arc<ObjectReading>),
}

/// The reader of one worker.
enum AnyReader {
    OfClasses(Reader),
    WithMaps(PairReader),
    WithObjects(ObjectReader),
}

/// The state of one worker.
struct Worker {
    shared: Arc<Shared>,
    reader: AnyReader,
    /// [`Handover::numbers`]
    numbers: Option<Tensor>,
    /// The number of the epoch of the worker's last piece, and the epoch's order of images. None before the first piece.
    epoch: Option<(u64, Arc<Epoch>)>,
}

/// The part of the random keys for Mixup and CutMix. No other random numbers of a phase use this part.
const MIX_KEY: u64 = 3;

impl Loader {
    /// Starts the workers of one replica in a phase that begins or continues at `first_step`. `micro_batches` are the positions of
    /// the replica's micro-batches in every global batch.
    ///
    /// # Errors
    /// A usage error if a thread cannot be started.
    pub fn start(
        plan: &Plan,
        phase: &PhasePlan,
        feed: Feed,
        micro_batches: Vec<Range<usize>>,
        first_step: u64,
        handover: Handover,
    ) -> Result<Loader> {
        let (config, source) = (&plan.config, feed.source);
        let (staging, numbers) = (handover.staging(), handover.numbers(config));
        let shared = Arc::new(Shared {
            images: match config.task {
                TaskKind::Classification => Images::OfClasses(Reading::training(config, &source.train, &source.bad)),
                TaskKind::Segmentation => Images::WithMaps(PairReading::new(config, &source.train, &source.bad)),
                TaskKind::Detection => Images::WithObjects(ObjectReading::new(config, &source.train, &source.bad)),
            },
            sampler: Sampler {
                images: source.train.len(),
                repeats: config.data.repeats,
                global_batch: phase.training.global_batch,
                steps_per_epoch: phase.steps_per_epoch,
                seed: phase.seed,
            },
            data: config.data.clone(),
            classes: config.model.classes(),
            channels: config.model.channels(),
            size: config.model.image_size(),
            handover,
            staging,
            kind: kind(&numbers),
            pieces: micro_batches.iter().flat_map(pieces).collect(),
            first_step,
            memory: BatchMemory::default(),
            workers: feed.workers,
            epoch: Mutex::new(None),
        });
        let largest = shared.pieces.iter().map(Range::len).max().unwrap_or(0);
        let bytes = batch_bytes([largest, shared.channels, shared.size], shared.kind, shared.staging.is_pinned());
        let made = Ahead::start(feed.workers, bytes, || {
            let numbers = numbers.as_ref().map(Tensor::shallow_clone);
            let mut worker = Worker { shared: shared.clone(), reader: shared.images.reader(), numbers, epoch: None };
            move |number| Some(worker.make(number))
        })?;
        let counted = |micro_batch: Range<usize>| (micro_batch.clone(), pieces(&micro_batch).len());
        Ok(Loader { pieces: made, micro_batches: micro_batches.into_iter().map(counted).collect(), next: 0 })
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    /// Waits for the next micro-batch. The stream has no end, but an item may be an error.
    fn next(&mut self) -> Option<Result<Batch>> {
        let (positions, count) = &self.micro_batches[self.next];
        self.next = (self.next + 1) % self.micro_batches.len();
        let piece = |_| self.pieces.next().expect("workers run until the loader is dropped");
        let pieces = (0..*count).map(piece).collect::<Result<Vec<Piece>>>();
        Some(pieces.map(|pieces| Batch { pieces, positions: positions.clone() }))
    }
}

impl Images {
    fn reader(&self) -> AnyReader {
        match self {
            Images::OfClasses(reading) => AnyReader::OfClasses(reading.reader()),
            Images::WithMaps(reading) => AnyReader::WithMaps(reading.reader()),
            Images::WithObjects(reading) => AnyReader::WithObjects(reading.reader()),
        }
    }
}

impl Shared {
    /// Writes the images of these samples, and mixes them unless a device will mix them. If the images are bytes, `erased` receives
    /// the noise of RandomErasing. Returns the mixed targets. Also returns the mixing if a device must still mix the images.
    fn with_classes(
        &self,
        reader: &mut Reader,
        samples: &[(usize, [u64; 4])],
        mix: Mix,
        (images_bchw, erased): (&mut Tensor, &mut Erased),
    ) -> Result<(Tensor, Option<Mix>)> {
        let mut labels = Vec::with_capacity(samples.len());
        for (number, (index, key)) in samples.iter().enumerate() {
            labels.push(reader.read(*index, &Random::new(key), out(images_bchw, number, erased))?);
        }
        let targets = mix.targets(&labels, self.classes, self.data.label_smoothing);
        let targets_bc = Tensor::from_slice(&targets).view([samples.len() as i64, self.classes as i64]);
        if let Handover::Unmixed(_) | Handover::Bytes(_) = self.handover {
            return Ok((targets_bc, Some(mix)));
        }
        mix.images(floats_mut(images_bchw), self.channels, self.size);
        Ok((targets_bc, None))
    }

    /// The number of an epoch, and the epoch's order of images.
    fn order(&self, epoch: u64) -> (u64, Arc<Epoch>) {
        let mut newest = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        match &*newest {
            Some((number, order)) if *number == epoch => (epoch, order.clone()),
            _ => {
                let order = Arc::new(self.sampler.epoch(epoch));
                *newest = Some((epoch, order.clone()));
                (epoch, order)
            }
        }
    }
}

impl Worker {
    /// Makes the piece with this number. Piece 0 is the first piece of `first_step`, and the numbers go on through all steps.
    fn make(&mut self, number: usize) -> Result<Piece> {
        let shared = self.shared.clone();
        let step = shared.first_step + (number / shared.pieces.len()) as u64;
        let positions = shared.pieces[number % shared.pieces.len()].clone();
        let epoch = step / shared.sampler.steps_per_epoch;
        let (_, order) = match self.epoch.take() {
            Some(current) if current.0 == epoch => self.epoch.insert(current),
            _ => self.epoch.insert(shared.order(epoch)),
        };
        let shape = shape(positions.len(), shared.channels, shared.size);
        let (mut images_bchw, memory) =
            allocate(&shared.memory, (shape, shared.kind), &shared.staging, shared.workers)?;
        let mut erased = Erased::default();
        let samples: Vec<(usize, [u64; 4])> =
            positions.clone().map(|position| shared.sampler.sample(order, step, position)).collect();
        let (targets, mix) = match &mut self.reader {
            AnyReader::OfClasses(reader) => {
                let block = (positions.start / BLOCK) as u64;
                let mix = Mix::draw(&shared.data, shared.size, &[shared.sampler.seed, MIX_KEY, step, block]);
                shared.with_classes(reader, &samples, mix, (&mut images_bchw, &mut erased))?
            }
            AnyReader::WithMaps(reader) => (reader.train(&samples, shared.size, floats_mut(&mut images_bchw))?, None),
            AnyReader::WithObjects(reader) => (reader.train(&samples, floats_mut(&mut images_bchw))?, None),
        };
        let images = BatchImages::written(images_bchw, &erased, &self.numbers, &shared.staging);
        let targets = if is_rows(&targets) { targets } else { shared.staging.staged(targets) };
        Ok(Piece { images, targets, mix, memory })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of ranges is meant")]
    fn pieces_lie_in_one_block_each_and_make_up_the_micro_batch() {
        assert_eq!(pieces(&(0..64)), [0..64]);
        assert_eq!(pieces(&(100..250)), [100..128, 128..192, 192..250]);
        for micro_batch in [0..2, 62..66, 130..1154, 64..128] {
            let pieces = pieces(&micro_batch);
            assert!(pieces.iter().all(|p| p.start / BLOCK == (p.end - 1) / BLOCK && p.len() % 2 == 0), "{pieces:?}");
            assert_eq!((pieces[0].start, pieces.last().unwrap().end), (micro_batch.start, micro_batch.end));
            assert!(pieces.windows(2).all(|two| two[0].end == two[1].start));
        }
    }
}
