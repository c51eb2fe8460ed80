//! Batches ahead of the step: worker threads read and augment pieces of micro-batches.

use super::ahead::Ahead;
use super::batch_memory::{Lent, Spare, batch_bytes, room, shape};
use super::reader::{Reader, Reading};
use super::sampler::{Epoch, Sampler};
use crate::config::{Config, Data};
use crate::data::image::mix::{BLOCK, Mix};
use crate::data::source::Source;
use crate::launcher::cores_of_this_rank;
use crate::plan::{PhasePlan, Plan};
use crate::random::Random;
use crate::weights::{floats_mut, pinned, upload};
use anyhow::Result;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Tensor};

/// One micro-batch.
#[derive(Debug)]
pub struct Batch {
    pieces: Vec<Piece>,
    /// Where the samples stand in the global batch.
    pub positions: Range<usize>,
}

/// Samples of a global batch, all of one block. For a GPU its tensors are in pinned memory.
#[derive(Debug)]
struct Piece {
    /// (batch, channel, row, column), normalised.
    images_bchw: Tensor,
    /// (batch, class), each row a distribution.
    targets_bc: Tensor,
    /// What is still to be done to the images, where the device does it.
    mix: Option<Mix>,
    /// The images' memory, if it is to be used again once this is dropped.
    lent: Option<Lent>,
}

/// As many samples as a worker makes at a time: few enough that a large micro-batch is made by all of them.
const PIECE: usize = 64;
const _: () = assert!(BLOCK.is_multiple_of(PIECE) && PIECE.is_multiple_of(2));

/// Where micro-batches are cut into pieces: at multiples of [`PIECE`] in the global batch, however that is shared out.
fn pieces(micro: &Range<usize>) -> Vec<Range<usize>> {
    let starts = (micro.start / PIECE..micro.end.div_ceil(PIECE)).map(|piece| piece * PIECE);
    starts.map(|start| start.max(micro.start)..(start + PIECE).min(micro.end)).collect()
}

/// An endless stream of micro-batches from some step on.
pub struct Loader {
    pieces: Ahead<Result<Piece>>,
    /// The micro-batches of each step, and in how many pieces they come.
    micro: Vec<(Range<usize>, usize)>,
    next: usize,
}

/// Who mixes the images of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixing {
    /// The loader's workers.
    Host,
    /// This device, in [`Batch::on`].
    Device(Device),
}

/// What the workers of one replica share.
struct Job {
    reading: Arc<Reading>,
    sampler: Sampler,
    data: Data,
    classes: usize,
    channels: usize,
    size: usize,
    mixing: Mixing,
    /// The pieces of this replica's micro-batches of each step.
    pieces: Vec<Range<usize>>,
    first_step: u64,
    spare: Spare,
    /// The newest epoch's order, drawn by the first worker that comes to it.
    epoch: Mutex<Option<(u64, Arc<Epoch>)>>,
}

/// One worker: its reader, and the order of the epoch it is in.
struct Worker {
    job: Arc<Job>,
    reader: Reader,
    epoch: Option<(u64, Arc<Epoch>)>,
}

const MIX: u64 = 3;

impl Loader {
    /// Starts the workers of one replica for a phase that goes on at `first_step`; `micro_batches` are the replica's part of
    /// every global batch.
    pub fn start(
        plan: &Plan,
        phase: &PhasePlan,
        source: &Source,
        micro_batches: Vec<Range<usize>>,
        first_step: u64,
        mixing: Mixing,
    ) -> Loader {
        let config = &plan.config;
        let job = Arc::new(Job {
            reading: Reading::training(config, &source.train, &source.bad),
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
            mixing,
            pieces: micro_batches.iter().flat_map(pieces).collect(),
            first_step,
            spare: Spare::default(),
            epoch: Mutex::new(None),
        });
        let largest = job.pieces.iter().map(Range::len).max().unwrap_or(0);
        let bytes = batch_bytes(largest, job.channels, job.size, matches!(mixing, Mixing::Device(_)));
        let made = Ahead::start(workers(config), bytes, || {
            let mut worker = Worker { job: job.clone(), reader: job.reading.reader(), epoch: None };
            move |number| Some(worker.make(number))
        });
        let counted = |micro: Range<usize>| (micro.clone(), pieces(&micro).len());
        Loader { pieces: made, micro: micro_batches.into_iter().map(counted).collect(), next: 0 }
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    /// The next micro-batch; waits for it if it is not ready. There is always one, or an error that names an image.
    fn next(&mut self) -> Option<Result<Batch>> {
        let (positions, count) = &self.micro[self.next];
        self.next = (self.next + 1) % self.micro.len();
        let piece = |_| self.pieces.next().expect("workers run until the loader is dropped");
        let pieces = (0..*count).map(piece).collect::<Result<Vec<Piece>>>();
        Some(pieces.map(|pieces| Batch { pieces, positions: positions.clone() }))
    }
}

impl Batch {
    /// A batch that nobody need mix: images (batch, channel, row, column) and targets (batch, class).
    pub fn of(images_bchw: Tensor, targets_bc: Tensor, positions: Range<usize>) -> Batch {
        Batch { pieces: vec![Piece { images_bchw, targets_bc, mix: None, lent: None }], positions }
    }

    /// Its images (batch, channel, row, column) and targets (batch, class) on a device, mixed; and what must not be dropped
    /// before the images are done with.
    pub fn on(self, device: Device) -> (Tensor, Tensor, Option<Lent>) {
        let piece = |Piece { images_bchw, targets_bc, mix, lent }: Piece| {
            let images_bchw = upload(&images_bchw, device);
            mix.iter().for_each(|mix| mix.tensor(&images_bchw));
            (images_bchw, upload(&targets_bc, device), lent)
        };
        let mut pieces: Vec<_> = self.pieces.into_iter().map(piece).collect();
        if pieces.len() == 1 {
            return pieces.swap_remove(0);
        }
        let images: Vec<&Tensor> = pieces.iter().map(|(images_bchw, ..)| images_bchw).collect();
        let targets: Vec<&Tensor> = pieces.iter().map(|(_, targets_bc, _)| targets_bc).collect();
        (Tensor::cat(&images, 0), Tensor::cat(&targets, 0), None)
    }
}

impl Job {
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
    fn make(&mut self, number: usize) -> Result<Piece> {
        let job = self.job.clone();
        let step = job.first_step + (number / job.pieces.len()) as u64;
        let positions = job.pieces[number % job.pieces.len()].clone();
        let wanted = step / job.sampler.steps_per_epoch;
        let (_, order) = match self.epoch.take() {
            Some(epoch) if epoch.0 == wanted => self.epoch.insert(epoch),
            _ => self.epoch.insert(job.order(wanted)),
        };
        let device = match job.mixing {
            Mixing::Host => Device::Cpu,
            Mixing::Device(device) => device,
        };
        let (mut images_bchw, lent) = room(&job.spare, shape(positions.len(), job.channels, job.size), device);
        let image = job.channels * job.size * job.size;
        let pixels = floats_mut(&mut images_bchw);
        let mut labels = Vec::with_capacity(positions.len());
        for (position, out) in positions.clone().zip(pixels.chunks_exact_mut(image)) {
            let (index, key) = job.sampler.sample(order, step, position);
            labels.push(self.reader.read(index, &Random::new(&key), out)?);
        }
        let block = (positions.start / BLOCK) as u64;
        let mix = Mix::draw(&job.data, job.size, &[job.sampler.seed, MIX, step, block]);
        let targets = mix.targets(&labels, job.classes, job.data.label_smoothing);
        let targets_bc = Tensor::from_slice(&targets).view([positions.len() as i64, job.classes as i64]);
        let mix = match job.mixing {
            Mixing::Host => {
                mix.images(pixels, job.channels, job.size);
                None
            }
            Mixing::Device(_) => Some(mix),
        };
        Ok(Piece { images_bchw, targets_bc: pinned(targets_bc, device), mix, lent })
    }
}

/// How many loaders at a time share this rank's cores.
static REPLICAS: AtomicUsize = AtomicUsize::new(1);

/// Says how many replicas of this rank have loaders at the same time.
pub fn share_cores(replicas: usize) {
    REPLICAS.store(replicas, Ordering::Relaxed);
}

/// Data workers of one replica: as many as the config says; for 0 the cores of this rank that its replicas leave, divided
/// among them. Their number changes nothing but the speed.
pub fn workers(config: &Config) -> usize {
    match config.run.workers {
        0 => automatic_workers(cores_of_this_rank(), REPLICAS.load(Ordering::Relaxed)),
        workers => workers,
    }
}

/// A core for each replica, the rest for its data; at least one worker.
pub fn automatic_workers(cores: usize, replicas: usize) -> usize {
    (cores.saturating_sub(replicas) / replicas.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of ranges is meant")]
    fn pieces_lie_in_one_block_each_and_make_up_the_micro_batch() {
        assert_eq!(pieces(&(0..64)), [0..64]);
        assert_eq!(pieces(&(100..250)), [100..128, 128..192, 192..250]);
        for micro in [0..2, 62..66, 130..1154, 64..128] {
            let pieces = pieces(&micro);
            assert!(pieces.iter().all(|p| p.start / BLOCK == (p.end - 1) / BLOCK && p.len() % 2 == 0), "{pieces:?}");
            assert_eq!((pieces[0].start, pieces.last().unwrap().end), (micro.start, micro.end));
            assert!(pieces.windows(2).all(|two| two[0].end == two[1].start));
        }
    }

    #[test]
    fn every_core_that_the_replicas_leave_works_on_data() {
        assert_eq!([(1, 1), (2, 1), (64, 8), (70, 8), (4, 8)].map(|(c, r)| automatic_workers(c, r)), [1, 1, 7, 7, 1]);
    }
}
