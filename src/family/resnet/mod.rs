//! The residual network for small images (He et al., arXiv 1512.03385, section 4.2): a stem, layers of basic blocks, global average
//! pooling and a linear head. The stem is one convolution. A layer is a group of blocks of the same width. Its first block doubles
//! the width and halves the resolution, except in the first layer.
//!
//! Two stages may meet between any two blocks, and the stem belongs to the first stage. A thin stage keeps the blocks that change
//! the width, so that the shapes at its borders are the same as in the target. A thin stage without such blocks has one block. If
//! the first stage consists of the stem alone, its thin stage has no block.

mod blocks;
mod cost;
mod parameters;
mod validate;

use super::parameter::Parameter;
use super::shape::Shape;
use super::{Family, Memory, Model, count, numbered};
use anyhow::Result;
pub use blocks::Block;
use serde::{Deserialize, Serialize};

/// The defaults of this family, as TOML.
pub const DEFAULTS: &str = include_str!("defaults.toml");

/// The keys of `[model]`, each documented in `defaults.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resnet {
    #[serde(default)]
    family: Name,
    pub image_size: usize,
    pub channels: usize,
    pub classes: usize,
    pub width: usize,
    pub layers: Vec<usize>,
    pub depths: Vec<usize>,
    pub shortcut: Shortcut,
    pub frozen_norm: FrozenNorm,
}

/// The name of the family. It is stored with the other keys, because the family decides which keys a `[model]` table has.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    #[default]
    Resnet,
}

/// How the input of a block that changes the shape reaches its output (He et al., section 3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shortcut {
    /// Every second pixel of the input in each direction, with channels of zeros before and after the channels of the input.
    A,
    /// A 1×1 convolution with a norm.
    B,
}

/// The statistics with which the batch norms of a frozen stage normalise during training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FrozenNorm {
    /// The stored running statistics, as constants.
    Running,
    /// The statistics of the micro-batch, as in Deep Incubation's official code, which leaves frozen stages in training mode.
    Batch,
}

impl Resnet {
    /// The blocks of each stage, for stages of these depths.
    pub fn blocks(&self, depths: &[usize]) -> Vec<Vec<Block>> {
        blocks::blocks(self, depths)
    }

    /// The number of channels after the last block.
    pub fn features(&self) -> usize {
        self.width << (self.layers.len() - 1)
    }
}

impl Family for Resnet {
    fn title(&self) -> &'static str {
        "residual network"
    }

    fn image_size(&self) -> usize {
        self.image_size
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn border(&self, stage: usize) -> Shape {
        blocks::border(self, stage)
    }

    fn depths(&self) -> &[usize] {
        &self.depths
    }

    fn meta_depths(&self) -> Vec<usize> {
        blocks::thin_depths(self)
    }

    fn validate(&self) -> Result<()> {
        validate::validate(self)
    }

    fn parameters(&self, depths: &[usize]) -> Vec<Parameter> {
        parameters::parameters(self, depths)
    }

    fn whole_name(&self, parameter: &Parameter, depths: &[usize]) -> String {
        parameters::whole_name(self, parameter, depths)
    }

    fn stage_flops(&self, depths: &[usize], stage: usize) -> f64 {
        cost::stage_flops(self, depths, stage)
    }

    fn activations(&self, training: &Memory) -> f64 {
        cost::activations(self, training)
    }

    /// The rate rises linearly from 0 in the first block to `rate` in the last. A block has one branch.
    fn drop_rates(&self, depths: &[usize], rate: f64) -> Vec<f64> {
        let blocks: usize = depths.iter().sum();
        if rate == 0.0 || blocks < 2 {
            return Vec::new();
        }
        (0..blocks).map(|block| rate * block as f64 / (blocks - 1) as f64).collect()
    }

    fn blocks_in(&self, names: &mut dyn Iterator<Item = &str>) -> usize {
        let names: Vec<&str> = names.collect();
        let of_layer = |layer: usize| {
            let prefix = format!("layer{}.", layer + 1);
            count(names.iter().filter_map(|name| numbered(name, &prefix)))
        };
        (0..self.layers.len()).map(of_layer).fold(0, usize::saturating_add)
    }

    /// PyTorch's BatchNorm also stores the number of batches that it has seen. An import does not need this number.
    fn is_needless(&self, name: &str) -> bool {
        name.ends_with(".num_batches_tracked")
    }

    fn cure_for_depths(&self) -> &'static str {
        "set model.layers and model.depths"
    }

    fn is_like(&self, other: &Model) -> bool {
        let Resnet { image_size, depths, frozen_norm, .. } = self.clone();
        matches!(other, Model::Resnet(other) if Resnet { image_size, depths, frozen_norm, ..other.clone() } == *self)
    }
}
