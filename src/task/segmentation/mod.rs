//! Semantic segmentation: one class for each pixel. UPerNet (arXiv 1807.10221) reads the outputs of four stages. An optional
//! auxiliary FCN (fully convolutional network) reads one of these outputs. Both heads are as in mmsegmentation 1.2.2. Training
//! targets are label maps (b, row, column) of the size of the crop. The label [`IGNORED`] marks a pixel without a class.
//!
//! Tensor names end in their shape: b = batch, n = tokens, d = width of a token, c = channels or classes, h and w = rows and
//! columns, 1 = a single image.

mod heads;
mod infer;
mod loss;
mod metrics;
mod neck;
mod norm;

pub use metrics::{METRICS, of_classes};

use super::{Loss, Part};
use crate::config::{Config, IGNORED, Inference, NormOver, PixelMean, TAPS};
use crate::family::Tokens;
use crate::family::parameter::Parameter;
use crate::model::{Network, Tap};
use crate::plan::segmentation::Architecture;
use anyhow::Result;
use heads::Heads;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// The task as a config sets it: all values on which the heads, the loss and the evaluation depend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segmentation {
    architecture: Architecture,
    /// The stages whose outputs the heads read, through the neck if there is one.
    tapped: [usize; TAPS],
    tokens: Tokens,
    /// The weight of the FCN's loss; 0 if there is no FCN.
    auxiliary_weight: f64,
    /// The probability with which dropout drops a channel before each classifier.
    dropout: f64,
    mean: PixelMean,
    norm_over: NormOver,
    inference: Inference,
    /// The distance in pixels between the starts of neighbouring windows of a sliding evaluation. Before the last window, the
    /// distance may be shorter.
    stride: usize,
    /// Whether an evaluation also reads the mirror image of each image.
    flip: bool,
}

impl Segmentation {
    /// The task of a validated config, whose task must be segmentation.
    pub fn of(config: &Config) -> Segmentation {
        let keys = &config.segmentation;
        Segmentation {
            architecture: Architecture::of(config).expect("the config was validated"),
            tapped: keys.tapped_stages(config.model.stages()),
            tokens: config.model.tokens_given().expect("the config was validated"),
            auxiliary_weight: keys.auxiliary_weight,
            dropout: keys.head_dropout,
            mean: keys.loss_mean,
            norm_over: keys.norm_over,
            inference: keys.inference,
            stride: keys.window_stride(),
            flip: keys.test_flip,
        }
    }

    pub fn taps(self) -> Vec<Tap> {
        self.tapped.map(Tap::Stage).to_vec()
    }

    /// The parameters and buffers of the neck and the heads, with mmsegmentation's names. Their stage number is `stages`, the
    /// number after that of the network's last stage.
    pub fn parameters(self, stages: usize) -> Vec<Parameter> {
        self.architecture.parameters(stages)
    }

    /// The contribution of a part of a batch to the mean loss, and its gradients at the taps. Adds the gradients of the neck's
    /// and the heads' parameters to their sums in the network's flat buffer. Collective over the part's group.
    pub fn loss(self, network: &Network, outputs: &[Tensor], targets: &Tensor, part: &Part) -> Result<Loss> {
        loss::loss(self, network, outputs, targets, part)
    }

    pub fn random_targets(self, samples: usize) -> Tensor {
        let [b, side] = [samples, self.architecture.crop].map(|n| n as i64);
        Tensor::randint(self.architecture.classes as i64, [b, side, side], (Kind::Uint8, Device::Cpu))
    }

    /// The class of each pixel (1, row, column) of an image, at the size of its label map and in host memory. `images_1chw` holds
    /// the image at each scale of the evaluation.
    pub fn infer(self, network: &Network, images_1chw: &[Tensor], labels_1hw: &Tensor) -> Result<Tensor> {
        let (_, h, w) = labels_1hw.size3().expect("a label map is (1, row, column)");
        infer::infer(self, network, images_1chw, [h, w])
    }

    pub fn sums(self) -> Vec<f64> {
        metrics::sums(self.architecture.classes)
    }

    pub fn add(self, sums: &mut [f64], predictions: &Tensor, labels: &Tensor) {
        metrics::add(sums, predictions, labels);
    }

    pub fn values(self, sums: &[f64]) -> BTreeMap<String, f64> {
        metrics::values(sums)
    }

    /// The map (b, d, row, column) that the tokens of the patches form. `tokens_bnd` (b, 1 + n, d) holds all tokens of images of
    /// the given size in pixels. The class token is left out.
    fn map(self, tokens_bnd: &Tensor, [height, width]: [i64; 2]) -> Tensor {
        let (b, n, d) = tokens_bnd.size3().expect("tokens are (b, n, d)");
        let grid = [height, width].map(|side| (side as usize).div_ceil(self.tokens.patch) as i64);
        tokens_bnd.narrow(1, 1, n - 1).transpose(1, 2).reshape([b, d, grid[0], grid[1]])
    }
}

#[cfg(test)]
mod tests;
