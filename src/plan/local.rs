//! Local losses. Each stage but the last ends at a border. If a phase has local losses, such a stage learns only from the losses at
//! its border, because no gradient passes through a border.

use super::head::{Head, Layer};
use crate::config::{Config, InfoPro, LabelLoss, LocalHead, ObjectiveKind};
use crate::family::shape::Shape;

/// The border after a stage, with its losses.
#[derive(Debug, Clone, PartialEq)]
pub struct Border {
    pub stage: usize,
    /// The losses from which the stage learns.
    pub losses: Vec<LocalLoss>,
}

/// A loss that reads a stage's output through a head.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalLoss {
    pub kind: LossKind,
    /// The factor of this loss in the sum of all losses. It is above 0.
    pub weight: f64,
    pub head: Head,
}

/// The kind of a local loss.
#[derive(Debug, Clone, PartialEq)]
pub enum LossKind {
    /// The cross entropy of the classes. The head's output holds their logits.
    CrossEntropy,
    /// The contrastive loss. The head's output is a vector for each sample. The loss pulls vectors of the same class together and
    /// pushes vectors of different classes apart, within each block of [`CONTRAST_BLOCK`] samples.
    Contrast,
    /// The reconstruction of the input image. The head's output holds a logit for each pixel and channel. The input was normalised
    /// by this mean and standard deviation of each channel.
    Reconstruction { mean: Vec<f64>, std: Vec<f64> },
}

/// The number of consecutive samples of the global batch among which the contrastive loss forms its pairs: InfoPro's batch for
/// CIFAR-100. No micro-batch may cut a block, so the loss does not depend on the number of replicas and micro-batches.
pub const CONTRAST_BLOCK: usize = 128;

/// The borders of a phase that trains the whole network with this objective; empty if the phase trains end to end.
pub fn borders(config: &Config, objective: ObjectiveKind) -> Vec<Border> {
    let stages = 0..config.model.stages() - 1;
    match objective {
        ObjectiveKind::EndToEnd => Vec::new(),
        ObjectiveKind::Dgl => stages.map(|stage| Border { stage, losses: vec![of_dgl(config, stage)] }).collect(),
        ObjectiveKind::InfoPro => stages.map(|stage| Border { stage, losses: of_infopro(config, stage) }).collect(),
    }
}

fn of_dgl(config: &Config, stage: usize) -> LocalLoss {
    let (input, classes) = (config.model.border(stage), config.model.classes());
    let layers = match config.dgl.head {
        LocalHead::Mlp => mlp(input, classes),
        LocalHead::Linear => linear(input, classes),
    };
    LocalLoss {
        kind: LossKind::CrossEntropy,
        weight: 1.0,
        head: Head { name: format!("local.{stage}.classes"), input, layers },
    }
}

/// InfoPro's losses at the border after a stage. Their weights change linearly from the first border to the last border. Losses
/// with weight 0 are left out.
fn of_infopro(config: &Config, stage: usize) -> Vec<LocalLoss> {
    let (model, InfoPro { loss, reconstruction, classes, .. }) = (&config.model, &config.infopro);
    let (input, last) = (model.border(stage), model.stages().saturating_sub(2));
    let share = if last > 0 { stage as f64 / last as f64 } else { 0.0 };
    let weight = |[first, last]: [f64; 2]| first * (1.0 - share) + last * share;
    let decoder = LocalLoss {
        kind: LossKind::Reconstruction { mean: config.data.mean.clone(), std: config.data.std.clone() },
        weight: weight(*reconstruction),
        head: Head {
            name: format!("local.{stage}.decoder"),
            input,
            layers: decoder(input, model.image_size(), model.channels()),
        },
    };
    let (kind, outputs) = match loss {
        LabelLoss::Softmax => (LossKind::CrossEntropy, model.classes()),
        LabelLoss::Contrast => (LossKind::Contrast, FEATURES),
    };
    let layers = convolutional(input, model.border(model.stages() - 1).width(), outputs);
    let of_classes = LocalLoss {
        kind,
        weight: weight(*classes),
        head: Head { name: format!("local.{stage}.classes"), input, layers },
    };
    [decoder, of_classes].into_iter().filter(|loss| loss.weight > 0.0).collect()
}

/// The width of the hidden layer of InfoPro's net "1c2f", and the length of the vectors that the contrastive loss compares.
const FEATURES: usize = 128;

/// InfoPro's decoder (`auxiliary_nets.py` of its code) without the sigmoid. It resizes the map to the size of the image and applies
/// two convolutions. If the input is tokens, the tokens of the patches form the map.
fn decoder(input: Shape, side: usize, channels: usize) -> Vec<Layer> {
    let convolution = |output| Layer::Convolution { output, kernel: 3, stride: 1, bias: true };
    let rest = [Layer::Upsample(side), convolution(12), Layer::BatchNorm, Layer::Relu, convolution(channels)];
    let first = matches!(input, Shape::Tokens { .. }).then_some(Layer::Grid);
    first.into_iter().chain(rest).collect()
}

/// For a map, InfoPro's net "1c2f": a convolution, the mean of the map, and two linear layers. The convolution doubles the width
/// and halves the side, unless the map already has the width of the network's last stage (`widest`). For tokens, the net is DGL's
/// MLP head ([`mlp`]).
fn convolutional(input: Shape, widest: usize, outputs: usize) -> Vec<Layer> {
    let Shape::Map { channels, .. } = input else { return mlp(input, outputs) };
    let (output, stride) = if channels < widest { (2 * channels, 2) } else { (channels, 1) };
    vec![
        Layer::Convolution { output, kernel: 3, stride, bias: false },
        Layer::BatchNorm,
        Layer::Relu,
        Layer::Pool(1),
        Layer::Flatten,
        Layer::Linear { output: FEATURES },
        Layer::Relu,
        Layer::Linear { output: outputs },
    ]
}

/// For a map, DGL's MLP-SR (`auxillary_classifier.py` of its code). It averages the map to a quarter of its side, applies three 1×1
/// convolutions, averages the map to 2×2, and applies three linear layers. Each of these six layers has a BatchNorm and a ReLU. A
/// last linear layer gives the outputs. For tokens, a norm and two linear layers on the class token, which the network's own head
/// reads too.
fn mlp(input: Shape, outputs: usize) -> Vec<Layer> {
    match input {
        Shape::Map { channels, side } => {
            let convolution = Layer::Convolution { output: channels, kernel: 1, stride: 1, bias: false };
            let linear = Layer::Linear { output: 4 * channels };
            let mut layers = vec![Layer::Pool(side.div_ceil(4))];
            layers.extend([convolution, Layer::BatchNorm, Layer::Relu].repeat(3));
            layers.extend([Layer::Pool(2), Layer::Flatten]);
            layers.extend([linear, Layer::BatchNorm, Layer::Relu].repeat(3));
            layers.push(Layer::Linear { output: outputs });
            layers
        }
        Shape::Tokens { width, .. } => vec![
            Layer::ClassToken,
            Layer::LayerNorm,
            Layer::Linear { output: width },
            Layer::Gelu,
            Layer::Linear { output: outputs },
        ],
        Shape::Vector { .. } => linear(input, outputs),
    }
}

/// One linear layer on the mean of a map, or on the normalised class token, as in greedy layer-wise training.
fn linear(input: Shape, outputs: usize) -> Vec<Layer> {
    let mut layers = match input {
        Shape::Map { .. } => vec![Layer::Pool(1), Layer::Flatten],
        Shape::Tokens { .. } => vec![Layer::ClassToken, Layer::LayerNorm],
        Shape::Vector { .. } => Vec::new(),
    };
    layers.push(Layer::Linear { output: outputs });
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn borders_of(objective: ObjectiveKind, text: &str, sets: &[&str]) -> Vec<Border> {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        borders(&Config::parse(text, &sets).unwrap(), objective)
    }

    fn count(loss: &LocalLoss) -> usize {
        loss.head.parameters(9).iter().map(|parameter| parameter.count()).sum()
    }

    /// The number of values in the parameters of the heads at each border.
    fn counts(text: &str, sets: &[&str]) -> Vec<usize> {
        let borders = borders_of(ObjectiveKind::Dgl, text, sets);
        borders.iter().map(|border| border.losses.iter().map(count).sum()).collect()
    }

    const RESNET: &str = "[model]\nfamily = \"resnet\"\n[data]\n";
    const DEIT_T: &str = "[model]\nimage_size = 32\npatch_size = 4\nwidth = 192\nheads = 3\nclasses = 100";

    #[test]
    fn heads_have_the_parameters_of_dgls_and_greedy_ones_a_single_layer() {
        // InfoPro's cut for four modules: the borders have 16, 32 and 64 channels.
        let four = ["model.depths=[12, 14, 14, 14]"];
        assert_eq!(counts(RESNET, &four), [20_228, 66_468, 237_284]);
        assert_eq!(counts(RESNET, &["model.depths=[18, 18, 18]"]), [20_228, 66_468]);
        assert!(counts(RESNET, &["model.depths=[54]"]).is_empty());
        assert_eq!(counts(DEIT_T, &[]), [56_740; 3]);
        let greedy = |text: &str| counts(text, &["dgl.head=linear"]);
        assert_eq!(greedy(RESNET), [17 * 100, 33 * 100]);
        assert_eq!(greedy(DEIT_T), [2 * 192 + 193 * 100; 3]);
    }

    #[test]
    fn decoders_and_heads_have_the_parameters_of_infopros() {
        let all = |text: &str, sets: &[&str]| -> Vec<Vec<usize>> {
            let weights = ["infopro.reconstruction=[1, 1]", "infopro.classes=[1, 1]", "data.mixup=0", "data.cutmix=0"];
            let borders = borders_of(ObjectiveKind::InfoPro, text, &[&weights[..], sets].concat());
            borders.iter().map(|border| border.losses.iter().map(count).collect()).collect()
        };
        let four = "model.depths=[12, 14, 14, 14]";
        assert_eq!(all(RESNET, &[four]), [[2_091, 21_796], [3_819, 39_780], [7_275, 58_212]]);
        let contrast = "infopro.loss=contrast";
        assert_eq!(all(RESNET, &[four, contrast]), [[2_091, 25_408], [3_819, 43_392], [7_275, 61_824]]);
        assert_eq!(all(DEIT_T, &[]), [[21_099, 56_740]; 3]);
    }

    #[test]
    fn weights_change_on_a_line_between_the_borders_and_losses_without_weight_are_left_out() {
        let weights = |sets: &[&str]| -> Vec<Vec<f64>> {
            let borders = borders_of(ObjectiveKind::InfoPro, RESNET, sets);
            borders.iter().map(|border| border.losses.iter().map(|loss| loss.weight).collect()).collect()
        };
        let four = "model.depths=[12, 14, 14, 14]";
        assert_eq!(weights(&[four]), [vec![1.0], vec![0.5, 0.5], vec![1.0]]);
        let keys = ["infopro.reconstruction=[5, 1]", "infopro.classes=[0, 0]"];
        assert_eq!(weights(&[&[four][..], &keys].concat()), [[5.0], [3.0], [1.0]]);
        let two = ["model.depths=[27, 27]", "infopro.reconstruction=[5, 0]", "infopro.classes=[0.5, 0]"];
        assert_eq!(weights(&two), [[5.0, 0.5]]);
        assert_eq!(weights(&["infopro.reconstruction=[0, 0]", "infopro.classes=[0, 0]"]), [vec![0.0; 0], vec![]]);
    }

    #[test]
    fn a_head_costs_little_beside_its_stage() {
        let config = Config::parse(RESNET, &[]).unwrap();
        for Border { stage, losses } in borders(&config, ObjectiveKind::Dgl) {
            let share = losses[0].head.flops() / config.model.stage_flops(&[18, 18, 18], stage);
            assert!((1e-4..0.05).contains(&share), "{share}");
        }
        // Three convolutions on 8 × 8 pixels, three layers of 64 × 64, one of 64 × 100.
        let head = &borders(&config, ObjectiveKind::Dgl)[0].losses[0].head;
        assert_eq!(head.flops(), 2.0 * (3.0 * 64.0 * 256.0 + 3.0 * 4096.0 + 6400.0));
    }
}
