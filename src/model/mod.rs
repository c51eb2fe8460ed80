//! The staged Vision Transformer. Meta model, hybrid and target are this one network with different stage depths.
//!
//! Shape suffixes: b = batch, n = tokens, d = width, c = channels or classes, p = patch side, h = heads, e = head width.

mod block;
mod flat;
mod init;

pub use block::DropPath;
pub use flat::{FlatParameters, Layout};
pub use init::fresh;

use crate::config::Model;
use crate::plan::parameters::parameters;
use crate::weights::Weights;
use anyhow::{Context, Result};
use block::{Block, Linear, Norm};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// A network whose stages in `trained` have their parameters in one flat buffer and require gradients; all other
/// stages are frozen.
pub struct Network {
    model: Model,
    trained: Range<usize>,
    stages: Vec<Stage>,
    flat: FlatParameters,
}

/// One stage: its blocks, and what only the first or last stage has.
struct Stage {
    embed: Option<Embed>,
    blocks: Vec<Block>,
    head: Option<(Norm, Linear)>,
}

struct Embed {
    cls_token: Tensor,
    pos_embed: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
}

impl Network {
    /// Builds a network from copies of `weights`, which must hold every parameter of these stage depths.
    pub fn new(model: &Model, depths: &[usize], trained: Range<usize>, weights: &Weights) -> Result<Network> {
        let table = parameters(model, depths);
        let flat = FlatParameters::new(table.iter().filter(|p| trained.contains(&p.stage)), weights)?;
        let get = |stage: usize, name: &str| -> Result<Tensor> {
            match flat.get(stage, name) {
                Some(view) => Ok(view),
                None => {
                    let tensor = weights.get(&(stage, name.to_string()));
                    Ok(tensor.with_context(|| format!("stage {stage} has no {name}"))?.shallow_clone())
                }
            }
        };
        let stages = (0..depths.len()).map(|s| Stage::new(model, depths, s, &get)).collect::<Result<_>>()?;
        Ok(Network { model: model.clone(), trained, stages, flat })
    }

    /// The trained parameters.
    pub fn flat(&self) -> &FlatParameters {
        &self.flat
    }

    pub fn flat_mut(&mut self) -> &mut FlatParameters {
        &mut self.flat
    }

    /// Logits (b, classes) of images (b, channels, rows, columns).
    ///
    /// Stages before the trained ones run without an autograd graph; stages after them pass activation gradients back
    /// and, as their parameters require none, compute no weight gradients. `drop` is off for evaluation.
    pub fn forward(&self, images_bchw: &Tensor, drop: Option<&DropPath>) -> Tensor {
        let mut x_bnd = tch::no_grad(|| patches(images_bchw, self.model.patch_size as i64));
        let dropout = if drop.is_some() { self.model.dropout } else { 0.0 };
        let mut depth = 0;
        for (s, stage) in self.stages.iter().enumerate() {
            let frozen_prefix = s < self.trained.start;
            let run = |x: &Tensor| stage.forward(x, drop, depth, dropout);
            x_bnd = if frozen_prefix { tch::no_grad(|| run(&x_bnd)) } else { run(&x_bnd) };
            depth += stage.blocks.len();
        }
        x_bnd
    }

    /// Gradients of the trained parameters, in the order of the flat buffer.
    pub fn gradients(&self, loss: &Tensor) -> Vec<Tensor> {
        Tensor::run_backward(&[loss], self.flat.views(), false, false)
    }
}

impl Stage {
    fn new(
        model: &Model,
        depths: &[usize],
        index: usize,
        get: &dyn Fn(usize, &str) -> Result<Tensor>,
    ) -> Result<Stage> {
        let get = |name: &str| get(index, name);
        let embed = if index == 0 {
            Some(Embed {
                cls_token: get("cls_token")?,
                pos_embed: get("pos_embed")?,
                proj_weight: get("patch_embed.proj.weight")?,
                proj_bias: get("patch_embed.proj.bias")?,
            })
        } else {
            None
        };
        let blocks = (0..depths[index])
            .map(|block| Block::new(model, &|name| get(&format!("blocks.{block}.{name}"))))
            .collect::<Result<_>>()?;
        let head = if index + 1 == depths.len() {
            let norm = Norm { weight: get("norm.weight")?, bias: get("norm.bias")?, eps: model.layer_norm_eps };
            Some((norm, Linear { weight: get("head.weight")?, bias: Some(get("head.bias")?) }))
        } else {
            None
        };
        Ok(Stage { embed, blocks, head })
    }

    /// From patches (stage 0) or tokens to tokens, or to logits (last stage). `depth` counts the blocks before.
    fn forward(&self, x: &Tensor, drop: Option<&DropPath>, depth: usize, dropout: f64) -> Tensor {
        let mut x_bnd = match &self.embed {
            Some(embed) => embed.forward(x).dropout(dropout, dropout > 0.0),
            None => x.shallow_clone(),
        };
        for (i, block) in self.blocks.iter().enumerate() {
            x_bnd = block.forward(&x_bnd, drop, depth + i, dropout);
        }
        match &self.head {
            // Only the class token reaches the head, so only it is normalised.
            Some((norm, head)) => head.forward(&norm.forward(&x_bnd.select(1, 0))),
            None => x_bnd,
        }
    }
}

/// Cuts (b, c, H, W) into rows of pixels (b, n, c·p·p), in the order of the patch kernel: the convolution with stride
/// p becomes one matrix product.
fn patches(images_bchw: &Tensor, p: i64) -> Tensor {
    let (b, c, height, width) = images_bchw.size4().expect("images are (b, c, h, w)");
    images_bchw.view([b, c, height / p, p, width / p, p]).permute([0, 2, 4, 1, 3, 5]).reshape([
        b,
        (height / p) * (width / p),
        c * p * p,
    ])
}

impl Embed {
    fn forward(&self, patches_bnp: &Tensor) -> Tensor {
        let (b, _, pixels) = patches_bnp.size3().expect("patches are (b, n, pixels)");
        let tokens_bnd = patches_bnp.linear(&self.proj_weight.view([-1, pixels]), Some(&self.proj_bias));
        let class_b1d = self.cls_token.expand([b, -1, -1], false);
        Tensor::cat(&[class_b1d, tokens_bnd], 1) + &self.pos_embed
    }
}

/// The device and number type of every parameter.
pub const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);
