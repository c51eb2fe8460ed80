//! Batches ahead of the step: worker threads decode and augment whole micro-batches. Worker w of W makes every W-th
//! micro-batch and the consumer takes them in turn, so that their number changes nothing but the speed.

use super::augment::Transform;
use super::mix::Mix;
use super::sampler::Sampler;
use super::{Images, Source};
use crate::config::Data;
use crate::plan::groups::{micro_batches, share};
use crate::plan::{PhasePlan, Plan};
use crate::random::Random;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use tch::Tensor;

/// One micro-batch.
#[derive(Debug)]
pub struct Batch {
    /// (batch, channel, row, column), normalised.
    pub images_bchw: Tensor,
    /// (batch, class), each row a distribution.
    pub targets_bc: Tensor,
    /// Where the samples stand in the global batch.
    pub positions: Range<usize>,
}

/// An endless stream of micro-batches from some step on.
pub struct Loader {
    workers: Vec<Receiver<Batch>>,
    next: usize,
}

/// What a worker needs; shared by all.
struct Job {
    images: Arc<Images>,
    transform: Transform,
    sampler: Sampler,
    data: Data,
    classes: usize,
    /// This replica's micro-batches of each step.
    micro: Vec<Range<usize>>,
    first_step: u64,
}

const MIX: u64 = 3;
/// Micro-batches that each worker keeps ready.
const AHEAD: usize = 3;

impl Loader {
    /// Starts the workers of one replica for a phase that goes on at `first_step`.
    pub fn start(
        plan: &Plan,
        phase: &PhasePlan,
        source: &Source,
        replica: usize,
        replicas: usize,
        first_step: u64,
    ) -> Loader {
        let config = &plan.config;
        let global_batch = phase.training.global_batch;
        let job = Arc::new(Job {
            images: source.train.clone(),
            transform: Transform::training(config),
            sampler: Sampler {
                images: source.train.len(),
                repeats: config.data.repeats,
                global_batch,
                steps_per_epoch: phase.steps_per_epoch,
                seed: phase.seed,
            },
            data: config.data.clone(),
            classes: config.model.classes,
            micro: micro_batches(share(global_batch, replica, replicas), config.run.micro_batch),
            first_step,
        });
        let workers = (0..config.run.workers)
            .map(|worker| {
                let (sender, receiver) = sync_channel(AHEAD);
                let (job, workers) = (job.clone(), config.run.workers);
                std::thread::Builder::new()
                    .name(format!("data-{worker}"))
                    .spawn(move || job.work(worker, workers, &sender))
                    .expect("a thread can be started");
                receiver
            })
            .collect();
        Loader { workers, next: 0 }
    }
}

impl Iterator for Loader {
    type Item = Batch;

    /// The next micro-batch; waits for it if it is not ready. There is always one.
    fn next(&mut self) -> Option<Batch> {
        let batch = self.workers[self.next].recv().expect("workers run until the loader is dropped");
        self.next = (self.next + 1) % self.workers.len();
        Some(batch)
    }
}

impl Job {
    /// Makes every `workers`-th micro-batch until nobody takes them any more.
    fn work(&self, worker: usize, workers: usize, sender: &SyncSender<Batch>) {
        let mut epoch = (u64::MAX, None);
        for number in (worker..).step_by(workers) {
            let step = self.first_step + (number / self.micro.len()) as u64;
            let wanted = step / self.sampler.steps_per_epoch;
            if epoch.0 != wanted {
                epoch = (wanted, Some(self.sampler.epoch(wanted)));
            }
            let order = epoch.1.as_ref().expect("set above");
            let batch = self.make(order, step, self.micro[number % self.micro.len()].clone());
            if sender.send(batch).is_err() {
                return;
            }
        }
    }

    fn make(&self, order: &super::sampler::Epoch, step: u64, positions: Range<usize>) -> Batch {
        let (channels, size) = (self.images.channels, self.images.size);
        let image = channels * size * size;
        let mut pixels = vec![0.0; positions.len() * image];
        let mut labels = Vec::with_capacity(positions.len());
        for (position, out) in positions.clone().zip(pixels.chunks_exact_mut(image)) {
            let (index, key) = self.sampler.sample(order, step, position);
            self.transform.apply(&self.images, index, Random::new(&key), out);
            labels.push(self.images.labels[index]);
        }
        let mix = Mix::draw(&self.data, size, &[self.sampler.seed, MIX, step]);
        mix.images(&mut pixels, channels, size);
        let targets = mix.targets(&labels, self.classes, self.data.label_smoothing);
        let (batch, side) = (positions.len() as i64, size as i64);
        Batch {
            images_bchw: Tensor::from_slice(&pixels).view([batch, channels as i64, side, side]),
            targets_bc: Tensor::from_slice(&targets).view([batch, self.classes as i64]),
            positions,
        }
    }
}

/// A batch of test images without augmentation: (images, labels).
pub fn test_batch(images: &Images, transform: &Transform, range: Range<usize>) -> (Tensor, Tensor) {
    let image = images.channels * images.size * images.size;
    let mut pixels = vec![0.0; range.len() * image];
    for (index, out) in range.clone().zip(pixels.chunks_exact_mut(image)) {
        transform.apply(images, index, Random::new(&[]), out);
    }
    let labels: Vec<i64> = images.labels[range.clone()].iter().map(|&l| l.into()).collect();
    let side = images.size as i64;
    let images_bchw = Tensor::from_slice(&pixels).view([range.len() as i64, images.channels as i64, side, side]);
    (images_bchw, Tensor::from_slice(&labels))
}
