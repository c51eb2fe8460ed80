//! The staged Vision Transformer. Meta model, hybrid and target are this one network with different stage depths.
//!
//! Shape suffixes: b = batch, n = tokens, d = width, c = channels or classes, p = patch side, h = heads, e = head width.

mod attention;
mod block;
mod cpu;
mod flat;
mod init;
mod layers;
pub mod off;
mod rate;
mod stage;

pub use block::DropPath;
pub use cpu::threads;
pub use flat::{EXTRAS, FlatParameters, Loan, Weight};
pub use init::fresh;
pub use rate::matrix_product_rate;

use crate::config::{Config, Model, Precision};
use crate::plan::parameters::parameters;
use crate::weights::Weights;
use anyhow::{Context, Result};
use block::Masks;
use stage::{KeptEmbed, KeptHead, Stage};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// A network whose stages in `trained` have their parameters in one flat buffer and can be trained; all other stages
/// are frozen.
pub struct Network {
    model: Model,
    trained: Range<usize>,
    stages: Vec<Stage>,
    flat: FlatParameters,
    kind: Kind,
    checkpointing: bool,
}

/// What the backward pass needs of a forward pass: of the trained stages and those after them.
pub struct Tape {
    embed: Option<KeptEmbed>,
    blocks: Vec<KeptBlock>,
    head: KeptHead,
}

struct KeptBlock {
    stage: usize,
    block: usize,
    masks: Masks,
    kept: Activations,
}

/// Of one block.
enum Activations {
    Kept(block::Kept),
    /// To be computed again from the block's input (Chen et al., arXiv 1604.06174).
    Input(Tensor),
}

impl Network {
    /// Builds a network from copies of `weights`, which must hold every parameter of these stage depths, to compute as
    /// `config.run` says.
    pub fn new(config: &Config, depths: &[usize], trained: Range<usize>, weights: &Weights) -> Result<Network> {
        let model = &config.model;
        let kind = match config.run.precision {
            Precision::Bf16 => Kind::BFloat16,
            // TF32 is fp32 whose products the device may round.
            Precision::Fp32 | Precision::Tf32 => Kind::Float,
        };
        let table = parameters(model, depths);
        let flat = FlatParameters::new(table.iter().filter(|p| trained.contains(&p.stage)), weights, kind)?;
        let get = |stage: usize, name: &str, exact: bool| -> Result<Weight> {
            if let Some(weight) = flat.get(stage, name, exact) {
                return Ok(weight);
            }
            let tensor = weights.get(&(stage, name.to_string()));
            let tensor = tensor.with_context(|| format!("stage {stage} has no {name}"))?;
            Ok(Weight { value: tensor.to_kind(if exact { Kind::Float } else { kind }), gradient: None })
        };
        // A GPU's norms take weights of the type that they normalise; their statistics are fp32 all the same.
        let on_cpu = flat.buffer().device() == Device::Cpu;
        let get = |stage: usize, name: &str, exact: bool| get(stage, name, exact && on_cpu);
        let stages = (0..depths.len()).map(|s| Stage::new(model, depths, s, &get)).collect::<Result<_>>()?;
        let checkpointing = config.run.activation_checkpointing;
        Ok(Network { model: model.clone(), trained, stages, flat, kind, checkpointing })
    }

    /// The trained parameters.
    pub fn flat(&self) -> &FlatParameters {
        &self.flat
    }

    pub fn flat_mut(&mut self) -> &mut FlatParameters {
        &mut self.flat
    }

    /// The number type and device of the computation: the device is that of the weights that it was built from.
    pub fn options(&self) -> (Kind, Device) {
        (self.kind, self.flat.buffer().device())
    }

    /// Logits (b, classes) in fp32 of images (b, channels, rows, columns), for evaluation.
    pub fn forward(&self, images_bchw: &Tensor) -> Tensor {
        tch::no_grad(|| self.pass(images_bchw, None, 0.0, false).0)
    }

    /// Logits in fp32, and what [`Network::backward`] needs. Of stages before the trained ones nothing is kept.
    pub fn train(&self, images_bchw: &Tensor, drop: &DropPath) -> (Tensor, Tape) {
        let (logits_bc, tape) = tch::no_grad(|| self.pass(images_bchw, Some(drop), self.model.dropout, true));
        (logits_bc, tape.expect("it was asked for"))
    }

    fn pass(&self, images_bchw: &Tensor, drop: Option<&DropPath>, dropout: f64, keep: bool) -> (Tensor, Option<Tape>) {
        let (mut x_bnd, embed) = self.stages[0].embed(&images_bchw.to_kind(self.kind), dropout);
        let embed = embed.filter(|_| keep);
        let (b, n, d) = x_bnd.size3().expect("tokens are (b, n, d)");
        let mut blocks = Vec::new();
        let numbered = self.stages.iter().enumerate();
        let numbered = numbered.flat_map(|(s, stage)| (0..stage.blocks.len()).map(move |block| (s, stage, block)));
        for (number, (stage, of, block)) in numbered.enumerate() {
            let masks = Masks::new(&x_bnd, self.model.hidden() as i64, drop, number, dropout);
            let x_md = x_bnd.view([b * n, d]);
            let (out_md, kept) = of.blocks[block].forward(&x_md, &masks);
            if keep && stage >= self.trained.start {
                let kept = if self.checkpointing { Activations::Input(x_md) } else { Activations::Kept(kept) };
                blocks.push(KeptBlock { stage, block, masks, kept });
            }
            x_bnd = out_md.view([b, n, d]);
        }
        let (logits_bc, head) = self.stages[self.stages.len() - 1].head(&x_bnd);
        (logits_bc, keep.then_some(Tape { embed, blocks, head }))
    }

    /// Adds the gradients of the trained parameters to the flat buffer's, from that of the logits. Stages after the
    /// trained ones pass activation gradients back and compute no weight gradients.
    pub fn backward(&self, tape: Tape, gradient_bc: &Tensor) {
        tch::no_grad(|| {
            let mut gradient_md = self.stages[self.stages.len() - 1].head_backward(gradient_bc, tape.head);
            for KeptBlock { stage, block, masks, kept } in tape.blocks.into_iter().rev() {
                let block = &self.stages[stage].blocks[block];
                let kept = match kept {
                    Activations::Kept(kept) => kept,
                    Activations::Input(x_md) => block.forward(&x_md, &masks).1,
                };
                gradient_md = block.backward(gradient_md, kept, &masks);
            }
            if let Some(kept) = tape.embed {
                self.stages[0].embed_backward(&gradient_md, kept);
            }
        });
    }
}

/// The number type of every parameter as it is trained and kept, and where weights are read and written.
pub const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);
