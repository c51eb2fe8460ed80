//! One stage: its blocks, and what only the first or last stage has: the embedding of patches, the final norm and head.

use super::block::Block;
use super::flat::Weight;
use super::layers::{Linear, Norm, Statistics};
use crate::config::Model;
use anyhow::Result;
use tch::{Kind, Tensor};

pub struct Stage {
    embed: Option<Embed>,
    pub blocks: Vec<Block>,
    head: Option<(Norm, Linear)>,
}

struct Embed {
    patch: i64,
    cls_token: Weight,
    pos_embed: Weight,
    proj: Linear,
}

/// What the embedding's backward pass needs.
pub struct KeptEmbed {
    patches_mp: Tensor,
    dropout_bnd: Option<Tensor>,
}

/// What the head's backward pass needs.
pub struct KeptHead {
    tokens: [i64; 3],
    class_bd: Tensor,
    statistics: Statistics,
    normed_bd: Option<Tensor>,
}

impl Stage {
    /// `get` gives a parameter by stage and name; with true as fp32.
    pub fn new(
        model: &Model,
        depths: &[usize],
        index: usize,
        get: &dyn Fn(usize, &str, bool) -> Result<Weight>,
    ) -> Result<Stage> {
        let weight = |name: &str| get(index, name, false);
        let embed = if index == 0 {
            let proj =
                Linear { weight: weight("patch_embed.proj.weight")?, bias: Some(weight("patch_embed.proj.bias")?) };
            let (cls_token, pos_embed) = (weight("cls_token")?, weight("pos_embed")?);
            Some(Embed { patch: model.patch_size as i64, cls_token, pos_embed, proj })
        } else {
            None
        };
        let block = |block| Block::new(model, &|name, exact| get(index, &format!("blocks.{block}.{name}"), exact));
        let blocks = (0..depths[index]).map(block).collect::<Result<_>>()?;
        let head = if index + 1 == depths.len() {
            let (scale, bias) = (get(index, "norm.weight", true)?, get(index, "norm.bias", true)?);
            let norm = Norm { weight: scale, bias, eps: model.layer_norm_eps };
            Some((norm, Linear { weight: weight("head.weight")?, bias: Some(weight("head.bias")?) }))
        } else {
            None
        };
        Ok(Stage { embed, blocks, head })
    }

    /// Images (b, c, h, w) to tokens (b, n, d). Only the first stage can.
    pub fn embed(&self, images_bchw: &Tensor, dropout: f64) -> (Tensor, Option<KeptEmbed>) {
        let embed = self.embed.as_ref().expect("the first stage has the embedding");
        let patches_mp = patches(images_bchw, embed.patch);
        let weight = embed.proj.weight.value.view([-1, patches_mp.size()[1]]);
        let bias = embed.proj.bias.as_ref().map(|bias| &bias.value);
        let b = images_bchw.size()[0];
        let tokens_bnd = patches_mp.linear(&weight, bias).view([b, -1, weight.size()[0]]);
        let class_b1d = embed.cls_token.value.expand([b, -1, -1], false);
        let mut x_bnd = Tensor::cat(&[class_b1d, tokens_bnd], 1) + &embed.pos_embed.value;
        let dropout_bnd = (dropout > 0.0).then(|| x_bnd.ones_like().dropout(dropout, true));
        if let Some(mask) = &dropout_bnd {
            x_bnd *= mask;
        }
        let trained = embed.proj.weight.gradient.is_some();
        (x_bnd, trained.then_some(KeptEmbed { patches_mp, dropout_bnd }))
    }

    /// Adds the embedding's gradients, from that of the tokens.
    pub fn embed_backward(&self, gradient_md: &Tensor, kept: KeptEmbed) {
        let embed = self.embed.as_ref().expect("the first stage has the embedding");
        let d = gradient_md.size()[1];
        let n = embed.pos_embed.value.size()[1];
        let gradient_bnd = gradient_md.view([-1, n, d]);
        let gradient_bnd = kept.dropout_bnd.map_or(gradient_bnd.shallow_clone(), |mask| &gradient_bnd * mask);
        let over_batch_nd = gradient_bnd.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        embed.pos_embed.accumulate(|| over_batch_nd.shallow_clone());
        embed.cls_token.accumulate(|| over_batch_nd.get(0));
        let tokens_md = gradient_bnd.narrow(1, 1, n - 1).reshape([-1, d]);
        embed.proj.backward_parameters(&tokens_md, &Some(kept.patches_mp));
    }

    /// Tokens (b, n, d) to logits (b, classes) in fp32. Only the last stage can.
    pub fn head(&self, x_bnd: &Tensor) -> (Tensor, KeptHead) {
        let (norm, head) = self.head.as_ref().expect("the last stage has the head");
        let tokens = x_bnd.size3().expect("tokens are (b, n, d)").into();
        // Only the class token reaches the head, so only it is normalised.
        let class_bd = x_bnd.select(1, 0).contiguous();
        let (normed_bd, statistics) = norm.forward(&class_bd);
        let logits_bc = head.forward(&normed_bd).to_kind(Kind::Float);
        (logits_bc, KeptHead { tokens, class_bd, statistics, normed_bd: head.keep(normed_bd) })
    }

    /// The gradient of the tokens (m, d) from that of the logits; adds those of trained parameters.
    pub fn head_backward(&self, gradient_bc: &Tensor, kept: KeptHead) -> Tensor {
        let (norm, head) = self.head.as_ref().expect("the last stage has the head");
        let gradient_bc = gradient_bc.to_kind(kept.class_bd.kind());
        let normed_bd = head.backward(&gradient_bc, &kept.normed_bd);
        let class_bd = norm.backward(normed_bd.zeros_like(), &normed_bd, &kept.class_bd, &kept.statistics);
        let [b, n, d] = kept.tokens;
        let gradient_bnd = class_bd.new_zeros([b, n, d], (class_bd.kind(), class_bd.device()));
        gradient_bnd.select(1, 0).copy_(&class_bd);
        gradient_bnd.view([b * n, d])
    }
}

/// Cuts (b, c, H, W) into rows of pixels (b · n, c·p·p), in the order of the patch kernel: the convolution with stride
/// p becomes one matrix product.
fn patches(images_bchw: &Tensor, p: i64) -> Tensor {
    let (b, c, height, width) = images_bchw.size4().expect("images are (b, c, h, w)");
    let cut = images_bchw.view([b, c, height / p, p, width / p, p]).permute([0, 2, 4, 1, 3, 5]);
    cut.reshape([b * (height / p) * (width / p), c * p * p])
}
