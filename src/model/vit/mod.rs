//! The Vision Transformer with its blocks, layers and CPU kernels.
//!
//! The backward pass is written out instead of left to autograd. So the forward pass keeps only the tensors that the backward pass
//! needs. It keeps fewer tensors for frozen blocks. The backward pass adds gradients straight to the flat buffer of gradients, and
//! can recompute a block whose activations were not kept.
//!
//! Tensor names end in their shape: b = batch, n = tokens, d = width, m = b · n tokens, p = numbers of a patch, c = channels
//! or classes, h and w = rows and columns.

mod attention;
mod block;
mod cpu;
mod embed;
mod head;
mod layers;
mod windows;

pub use attention::prove as prove_attention;

use super::stage::{Backward, Pass, Stage};
use super::{Blueprint, Parts};
use crate::family::vit::Vit;
use anyhow::Result;
use block::{Block, Kept, Masks};
use embed::Embed;
use head::Head;
use tch::{Device, Tensor};

/// One stage: its blocks and, in the first stage, the embedding of patches.
struct Blocks {
    /// The embedding with which the first stage begins; none in other stages.
    embed: Option<Embed>,
    blocks: Vec<Block>,
    /// The number of blocks in the stages before this stage.
    blocks_before: usize,
    /// Whether activation checkpointing is on: a block keeps only its input, and the backward pass recomputes the block.
    checkpointing: bool,
}

/// The values that the backward pass of one block needs.
struct KeptBlock {
    masks: Masks,
    activations: Activations,
}

enum Activations {
    Kept(Box<Kept>),
    /// The block's input, from which the block is recomputed (Chen et al., arXiv 1604.06174).
    Input(Tensor),
}

/// Builds a ViT. The parameters of the head belong to the last stage.
pub fn parts(vit: &Vit, blueprint: &Blueprint) -> Result<Parts> {
    let &Blueprint { depths, get, device, checkpointing, off } = blueprint;
    // On a GPU, layer norms take weights in the number type of their input. They always compute their statistics in fp32.
    let get = |stage: usize, name: &str, exact: bool| get(stage, name, exact && device == Device::Cpu);
    let mut stages: Vec<Box<dyn Stage>> = Vec::new();
    let (mut blocks_before, total) = (0, depths.iter().sum());
    for (stage, &depth) in depths.iter().enumerate() {
        let embed = if stage == 0 { Some(Embed::new(vit, off, &|name| get(0, name, false))?) } else { None };
        let block = |block| {
            let has_windows = vit.has_windows(blocks_before + block, total);
            Block::new(vit, (off, has_windows), &|name, exact| get(stage, &format!("blocks.{block}.{name}"), exact))
        };
        let blocks = (0..depth).map(block).collect::<Result<_>>()?;
        stages.push(Box::new(Blocks { embed, blocks, blocks_before, checkpointing }));
        blocks_before += depth;
    }
    let last = depths.len() - 1;
    let head = |_| Head::new(vit, off, &|name, exact| get(last, name, exact));
    let head = (vit.classes > 0).then_some(()).map(head).transpose()?;
    Ok(Parts { stages, head: head.map(|head| Box::new(head) as Box<dyn Stage>) })
}

impl Stage for Blocks {
    /// Maps tokens (b, n, d) to tokens (b, n, d). The first stage takes images (b, c, h, w) instead.
    fn forward<'a>(&'a self, input: Tensor, pass: &Pass, keep: bool) -> (Tensor, Option<Backward<'a>>) {
        let (mut x_bnd, embedded) = match &self.embed {
            Some(embed) => embed.forward(&input, pass.dropout),
            None => (input, None),
        };
        let (b, n, d) = x_bnd.size3().expect("tokens are (b, n, d)");
        let mut kept_blocks = Vec::new();
        for (number, block) in self.blocks.iter().enumerate() {
            let masks = block.masks(&x_bnd, pass, self.blocks_before + number);
            let x_md = x_bnd.view([b * n, d]);
            let (out_md, kept) = block.forward(&x_md, &masks);
            if keep {
                let activations =
                    if self.checkpointing { Activations::Input(x_md) } else { Activations::Kept(Box::new(kept)) };
                kept_blocks.push(KeptBlock { masks, activations });
            }
            x_bnd = out_md.view([b, n, d]);
        }
        let backward = move |gradient_bnd: Tensor| {
            let mut gradient_md = gradient_bnd.view([b * n, d]);
            for (block, KeptBlock { masks, activations }) in self.blocks.iter().zip(kept_blocks).rev() {
                let kept = match activations {
                    Activations::Kept(kept) => *kept,
                    Activations::Input(x_md) => block.forward(&x_md, &masks).1,
                };
                gradient_md = block.backward(gradient_md, kept, &masks);
            }
            match &self.embed {
                Some(embed) => {
                    embedded.into_iter().for_each(|kept| embed.backward(&gradient_md, kept));
                    None
                }
                None => Some(gradient_md.view([b, n, d])),
            }
        };
        (x_bnd, keep.then(|| Box::new(backward) as Backward<'a>))
    }
}
