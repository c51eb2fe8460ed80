//! Turns tokens into logits: the final norm and the linear head, on the class token.

use super::super::Weight;
use super::super::off::{Off, Optimisation};
use super::super::stage::{Backward, Pass, Stage};
use super::layers::{Linear, Norm};
use crate::family::vit::Vit;
use anyhow::Result;
use tch::{Kind, Tensor};

/// The head with its parameters.
pub struct Head {
    norm: Norm,
    linear: Linear,
}

impl Head {
    /// Builds the head. `get` returns a parameter by its name. If its second argument is true, the parameter is in fp32 on a CPU.
    pub fn new(vit: &Vit, off: Off, get: &dyn Fn(&str, bool) -> Result<Weight>) -> Result<Head> {
        let (weight, bias) = (get("norm.weight", true)?, get("norm.bias", true)?);
        let norm = Norm { weight, bias, eps: vit.layer_norm_eps, kernels: !off.contains(Optimisation::Kernels) };
        let (weight, bias) = (get("head.weight", false)?, Some(get("head.bias", false)?));
        let linear = Linear { weight, bias, float_sums: !off.contains(Optimisation::FloatSums) };
        Ok(Head { norm, linear })
    }
}

impl Stage for Head {
    /// Turns tokens (b, n, d) into logits (b, classes) in fp32.
    fn forward<'a>(&'a self, x_bnd: Tensor, _: &Pass, keep: bool) -> (Tensor, Option<Backward<'a>>) {
        let Head { norm, linear } = self;
        let size_bnd = x_bnd.size();
        // Only the class token reaches the linear layer, so no other token is normalised.
        let class_bd = x_bnd.select(1, 0).contiguous();
        let (normed_bd, statistics) = norm.forward(&class_bd);
        let logits_bc = linear.forward(&normed_bd).to_kind(Kind::Float);
        let kept_bd = linear.keep(normed_bd);
        let backward = move |gradient_bc: Tensor| {
            let gradient_bc = gradient_bc.to_kind(class_bd.kind());
            let normed_bd = linear.backward(&gradient_bc, &kept_bd);
            let gradient_bd = norm.backward(normed_bd.zeros_like(), &normed_bd, &class_bd, &statistics);
            let gradient_bnd = gradient_bd.new_zeros(&size_bnd, (gradient_bd.kind(), gradient_bd.device()));
            gradient_bnd.select(1, 0).copy_(&gradient_bd);
            Some(gradient_bnd)
        };
        (logits_bc, keep.then(|| Box::new(backward) as Backward<'a>))
    }
}
