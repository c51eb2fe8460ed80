//! Detection: the boxes, classes and masks of objects. Mask R-CNN (arXiv 1703.06870) on a plain ViT (arXiv 2203.16527), exactly as
//! detectron2's `mask_rcnn_vitdet`; without masks it is Faster R-CNN. All heads read the tokens of the last stage.
//!
//! A batch's targets are rows of [`Scene`], in pixels of the crop. Boxes are selected, matched and drawn on the host, in fp32, so the
//! host waits for a GPU within a step.
//!
//! Tensor names end in their shape: b = batch, n = tokens, d = numbers of a token, a = anchors, r = regions, c = channels, h and w =
//! rows and columns.

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

/// The task of a config, with all that its heads, losses and evaluation depend on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Detection {
    architecture: Architecture,
    /// The last stage, whose output the heads read.
    tapped: usize,
    patch: usize,
    /// The proposals of an image in training.
    limits: Limits,
    drawn_anchors: Quota,
    drawn_regions: Quota,
}

impl Detection {
    /// The task of a config of detection that passed validation.
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

    /// The parameters of the pyramid and the heads, by detectron2's names. Their stage is that after the network's `stages`.
    pub fn parameters(self, stages: usize) -> Vec<Parameter> {
        self.architecture.parameters(stages)
    }

    /// The contribution of a part of a batch to the mean loss, and the gradient at the tap. The gradients of the heads' parameters are
    /// added to the flat buffer of the network.
    pub fn loss(self, network: &Network, outputs: &[Tensor], targets: &Tensor, part: &Part) -> Result<Loss> {
        loss::loss(self, network, outputs, targets, part)
    }

    /// A few boxes with polygons for each image, as rows of scenes (b, numbers).
    pub fn random_targets(self, samples: usize) -> Tensor {
        random_targets::random_targets(self.architecture, samples)
    }

    /// What is detected in an image (1, c, crop, crop) whose label is a row (1, numbers) of a scene in pixels of the original image: a
    /// row (1, numbers) of detections in those pixels.
    pub fn infer(self, network: &Network, image_1chw: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let (scene, _) = Scene::from_row(&Vec::<f64>::try_from(labels.get(0))?)?;
        let size = fitted(scene.size, self.architecture.crop);
        let tokens = network.forward(image_1chw, &self.taps()).swap_remove(0);
        let heads = Heads::new(self.architecture, network, false);
        let detected = tch::no_grad(|| infer::detected(self, &heads, &self.map(&tokens), size, scene.size));
        Ok(Tensor::from_slice(&detected_to_row(&detected)).unsqueeze(0))
    }

    /// Adds an evaluated image to the list of all.
    pub fn add(self, sums: &mut Vec<f64>, detected: &Tensor, label: &Tensor) {
        metrics::add(sums, detected, label);
    }

    pub fn metrics(self) -> &'static [super::Metric] {
        metrics(self.architecture.masks)
    }

    /// The metrics, and the figures of each class. A class that has none of these `names` is called by its number.
    pub fn figures(self, sums: &[f64], names: &[String]) -> (BTreeMap<String, f64>, Vec<ClassFigures>) {
        metrics::figures(sums, (self.architecture.classes, names), self.architecture.masks)
    }

    /// The map (b, d, row, column) of the tokens (b, 1 + n, d), without the class token.
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
