//! The forward passes of the feature pyramid and of the heads. They follow detectron2's `SimpleFeaturePyramid`, `StandardRPNHead`,
//! `FastRCNNConvFCHead` with `FastRCNNOutputLayers`, and `MaskRCNNConvUpsampleHead`.

use crate::model::{Network, Weight};
use crate::plan::detection::{Architecture, CONVOLUTIONS, RATIOS};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

const LAYER_NORM_EPS: f64 = 1e-6;

/// The pyramid and the heads with their parameters.
pub struct Heads {
    weights: BTreeMap<String, Weight>,
    /// The parameters by name. In training, they are leaves of autograd's graph. The parameters of norms are fp32.
    values: BTreeMap<String, Tensor>,
    /// The number type of convolutions and linear layers.
    kind: Kind,
}

/// The predictions of the RPN (region proposal network) for the anchors of all levels, in the order of
/// [`Anchors`](super::anchors::Anchors), in fp32.
pub struct Anchored {
    /// The logits (b, a) of the probability that an anchor contains an object.
    pub logits: Tensor,
    /// The deltas (b, a, 4) from each anchor to its object.
    pub deltas: Tensor,
}

impl Heads {
    /// The pyramid and the heads of a network. If `trains`, autograd computes the gradients of their parameters.
    pub fn new(architecture: Architecture, network: &Network, trains: bool) -> Heads {
        let stage = network.stages();
        let weight = |name: String| {
            let is_exact = name.contains(".norm.") || name.starts_with(NORM_ALONE);
            let weight = network.flat().get(stage, &name, is_exact);
            (name, weight.expect("the network was built with the task's parameters"))
        };
        let names = architecture.parameters(stage).into_iter().map(|parameter| parameter.name);
        let weights: BTreeMap<String, Weight> = names.map(weight).collect();
        let value =
            |(name, weight): (&String, &Weight)| (name.clone(), weight.value.detach().set_requires_grad(trains));
        let values = weights.iter().map(value).collect();
        Heads { weights, values, kind: network.options().0 }
    }

    /// Adds the gradient of each parameter to the parameter's sum in the flat buffer. A parameter without a gradient is skipped.
    pub fn add_gradients(&self) {
        for (name, weight) in &self.weights {
            let gradient = self.values[name].grad();
            if gradient.defined() {
                weight.accumulate(|| gradient);
            }
        }
    }

    /// The maps p2 … p6 (b, c, row, column) of the pyramid, computed from the map of the tokens (b, d, row, column).
    pub fn pyramid(&self, map: &Tensor) -> Vec<Tensor> {
        let map = &map.to_kind(self.kind);
        let doubled = |name: &str, x: &Tensor| self.doubled(&format!("backbone.{name}"), x);
        let units = |level: usize, first: usize, x: &Tensor| {
            let unit = |number: usize, x: &Tensor| self.unit(&format!("backbone.simfp_{level}.{number}"), x);
            unit(first + 1, &unit(first, x))
        };
        let fine = self.norm("backbone.simfp_2.1", &doubled("simfp_2.0", map)).gelu("none");
        let coarse = map.max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false);
        let p5 = units(5, 1, &coarse);
        let p6 = p5.max_pool2d([1, 1], [2, 2], [0, 0], [1, 1], false);
        vec![
            units(2, 4, &doubled("simfp_2.3", &fine)),
            units(3, 1, &doubled("simfp_3.0", map)),
            units(4, 0, map),
            p5,
            p6,
        ]
    }

    /// Runs the RPN on all maps of the pyramid.
    pub fn anchored(&self, maps: &[Tensor]) -> Anchored {
        let name = |name: &str| format!("proposal_generator.rpn_head.{name}");
        let ratios = RATIOS.len() as i64;
        let of_map = |map: &Tensor| {
            let hidden = self.convolution(&name("conv.conv0"), map).relu();
            let hidden = self.convolution(&name("conv.conv1"), &hidden).relu();
            let logits = self.convolution(&name("objectness_logits"), &hidden).to_kind(Kind::Float);
            let deltas = self.convolution(&name("anchor_deltas"), &hidden).to_kind(Kind::Float);
            let (b, _, h, w) = deltas.size4().expect("a map is (b, c, h, w)");
            let deltas = deltas.reshape([b, ratios, 4, h, w]).permute([0, 3, 4, 1, 2]);
            (logits.permute([0, 2, 3, 1]).flatten(1, -1), deltas.flatten(1, 3))
        };
        let (logits, deltas): (Vec<Tensor>, Vec<Tensor>) = maps.iter().map(of_map).unzip();
        Anchored { logits: Tensor::cat(&logits, 1), deltas: Tensor::cat(&deltas, 1) }
    }

    /// Runs the box head on pooled regions (r, c, 7, 7). Returns the logits (r, classes + 1), of which the last belongs to the
    /// background, and the deltas (r, classes, 4), both in fp32.
    pub fn boxes(&self, features: &Tensor) -> [Tensor; 2] {
        let linear = |name: &str, x: &Tensor| {
            let [weight, bias] = self.weight_and_bias(&format!("roi_heads.{name}"));
            x.linear(weight, Some(bias))
        };
        let hidden = self.units("box_head.conv", features).flatten(1, -1);
        let hidden = linear("box_head.fc1", &hidden).relu();
        let logits = linear("box_predictor.cls_score", &hidden).to_kind(Kind::Float);
        let deltas = linear("box_predictor.bbox_pred", &hidden).to_kind(Kind::Float);
        let r = features.size()[0];
        [logits, deltas.reshape([r, deltas.size()[1] / 4, 4])]
    }

    /// Runs the mask head on pooled regions (r, c, 14, 14). The head predicts a mask for each class. Returns the logits
    /// (r, 28, 28) of the mask of each region's class, in fp32. `classes` (r) holds the classes of the regions.
    pub fn masks(&self, features: &Tensor, classes: &Tensor) -> Tensor {
        let hidden = self.doubled("roi_heads.mask_head.deconv", &self.units("mask_head.mask_fcn", features)).relu();
        let logits = self.convolution("roi_heads.mask_head.predictor", &hidden);
        let (r, _, h, w) = logits.size4().expect("masks are (r, c, h, w)");
        let of_class = logits.gather(1, &classes.view([r, 1, 1, 1]).expand([r, 1, h, w], false), false);
        of_class.squeeze_dim(1).to_kind(Kind::Float)
    }

    /// The convolutions with which the box head and the mask head begin, each with LayerNorm and ReLU.
    fn units(&self, name: &str, features: &Tensor) -> Tensor {
        let unit = |x: Tensor, number: usize| self.unit(&format!("roi_heads.{name}{number}"), &x).relu();
        (1..=CONVOLUTIONS).fold(features.to_kind(self.kind), unit)
    }

    /// A convolution without bias, followed by LayerNorm.
    fn unit(&self, name: &str, x_bchw: &Tensor) -> Tensor {
        let x_bchw = convolved(x_bchw, &self.values[&format!("{name}.weight")], None);
        self.norm(&format!("{name}.norm"), &x_bchw)
    }

    /// LayerNorm over the channels, computed in fp32.
    fn norm(&self, name: &str, x_bchw: &Tensor) -> Tensor {
        let [weight, bias] = self.weight_and_bias(name);
        let x_bhwc = x_bchw.permute([0, 2, 3, 1]).to_kind(Kind::Float);
        let normed = x_bhwc.layer_norm([weight.size()[0]], Some(weight), Some(bias), LAYER_NORM_EPS, true);
        normed.permute([0, 3, 1, 2]).to_kind(self.kind)
    }

    fn convolution(&self, name: &str, x_bchw: &Tensor) -> Tensor {
        let [weight, bias] = self.weight_and_bias(name);
        convolved(x_bchw, weight, Some(bias))
    }

    /// A transposed convolution that doubles the number of rows and columns.
    fn doubled(&self, name: &str, x_bchw: &Tensor) -> Tensor {
        let [weight, bias] = self.weight_and_bias(name);
        x_bchw.conv_transpose2d(weight, Some(bias), [2, 2], [0, 0], [0, 0], 1, [1, 1])
    }

    fn weight_and_bias(&self, name: &str) -> [&Tensor; 2] {
        ["weight", "bias"].map(|part| &self.values[&format!("{name}.{part}")])
    }
}

/// The prefix of the parameter names of the only norm that does not follow a convolution of [`Heads::unit`].
const NORM_ALONE: &str = "backbone.simfp_2.1.";

/// A convolution that keeps the number of rows and columns.
fn convolved(x_bchw: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let padding = weight.size()[2] / 2;
    x_bchw.conv2d(weight, bias, [1, 1], [padding, padding], [1, 1], 1)
}
