//! One transformer block, as timm's `Block`: x + drop(attn(norm1(x))), then x + drop(mlp(norm2(x))).

use super::super::Weight;
use super::super::off::{Off, Part};
use super::super::stage::{Pass, Samples};
use super::attention;
use super::layers::{Linear, Norm, Statistics, gelu, gelu_backward};
use crate::family::vit::Vit;
use anyhow::Result;
use tch::{Kind, Tensor};

/// What is random in one block and one pass: drawn once, so that a block can be computed again.
pub struct Masks {
    n: i64,
    branches: [Branch; 2],
    /// 0 or 1 / keep probability: after the attention, inside the MLP and after it, of the samples that are computed.
    dropout: Option<[Tensor; 3]>,
}

/// Which samples of a residual branch are computed, and what their outputs are multiplied by.
struct Branch {
    n: i64,
    /// (computed samples, 1, 1); none if nothing is dropped.
    scale: Option<Tensor>,
    /// The numbers of the computed samples; none if all are computed.
    rows: Option<Tensor>,
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
    /// Whether a branch computes only the samples that keep it.
    kept_samples: bool,
}

/// What the backward pass needs of the forward pass; nothing of a branch that no sample keeps. In the names of tensors the
/// letter r stands for the tokens of the samples that are computed.
pub struct Kept {
    attention: Option<KeptAttention>,
    mlp: Option<KeptMlp>,
}

struct KeptAttention {
    x_rd: Tensor,
    statistics: Statistics,
    normed_rd: Option<Tensor>,
    attention: attention::Kept,
    mixed_rd: Option<Tensor>,
}

struct KeptMlp {
    x_rd: Tensor,
    statistics: Statistics,
    normed_rd: Option<Tensor>,
    hidden_rh: Tensor,
    active_rh: Option<Tensor>,
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
            kept_samples: !off.has(Part::KeptSamples),
        })
    }

    /// The masks of this block, which is the `number`th of the whole network, for tokens like `x_bnd`.
    pub fn masks(&self, x_bnd: &Tensor, pass: &Pass, number: usize) -> Masks {
        let (b, n, d) = x_bnd.size3().expect("tokens are (b, n, d)");
        // The first block's rate is always zero.
        let drop = pass.drop.filter(|_| number > 0);
        let branches = [0, 1].map(|half| {
            let samples = drop.and_then(|drop| drop.branch(2 * number + half));
            Branch::new(samples, self.kept_samples, n, x_bnd.kind())
        });
        let dropout = pass.dropout;
        // The mask of every sample is drawn, so that the masks do not depend on which samples are computed.
        let mask = |width: i64, branch: &Branch| {
            let ones = x_bnd.new_ones([b * n, width], (x_bnd.kind(), x_bnd.device()));
            branch.take(ones.dropout(dropout, true))
        };
        let ([first, second], hidden) = (&branches, self.fc1.weight.value.size()[0]);
        let dropout = (dropout > 0.0).then(|| [mask(d, first), mask(hidden, second), mask(d, second)]);
        Masks { n, branches, dropout }
    }

    /// (m, d) to (m, d) with m = b · n tokens.
    pub fn forward(&self, x_md: &Tensor, masks: &Masks) -> (Tensor, Kept) {
        let [first, second] = &masks.branches;
        let (middle_md, attention) = first.forward(x_md, |x_rd| self.attention(x_rd, masks));
        let (out_md, mlp) = second.forward(&middle_md, |x_rd| self.mlp(x_rd, masks));
        (out_md, Kept { attention, mlp })
    }

    fn attention(&self, x_rd: Tensor, masks: &Masks) -> (Tensor, KeptAttention) {
        let (normed_rd, statistics) = self.norm1.forward(&x_rd);
        let qkv_r3d = self.qkv.forward(&normed_rd);
        let (mixed_rd, attention) = attention::forward(&qkv_r3d, masks.n, self.heads, self.products);
        let out_rd = masks.dropped(self.proj.forward(&mixed_rd), 0);
        let (normed_rd, mixed_rd) = (self.qkv.keep(normed_rd), self.proj.keep(mixed_rd));
        (out_rd, KeptAttention { x_rd, statistics, normed_rd, attention, mixed_rd })
    }

    fn mlp(&self, x_rd: Tensor, masks: &Masks) -> (Tensor, KeptMlp) {
        let (normed_rd, statistics) = self.norm2.forward(&x_rd);
        let hidden_rh = self.fc1.forward(&normed_rd);
        let active_rh = masks.dropped(gelu(&hidden_rh, self.kernels), 1);
        let out_rd = masks.dropped(self.fc2.forward(&active_rh), 2);
        let (normed_rd, active_rh) = (self.fc1.keep(normed_rd), self.fc2.keep(active_rh));
        (out_rd, KeptMlp { x_rd, statistics, normed_rd, hidden_rh, active_rh })
    }

    /// The gradient of the input from that of the output; adds those of trained parameters.
    pub fn backward(&self, gradient_md: Tensor, kept: Kept, masks: &Masks) -> Tensor {
        let [first, second] = &masks.branches;
        let gradient_md = second.backward(gradient_md, kept.mlp, |branch_rd, residual_rd, kept| {
            let active_rh = masks.dropped(self.fc2.backward(&masks.dropped(branch_rd, 2), &kept.active_rh), 1);
            let hidden_rh = gelu_backward(active_rh, &kept.hidden_rh, self.kernels);
            let normed_rd = self.fc1.backward(&hidden_rh, &kept.normed_rd);
            self.norm2.backward(residual_rd, &normed_rd, &kept.x_rd, &kept.statistics)
        });
        first.backward(gradient_md, kept.attention, |branch_rd, residual_rd, kept| {
            let mixed_rd = self.proj.backward(&masks.dropped(branch_rd, 0), &kept.mixed_rd);
            let qkv_r3d = attention::backward(&mixed_rd, kept.attention, masks.n, self.heads);
            let normed_rd = self.qkv.backward(&qkv_r3d, &kept.normed_rd);
            self.norm1.backward(residual_rd, &normed_rd, &kept.x_rd, &kept.statistics)
        })
    }
}

impl Masks {
    fn dropped(&self, x: Tensor, which: usize) -> Tensor {
        match &self.dropout {
            Some(masks) => x * &masks[which],
            None => x,
        }
    }
}

impl Branch {
    fn new(samples: Option<&Samples>, kept_alone: bool, n: i64, kind: Kind) -> Branch {
        let Some(samples) = samples else { return Branch { n, scale: None, rows: None } };
        let (scale, rows) = (samples.scale_b11.to_kind(kind), samples.worth_taking().filter(|_| kept_alone));
        match rows {
            Some(rows) => Branch { n, scale: Some(scale.index_select(0, rows)), rows: Some(rows.shallow_clone()) },
            None => Branch { n, scale: Some(scale), rows: None },
        }
    }

    /// x + branch(x) · scale for the samples that are computed, and x for all others. Also returns what the branch keeps.
    fn forward<K>(&self, x_md: &Tensor, branch: impl FnOnce(Tensor) -> (Tensor, K)) -> (Tensor, Option<K>) {
        if self.is_empty() {
            return (x_md.shallow_clone(), None);
        }
        let x_rd = self.take(x_md.shallow_clone());
        let (mut out_rd, kept) = branch(x_rd.shallow_clone());
        let sum_rd = match &self.scale {
            Some(scale) => self.samples(&x_rd).addcmul(&self.samples(&out_rd), scale).view_as(&x_rd),
            None => out_rd.g_add_(&x_rd),
        };
        let sum_md = if self.rows.is_some() { self.put(x_md.copy(), &sum_rd) } else { sum_rd };
        (sum_md, Some(kept))
    }

    /// The gradient of x from the gradient of the sum. `branch` takes the gradients of its output and of the sum, and adds the
    /// gradient of its input to the latter.
    fn backward<K>(
        &self,
        gradient_md: Tensor,
        kept: Option<K>,
        branch: impl FnOnce(Tensor, Tensor, K) -> Tensor,
    ) -> Tensor {
        let Some(kept) = kept else { return gradient_md };
        let residual_rd = self.take(gradient_md.shallow_clone());
        let branch_rd = match &self.scale {
            Some(scale) => (self.samples(&residual_rd) * scale).view_as(&residual_rd),
            None => residual_rd.shallow_clone(),
        };
        let sum_rd = branch(branch_rd, residual_rd, kept);
        if self.rows.is_some() { self.put(gradient_md, &sum_rd) } else { sum_rd }
    }

    fn is_empty(&self) -> bool {
        self.rows.as_ref().is_some_and(|rows| rows.numel() == 0)
    }

    /// The tokens of the samples that are computed.
    fn take(&self, x_md: Tensor) -> Tensor {
        match &self.rows {
            Some(rows) => self.samples(&x_md).index_select(0, rows).view([-1, x_md.size()[1]]),
            None => x_md,
        }
    }

    /// Writes the tokens of the samples that are computed into those of all samples.
    fn put(&self, x_md: Tensor, x_rd: &Tensor) -> Tensor {
        if let Some(rows) = &self.rows {
            let _ = self.samples(&x_md).index_copy_(0, rows, &self.samples(x_rd));
        }
        x_md
    }

    /// As (samples, n, width).
    fn samples(&self, x_md: &Tensor) -> Tensor {
        x_md.view([-1, self.n, x_md.size()[1]])
    }
}
