//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the arithmetic of torch.optim.AdamW, in one pass over flat buffers.

mod device;

use crate::config::Training;
use crate::model::{FlatParameters, threads};
use crate::weights::{floats, floats_mut};
use anyhow::{Context, Result};
use multiversion::multiversion;
use std::collections::BTreeMap;
use tch::Tensor;

/// The optimiser: the moments and, if the config asks for it, the moving average of the weights.
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    ema_decay: f64,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Option<Tensor>,
    steps: u64,
    /// Whether libtorch's own operations update weights on the CPU too.
    by_libtorch: bool,
}

/// The constants of one update.
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
    /// Starts with moments of zero and with the weights as their average.
    pub fn new(training: &Training, flat: &FlatParameters) -> AdamW {
        AdamW {
            betas: training.betas,
            eps: training.eps,
            weight_decay: training.weight_decay,
            ema_decay: training.ema,
            exp_avg: flat.buffer().zeros_like(),
            exp_avg_sq: flat.buffer().zeros_like(),
            ema: (training.ema > 0.0).then(|| flat.buffer().copy()),
            steps: 0,
            by_libtorch: false,
        }
    }

    /// The same optimiser, but libtorch's own operations update the weights on the CPU too.
    pub fn by_libtorch(self) -> AdamW {
        AdamW { by_libtorch: true, ..self }
    }

    /// Resumes from the buffers of a checkpoint that was written after `steps` updates.
    pub fn resume(
        training: &Training,
        flat: &FlatParameters,
        mut state: BTreeMap<String, Tensor>,
        steps: u64,
    ) -> Result<AdamW> {
        let mut take = |name: &str| -> Result<Tensor> {
            let tensor = state.remove(name).with_context(|| format!("state/{name} is missing"))?;
            anyhow::ensure!(tensor.size() == flat.buffer().size(), "state/{name} has shape {:?}", tensor.size());
            Ok(tensor.to_device(flat.buffer().device()))
        };
        Ok(AdamW {
            exp_avg: take("exp_avg")?,
            exp_avg_sq: take("exp_avg_sq")?,
            ema: if training.ema > 0.0 { Some(take("ema")?) } else { None },
            steps,
            ..Self::new(training, flat)
        })
    }

    /// The buffers that a checkpoint keeps.
    pub fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let mut state = vec![("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)];
        state.extend(self.ema.as_ref().map(|ema| ("ema", ema)));
        state
    }

    /// The moving average of the weights, if there is one.
    pub fn average(&self) -> Option<&Tensor> {
        self.ema.as_ref()
    }

    /// Updates the weights once, with the gradients' global norm limited to `clip`; 0 means no limit. If the loss or the norm is
    /// not finite, weights, moments and average stay as they are, but the update is counted. The norm is left behind the gradients
    /// ([`FlatParameters::set_norm`]).
    pub fn step(&mut self, flat: &mut FlatParameters, clip: f64, lr: f64) {
        self.steps += 1;
        flat.wait_for_loan();
        if flat.buffer().device().is_cuda() || self.by_libtorch {
            self.step_on_device(flat, clip, lr);
        } else {
            self.step_on_host(flat, clip, lr);
        }
    }

    fn step_on_host(&mut self, flat: &mut FlatParameters, clip: f64, lr: f64) {
        let norm = norm(&floats(flat.gradients())[..flat.trainable()]);
        flat.set_norm(&Tensor::from(norm as f32));
        if !norm.is_finite() || !flat.loss().double_value(&[]).is_finite() {
            return;
        }
        let correction = |beta: f64| 1.0 - beta.powi(self.steps as i32);
        let mut pass = Pass {
            scale: clip_scale(norm, clip),
            beta1: self.betas[0] as f32,
            beta2: self.betas[1] as f32,
            step_size: (lr / correction(self.betas[0])) as f32,
            root_correction: correction(self.betas[1]).sqrt() as f32,
            eps: self.eps as f32,
            keep: (1.0 - lr * self.weight_decay) as f32,
        };
        let (decayed, trainable) = (flat.decayed(), flat.trainable());
        flat.update(|weights, gradients| {
            let gradients = &gradients[..trainable];
            let (weights_decayed, plain) = weights[..trainable].split_at_mut(decayed);
            let (m, m_plain) = floats_mut(&mut self.exp_avg)[..trainable].split_at_mut(decayed);
            let (v, v_plain) = floats_mut(&mut self.exp_avg_sq)[..trainable].split_at_mut(decayed);
            let (g, g_plain) = gradients.split_at(decayed);
            pass.update(weights_decayed, m, v, g);
            pass.keep = 1.0;
            pass.update(plain, m_plain, v_plain, g_plain);
            if let Some(ema) = &mut self.ema {
                let decay = self.ema_decay as f32;
                for (average, weight) in floats_mut(ema).iter_mut().zip(weights) {
                    *average = decay * *average + (1.0 - decay) * *weight;
                }
            }
        });
    }
}

/// The norm of all gradients. The squares are added in chunks, so that the rounding error does not grow with the number of
/// parameters. The sums of the chunks are added in order, so that the norm does not depend on the number of threads.
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

/// The sum of the squares, in lanes, so that the compiler vectorises the loop.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::model::fresh;
    use std::sync::mpsc::channel;
    use tch::Kind;

    #[test]
    fn clipping_brings_a_long_gradient_to_the_limit_and_leaves_a_short_one() {
        let scale = clip_scale(norm(&[3.0, 4.0]), 1.0);
        assert!((f64::from(scale) * 5.0 - 1.0).abs() < 1e-5);
        assert_eq!(clip_scale(norm(&[0.3, 0.4]), 1.0), 1.0);
        assert_eq!(clip_scale(norm(&[3.0, 4.0]), 0.0), 1.0);
    }

    #[test]
    fn the_norm_counts_every_number_once_for_any_number_of_threads() {
        for numbers in [0, 1, 4095, 4097, 3 * 4096 + 5, 100_000] {
            let gradients: Vec<f32> = (0..numbers).map(|i| ((i as f32) * 0.37).sin()).collect();
            let expected = gradients.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            assert!((norm(&gradients) - expected).abs() <= 1e-6 * expected, "{numbers}");
        }
    }

    #[test]
    fn weights_do_not_change_while_they_are_lent() {
        let config = Config::parse("[model]\nimage_size = 32\npatch_size = 4\nwidth = 64\nheads = 2", &[]).unwrap();
        let table = config.model.parameters(config.model.depths());
        let mut flat = FlatParameters::new(table.iter(), &fresh(table.iter(), 1), Kind::Float).unwrap();
        let mut optimiser = AdamW::new(&config.meta, &flat);
        let _ = flat.gradients_mut().fill_(1.0);
        let mut change = |by_optimiser: bool| {
            let (loan, lent, before) = (flat.lend(), flat.buffer().shallow_clone(), flat.buffer().copy());
            let (begun, begins) = channel();
            let reader = std::thread::spawn(move || {
                begun.send(()).unwrap();
                let stays = (0..300).all(|_| lent == before);
                drop(loan);
                (stays, before)
            });
            begins.recv().unwrap();
            match by_optimiser {
                true => optimiser.step(&mut flat, 0.0, 0.1),
                false => flat.set(&(flat.buffer() + 1.0)),
            }
            let (stays, before) = reader.join().unwrap();
            assert!(stays, "they change while they are lent, by the optimiser: {by_optimiser}");
            assert_ne!(*flat.buffer(), before, "they change after the loan");
        };
        change(true);
        change(false);
    }
}
