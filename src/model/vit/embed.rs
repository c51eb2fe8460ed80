//! Turns images into tokens: the embedding of patches, the class token and the position embeddings.

use super::super::Weight;
use super::super::off::{Off, Optimisation};
use super::layers::Linear;
use crate::family::vit::Vit;
use crate::family::vit::resample;
use anyhow::Result;
use tch::{Kind, Tensor};

/// The embedding of images as tokens, with its parameters.
pub struct Embed {
    patch: i64,
    cls_token: Weight,
    pos_embed: Weight,
    proj: Linear,
}

/// The tensors that the backward pass needs.
pub struct Kept {
    /// The pixels of each patch.
    patches_mp: Tensor,
    dropout_bnd: Option<Tensor>,
}

impl Embed {
    /// Builds the embedding. `get` returns a parameter by its name.
    pub fn new(vit: &Vit, off: Off, get: &dyn Fn(&str) -> Result<Weight>) -> Result<Embed> {
        let (weight, bias) = (get("patch_embed.proj.weight")?, Some(get("patch_embed.proj.bias")?));
        let proj = Linear { weight, bias, float_sums: !off.contains(Optimisation::FloatSums) };
        Ok(Embed { patch: vit.patch_size as i64, cls_token: get("cls_token")?, pos_embed: get("pos_embed")?, proj })
    }

    /// Turns images (b, c, h, w) into tokens (b, n, d). If the embedding is trained, also returns the tensors that the backward
    /// pass needs.
    ///
    /// Images in evaluation may differ in size from the images of training. Zeros below and to the right then complete the patches
    /// at the edges. The position embeddings are resampled to the grid of the patches, as in mmsegmentation.
    pub fn forward(&self, images_bchw: &Tensor, dropout: f64) -> (Tensor, Option<Kept>) {
        let (_, _, h, w) = images_bchw.size4().expect("images are (b, c, h, w)");
        let grid = [h, w].map(|side| (side + self.patch - 1) / self.patch);
        let missing = [grid[1] * self.patch - w, grid[0] * self.patch - h];
        let padded = |_| images_bchw.constant_pad_nd([0, missing[0], 0, missing[1]]);
        let padded_bchw = (missing != [0, 0]).then_some(()).map(padded);
        let images_bchw = padded_bchw.as_ref().unwrap_or(images_bchw);
        let resampled_1nd = resample::positions(&self.pos_embed.value, grid);
        let patches_mp = patches(images_bchw, self.patch);
        let weight = self.proj.weight.value.view([-1, patches_mp.size()[1]]);
        let bias = self.proj.bias.as_ref().map(|bias| &bias.value);
        let b = images_bchw.size()[0];
        let tokens_bnd = patches_mp.linear(&weight, bias).view([b, -1, weight.size()[0]]);
        let class_b1d = self.cls_token.value.expand([b, -1, -1], false);
        let mut x_bnd = Tensor::cat(&[class_b1d, tokens_bnd], 1) + resampled_1nd;
        let dropout_bnd = (dropout > 0.0).then(|| x_bnd.ones_like().dropout(dropout, true));
        if let Some(mask) = &dropout_bnd {
            x_bnd *= mask;
        }
        let trained = self.proj.weight.gradient.is_some();
        (x_bnd, trained.then_some(Kept { patches_mp, dropout_bnd }))
    }

    /// Computes the gradients of the parameters from the gradient of the tokens, and adds them to the flat buffer of gradients.
    pub fn backward(&self, gradient_md: &Tensor, kept: Kept) {
        let d = gradient_md.size()[1];
        let n = self.pos_embed.value.size()[1];
        let gradient_bnd = gradient_md.view([-1, n, d]);
        let gradient_bnd = kept.dropout_bnd.map_or(gradient_bnd.shallow_clone(), |mask| &gradient_bnd * mask);
        let over_batch_nd = gradient_bnd.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        self.pos_embed.accumulate(|| over_batch_nd.shallow_clone());
        self.cls_token.accumulate(|| over_batch_nd.get(0));
        let tokens_md = gradient_bnd.narrow(1, 1, n - 1).reshape([-1, d]);
        self.proj.backward_parameters(&tokens_md, &Some(kept.patches_mp));
    }
}

/// Splits images (b, c, h, w) into the pixels of their patches (b · patches, c·p·p), in the order of the weights of the patch
/// convolution. So this convolution, which has stride p, becomes one matrix product.
fn patches(images_bchw: &Tensor, p: i64) -> Tensor {
    let (b, c, height, width) = images_bchw.size4().expect("images are (b, c, h, w)");
    let split = images_bchw.view([b, c, height / p, p, width / p, p]).permute([0, 2, 4, 1, 3, 5]);
    split.reshape([b * (height / p) * (width / p), c * p * p])
}
