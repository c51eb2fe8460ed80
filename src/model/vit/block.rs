//! One transformer block, as timm's `Block`: x + drop(attn(norm1(x))), then x + drop(mlp(norm2(x))). The terms attn(norm1(x)) and
//! mlp(norm2(x)) are the residual branches. Stochastic depth may drop a branch for some samples.

use super::super::Weight;
use super::super::off::{Off, Optimisation};
use super::super::stage::{Pass, Samples};
use super::attention;
use super::layers::{Linear, Norm, Statistics, gelu, gelu_backward};
use super::windows::{self, Gradients, Windows};
use crate::family::vit::Vit;
use anyhow::Result;
use tch::{Kind, Tensor};

/// The random values of one block in one pass. They are drawn once, so that a recomputed block has the same values.
pub struct Masks {
    /// The number of tokens of one sample.
    n: i64,
    branches: [Branch; 2],
    /// The masks of dropout after the attention, inside the MLP, and after the MLP. Each factor is 0 or 1 / keep probability. The
    /// masks hold only the tokens of the samples that are computed. None if there is no dropout.
    dropout: Option<[Tensor; 3]>,
}

/// The samples for which a residual branch is computed, and the factors of their outputs.
struct Branch {
    /// The number of tokens of one sample.
    n: i64,
    /// The factors (computed samples, 1, 1) of stochastic depth; none if nothing is dropped.
    scale: Option<Tensor>,
    /// The indices of the computed samples; none if all samples are computed.
    rows: Option<Tensor>,
}

/// A block with its parameters.
pub struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
    /// None if all tokens of an image attend to each other.
    windows: Option<Windows>,
    /// Whether the CPU kernels are used for the tensors that they support.
    kernels: bool,
    /// Whether attention to few tokens on a CPU is computed with matrix products.
    prefers_products: bool,
    /// Whether a branch may skip the samples that drop it.
    skips_dropped: bool,
}

/// The tensors of the forward pass that the backward pass needs; none for a branch that every sample drops. In tensor names,
/// r = tokens of the samples that are computed, h = hidden units of the MLP.
pub struct Kept {
    attention: Option<KeptAttention>,
    mlp: Option<KeptMlp>,
}

struct KeptAttention {
    x_rd: Tensor,
    statistics: Statistics,
    normed_rd: Option<Tensor>,
    attention: KeptMixing,
    mixed_rd: Option<Tensor>,
}

enum KeptMixing {
    Whole(attention::Kept),
    Windows(windows::Kept),
}

struct KeptMlp {
    x_rd: Tensor,
    statistics: Statistics,
    normed_rd: Option<Tensor>,
    hidden_rh: Tensor,
    active_rh: Option<Tensor>,
}

impl Block {
    /// Builds a block. `get` returns a parameter by its name. If the second argument of `get` is true, the parameter is in fp32 on
    /// a CPU. `has_windows` says whether tokens attend to each other only within windows.
    pub fn new(
        vit: &Vit,
        (off, has_windows): (Off, bool),
        get: &dyn Fn(&str, bool) -> Result<Weight>,
    ) -> Result<Block> {
        let kernels = !off.contains(Optimisation::Kernels);
        let linear = |name: &str, bias: bool| -> Result<Linear> {
            let bias = if bias { Some(get(&format!("{name}.bias"), false)?) } else { None };
            Ok(Linear {
                weight: get(&format!("{name}.weight"), false)?,
                bias,
                float_sums: !off.contains(Optimisation::FloatSums),
            })
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
            windows: has_windows.then_some(Windows { side: vit.window as i64 }),
            kernels,
            prefers_products: kernels && !off.contains(Optimisation::Attention),
            skips_dropped: !off.contains(Optimisation::KeptSamples),
        })
    }

    /// Draws the masks of one pass. The masks fit tokens with the shape, number type and device of `x_bnd`. `number` is the number
    /// of this block in the whole network, counted from 0.
    pub fn masks(&self, x_bnd: &Tensor, pass: &Pass, number: usize) -> Masks {
        let (b, n, d) = x_bnd.size3().expect("tokens are (b, n, d)");
        // The drop rate of the first block is always 0.
        let drop = pass.drop.filter(|_| number > 0);
        let branches = [0, 1].map(|half| {
            let samples = drop.and_then(|drop| drop.branch(2 * number + half));
            Branch::new(samples, self.skips_dropped, n, x_bnd.kind())
        });
        let dropout = pass.dropout;
        // Masks are drawn for all samples, so that the random numbers do not depend on which samples are computed.
        let mask = |width: i64, branch: &Branch| {
            let ones = x_bnd.new_ones([b * n, width], (x_bnd.kind(), x_bnd.device()));
            branch.take(ones.dropout(dropout, true))
        };
        let ([first, second], hidden) = (&branches, self.fc1.weight.value.size()[0]);
        let dropout = (dropout > 0.0).then(|| [mask(d, first), mask(hidden, second), mask(d, second)]);
        Masks { n, branches, dropout }
    }

    /// Maps tokens (m, d) to tokens (m, d), where m = b · n.
    pub fn forward(&self, x_md: &Tensor, masks: &Masks) -> (Tensor, Kept) {
        let [first, second] = &masks.branches;
        let (middle_md, attention) = first.forward(x_md, |x_rd| self.attention(x_rd, masks));
        let (out_md, mlp) = second.forward(&middle_md, |x_rd| self.mlp(x_rd, masks));
        (out_md, Kept { attention, mlp })
    }

    fn attention(&self, x_rd: Tensor, masks: &Masks) -> (Tensor, KeptAttention) {
        let (normed_rd, statistics) = self.norm1.forward(&x_rd);
        let qkv_r3d = self.qkv.forward(&normed_rd);
        let (mixed_rd, attention) = self.mix(&qkv_r3d, masks.n);
        let out_rd = masks.dropped(self.proj.forward(&mixed_rd), 0);
        let (normed_rd, mixed_rd) = (self.qkv.keep(normed_rd), self.proj.keep(mixed_rd));
        (out_rd, KeptAttention { x_rd, statistics, normed_rd, attention, mixed_rd })
    }

    /// Computes attention as (r, d) from q, k and v (r, 3·d). `n` is the number of tokens of each sample.
    fn mix(&self, qkv_r3d: &Tensor, n: i64) -> (Tensor, KeptMixing) {
        match self.windows {
            None => {
                let (mixed_rd, kept) = attention::forward(qkv_r3d, n, self.heads, self.prefers_products);
                (mixed_rd, KeptMixing::Whole(kept))
            }
            Some(windows) => {
                let bias = self.qkv.bias.as_ref().map(|bias| &bias.value);
                let (mixed_rd, kept) = windows.forward(qkv_r3d, bias, (n, self.heads), self.prefers_products);
                (mixed_rd, KeptMixing::Windows(kept))
            }
        }
    }

    /// Computes the gradient of q, k and v (r, 3·d). If windows reach beyond the map, q, k and v of their padding equal the bias.
    /// Then this function also adds the bias's gradient through the padding to the flat buffer of gradients.
    fn mix_backward(&self, gradient_rd: &Tensor, kept: KeptMixing, n: i64) -> Tensor {
        match kept {
            KeptMixing::Whole(kept) => attention::backward(gradient_rd, kept, n, self.heads),
            KeptMixing::Windows(kept) => {
                let Gradients { qkv_m3d, bias: through_filling } = kept.backward(gradient_rd, self.heads);
                if let (Some(bias), Some(gradient)) = (&self.qkv.bias, through_filling) {
                    bias.accumulate(|| gradient);
                }
                qkv_m3d
            }
        }
    }

    fn mlp(&self, x_rd: Tensor, masks: &Masks) -> (Tensor, KeptMlp) {
        let (normed_rd, statistics) = self.norm2.forward(&x_rd);
        let hidden_rh = self.fc1.forward(&normed_rd);
        let active_rh = masks.dropped(gelu(&hidden_rh, self.kernels), 1);
        let out_rd = masks.dropped(self.fc2.forward(&active_rh), 2);
        let (normed_rd, active_rh) = (self.fc1.keep(normed_rd), self.fc2.keep(active_rh));
        (out_rd, KeptMlp { x_rd, statistics, normed_rd, hidden_rh, active_rh })
    }

    /// Computes the gradient of the input from the gradient of the output. Adds the gradients of trained parameters to the flat
    /// buffer of gradients.
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
            let qkv_r3d = self.mix_backward(&mixed_rd, kept.attention, masks.n);
            let normed_rd = self.qkv.backward(&qkv_r3d, &kept.normed_rd);
            self.norm1.backward(residual_rd, &normed_rd, &kept.x_rd, &kept.statistics)
        })
    }
}

impl Masks {
    /// Applies the dropout mask with this number, if there is dropout.
    fn dropped(&self, x: Tensor, number: usize) -> Tensor {
        match &self.dropout {
            Some(masks) => x * &masks[number],
            None => x,
        }
    }
}

impl Branch {
    fn new(samples: Option<&Samples>, skips_dropped: bool, n: i64, kind: Kind) -> Branch {
        let Some(samples) = samples else { return Branch { n, scale: None, rows: None } };
        let (scale, rows) = (samples.scale_b11.to_kind(kind), samples.worth_taking().filter(|_| skips_dropped));
        match rows {
            Some(rows) => Branch { n, scale: Some(scale.index_select(0, rows)), rows: Some(rows.shallow_clone()) },
            None => Branch { n, scale: Some(scale), rows: None },
        }
    }

    /// Returns x + branch(x) · scale for the samples that are computed, and x for all others. Also returns the tensors that
    /// `branch` keeps for the backward pass.
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

    /// Computes the gradient of x from the gradient of the sum x + branch(x) · scale. The function `branch` takes the gradient of
    /// the branch's output and the gradient of the sum. It returns the gradient of the sum plus the gradient of the branch's input.
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

    /// Whether every sample drops the branch.
    fn is_empty(&self) -> bool {
        self.rows.as_ref().is_some_and(|rows| rows.numel() == 0)
    }

    /// Takes the tokens of the samples that are computed out of the tokens of all samples.
    fn take(&self, x_md: Tensor) -> Tensor {
        match &self.rows {
            Some(rows) => self.samples(&x_md).index_select(0, rows).view([-1, x_md.size()[1]]),
            None => x_md,
        }
    }

    /// Writes the tokens of the samples that are computed into the tokens of all samples.
    fn put(&self, x_md: Tensor, x_rd: &Tensor) -> Tensor {
        if let Some(rows) = &self.rows {
            let _ = self.samples(&x_md).index_copy_(0, rows, &self.samples(x_rd));
        }
        x_md
    }

    /// Views tokens (m, width) as (samples, n, width).
    fn samples(&self, x_md: &Tensor) -> Tensor {
        x_md.view([-1, self.n, x_md.size()[1]])
    }
}
