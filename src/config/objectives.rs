//! The keys of `[dgl]` and `[infopro]`: local losses, with which the stages of the whole network train apart from each other.

use super::{Data, Training};
use crate::require;
use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Which losses train a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectiveKind {
    /// The task's loss alone, through all stages.
    EndToEnd,
    /// Decoupled greedy learning (Belilovsky et al., arXiv 1901.08164): each stage but the last learns from a classifier of its
    /// own.
    Dgl,
    /// Information propagation (Wang et al., arXiv 2101.10832): each stage but the last learns to reconstruct the image and to tell
    /// the classes apart.
    InfoPro,
}

/// The table `[dgl]`, whose keys are documented in `configs/default.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Dgl {
    pub head: LocalHead,
    #[serde(flatten)]
    pub training: Training,
}

/// The classifier of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LocalHead {
    /// Of a map, DGL's MLP-SR; of tokens, two linear layers after the class token.
    Mlp,
    /// One linear layer, after the mean of a map or after the class token.
    Linear,
}

/// The table `[infopro]`, whose keys are documented in `configs/default.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InfoPro {
    pub loss: LabelLoss,
    /// The weights of the reconstruction at the first border and at the last.
    pub reconstruction: [f64; 2],
    /// The weights of the loss of the classes at the first border and at the last.
    pub classes: [f64; 2],
    #[serde(flatten)]
    pub training: Training,
}

/// How a stage learns to tell the classes apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelLoss {
    /// The supervised contrastive loss (Khosla et al., arXiv 2004.11362) of pairs of images.
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
