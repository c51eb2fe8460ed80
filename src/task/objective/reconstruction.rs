//! The loss of a reconstructed image as in InfoPro: the binary cross entropy of each value of the image, which lies in 0…1.

use crate::weights::upload;
use tch::{Kind, Tensor};

/// The sum over the samples of the loss of an image, which is the mean over its pixels and channels. `logits_bchw` (b, c, h, w)
/// are the predicted logits of the target's values. The target is the network's input with its normalisation undone. It is
/// clamped to 0…1, because random erasing writes values outside of this range, for which the loss would have no lower bound.
pub fn loss(logits_bchw: &Tensor, images_bchw: &Tensor, mean: &[f64], std: &[f64]) -> Tensor {
    let target_bchw = target(images_bchw, mean, std);
    let numbers = (logits_bchw.numel() as i64 / logits_bchw.size()[0]) as f64;
    // For a logit z and a target t this is log (1 + exp z) − t z, whose gradient is sigmoid(z) − t.
    (logits_bchw.softplus() - logits_bchw * target_bchw).sum(Kind::Float) / numbers
}

/// The images with their normalisation undone, clamped to 0…1. `mean` and `std` have a number for each channel.
fn target(images_bchw: &Tensor, mean: &[f64], std: &[f64]) -> Tensor {
    let of_channels = |values: &[f64]| {
        let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
        upload(&Tensor::from_slice(&values).view([-1, 1, 1]), images_bchw.device())
    };
    (images_bchw.to_kind(Kind::Float) * of_channels(std) + of_channels(mean)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn the_target_is_the_image_before_it_was_normalised_and_is_clamped() {
        let (mean, std) = ([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]);
        let bytes = Tensor::arange(256, (Kind::Float, Device::Cpu)).view([1, 1, 16, 16]).expand([1, 3, 16, 16], false);
        let scaled = bytes / 255.0;
        let [mean_c, std_c] =
            [mean, std].map(|values| Tensor::from_slice(&values).to_kind(Kind::Float).view([3, 1, 1]));
        let normalised = (&scaled - mean_c) / std_c;
        let found = target(&normalised, &mean, &std);
        assert!((&found - &scaled).abs().max().double_value(&[]) < 1e-6);
        let noise = Tensor::randn([8, 3, 16, 16], (Kind::Float, Device::Cpu)) * 5.0;
        let found = target(&noise, &mean, &std);
        assert!(found.min().double_value(&[]) >= 0.0 && found.max().double_value(&[]) <= 1.0);
    }

    #[test]
    fn the_loss_is_bounded_by_0_and_its_gradient_is_the_sigmoid_less_the_target() {
        let logits = (Tensor::arange(2 * 3 * 16, (Kind::Float, Device::Cpu)) * 0.7).sin().view([2, 3, 4, 4]) * 30.0;
        let images = Tensor::randn([2, 3, 4, 4], (Kind::Float, Device::Cpu)) * 4.0;
        let (mean, std) = ([0.5; 3], [0.2; 3]);
        let leaf = logits.set_requires_grad(true);
        let sum = loss(&leaf, &images, &mean, &std);
        assert!(sum.double_value(&[]) > 0.0);
        let gradient = Tensor::run_backward(&[&sum], &[&leaf], false, false).swap_remove(0);
        let expected = (leaf.detach().sigmoid() - target(&images, &mean, &std)) / 48.0;
        assert!((gradient - expected).abs().max().double_value(&[]) < 1e-6);
    }
}
