//! One transformer block, as timm's `Block`: x + drop(attn(norm1(x))), then x + drop(mlp(norm2(x))).

use super::super::Weight;
use super::super::off::{Off, Part};
use super::super::stage::Pass;
use super::attention;
use super::layers::{Linear, Norm, Statistics, gelu, gelu_backward};
use crate::family::vit::Vit;
use anyhow::Result;
use tch::Tensor;

/// What is random in one block and one pass: drawn once, so that a block can be computed again.
pub struct Masks {
    n: i64,
    /// (b, 1, 1) for either branch.
    branches: [Option<Tensor>; 2],
    /// 0 or 1 / keep probability: after the attention, inside the MLP and after it.
    dropout: Option<[Tensor; 3]>,
}

pub struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
    /// Whether the CPU kernels are used, and attention is computed as products of matrices with them.
    kernels: bool,
    products: bool,
}

/// What the backward pass needs of the forward pass.
pub struct Kept {
    x_md: Tensor,
    statistics1: Statistics,
    normed1_md: Option<Tensor>,
    attention: attention::Kept,
    mixed_md: Option<Tensor>,
    middle_md: Tensor,
    statistics2: Statistics,
    normed2_md: Option<Tensor>,
    hidden_mh: Tensor,
    active_mh: Option<Tensor>,
}

impl Block {
    /// `get` gives a parameter by name; with true as fp32.
    pub fn new(vit: &Vit, off: Off, get: &dyn Fn(&str, bool) -> Result<Weight>) -> Result<Block> {
        let kernels = !off.has(Part::Kernels);
        let linear = |name: &str, bias: bool| -> Result<Linear> {
            let bias = if bias { Some(get(&format!("{name}.bias"), false)?) } else { None };
            Ok(Linear { weight: get(&format!("{name}.weight"), false)?, bias })
        };
        let norm = |name: &str| -> Result<Norm> {
            let (weight, bias) = (get(&format!("{name}.weight"), true)?, get(&format!("{name}.bias"), true)?);
            Ok(Norm { weight, bias, eps: vit.layer_norm_eps, kernels })
        };
        Ok(Block {
            norm1: norm("norm1")?,
            qkv: linear("attn.qkv", vit.qkv_bias)?,
            proj: linear("attn.proj", true)?,
            norm2: norm("norm2")?,
            fc1: linear("mlp.fc1", true)?,
            fc2: linear("mlp.fc2", true)?,
            heads: vit.heads as i64,
            kernels,
            products: kernels && !off.has(Part::Attention),
        })
    }

    /// (m, d) to (m, d) with m = b · n tokens.
    pub fn forward(&self, x_md: &Tensor, masks: &Masks) -> (Tensor, Kept) {
        let (normed1_md, statistics1) = self.norm1.forward(x_md);
        let qkv_m3d = self.qkv.forward(&normed1_md);
        let (mixed_md, attention) = attention::forward(&qkv_m3d, masks.n, self.heads, self.products);
        let middle_md = masks.join(x_md, masks.dropped(self.proj.forward(&mixed_md), 0), 0);
        let (normed2_md, statistics2) = self.norm2.forward(&middle_md);
        let hidden_mh = self.fc1.forward(&normed2_md);
        let active_mh = masks.dropped(gelu(&hidden_mh, self.kernels), 1);
        let out_md = masks.join(&middle_md, masks.dropped(self.fc2.forward(&active_mh), 2), 1);
        let kept = Kept {
            x_md: x_md.shallow_clone(),
            statistics1,
            normed1_md: self.qkv.keep(normed1_md),
            attention,
            mixed_md: self.proj.keep(mixed_md),
            middle_md,
            statistics2,
            normed2_md: self.fc1.keep(normed2_md),
            hidden_mh,
            active_mh: self.fc2.keep(active_mh),
        };
        (out_md, kept)
    }

    /// The gradient of the input from that of the output; adds those of trained parameters.
    pub fn backward(&self, gradient_md: Tensor, kept: Kept, masks: &Masks) -> Tensor {
        let branch_md = masks.dropped(masks.branch(&gradient_md, 1), 2);
        let active_mh = masks.dropped(self.fc2.backward(&branch_md, &kept.active_mh), 1);
        let hidden_mh = gelu_backward(active_mh, &kept.hidden_mh, self.kernels);
        let normed_md = self.fc1.backward(&hidden_mh, &kept.normed2_md);
        let gradient_md = self.norm2.backward(gradient_md, &normed_md, &kept.middle_md, &kept.statistics2);

        let branch_md = masks.dropped(masks.branch(&gradient_md, 0), 0);
        let mixed_md = self.proj.backward(&branch_md, &kept.mixed_md);
        let qkv_m3d = attention::backward(&mixed_md, kept.attention, masks.n, self.heads);
        let normed_md = self.qkv.backward(&qkv_m3d, &kept.normed1_md);
        self.norm1.backward(gradient_md, &normed_md, &kept.x_md, &kept.statistics1)
    }
}

impl Masks {
    /// The masks of block `number` of the whole network, for tokens like `x_bnd` and so many hidden units.
    pub fn new(x_bnd: &Tensor, hidden: i64, pass: &Pass, number: usize) -> Masks {
        let (b, n, d) = x_bnd.size3().expect("tokens are (b, n, d)");
        // The first block's rate is always zero.
        let dropout = pass.dropout;
        let scale = pass.drop.and_then(|drop| drop.scale.as_ref()).filter(|_| number > 0);
        let branch = |half| Some(scale?.get((2 * number + half) as i64).to_kind(x_bnd.kind()));
        let mask = |width: i64| x_bnd.new_ones([b * n, width], (x_bnd.kind(), x_bnd.device())).dropout(dropout, true);
        let dropout = (dropout > 0.0).then(|| [mask(d), mask(hidden), mask(d)]);
        Masks { n, branches: [branch(0), branch(1)], dropout }
    }

    fn dropped(&self, x: Tensor, which: usize) -> Tensor {
        match &self.dropout {
            Some(masks) => x * &masks[which],
            None => x,
        }
    }

    /// x + branch · scale.
    fn join(&self, x_md: &Tensor, mut branch_md: Tensor, which: usize) -> Tensor {
        match &self.branches[which] {
            Some(scale) => {
                let shape = [-1, self.n, x_md.size()[1]];
                x_md.view(shape).addcmul(&branch_md.view(shape), scale).view_as(x_md)
            }
            None => branch_md.g_add_(x_md),
        }
    }

    /// The gradient of a branch from that of the sum.
    fn branch(&self, gradient_md: &Tensor, which: usize) -> Tensor {
        match &self.branches[which] {
            Some(scale) => (gradient_md.view([-1, self.n, gradient_md.size()[1]]) * scale).view_as(gradient_md),
            None => gradient_md.shallow_clone(),
        }
    }
}
