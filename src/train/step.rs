//! One optimiser step: forward and backward of each micro-batch, one all-reduce, clipping, one optimiser pass.

use super::adamw::AdamW;
use crate::collective::Collective;
use crate::data::loader::Batch;
use crate::model::{DropPath, Network};
use crate::plan::groups::{micro_batches, share};
use crate::plan::{PhasePlan, Plan};
use crate::random::Random;
use crate::weights::floats_mut;
use anyhow::Result;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// What a step tells the loop.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Mean loss over the global batch.
    pub loss: f64,
    /// Some rank of the group was asked to stop.
    pub stop: bool,
    /// How long this rank waited for data.
    pub waited: Duration,
}

/// The buffers and constants of a phase's steps.
pub struct Stepper<'a> {
    group: &'a dyn Collective,
    global_batch: f64,
    micro_batches: usize,
    clip: f64,
    drop: DropPathRule,
    dropout: bool,
    seed: u64,
    /// Gradients in the order of the flat parameters, then two numbers that travel with them: loss and stop.
    gradients: Tensor,
    numbers: i64,
}

const EXTRAS: i64 = 2;

impl<'a> Stepper<'a> {
    pub fn new(plan: &Plan, phase: &PhasePlan, group: &'a dyn Collective, network: &Network) -> Stepper<'a> {
        let global_batch = phase.training.global_batch;
        let share = share(global_batch, group.rank(), group.size());
        let numbers = network.flat().len() as i64;
        Stepper {
            group,
            global_batch: global_batch as f64,
            micro_batches: micro_batches(share, plan.config.run.micro_batch).len(),
            clip: phase.training.clip_grad,
            drop: DropPathRule { rate: phase.training.drop_path, blocks: phase.depths.iter().sum(), seed: phase.seed },
            dropout: plan.config.model.dropout > 0.0,
            seed: phase.seed,
            gradients: Tensor::zeros([numbers + EXTRAS], (Kind::Float, Device::Cpu)),
            numbers,
        }
    }

    /// Trains on one global batch, this replica's share of the next of `batches`, in micro-batches.
    pub fn step(
        &mut self,
        network: &mut Network,
        optimiser: &mut AdamW,
        batches: &mut dyn Iterator<Item = Batch>,
        step: u64,
        lr: f64,
    ) -> Result<Outcome> {
        let mut waited = Duration::ZERO;
        let _ = self.gradients.zero_();
        if self.dropout {
            // libtorch's generator draws the dropout masks: keyed by step and rank, a resumed run draws the same.
            tch::manual_seed(crate::random::key(&[self.seed, DROPOUT, step, self.group.rank() as u64]) as i64);
        }
        for _ in 0..self.micro_batches {
            let asked = Instant::now();
            let batch = batches.next().expect("a loader has no end");
            waited += asked.elapsed();
            self.accumulate(network, &batch, step);
        }
        let numbers = self.numbers as usize;
        let gradients = floats_mut(&mut self.gradients);
        gradients[numbers + 1] = f32::from(u8::from(super::stop_requested()));
        self.group.all_reduce(gradients)?;
        let outcome = Outcome { loss: gradients[numbers].into(), stop: gradients[numbers + 1] > 0.0, waited };
        if outcome.loss.is_finite() {
            let gradients = &mut gradients[..numbers];
            let scale = clip_scale(gradients, self.clip);
            optimiser.step(network.flat_mut(), gradients, scale, lr);
        }
        Ok(outcome)
    }

    /// Adds one micro-batch's share of loss and gradients.
    fn accumulate(&mut self, network: &Network, batch: &Batch, step: u64) {
        let drop = self.drop.draw(step, batch.positions.clone());
        let logits_bc = network.forward(&batch.images_bchw, Some(&drop));
        let loss = soft_cross_entropy(&logits_bc, &batch.targets_bc) / self.global_batch;
        let parts = network.gradients(&loss);
        let mut flat: Vec<Tensor> = parts.iter().map(|g| g.reshape([-1])).collect();
        flat.push(loss.detach().reshape([1]));
        let _ = self.gradients.narrow(0, 0, self.numbers + 1).g_add_(&Tensor::cat(&flat, 0));
    }
}

const DROPOUT: u64 = 5;

/// Σ over the batch of −Σ target · log softmax(logits) (timm: `SoftTargetCrossEntropy`, before its mean).
pub fn soft_cross_entropy(logits_bc: &Tensor, targets_bc: &Tensor) -> Tensor {
    -(targets_bc * logits_bc.log_softmax(-1, Kind::Float)).sum(Kind::Float)
}

/// The factor that brings the global norm down to `limit`, as torch's `clip_grad_norm_`; 1 where there is no limit.
fn clip_scale(gradients: &[f32], limit: f64) -> f32 {
    if limit == 0.0 {
        return 1.0;
    }
    // Summed in chunks, so that rounding does not grow with the number of parameters.
    let squares = gradients.chunks(4096).map(|c| f64::from(c.iter().map(|g| g * g).sum::<f32>()));
    let norm = squares.sum::<f64>().sqrt();
    (limit / (norm + 1e-6)).min(1.0) as f32
}

/// Stochastic depth: the rate rises linearly from 0 to `rate` over the blocks of the network that runs.
struct DropPathRule {
    rate: f64,
    blocks: usize,
    seed: u64,
}

impl DropPathRule {
    /// Masks of one micro-batch, keyed by the sample's position in the global batch: any cut of it draws the same.
    fn draw(&self, step: u64, positions: std::ops::Range<usize>) -> DropPath {
        if self.rate == 0.0 || self.blocks < 2 {
            return DropPath { scale: None };
        }
        let (branches, samples) = (2 * self.blocks, positions.len());
        let mut scale = vec![0.0f32; branches * samples];
        for (column, position) in positions.enumerate() {
            let mut random = Random::new(&[self.seed, DROP_PATH, step, position as u64]);
            for branch in 0..branches {
                let keep = 1.0 - self.rate * (branch / 2) as f64 / (self.blocks - 1) as f64;
                let kept = random.uniform() < keep;
                scale[branch * samples + column] = if kept { (1.0 / keep) as f32 } else { 0.0 };
            }
        }
        let shape = [branches as i64, samples as i64, 1, 1];
        DropPath { scale: Some(Tensor::from_slice(&scale).view(shape)) }
    }
}

const DROP_PATH: u64 = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_brings_a_long_gradient_to_the_limit_and_leaves_a_short_one() {
        let scale = clip_scale(&[3.0, 4.0], 1.0);
        assert!((f64::from(scale) * 5.0 - 1.0).abs() < 1e-5);
        assert_eq!(clip_scale(&[0.3, 0.4], 1.0), 1.0);
        assert_eq!(clip_scale(&[3.0, 4.0], 0.0), 1.0);
    }

    #[test]
    fn drop_path_keeps_each_branch_at_its_rate_without_bias_and_depends_only_on_the_position() {
        let rule = DropPathRule { rate: 0.5, blocks: 3, seed: 1 };
        let whole = rule.draw(7, 0..4000).scale.unwrap();
        let mean = whole.mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float);
        assert!((&mean - 1.0).abs().max().double_value(&[]) < 0.06, "{mean}");
        assert_eq!(
            whole.get(5).eq(0.0).sum(Kind::Int64).int64_value(&[]) / 100,
            20,
            "half of the last branch is dropped"
        );
        let cut = rule.draw(7, 1000..1002).scale.unwrap();
        assert_eq!(whole.narrow(1, 1000, 2), cut);
    }
}
