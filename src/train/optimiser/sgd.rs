//! Stochastic gradient descent with momentum, with the arithmetic of torch.optim.SGD: weight decay adds to the gradient, and the
//! momentum sums gradients without a factor (no dampening).

use super::{DeviceUpdate, Group, Rule, Update};
use crate::config::Training;
use crate::libtorch;
use crate::model::{FlatParameters, threads};
use crate::weights::floats_mut;
use multiversion::multiversion;
use tch::Tensor;

/// SGD with its settings and its moment.
pub struct Sgd {
    momentum: f64,
    nesterov: bool,
    /// The sum of the gradients so far, including weight decay. Each step multiplies the sum by `momentum` before it adds the new
    /// gradient.
    moment: Tensor,
}

/// The constants of one update of a group.
struct Pass {
    /// The factor that clips the gradients.
    scale: f32,
    momentum: f32,
    weight_decay: f32,
    lr: f32,
    /// Whether the weights move by the gradient plus momentum · moment (Nesterov's rule as in torch) instead of by the moment
    /// alone.
    nesterov: bool,
}

impl Sgd {
    pub fn new(training: &Training, flat: &FlatParameters) -> Sgd {
        Sgd { momentum: training.momentum, nesterov: training.nesterov, moment: flat.buffer().zeros_like() }
    }
}

impl Rule for Sgd {
    fn moments(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("momentum", &self.moment)]
    }

    fn moments_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("momentum", &mut self.moment)]
    }

    fn on_host(&mut self, update: &Update, group: &Group, weights: &mut [f32], gradients: &[f32]) {
        let pass = Pass {
            scale: update.scale,
            momentum: self.momentum as f32,
            weight_decay: group.weight_decay as f32,
            lr: (update.lr * group.rate) as f32,
            nesterov: self.nesterov,
        };
        let moment = &mut floats_mut(&mut self.moment)[group.numbers.clone()];
        let each = threads::rows_each(weights.len(), weights.len(), 64);
        let parts = weights.chunks_mut(each).zip(moment.chunks_mut(each)).zip(gradients.chunks(each));
        threads::each(parts, |((weights, moment), gradients)| descend(&pass, weights, moment, gradients));
    }

    fn on_device(&mut self, update: &DeviceUpdate, group: &Group, weights: &Tensor, gradients: &Tensor) {
        let DeviceUpdate { lr, divisor, skip, .. } = update;
        let descent = libtorch::Sgd {
            divisor,
            skip,
            lr: lr * group.rate,
            momentum: self.momentum,
            nesterov: self.nesterov,
            weight_decay: group.weight_decay,
        };
        libtorch::fused_sgd(&descent, weights, gradients, &group.of(&self.moment));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn descend(pass: &Pass, weights: &mut [f32], moment: &mut [f32], gradients: &[f32]) {
    let &Pass { scale, momentum, weight_decay, lr, nesterov } = pass;
    // Without Nesterov's rule the update is the moment alone.
    let [of_gradient, of_moment] = if nesterov { [1.0, momentum] } else { [0.0, 1.0] };
    for ((w, m), g) in weights.iter_mut().zip(moment).zip(gradients) {
        let g = g * scale + weight_decay * *w;
        *m = momentum * *m + g;
        *w -= lr * (of_gradient * g + of_moment * *m);
    }
}
