//! Describes the heads of local losses as lists of layers. The parameters, the cost and the computation of a head follow from its
//! list.

use crate::family::parameter::{Initial, Parameter, Role};
use crate::family::shape::Shape;

/// A small network that reads the output of a stage during training.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// The prefix of the names of the head's parameters.
    pub name: String,
    /// The shape of the stage's output.
    pub input: Shape,
    pub layers: Vec<Layer>,
}

/// One layer of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Takes the class token alone.
    ClassToken,
    /// Takes the tokens of the patches as a map.
    Grid,
    /// Interpolates a map bilinearly to this number of rows and columns, with aligned corners.
    Upsample(usize),
    /// Averages a map to this number of rows and columns (adaptive average pooling).
    Pool(usize),
    Flatten,
    /// A convolution, padded so that a stride of 1 keeps the size of the map.
    Convolution {
        output: usize,
        kernel: usize,
        stride: usize,
        bias: bool,
    },
    /// BatchNorm with the statistics of the micro-batch. Heads are never evaluated, so they need no running statistics.
    BatchNorm,
    LayerNorm,
    Relu,
    Gelu,
    Linear {
        output: usize,
    },
}

impl Layer {
    /// The shape of the output for an input of this shape.
    pub fn after(self, input: Shape) -> Shape {
        match (self, input) {
            (Layer::ClassToken, Shape::Tokens { width, .. }) => Shape::Vector { width },
            (Layer::Grid, Shape::Tokens { grid, width }) => Shape::Map { channels: width, side: grid },
            (Layer::Pool(side) | Layer::Upsample(side), Shape::Map { channels, .. }) => Shape::Map { channels, side },
            (Layer::Flatten, map) => Shape::Vector { width: map.count() },
            (Layer::Convolution { output, stride, .. }, Shape::Map { side, .. }) => {
                Shape::Map { channels: output, side: side.div_ceil(stride) }
            }
            (Layer::Linear { output }, Shape::Vector { .. }) => Shape::Vector { width: output },
            (Layer::BatchNorm | Layer::LayerNorm | Layer::Relu | Layer::Gelu, same) => same,
            (layer, shape) => unreachable!("{layer:?} after {shape:?}"),
        }
    }

    /// The number of the layer's parameters: 0, 1 (a weight) or 2 (a weight and a bias).
    pub fn parameters(self) -> usize {
        match self {
            Layer::Convolution { bias, .. } => 1 + usize::from(bias),
            Layer::BatchNorm | Layer::LayerNorm | Layer::Linear { .. } => 2,
            _ => 0,
        }
    }

    /// Whether the layer uses its parameters in fp32 even if the run computes in bf16.
    pub fn is_exact(self) -> bool {
        matches!(self, Layer::BatchNorm | Layer::LayerNorm)
    }

    /// The shape and the initial value of the weight and of the bias. The weights of convolutions start as in ResNets (He et al.).
    /// All other parameters start with PyTorch's defaults.
    fn rows(self, input: Shape) -> Vec<(Vec<usize>, Initial)> {
        let width = input.width();
        match self {
            Layer::Convolution { output, kernel, bias, .. } => {
                let weight =
                    (vec![output, width, kernel, kernel], Initial::FanOut { fan_out: output * kernel * kernel });
                let bias = bias.then(|| (vec![output], Initial::FanIn { fan_in: width * kernel * kernel }));
                std::iter::once(weight).chain(bias).collect()
            }
            Layer::Linear { output } => {
                let start = Initial::FanIn { fan_in: width };
                vec![(vec![output, width], start), (vec![output], start)]
            }
            Layer::BatchNorm | Layer::LayerNorm => vec![(vec![width], Initial::Ones), (vec![width], Initial::Zeros)],
            _ => Vec::new(),
        }
    }

    /// The floating-point operations of the forward pass. As in the network, norms and activations do not count.
    fn flops(self, input: Shape) -> usize {
        match self {
            Layer::Convolution { kernel, .. } => 2 * kernel * kernel * input.width() * self.after(input).count(),
            Layer::Linear { output } => 2 * input.width() * output,
            _ => 0,
        }
    }
}

impl Head {
    /// Each layer with the shape of its input.
    fn steps(&self) -> impl Iterator<Item = (Layer, Shape)> {
        self.layers.iter().scan(self.input, |shape, &layer| {
            let input = *shape;
            *shape = layer.after(input);
            Some((layer, input))
        })
    }

    /// The parameters of the head, named by the numbers of their layers, as in PyTorch's `Sequential`. Their stage is `stage`.
    pub fn parameters(&self, stage: usize) -> Vec<Parameter> {
        let of_layer = |(number, (layer, input)): (usize, (Layer, Shape))| {
            let parts = ["weight", "bias"].into_iter().zip(layer.rows(input));
            let parameter = |(part, (shape, start)): (&str, (Vec<usize>, Initial))| Parameter {
                stage,
                name: format!("{}.{number}.{part}", self.name),
                role: if shape.len() > 1 { Role::Decayed } else { Role::Plain },
                shape: shape.into_iter().map(|size| size as i64).collect(),
                start,
            };
            parts.map(parameter).collect::<Vec<_>>()
        };
        self.steps().enumerate().flat_map(of_layer).collect()
    }

    /// The operations of a forward pass of one sample.
    pub fn flops(&self) -> f64 {
        self.steps().map(|(layer, input)| layer.flops(input)).sum::<usize>() as f64
    }

    /// The number of values in the outputs of all layers, for one sample.
    pub fn activations(&self) -> f64 {
        self.steps().map(|(layer, input)| layer.after(input).count()).sum::<usize>() as f64
    }
}
