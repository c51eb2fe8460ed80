//! Detection: the boxes, classes and masks of objects. The detector is Mask R-CNN (arXiv 1703.06870) on a plain ViT (arXiv
//! 2203.16527), as in detectron2's `mask_rcnn_vitdet`. Without masks, the detector is Faster R-CNN. The heads read a feature
//! pyramid, which is computed from the tokens of the last stage.
//!
//! The training targets of a batch are [`Scene`]s as rows of numbers, in pixels of the crop. The host selects, matches and
//! samples boxes in fp32. So within a step, the host waits for a GPU's results.
//!
//! Tensor names end in their shape: b = batch, n = tokens, d = width of a token, a = anchors, r = regions, c = channels, h and w
//! = rows and columns, 1 = a single image.

mod anchors;
mod boxes;
mod heads;
mod infer;
mod loss;
mod matching;
mod metrics;
mod nms;
mod paste;
mod pooling;
mod proposals;
mod random_targets;
mod regions;

pub use metrics::metrics;

use super::{ClassFigures, Loss, Part};
use crate::coco::objects::{Scene, detected_to_row, fitted};
use crate::config::Config;
use crate::family::parameter::Parameter;
use crate::model::{Network, Tap};
use crate::plan::detection::Architecture;
use anchors::Anchors;
use anyhow::Result;
use heads::Heads;
use matching::Quota;
use proposals::Limits;
use std::collections::BTreeMap;
use tch::Tensor;

/// The task as a config sets it: all values on which the heads, the losses and the evaluation depend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Detection {
    architecture: Architecture,
    /// The number of the last stage, whose output the pyramid reads.
    tapped: usize,
    /// The side of a token's patch in pixels.
    patch: usize,
    /// The largest numbers of proposals of an image in training.
    limits: Limits,
    drawn_anchors: Quota,
    drawn_regions: Quota,
}

impl Detection {
    /// The task of a validated config, whose task must be detection.
    pub fn of(config: &Config) -> Detection {
        let architecture = Architecture::of(config).expect("the config was validated");
        Detection {
            architecture,
            tapped: config.model.stages() - 1,
            patch: config.model.tokens_given().expect("the config was validated").patch,
            limits: Limits { of_level: 2000, all: 1000 },
            drawn_anchors: Quota { all: 256, most_positive: 128 },
            drawn_regions: Quota { all: architecture.regions, most_positive: architecture.most_with_object() },
        }
    }

    pub fn taps(self) -> Vec<Tap> {
        vec![Tap::Stage(self.tapped)]
    }

    /// The parameters of the pyramid and the heads, with detectron2's names. Their stage number is `stages`, the number after
    /// that of the network's last stage.
    pub fn parameters(self, stages: usize) -> Vec<Parameter> {
        self.architecture.parameters(stages)
    }

    /// The contribution of a part of a batch to the mean loss, and its gradient at the tap. Adds the gradients of the pyramid's
    /// and the heads' parameters to their sums in the network's flat buffer.
    pub fn loss(self, network: &Network, outputs: &[Tensor], targets: &Tensor, part: &Part) -> Result<Loss> {
        loss::loss(self, network, outputs, targets, part)
    }

    /// Random training targets: a row (b, numbers) for each image, which holds a scene of a few objects.
    pub fn random_targets(self, samples: usize) -> Tensor {
        random_targets::random_targets(self.architecture, samples)
    }

    /// Detects the objects in an image (1, c, crop, crop). `labels` (1, numbers) holds the row of its scene, which gives the size
    /// of the original image. Returns a row (1, numbers) of detections, in pixels of the original image.
    pub fn infer(self, network: &Network, image_1chw: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let (scene, _) = Scene::from_row(&Vec::<f64>::try_from(labels.get(0))?)?;
        let size = fitted(scene.size, self.architecture.crop);
        let tokens = network.forward(image_1chw, &self.taps()).swap_remove(0);
        let heads = Heads::new(self.architecture, network, false);
        let detected = tch::no_grad(|| infer::detected(self, &heads, &self.map(&tokens), size, scene.size));
        Ok(Tensor::from_slice(&detected_to_row(&detected)).unsqueeze(0))
    }

    /// Appends the numbers of an evaluated image to the list of the evaluation: its label, then its detections.
    pub fn add(self, sums: &mut Vec<f64>, detected: &Tensor, label: &Tensor) {
        metrics::add(sums, detected, label);
    }

    pub fn metrics(self) -> &'static [super::Metric] {
        metrics(self.architecture.masks)
    }

    /// The metrics, and the figures of each class. A class without a name in `names` is called by its number.
    pub fn figures(self, sums: &[f64], names: &[String]) -> (BTreeMap<String, f64>, Vec<ClassFigures>) {
        metrics::figures(sums, (self.architecture.classes, names), self.architecture.masks)
    }

    /// The map (b, d, row, column) that the tokens of the patches form, given all tokens (b, 1 + n, d). The class token is left
    /// out.
    fn map(self, tokens_bnd: &Tensor) -> Tensor {
        let (b, n, d) = tokens_bnd.size3().expect("tokens are (b, n, d)");
        let grid = self.architecture.grid as i64;
        tokens_bnd.narrow(1, 1, n - 1).transpose(1, 2).reshape([b, d, grid, grid])
    }

    fn anchors(self) -> Anchors {
        Anchors::new(self.architecture.sides(), self.patch)
    }
}

#[cfg(test)]
mod tests;
