//! Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) with the rules of PyTorch's BatchNorm2d.
//!
//! In training, a trained stage normalises each micro-batch with the mean and the biased variance of this micro-batch. After each
//! step, its running statistics move towards the means and unbiased variances of the micro-batches, averaged over the global batch
//! ([`FlatParameters::move_buffers`](super::super::FlatParameters::move_buffers)). With one micro-batch and one replica this is
//! PyTorch's rule.

use super::super::Weight;
use super::super::autograd::Mode;
use crate::family::resnet::FrozenNorm;
use tch::{Kind, Tensor};

/// PyTorch's default.
const EPS: f64 = 1e-5;

/// The running statistics of one norm, and how the norm behaves in a frozen stage.
pub struct Norm {
    mean: Weight,
    variance: Weight,
    frozen: FrozenNorm,
}

impl Norm {
    pub fn new(mean: Weight, variance: Weight, frozen: FrozenNorm) -> Norm {
        Norm { mean, variance, frozen }
    }

    /// Normalises each channel, then scales and shifts it. In training, the norm of a trained stage also adds the statistics to the
    /// flat buffer.
    pub fn forward(&self, x_bchw: &Tensor, [scale_c, shift_c]: [&Tensor; 2], mode: &Mode) -> Tensor {
        let is_trained = self.mean.gradient.is_some();
        if !(mode.trains && (is_trained || self.frozen == FrozenNorm::Batch)) {
            let [mean, variance] = [&self.mean, &self.variance].map(|buffer| Some(&buffer.value));
            return x_bchw.batch_norm(Some(scale_c), Some(shift_c), mean, variance, false, 0.0, EPS, true);
        }
        // With a momentum of 1, `batch_norm` writes the statistics of the micro-batch into these tensors.
        let statistics_2c = Tensor::zeros([2, scale_c.size()[0]], (Kind::Float, x_bchw.device()));
        let [mean_c, variance_c] = [0, 1].map(|row| statistics_2c.get(row));
        let normalised_bchw =
            x_bchw.batch_norm(Some(scale_c), Some(shift_c), Some(&mean_c), Some(&variance_c), true, 1.0, EPS, true);
        if !mode.again {
            let samples = x_bchw.size()[0];
            self.mean.accumulate(|| mean_c * samples);
            self.variance.accumulate(|| variance_c * samples);
        }
        normalised_bchw
    }
}
