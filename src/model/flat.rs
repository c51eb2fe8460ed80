//! The trained parameters as views of one flat buffer. So a step needs one all-reduce, one norm and one optimiser pass instead of
//! hundreds of small operations. A checkpoint needs one large write for each flat buffer.

use crate::family::parameter::{Parameter, Role, flat_order};
use crate::weights::{Weights, floats, floats_mut};
use anyhow::{Context, Result};
use std::convert::Infallible;
use std::sync::mpsc::{Receiver, Sender, channel};
use tch::{Device, Kind, Tensor};

/// The flat buffers of all trained parameters. A flat buffer holds first the parameters with weight decay, then the parameters
/// without weight decay. The network's own buffers follow, such as BatchNorm's running mean, which are saved but not trained.
pub struct FlatParameters {
    /// The fp32 weights, which the optimiser changes.
    buffer: Tensor,
    /// A copy of the weights in the number type in which the network computes, if that type is not fp32.
    compute: Option<Tensor>,
    /// The gradients in the order of `buffer`, then [`EXTRAS`] numbers. A buffer of the network has no gradient. At its offset,
    /// this tensor holds the statistics that the buffer's stage reports, summed over the samples.
    gradients: Tensor,
    layout: Layout,
    /// How many numbers at the start have weight decay.
    decayed: usize,
    /// How many numbers at the start the optimiser changes.
    trainable: usize,
    /// A channel that closes when the [`Loan`] ends; none if nothing is lent.
    end_of_loan: Option<Receiver<Infallible>>,
}

/// A promise that the weights, and the tensors that the optimiser updates with them, do not change while this value exists.
pub struct Loan {
    _until_dropped: Sender<Infallible>,
}

/// How many numbers follow the gradients. First come the loss and the flag of a stop signal, which are summed over the replicas
/// with the gradients. The last is the norm of the summed gradients.
pub const EXTRAS: usize = 3;

/// One parameter, as a layer uses it.
pub struct Weight {
    /// The value, in the number type of the computation or in fp32. The value of a trained parameter is a view of a flat buffer.
    pub value: Tensor,
    /// The fp32 sum of the gradients, a view of a flat buffer; none if the parameter is frozen.
    pub gradient: Option<Tensor>,
}

/// The names, shapes and offsets of the parameters in a flat buffer.
#[derive(Debug)]
pub struct Layout {
    entries: Vec<Entry>,
}

/// The name, shape and offset of one parameter.
#[derive(Debug)]
struct Entry {
    stage: usize,
    name: String,
    shape: Vec<i64>,
    /// The offset of the parameter's first number in a flat buffer.
    start: usize,
    role: Role,
}

impl FlatParameters {
    /// Copies the weights of the given parameters into new flat buffers on the weights' device. `kind` is the number type of the
    /// computation.
    pub fn new<'a>(
        parameters: impl Iterator<Item = &'a Parameter>,
        weights: &Weights,
        kind: Kind,
    ) -> Result<FlatParameters> {
        let ordered = flat_order(parameters.cloned().collect());
        let count = |counts: &dyn Fn(&Parameter) -> bool| -> usize {
            ordered.iter().filter(|(_, p)| counts(p)).map(|(_, p)| p.count()).sum()
        };
        let decayed = count(&|p| p.role == Role::Decayed);
        let (trainable, total) = (count(&Parameter::is_trainable), count(&|_| true));
        let device = weights.values().next().map_or(Device::Cpu, Tensor::device);
        let buffer = Tensor::zeros([total as i64], (Kind::Float, device));
        let mut entries = Vec::with_capacity(ordered.len());
        for (start, parameter) in ordered {
            let weight = weights
                .get(&(parameter.stage, parameter.name.clone()))
                .with_context(|| format!("stage {} has no {}", parameter.stage, parameter.name))?;
            anyhow::ensure!(
                weight.size() == parameter.shape,
                "stage {} {} has shape {:?}, expected {:?}",
                parameter.stage,
                parameter.name,
                weight.size(),
                parameter.shape
            );
            let Parameter { stage, name, shape, role, .. } = parameter;
            let entry = Entry { stage, name, shape, start, role };
            entry.view(&buffer).copy_(weight);
            entries.push(entry);
        }
        let layout = Layout { entries };
        let compute = (kind != Kind::Float).then(|| buffer.to_kind(kind));
        let gradients = Tensor::zeros([(total + EXTRAS) as i64], (Kind::Float, device));
        Ok(FlatParameters { buffer, compute, gradients, layout, decayed, trainable, end_of_loan: None })
    }

    /// How many numbers the flat buffer of the weights holds.
    pub fn len(&self) -> usize {
        self.buffer.numel()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many numbers at the start of the buffer have weight decay.
    pub fn decayed(&self) -> usize {
        self.decayed
    }

    /// How many numbers at the start of the buffer the optimiser changes. The numbers after them are saved but not trained.
    pub fn trainable(&self) -> usize {
        self.trainable
    }

    /// Moves each of the network's buffers by its momentum towards the mean of the statistics that its stage reported, over
    /// `samples` samples. Changes nothing if the loss is not finite.
    pub fn move_buffers(&mut self, samples: f64) {
        self.move_by(samples, |momentum| momentum);
    }

    /// Sets each of the network's buffers to the mean of the statistics that its stage reported, over `samples` samples. Changes
    /// nothing if the loss is not finite.
    pub fn set_buffers(&mut self, samples: f64) {
        self.move_by(samples, |_| 1.0);
    }

    fn move_by(&mut self, samples: f64, rate: impl Fn(f64) -> f64) {
        if self.trainable == self.len() {
            return;
        }
        self.wait_for_loan();
        let is_finite = self.loss().isfinite();
        // Neighbours of the same momentum move in one operation, because a GPU takes as long for one small buffer as for all
        // buffers.
        for neighbours in self.layout.entries.chunk_by(|a, b| a.role == b.role) {
            let (first, last) = (&neighbours[0], &neighbours[neighbours.len() - 1]);
            if let Role::Buffer { momentum } = first.role {
                let (start, end) = (first.start as i64, (last.start + last.count()) as i64);
                let [mut value, sum] = [&self.buffer, &self.gradients].map(|all| all.narrow(0, start, end - start));
                let moved = value.lerp(&(sum / samples), rate(momentum));
                value.copy_(&moved.where_self(&is_finite, &value));
            }
        }
        self.refresh();
    }

    /// The weights and buffers in fp32.
    pub fn buffer(&self) -> &Tensor {
        &self.buffer
    }

    /// The gradients and the [`EXTRAS`] after them.
    pub fn gradients(&self) -> &Tensor {
        &self.gradients
    }

    /// The loss to which the gradients belong: the first of the [`EXTRAS`], a scalar on the device.
    pub fn loss(&self) -> Tensor {
        self.gradients.get(self.len() as i64)
    }

    /// The numbers that are summed over the replicas: the gradients, the loss and the stop flag.
    pub fn summed(&mut self) -> Tensor {
        self.gradients.narrow(0, 0, (self.len() + EXTRAS - 1) as i64)
    }

    /// Writes the norm of the gradients into the last of the [`EXTRAS`].
    pub fn set_norm(&mut self, norm: &Tensor) {
        self.gradients.get((self.len() + EXTRAS - 1) as i64).copy_(norm);
    }

    /// The gradients and the [`EXTRAS`] after them, for a caller that changes them.
    pub fn gradients_mut(&mut self) -> &mut Tensor {
        &mut self.gradients
    }

    /// Lends the weights in host memory, and the tensors that the optimiser updates with them, to a thread that reads them while
    /// training continues. Code that changes any of these tensors must call [`FlatParameters::wait_for_loan`] first.
    pub fn lend(&mut self) -> Loan {
        self.wait_for_loan();
        let (_until_dropped, ended) = channel();
        self.end_of_loan = Some(ended);
        Loan { _until_dropped }
    }

    /// Waits until nothing is lent.
    pub fn wait_for_loan(&mut self) {
        if let Some(ended) = self.end_of_loan.take() {
            // Nothing is ever sent. The channel closes with the loan.
            let _ = ended.recv();
        }
    }

    /// Changes the weights in host memory by calling `update` with the weights and the gradients.
    pub fn update(&mut self, update: impl FnOnce(&mut [f32], &[f32])) {
        let numbers = self.len();
        update(floats_mut(&mut self.buffer), &floats(&self.gradients)[..numbers]);
        self.refresh();
    }

    /// Replaces the weights by the numbers of another flat buffer with the same layout.
    pub fn set(&mut self, numbers: &Tensor) {
        self.wait_for_loan();
        self.buffer.copy_(numbers);
        self.refresh();
    }

    /// Updates the copy in the number type of the computation after the weights have changed.
    pub fn refresh(&mut self) {
        if let Some(compute) = &mut self.compute {
            compute.copy_(&self.buffer);
        }
    }

    /// The parameter with this name, in the number type of the computation or, if `exact`, in fp32. Returns none if the flat buffer
    /// does not hold the parameter.
    pub fn get(&self, stage: usize, name: &str, exact: bool) -> Option<Weight> {
        let entry = self.layout.entries.iter().find(|entry| entry.stage == stage && entry.name == name)?;
        let compute = self.compute.as_ref().filter(|_| !exact);
        let value = entry.view(compute.unwrap_or(&self.buffer));
        Some(Weight { value, gradient: Some(entry.view(&self.gradients)) })
    }

    /// The names, shapes and offsets of the parameters.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
}

impl Layout {
    /// Views, by name, of the parameters in any flat buffer of this layout, such as the weights, their average or the gradients.
    pub fn named(&self, buffer: &Tensor) -> Weights {
        self.entries.iter().map(|entry| ((entry.stage, entry.name.clone()), entry.view(buffer))).collect()
    }
}

impl Entry {
    /// The parameter as a view of a flat buffer.
    fn view(&self, buffer: &Tensor) -> Tensor {
        buffer.narrow(0, self.start as i64, self.count() as i64).view(&self.shape[..])
    }

    fn count(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

impl Weight {
    /// Adds the result of `gradient` to the sum of the gradients. If the parameter is frozen, does not call `gradient`.
    pub fn accumulate(&self, gradient: impl FnOnce() -> Tensor) {
        if let Some(sum) = &self.gradient {
            let _ = sum.shallow_clone().g_add_(&gradient().view_as(sum));
        }
    }
}
