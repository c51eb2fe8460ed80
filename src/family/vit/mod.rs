//! The Vision Transformer (arXiv 2010.11929) as timm and DeiT build it: patches and a class token, pre-norm blocks of
//! attention and MLP, a final norm and a linear head on the class token.

pub mod cost;
pub mod names;
mod parameters;
pub mod resample;
mod validate;

use super::parameter::{Grown, Parameter};
use super::shape::Shape;
use super::{Family, Memory, Model, Tokens};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The keys of `[model]`, each documented in `configs/default.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vit {
    pub image_size: usize,
    pub channels: usize,
    /// The number of classes; 0 in a network without a head, which also has no final norm.
    pub classes: usize,
    pub patch_size: usize,
    pub width: usize,
    pub heads: usize,
    pub mlp_ratio: f64,
    pub depths: Vec<usize>,
    pub meta_depth: usize,
    pub qkv_bias: bool,
    pub layer_norm_eps: f64,
    pub dropout: f64,
    /// The side of an attention window, in tokens. Most blocks attend within such square windows. The side is 0 if all blocks
    /// attend to the whole image. Only the network of a detector has windows.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub window: usize,
}

fn is_zero(window: &usize) -> bool {
    *window == 0
}

impl Vit {
    /// Hidden units of the MLP.
    pub fn hidden(&self) -> usize {
        (self.width as f64 * self.mlp_ratio) as usize
    }

    /// Whether block `number` (counted from 0) of `blocks` attends within windows. The last block of each quarter of the network
    /// attends to the whole image, as in ViTDet.
    pub fn has_windows(&self, number: usize, blocks: usize) -> bool {
        let ends_quarter = (1..=4).any(|quarter| (quarter * blocks).div_ceil(4) == number + 1);
        self.window > 0 && !ends_quarter
    }

    /// The number of patches along one side of an image.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// The number of tokens: the patches and the class token.
    pub fn tokens(&self) -> usize {
        self.grid().pow(2) + 1
    }
}

impl Family for Vit {
    fn title(&self) -> &'static str {
        "Vision Transformer"
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

    fn tokens_given(&self) -> Option<Tokens> {
        Some(Tokens { patch: self.patch_size, width: self.width })
    }

    fn border(&self, _stage: usize) -> Shape {
        Shape::Tokens { grid: self.grid(), width: self.width }
    }

    fn depths(&self) -> &[usize] {
        &self.depths
    }

    fn meta_depths(&self) -> Vec<usize> {
        vec![self.meta_depth; self.depths.len()]
    }

    fn validate(&self) -> Result<()> {
        validate::validate(self)
    }

    fn parameters(&self, depths: &[usize]) -> Vec<Parameter> {
        parameters::parameters(self, depths)
    }

    fn counts(&self, depths: &[usize]) -> Vec<usize> {
        parameters::counts(self, depths)
    }

    fn has_layers(&self) -> bool {
        true
    }

    fn layer(&self, parameter: &Parameter, depths: &[usize]) -> usize {
        parameters::layer(parameter, depths)
    }

    fn whole_name(&self, parameter: &Parameter, depths: &[usize]) -> String {
        parameters::timm_name(parameter, depths)
    }

    fn stage_flops(&self, depths: &[usize], stage: usize) -> f64 {
        cost::stage_flops(self, depths, stage)
    }

    fn activations(&self, training: &Memory) -> f64 {
        cost::activations(self, training)
    }

    /// The rate rises linearly from 0 in the first block to `rate` in the last (DeiT). A block has two branches.
    fn drop_rates(&self, depths: &[usize], rate: f64) -> Vec<f64> {
        let blocks: usize = depths.iter().sum();
        if rate == 0.0 || blocks < 2 {
            return Vec::new();
        }
        (0..2 * blocks).map(|branch| rate * (branch / 2) as f64 / (blocks - 1) as f64).collect()
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }

    fn can_grow(&self) -> bool {
        true
    }

    fn grown(&self, parameter: &Parameter, depth: usize, meta_depth: usize) -> Grown {
        parameters::grown(parameter, depth, meta_depth)
    }

    fn takes(&self, parameter: &Parameter, shape: &[i64]) -> bool {
        parameter.shape == shape || resample::is_another_grid(parameter, shape)
    }

    fn resampled(&self, parameter: &Parameter, tensor: Tensor) -> Tensor {
        if parameter.name != "pos_embed" || tensor.size() == parameter.shape {
            return tensor;
        }
        log::info!(
            "pos_embed: resampled from {} rows to a grid of {side}×{side}",
            tensor.size()[1],
            side = self.grid()
        );
        resample::positions(&tensor, [self.grid() as i64; 2])
    }

    fn absent_bias(&self, weight: &str) -> Option<String> {
        let is_absent = !self.qkv_bias && weight.ends_with("qkv.weight");
        is_absent.then(|| weight.replace("weight", "bias"))
    }

    fn cure_for_missing(&self, name: &str) -> &'static str {
        if name.ends_with("qkv.bias") { "; set model.qkv_bias = false" } else { "" }
    }

    fn is_like(&self, other: &Model) -> bool {
        let Vit { image_size, depths, meta_depth, window, .. } = self.clone();
        match other {
            Model::Vit(other) => Vit { image_size, depths, meta_depth, window, ..other.clone() } == *self,
            _ => false,
        }
    }
}
