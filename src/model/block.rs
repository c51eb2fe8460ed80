//! One transformer block, as timm's `Block`: x + drop(attn(norm1(x))), then x + drop(mlp(norm2(x))).

use crate::config::Model;
use anyhow::Result;
use tch::Tensor;

pub struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

pub struct Norm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub eps: f64,
}

impl Norm {
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}

/// Stochastic depth masks of one forward pass: 0, or 1 / keep probability, for each residual branch and sample.
pub struct DropPath {
    /// (2 · blocks, b, 1, 1); none where the rate is zero.
    pub scale: Option<Tensor>,
}

impl DropPath {
    fn apply(&self, branch_bnd: Tensor, number: usize) -> Tensor {
        match &self.scale {
            // The first block's rate is always zero.
            Some(scale) if number > 1 => branch_bnd * scale.get(number as i64),
            _ => branch_bnd,
        }
    }
}

pub struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
}

impl Block {
    pub fn new(model: &Model, get: &dyn Fn(&str) -> Result<Tensor>) -> Result<Block> {
        let linear = |name: &str, bias: bool| -> Result<Linear> {
            let bias = if bias { Some(get(&format!("{name}.bias"))?) } else { None };
            Ok(Linear { weight: get(&format!("{name}.weight"))?, bias })
        };
        let norm = |name: &str| -> Result<Norm> {
            let eps = model.layer_norm_eps;
            Ok(Norm { weight: get(&format!("{name}.weight"))?, bias: get(&format!("{name}.bias"))?, eps })
        };
        Ok(Block {
            norm1: norm("norm1")?,
            qkv: linear("attn.qkv", model.qkv_bias)?,
            proj: linear("attn.proj", true)?,
            norm2: norm("norm2")?,
            fc1: linear("mlp.fc1", true)?,
            fc2: linear("mlp.fc2", true)?,
            heads: model.heads as i64,
        })
    }

    /// `number` counts the blocks of the whole network, from 0.
    pub fn forward(&self, x_bnd: &Tensor, drop: Option<&DropPath>, number: usize, dropout: f64) -> Tensor {
        let dropped = |branch: Tensor, half: usize| match drop {
            Some(drop) => drop.apply(branch, 2 * number + half),
            None => branch,
        };
        let x_bnd = x_bnd + dropped(self.attention(&self.norm1.forward(x_bnd), dropout), 0);
        let mlp = self.mlp(&self.norm2.forward(&x_bnd), dropout);
        x_bnd + dropped(mlp, 1)
    }

    fn attention(&self, x_bnd: &Tensor, dropout: f64) -> Tensor {
        let (b, n, d) = x_bnd.size3().expect("tokens are (b, n, d)");
        let qkv = self.qkv.forward(x_bnd).view([b, n, 3, self.heads, d / self.heads]).permute([2, 0, 3, 1, 4]);
        let (q_bhne, k_bhne, v_bhne) = (qkv.get(0), qkv.get(1), qkv.get(2));
        let mixed_bhne =
            Tensor::scaled_dot_product_attention(&q_bhne, &k_bhne, &v_bhne, None::<&Tensor>, 0.0, false, None, false);
        let mixed_bnd = mixed_bhne.transpose(1, 2).reshape([b, n, d]);
        self.proj.forward(&mixed_bnd).dropout(dropout, dropout > 0.0)
    }

    fn mlp(&self, x_bnd: &Tensor, dropout: f64) -> Tensor {
        let hidden = self.fc1.forward(x_bnd).gelu("none").dropout(dropout, dropout > 0.0);
        self.fc2.forward(&hidden).dropout(dropout, dropout > 0.0)
    }
}
