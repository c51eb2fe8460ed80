//! AdamW (Loshchilov and Hutter, arXiv 1711.05101; the arithmetic of torch.optim.AdamW) in one pass over flat buffers.

use crate::config::Training;
use crate::model::FlatParameters;
use crate::weights::floats_mut;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use tch::Tensor;

/// Moments and, if asked for, the moving average of the weights.
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    ema_decay: f64,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Option<Tensor>,
    steps: u64,
}

/// The numbers of one pass, the same for every parameter.
struct Pass {
    scale: f32,
    beta1: f32,
    beta2: f32,
    step_size: f32,
    root_correction: f32,
    eps: f32,
    keep: f32,
}

impl AdamW {
    /// Zero moments; the average starts at the weights.
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
        }
    }

    /// Goes on from a checkpoint's buffers, taken after `steps` updates.
    pub fn resume(
        training: &Training,
        flat: &FlatParameters,
        mut state: BTreeMap<String, Tensor>,
        steps: u64,
    ) -> Result<AdamW> {
        let mut take = |name: &str| -> Result<Tensor> {
            let tensor = state.remove(name).with_context(|| format!("state/{name} is missing"))?;
            anyhow::ensure!(tensor.size() == flat.buffer().size(), "state/{name} has shape {:?}", tensor.size());
            Ok(tensor)
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

    /// One update with gradients times `scale`.
    pub fn step(&mut self, flat: &mut FlatParameters, gradients: &[f32], scale: f32, lr: f64) {
        self.steps += 1;
        let correction = |beta: f64| 1.0 - beta.powi(self.steps as i32);
        let mut pass = Pass {
            scale,
            beta1: self.betas[0] as f32,
            beta2: self.betas[1] as f32,
            step_size: (lr / correction(self.betas[0])) as f32,
            root_correction: correction(self.betas[1]).sqrt() as f32,
            eps: self.eps as f32,
            keep: (1.0 - lr * self.weight_decay) as f32,
        };
        let decayed = flat.decayed();
        let (weights, plain) = flat.numbers_mut().split_at_mut(decayed);
        let (m, m_plain) = floats_mut(&mut self.exp_avg).split_at_mut(decayed);
        let (v, v_plain) = floats_mut(&mut self.exp_avg_sq).split_at_mut(decayed);
        let (g, g_plain) = gradients.split_at(decayed);
        pass.update(weights, m, v, g);
        pass.keep = 1.0;
        pass.update(plain, m_plain, v_plain, g_plain);
        if let Some(ema) = &mut self.ema {
            let decay = self.ema_decay as f32;
            for (average, weight) in floats_mut(ema).iter_mut().zip(flat.numbers_mut()) {
                *average = decay * *average + (1.0 - decay) * *weight;
            }
        }
    }
}

impl Pass {
    fn update(&self, weights: &mut [f32], m: &mut [f32], v: &mut [f32], gradients: &[f32]) {
        let (b1, b2) = (self.beta1, self.beta2);
        for (((w, m), v), g) in weights.iter_mut().zip(m).zip(v).zip(gradients) {
            let g = g * self.scale;
            *m += (1.0 - b1) * (g - *m);
            *v = b2 * *v + (1.0 - b2) * g * g;
            *w = *w * self.keep - self.step_size * *m / (v.sqrt() / self.root_correction + self.eps);
        }
    }
}
