//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the arithmetic of torch.optim.AdamW.

use super::{DeviceUpdate, Group, Rule, Update};
use crate::config::Training;
use crate::libtorch;
use crate::model::{FlatParameters, threads};
use crate::weights::floats_mut;
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// AdamW with its settings and its moments.
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// The constants of one update of a group.
struct Pass {
    /// The factor that clips the gradients.
    scale: f32,
    beta1: f32,
    beta2: f32,
    /// The learning rate divided by the bias correction of the first moment, 1 − β₁ᵗ.
    step_size: f32,
    /// The square root of the bias correction of the second moment, √(1 − β₂ᵗ).
    root_correction: f32,
    eps: f32,
    /// The factor of weight decay: 1 − learning rate · weight decay.
    keep: f32,
}

impl AdamW {
    pub fn new(training: &Training, flat: &FlatParameters) -> AdamW {
        AdamW {
            betas: training.betas,
            eps: training.eps,
            exp_avg: flat.buffer().zeros_like(),
            exp_avg_sq: flat.buffer().zeros_like(),
        }
    }
}

impl Rule for AdamW {
    fn moments(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)]
    }

    fn moments_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("exp_avg", &mut self.exp_avg), ("exp_avg_sq", &mut self.exp_avg_sq)]
    }

    fn on_host(&mut self, update: &Update, group: &Group, weights: &mut [f32], gradients: &[f32]) {
        let correction = |beta: f64| 1.0 - beta.powi(update.steps as i32);
        let pass = Pass {
            scale: update.scale,
            beta1: self.betas[0] as f32,
            beta2: self.betas[1] as f32,
            step_size: (update.lr * group.rate / correction(self.betas[0])) as f32,
            root_correction: correction(self.betas[1]).sqrt() as f32,
            eps: self.eps as f32,
            keep: (1.0 - update.lr * group.rate * group.weight_decay) as f32,
        };
        let m = &mut floats_mut(&mut self.exp_avg)[group.numbers.clone()];
        let v = &mut floats_mut(&mut self.exp_avg_sq)[group.numbers.clone()];
        pass.update(weights, m, v, gradients);
    }

    fn on_device(&mut self, update: &DeviceUpdate, group: &Group, weights: &Tensor, gradients: &Tensor) {
        let update = libtorch::AdamW {
            step: Tensor::full([], update.steps as f64, (Kind::Float, weights.device())),
            divisor: update.divisor.shallow_clone(),
            skip: update.skip.shallow_clone(),
            lr: update.lr * group.rate,
            betas: self.betas,
            weight_decay: group.weight_decay,
            eps: self.eps,
        };
        let moments = [group.of(&self.exp_avg), group.of(&self.exp_avg_sq)];
        libtorch::fused_adamw(&update, weights, gradients, moments.each_ref());
    }
}

impl Pass {
    fn update(&self, weights: &mut [f32], m: &mut [f32], v: &mut [f32], gradients: &[f32]) {
        let each = threads::rows_each(weights.len(), weights.len(), 64);
        let parts = weights.chunks_mut(each).zip(m.chunks_mut(each)).zip(v.chunks_mut(each));
        threads::each(parts.zip(gradients.chunks(each)), |(((weights, m), v), g)| update(self, weights, m, v, g));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn update(pass: &Pass, weights: &mut [f32], m: &mut [f32], v: &mut [f32], gradients: &[f32]) {
    let &Pass { scale, beta1, beta2, step_size, root_correction, eps, keep } = pass;
    for (((w, m), v), g) in weights.iter_mut().zip(m).zip(v).zip(gradients) {
        let g = g * scale;
        *m += (1.0 - beta1) * (g - *m);
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        *w = *w * keep - step_size * *m / (v.sqrt() / root_correction + eps);
    }
}
