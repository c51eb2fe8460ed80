//! The same pass on a GPU: a few libtorch operations on the flat buffers, with nothing to wait for.

use super::AdamW;
use crate::model::FlatParameters;
use tch::{Kind, Tensor};

impl AdamW {
    /// As `step_on_host`, for buffers on any device.
    pub(super) fn step_on_device(&mut self, flat: &mut FlatParameters, clip: f64, lr: f64) {
        let correction = |beta: f64| 1.0 - beta.powi(self.steps as i32);
        let (step_size, root_correction) = (lr / correction(self.betas[0]), correction(self.betas[1]).sqrt());
        let gradients = &clipped(&flat.gradients().narrow(0, 0, flat.len() as i64), clip);
        let _ = self.exp_avg.lerp_(gradients, 1.0 - self.betas[0]);
        let _ = self.exp_avg_sq.lerp_(&gradients.square(), 1.0 - self.betas[1]);
        let denominator = self.exp_avg_sq.sqrt().divide_scalar_(root_correction).g_add_scalar_(self.eps);
        let update = &self.exp_avg / denominator * -step_size;
        let (weights, decayed) = (flat.buffer().shallow_clone(), flat.decayed() as i64);
        tch::no_grad(|| {
            let _ = weights.narrow(0, 0, decayed).g_mul_scalar_(1.0 - lr * self.weight_decay);
            let _ = weights.shallow_clone().g_add_(&update);
        });
        if let Some(ema) = &mut self.ema {
            let _ = ema.lerp_(&weights, 1.0 - self.ema_decay);
        }
        flat.refresh();
    }
}

/// The factor stays on the device, as torch's `clip_grad_norm_` has it.
fn clipped(gradients: &Tensor, limit: f64) -> Tensor {
    if limit == 0.0 {
        return gradients.shallow_clone();
    }
    let norm = gradients.square().sum(Kind::Float).sqrt();
    gradients * (limit / (norm + 1e-6)).clamp_max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::model::fresh;
    use crate::plan::parameters::parameters;

    #[test]
    fn both_passes_make_the_same_weights_moments_and_average() {
        let text = "[model]\nimage_size = 8\npatch_size = 4\nwidth = 8\nheads = 2\ndepths = [1]\n[train]\nema = 0.9";
        let config = Config::parse(text, &[]).unwrap();
        let table = parameters(&config.model, &[1]);
        let weights = fresh(table.iter(), 7);
        let flat = || FlatParameters::new(table.iter(), &weights, Kind::Float).unwrap();
        let (mut host, mut device) = (flat(), flat());
        let mut on_host = AdamW::new(&config.meta, &host);
        let mut on_device = AdamW::new(&config.meta, &device);
        let _guard = tch::no_grad_guard();
        tch::manual_seed(3);
        for (step, clip) in [0.0, 0.5, 1e9, 0.1].into_iter().enumerate() {
            let gradients = host.gradients().randn_like() * 0.1;
            for flat in [&mut host, &mut device] {
                flat.gradients_mut().copy_(&gradients);
            }
            let lr = 1e-2 * (step + 1) as f64;
            (on_host.steps, on_device.steps) = (step as u64 + 1, step as u64 + 1);
            on_host.step_on_host(&mut host, clip, lr);
            on_device.step_on_device(&mut device, clip, lr);
        }
        let close = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) < 1e-6;
        assert!(close(host.buffer(), device.buffer()));
        assert!(!close(host.buffer(), flat().buffer()), "the weights have moved");
        for ((name, a), (_, b)) in on_host.state().into_iter().zip(on_device.state()) {
            assert!(close(a, b), "{name}");
        }
    }
}
