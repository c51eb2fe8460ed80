//! The forward pass of a local loss's head.

use crate::plan::head::{Head, Layer};
use tch::{Kind, Tensor};

/// The epsilons are PyTorch's defaults.
const BATCH_NORM_EPS: f64 = 1e-5;
const LAYER_NORM_EPS: f64 = 1e-5;

/// The output of a head in fp32. `input` is the output of a stage, and `values` are the head's parameters in the order of its
/// layers.
pub fn forward(head: &Head, values: &[Tensor], input: &Tensor) -> Tensor {
    let (mut x, mut rest) = (input.shallow_clone(), values);
    for layer in &head.layers {
        let own;
        (own, rest) = rest.split_at(layer.parameters());
        x = apply(*layer, own, &x);
    }
    x.to_kind(Kind::Float)
}

fn apply(layer: Layer, own: &[Tensor], x: &Tensor) -> Tensor {
    match layer {
        Layer::ClassToken => x.select(1, 0),
        Layer::Grid => {
            let (b, n, d) = x.size3().expect("tokens are (b, n, d)");
            let side = (n - 1).isqrt();
            x.narrow(1, 1, n - 1).transpose(1, 2).reshape([b, d, side, side])
        }
        Layer::Upsample(side) => x.upsample_bilinear2d([side as i64; 2], true, None, None),
        Layer::Pool(side) => x.adaptive_avg_pool2d([side as i64; 2]),
        Layer::Flatten => x.flatten(1, -1),
        Layer::Convolution { kernel, stride, .. } => {
            let padding = kernel as i64 / 2;
            x.conv2d(&own[0], own.get(1), [stride as i64; 2], [padding; 2], [1, 1], 1)
        }
        Layer::BatchNorm => {
            let none = None::<&Tensor>;
            x.batch_norm(Some(&own[0]), Some(&own[1]), none, none, true, 0.0, BATCH_NORM_EPS, true)
        }
        Layer::LayerNorm => {
            let width = own[0].size();
            let normed =
                x.to_kind(Kind::Float).layer_norm(&width[..], Some(&own[0]), Some(&own[1]), LAYER_NORM_EPS, true);
            normed.to_kind(x.kind())
        }
        Layer::Relu => x.relu(),
        Layer::Gelu => x.gelu("none"),
        Layer::Linear { .. } => x.linear(&own[0], Some(&own[1])),
    }
}
