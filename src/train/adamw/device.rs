//! The same update on a GPU (in a benchmark also on a CPU) by libtorch's fused AdamW: one kernel for the parameters with weight
//! decay and one for the others. The host waits for neither.

use super::AdamW;
use crate::libtorch;
use crate::model::FlatParameters;
use tch::{Kind, Tensor};

impl AdamW {
    /// Updates the weights as `step_on_host` does, for buffers on any device.
    pub(super) fn step_on_device(&mut self, flat: &mut FlatParameters, clip: f64, lr: f64) {
        let (numbers, decayed) = (flat.trainable() as i64, flat.decayed() as i64);
        let norm = flat.gradients().narrow(0, 0, numbers).norm();
        flat.set_norm(&norm);
        let is_finite = norm.isfinite().logical_and(&flat.loss().isfinite());
        let mut update = libtorch::AdamW {
            step: Tensor::full([], self.steps as f64, (Kind::Float, flat.buffer().device())),
            divisor: divisor(&norm, clip),
            skip: is_finite.logical_not().to_kind(Kind::Float),
            lr,
            betas: self.betas,
            weight_decay: self.weight_decay,
            eps: self.eps,
        };
        for (start, end, decay) in [(0, decayed, self.weight_decay), (decayed, numbers, 0.0)] {
            let part = |tensor: &Tensor| tensor.narrow(0, start, end - start);
            let moments = [part(&self.exp_avg), part(&self.exp_avg_sq)];
            update.weight_decay = decay;
            libtorch::fused_adamw(&update, &part(flat.buffer()), &part(flat.gradients()), moments.each_ref());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::model::fresh;

    #[test]
    fn host_and_device_compute_the_same_weights_moments_and_average() {
        let text = "[model]\nimage_size = 8\npatch_size = 4\nwidth = 8\nheads = 2\ndepths = [1]\n[train]\nema = 0.9";
        let config = Config::parse(text, &[]).unwrap();
        let table = config.model.parameters(&[1]);
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
        // A loss or a gradient that is not finite changes nothing, whether or not the gradients are clipped.
        for (flat, optimiser) in [(&mut host, &mut on_host), (&mut device, &mut on_device)] {
            let all = |flat: &FlatParameters, optimiser: &AdamW| {
                optimiser.state().iter().map(|(_, t)| t.copy()).chain([flat.buffer().copy()]).collect::<Vec<_>>()
            };
            let before = all(flat, optimiser);
            let mut try_both = |flat: &mut FlatParameters| {
                for clip in [0.0, 1.0] {
                    optimiser.step(flat, clip, 1.0);
                    optimiser.step_on_device(flat, clip, 1.0);
                }
                assert_eq!(before, all(flat, optimiser), "the moments, the average and the weights");
            };
            let loss = flat.loss().copy();
            let _ = flat.loss().fill_(f64::NAN);
            try_both(flat);
            flat.loss().copy_(&loss);
            for value in [f64::NAN, f64::INFINITY] {
                let _ = flat.gradients().get(5).fill_(value);
                try_both(flat);
            }
        }
        let close = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) < 1e-6;
        assert!(close(host.buffer(), device.buffer()));
        assert!(!close(host.buffer(), flat().buffer()), "the weights have moved");
        for ((name, a), (_, b)) in on_host.state().into_iter().zip(on_device.state()) {
            assert!(close(a, b), "{name}");
        }
    }
}
