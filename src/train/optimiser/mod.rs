//! The optimisers: AdamW and SGD. An optimiser updates the weights in one flat buffer, and their moving average if there is one.

mod adamw;
mod sgd;

use crate::config::{self, Training};
use crate::model::{FlatParameters, threads};
use crate::weights::{floats, floats_mut};
use adamw::AdamW;
use anyhow::{Context, Result};
use multiversion::multiversion;
use sgd::Sgd;
use std::collections::BTreeMap;
use std::ops::Range;
use tch::{Kind, Tensor};

/// The optimiser of a phase: the rule of its updates with the moments. It also keeps a moving average of the weights, if the config
/// asks for an average.
pub struct Optimiser {
    rule: Box<dyn Rule>,
    weight_decay: f64,
    /// Whether weight decay also acts on the parameters that usually have none, such as biases.
    decays_all: bool,
    ema_decay: f64,
    ema: Option<Tensor>,
    steps: u64,
    /// Whether libtorch's own operations update weights on the CPU too.
    by_libtorch: bool,
    /// Parts of the flat buffer, each with the factor of its learning rate. Together the parts cover all trainable numbers.
    rates: Vec<(Range<usize>, f64)>,
}

/// How an optimiser changes weights.
trait Rule {
    /// The moments with their names. Each moment is as long as the flat buffer of the weights.
    fn moments(&self) -> Vec<(&'static str, &Tensor)>;
    fn moments_mut(&mut self) -> Vec<(&'static str, &mut Tensor)>;
    /// Updates the weights of a group, and the moments, in host memory.
    fn on_host(&mut self, update: &Update, group: &Group, weights: &mut [f32], gradients: &[f32]);
    /// Updates the weights of a group, and the moments, on their device by libtorch. The host does not wait.
    fn on_device(&mut self, update: &DeviceUpdate, group: &Group, weights: &Tensor, gradients: &Tensor);
}

/// Neighbouring numbers of the flat buffer with the same weight decay and learning rate.
struct Group {
    numbers: Range<usize>,
    weight_decay: f64,
    /// The factor of the learning rate.
    rate: f64,
}

impl Group {
    fn of(&self, tensor: &Tensor) -> Tensor {
        tensor.narrow(0, self.numbers.start as i64, self.numbers.len() as i64)
    }
}

/// The values of one update.
struct Update {
    /// The number of updates so far, including this update.
    steps: u64,
    lr: f64,
    /// The factor that clips the gradients.
    scale: f32,
}

/// The values of one update on a device. The values that depend on the gradients are fp32 scalars on the device, so that the host
/// does not wait for them.
struct DeviceUpdate {
    steps: u64,
    lr: f64,
    /// The divisor of the gradients, which clips them.
    divisor: Tensor,
    /// 1 if the update must change nothing, else 0.
    skip: Tensor,
}

impl Optimiser {
    /// An optimiser with moments of 0, whose moving average begins with the present weights.
    pub fn new(training: &Training, flat: &FlatParameters) -> Optimiser {
        let rule: Box<dyn Rule> = match training.optimiser {
            config::Optimiser::AdamW => Box::new(AdamW::new(training, flat)),
            config::Optimiser::Sgd => Box::new(Sgd::new(training, flat)),
        };
        Optimiser {
            rule,
            weight_decay: training.weight_decay,
            decays_all: training.decay_all,
            ema_decay: training.ema,
            ema: (training.ema > 0.0).then(|| flat.buffer().copy()),
            steps: 0,
            by_libtorch: false,
            rates: vec![(0..flat.trainable(), 1.0)],
        }
    }

    /// The same optimiser, but with these factors of the learning rate, each for a part of the flat buffer. Together the parts
    /// must cover all trainable numbers.
    pub fn with_rates(self, rates: Vec<(Range<usize>, f64)>) -> Optimiser {
        Optimiser { rates, ..self }
    }

    /// The same optimiser, but libtorch's own operations update the weights on the CPU too.
    pub fn by_libtorch(self) -> Optimiser {
        Optimiser { by_libtorch: true, ..self }
    }

    /// Resumes from the buffers of a checkpoint that was written after `steps` updates.
    pub fn resume(
        training: &Training,
        flat: &FlatParameters,
        mut state: BTreeMap<String, Tensor>,
        steps: u64,
    ) -> Result<Optimiser> {
        let mut take = |name: &str| -> Result<Tensor> {
            let tensor = state.remove(name).with_context(|| format!("state/{name} is missing"))?;
            anyhow::ensure!(tensor.size() == flat.buffer().size(), "state/{name} has shape {:?}", tensor.size());
            Ok(tensor.to_device(flat.buffer().device()))
        };
        let mut optimiser = Optimiser { steps, ..Self::new(training, flat) };
        for (name, moment) in optimiser.rule.moments_mut() {
            *moment = take(name)?;
        }
        if let Some(ema) = &mut optimiser.ema {
            *ema = take("ema")?;
        }
        Ok(optimiser)
    }

    /// The tensors that a checkpoint keeps.
    pub fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let mut state = self.rule.moments();
        state.extend(self.ema.as_ref().map(|ema| ("ema", ema)));
        state
    }

    /// The moving average of the weights, if there is one.
    pub fn average(&self) -> Option<&Tensor> {
        self.ema.as_ref()
    }

    /// Updates the weights once, with the gradients' global norm limited to `clip`; 0 means no limit. If the loss or the norm is
    /// not finite, weights, moments and average stay as they are, but the update is counted. The norm is stored after the
    /// gradients in their buffer ([`FlatParameters::set_norm`]).
    pub fn step(&mut self, flat: &mut FlatParameters, clip: f64, lr: f64) {
        self.steps += 1;
        flat.wait_for_loan();
        if flat.buffer().device().is_cuda() || self.by_libtorch {
            self.step_on_device(flat, clip, lr);
        } else {
            self.step_on_host(flat, clip, lr);
        }
    }

    /// Divides the trainable numbers into groups. All numbers of a group have the same weight decay and the same factor of the
    /// learning rate.
    fn groups(&self, flat: &FlatParameters) -> Vec<Group> {
        let plain = if self.decays_all { self.weight_decay } else { 0.0 };
        let both = [(0..flat.decayed(), self.weight_decay), (flat.decayed()..flat.trainable(), plain)];
        let common = |a: &Range<usize>, b: &Range<usize>| a.start.max(b.start)..a.end.min(b.end);
        let of = |(numbers, weight_decay): &(Range<usize>, f64)| {
            let parts = self.rates.iter().map(|(part, rate)| (common(numbers, part), *rate));
            let group = |(numbers, rate)| Group { numbers, weight_decay: *weight_decay, rate };
            parts.filter(|(numbers, _)| !numbers.is_empty()).map(group).collect::<Vec<_>>()
        };
        both.iter().flat_map(of).collect()
    }

    fn step_on_host(&mut self, flat: &mut FlatParameters, clip: f64, lr: f64) {
        let norm = norm(&floats(flat.gradients())[..flat.trainable()]);
        flat.set_norm(&Tensor::from(norm as f32));
        if !norm.is_finite() || !flat.loss().double_value(&[]).is_finite() {
            return;
        }
        let update = Update { steps: self.steps, lr, scale: clip_scale(norm, clip) };
        let groups = self.groups(flat);
        flat.update(|weights, gradients| {
            for group in &groups {
                let numbers = group.numbers.clone();
                self.rule.on_host(&update, group, &mut weights[numbers.clone()], &gradients[numbers]);
            }
            if let Some(ema) = &mut self.ema {
                let decay = self.ema_decay as f32;
                for (average, weight) in floats_mut(ema).iter_mut().zip(weights) {
                    *average = decay * *average + (1.0 - decay) * *weight;
                }
            }
        });
    }

    /// Updates the weights as `step_on_host` does, for buffers on any device, with one call of libtorch for each group.
    fn step_on_device(&mut self, flat: &mut FlatParameters, clip: f64, lr: f64) {
        let norm = flat.gradients().narrow(0, 0, flat.trainable() as i64).norm();
        flat.set_norm(&norm);
        let is_finite = norm.isfinite().logical_and(&flat.loss().isfinite());
        let skip = is_finite.logical_not().to_kind(Kind::Float);
        let update = DeviceUpdate { steps: self.steps, lr, divisor: divisor(&norm, clip), skip };
        for group in self.groups(flat) {
            self.rule.on_device(&update, &group, &group.of(flat.buffer()), &group.of(flat.gradients()));
        }
        if let Some(ema) = &mut self.ema {
            let _ = ema.lerp_tensor_(flat.buffer(), &(is_finite.to_kind(Kind::Float) * (1.0 - self.ema_decay)));
        }
        flat.refresh();
    }
}

/// The divisor that limits a norm, as torch's `clip_grad_norm_` computes it. It stays on the device.
fn divisor(norm: &Tensor, limit: f64) -> Tensor {
    if limit == 0.0 { norm.ones_like() } else { ((norm + 1e-6) / limit).clamp_min(1.0) }
}

/// The norm of all gradients. The squares are added in chunks, so that the rounding error does not grow with the number of
/// gradients. The sums of the chunks are added in order, so that the norm does not depend on the number of threads.
fn norm(gradients: &[f32]) -> f64 {
    const CHUNK: usize = 4096;
    let mut sums = vec![0.0f64; gradients.len().div_ceil(CHUNK)];
    let each = threads::rows_each(gradients.len(), gradients.len(), CHUNK).max(CHUNK);
    let parts = gradients.chunks(each).zip(sums.chunks_mut(each / CHUNK));
    threads::each(parts, |(gradients, sums)| {
        for (chunk, sum) in gradients.chunks(CHUNK).zip(sums) {
            *sum = squares(chunk).into();
        }
    });
    sums.iter().sum::<f64>().sqrt()
}

/// The sum of the squares. It is added in 16 lanes, so that the compiler vectorises the loop.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn squares(chunk: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for group in chunk.chunks(16) {
        lanes.iter_mut().zip(group).for_each(|(lane, g)| *lane += g * g);
    }
    lanes.iter().sum()
}

/// The factor that limits a norm, as torch's `clip_grad_norm_` computes it; 1 if `limit` is 0.
fn clip_scale(norm: f64, limit: f64) -> f32 {
    if limit == 0.0 { 1.0 } else { (limit / (norm + 1e-6)).min(1.0) as f32 }
}

#[cfg(test)]
mod tests;
