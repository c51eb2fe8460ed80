//! Batches ahead of the step: worker threads read and augment whole micro-batches.

use super::Source;
use super::ahead::Ahead;
use super::mix::Mix;
use super::reader::{Reader, Reading};
use super::sampler::{Epoch, Sampler};
use super::spare::{Lent, Spare};
use crate::config::{Config, Data};
use crate::launcher::cores_of_this_rank;
use crate::plan::groups::{micro_batches, share};
use crate::plan::{PhasePlan, Plan};
use crate::random::Random;
use crate::weights::{floats_mut, pinned};
use anyhow::Result;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Tensor};

/// One micro-batch. For a GPU its tensors are in pinned memory.
#[derive(Debug)]
pub struct Batch {
    /// (batch, channel, row, column), normalised.
    pub images_bchw: Tensor,
    /// (batch, class), each row a distribution.
    pub targets_bc: Tensor,
    /// What is still to be done to the images, where the device does it.
    pub mix: Option<Mix>,
    /// Where the samples stand in the global batch.
    pub positions: Range<usize>,
    /// The images' memory, if it is to be used again once the batch is dropped.
    pub lent: Option<Lent>,
}

/// An endless stream of micro-batches from some step on.
pub struct Loader(Ahead<Result<Batch>>);

/// Who mixes the images of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixing {
    /// The loader's workers.
    Host,
    /// Whoever takes the batch, on this device: [`Mix::tensor`].
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
    /// This replica's micro-batches of each step.
    micro: Vec<Range<usize>>,
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
    /// Starts the workers of one replica for a phase that goes on at `first_step`.
    pub fn start(
        plan: &Plan,
        phase: &PhasePlan,
        source: &Source,
        replica: usize,
        replicas: usize,
        first_step: u64,
        mixing: Mixing,
    ) -> Loader {
        let config = &plan.config;
        let global_batch = phase.training.global_batch;
        let job = Arc::new(Job {
            reading: Reading::training(config, &source.train, &source.bad),
            sampler: Sampler {
                images: source.train.len(),
                repeats: config.data.repeats,
                global_batch,
                steps_per_epoch: phase.steps_per_epoch,
                seed: phase.seed,
            },
            data: config.data.clone(),
            classes: config.model.classes,
            channels: config.model.channels,
            size: config.model.image_size,
            mixing,
            micro: micro_batches(share(global_batch, replica, replicas), phase.micro_batch),
            first_step,
            spare: Spare::default(),
            epoch: Mutex::new(None),
        });
        let largest = job.micro.iter().map(Range::len).max().unwrap_or(0);
        let bytes = batch_bytes(largest, job.channels, job.size, matches!(mixing, Mixing::Device(_)));
        Loader(Ahead::start(workers(config), bytes, || {
            let mut worker = Worker { job: job.clone(), reader: job.reading.reader(), epoch: None };
            move |number| Some(worker.make(number))
        }))
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    /// The next micro-batch; waits for it if it is not ready. There is always one, or an error that names an image.
    fn next(&mut self) -> Option<Result<Batch>> {
        Some(self.0.next().expect("workers run until the loader is dropped"))
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
    fn make(&mut self, number: usize) -> Result<Batch> {
        let job = self.job.clone();
        let step = job.first_step + (number / job.micro.len()) as u64;
        let positions = job.micro[number % job.micro.len()].clone();
        let wanted = step / job.sampler.steps_per_epoch;
        let (_, order) = match self.epoch.take() {
            Some(epoch) if epoch.0 == wanted => self.epoch.insert(epoch),
            _ => self.epoch.insert(job.order(wanted)),
        };
        let (mut images_bchw, lent) = job.spare.take(shape(positions.len(), job.channels, job.size));
        let image = job.channels * job.size * job.size;
        let pixels = floats_mut(&mut images_bchw);
        let mut labels = Vec::with_capacity(positions.len());
        for (position, out) in positions.clone().zip(pixels.chunks_exact_mut(image)) {
            let (index, key) = job.sampler.sample(order, step, position);
            labels.push(self.reader.read(index, &Random::new(&key), out)?);
        }
        let mix = Mix::draw(&job.data, job.size, &[job.sampler.seed, MIX, step]);
        let targets = mix.targets(&labels, job.classes, job.data.label_smoothing);
        let targets_bc = Tensor::from_slice(&targets).view([positions.len() as i64, job.classes as i64]);
        let (mix, device) = match job.mixing {
            Mixing::Host => {
                mix.images(pixels, job.channels, job.size);
                (None, Device::Cpu)
            }
            Mixing::Device(device) => (Some(mix), device),
        };
        let [images_bchw, targets_bc] = [images_bchw, targets_bc].map(|tensor| pinned(tensor, device));
        // What is pinned is a copy.
        let lent = Some(lent).filter(|_| !device.is_cuda());
        Ok(Batch { images_bchw, targets_bc, mix, positions, lent })
    }
}

/// Test images without augmentation. For a GPU they are in pinned memory.
pub struct TestBatch {
    /// (batch, channel, row, column), normalised.
    pub images_bchw: Tensor,
    /// The class of each.
    pub labels_b: Tensor,
    /// The images' memory, used again once the batch is dropped.
    _lent: Option<Lent>,
}

/// The test images of `range` in batches of `size` at most, in order; unreadable ones are left out.
pub fn test_batches(
    config: &Config,
    source: &Source,
    range: Range<usize>,
    size: usize,
    device: Device,
) -> impl Iterator<Item = Result<TestBatch>> + use<> {
    let reading = Reading::evaluation(config, &source.test, &source.bad);
    let (channels, side) = (config.model.channels, config.model.image_size);
    let batches = range.len().div_ceil(size);
    let spare = Spare::default();
    Ahead::start(workers(config), batch_bytes(size, channels, side, device.is_cuda()), move || {
        let (mut reader, range, spare) = (reading.reader(), range.clone(), spare.clone());
        move |number| {
            let start = range.start + number * size;
            let batch = start..(start + size).min(range.end);
            let shape = shape(batch.len(), channels, side);
            (number < batches).then(|| test_batch(&mut reader, spare.take(shape), batch, device))
        }
    })
}

fn test_batch(
    reader: &mut Reader,
    (mut images_bchw, lent): (Tensor, Lent),
    range: Range<usize>,
    device: Device,
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
    let images_bchw = pinned(images_bchw.narrow(0, 0, labels.len() as i64), device);
    Ok(TestBatch {
        images_bchw,
        labels_b: Tensor::from_slice(&labels),
        _lent: Some(lent).filter(|_| !device.is_cuda()),
    })
}

/// Memory that a batch takes; libtorch rounds what is pinned up to a power of two.
fn batch_bytes(images: usize, channels: usize, size: usize, is_pinned: bool) -> usize {
    let bytes = 4 * images * channels * size * size;
    if is_pinned { bytes.next_power_of_two() } else { bytes }
}

/// Data workers of one replica: as many as the config says; for 0 the cores of this rank that its replicas leave, divided
/// among them. Their number changes nothing but the speed.
pub fn workers(config: &Config) -> usize {
    match config.run.workers {
        // libtorch was told each replica's part of the rank's cores.
        0 if config.run.threads == 0 => automatic_workers(tch::get_num_threads().max(1) as usize, 1),
        0 => automatic_workers(cores_of_this_rank(), Plan::without_data(config.clone()).replicas_per_rank()),
        workers => workers,
    }
}

/// A core for each replica, the rest for its data; at least one worker.
pub fn automatic_workers(cores: usize, replicas: usize) -> usize {
    (cores.saturating_sub(replicas) / replicas.max(1)).max(1)
}

fn shape(batch: usize, channels: usize, size: usize) -> [i64; 4] {
    [batch as i64, channels as i64, size as i64, size as i64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_core_that_the_replicas_leave_works_on_data() {
        assert_eq!([(1, 1), (2, 1), (64, 8), (70, 8), (4, 8)].map(|(c, r)| automatic_workers(c, r)), [1, 1, 7, 7, 1]);
    }
}
