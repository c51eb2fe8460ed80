//! The keys of `[dgl]` and `[infopro]`. With their local losses, the stages of the whole network train apart from each other.

use super::{Data, Training};
use crate::require;
use anyhow::Result;
use serde::{Deserialize, Serialize};

/// The losses that train a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectiveKind {
    /// The task's loss alone, through all stages.
    EndToEnd,
    /// Decoupled greedy learning (Belilovsky et al., arXiv 1901.08164): each stage except the last learns from a classifier of its
    /// own.
    Dgl,
    /// Information propagation (Wang et al., arXiv 2101.10832): each stage except the last learns to reconstruct the image and to
    /// tell the classes apart.
    InfoPro,
}

/// The table `[dgl]`, whose keys are documented in `configs/default.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Dgl {
    pub head: LocalHead,
    #[serde(flatten)]
    pub training: Training,
}

/// The kind of local classifier of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LocalHead {
    /// DGL's MLP-SR on a feature map, or two linear layers on the class token.
    Mlp,
    /// One linear layer, on the mean of a feature map or on the class token.
    Linear,
}

/// The table `[infopro]`, whose keys are documented in `configs/default.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InfoPro {
    pub loss: LabelLoss,
    /// The weights of the reconstruction loss at the first border of two stages and at the last border.
    pub reconstruction: [f64; 2],
    /// The weights of the classification loss at the first border of two stages and at the last border.
    pub classes: [f64; 2],
    #[serde(flatten)]
    pub training: Training,
}

/// How a stage learns to tell the classes apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelLoss {
    /// The supervised contrastive loss (Khosla et al., arXiv 2004.11362), over pairs of images.
    Contrast,
    /// Cross entropy.
    Softmax,
}

impl InfoPro {
    pub(super) fn validate(&self, data: &Data) -> Result<()> {
        for (key, weights) in [("reconstruction", self.reconstruction), ("classes", self.classes)] {
            require!(
                weights.iter().all(|weight| *weight >= 0.0 && weight.is_finite()),
                "infopro.{key} = {weights:?}: give two numbers of at least 0, the weights at the first border and at the last"
            );
        }
        let is_mixed = data.mixup > 0.0 || data.cutmix > 0.0 || data.label_smoothing >= 1.0;
        require!(
            self.loss == LabelLoss::Softmax || !is_mixed,
            "infopro.loss = \"contrast\" compares images of one class, but data.mixup = {}, data.cutmix = {} and data.label_smoothing = \
             {} leave an image without one; set infopro.loss = \"softmax\", or data.mixup = 0 and data.cutmix = 0",
            data.mixup,
            data.cutmix,
            data.label_smoothing
        );
        Ok(())
    }
}
