//! Heads of local losses as lists of layers, from which follow their parameters, their cost and their computation.

use crate::family::parameter::{Parameter, Role, Start};
use crate::family::shape::Shape;

/// A small network that reads the output of a stage in training.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// The start of its parameters' names.
    pub name: String,
    /// The output of the stage.
    pub input: Shape,
    pub layers: Vec<Layer>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// The class token alone.
    ClassToken,
    /// The tokens of the patches as a map.
    Grid,
    /// Interpolates a map bilinearly to so many rows and columns. Its corners stay where they are.
    Upsample(usize),
    /// Averages a map to so many rows and columns.
    Pool(usize),
    Flatten,
    /// With padding that keeps the size of the map if the stride is 1.
    Convolution {
        output: usize,
        kernel: usize,
        stride: usize,
        bias: bool,
    },
    /// BatchNorm by the statistics of the micro-batch. Heads are never evaluated, so there are no running statistics.
    BatchNorm,
    LayerNorm,
    Relu,
    Gelu,
    Linear {
        output: usize,
    },
}

impl Layer {
    /// The shape of its output.
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

    /// How many parameters it has: none, a weight, or a weight and a bias.
    pub fn parameters(self) -> usize {
        match self {
            Layer::Convolution { bias, .. } => 1 + usize::from(bias),
            Layer::BatchNorm | Layer::LayerNorm | Layer::Linear { .. } => 2,
            _ => 0,
        }
    }

    /// Whether its parameters are used in fp32 in any precision.
    pub fn is_exact(self) -> bool {
        matches!(self, Layer::BatchNorm | Layer::LayerNorm)
    }

    /// The shape and the start of its weight and of its bias. Convolutions start as those of the network, and linear layers and
    /// biases as in PyTorch.
    fn rows(self, input: Shape) -> Vec<(Vec<usize>, Start)> {
        let width = input.width();
        match self {
            Layer::Convolution { output, kernel, bias, .. } => {
                let weight = (vec![output, width, kernel, kernel], Start::FanOut { fan_out: output * kernel * kernel });
                let bias = bias.then(|| (vec![output], Start::FanIn { fan_in: width * kernel * kernel }));
                std::iter::once(weight).chain(bias).collect()
            }
            Layer::Linear { output } => {
                let start = Start::FanIn { fan_in: width };
                vec![(vec![output, width], start), (vec![output], start)]
            }
            Layer::BatchNorm | Layer::LayerNorm => vec![(vec![width], Start::Ones), (vec![width], Start::Zeros)],
            _ => Vec::new(),
        }
    }

    /// The floating-point operations of its forward pass; norms and activations count as none, as in the rest of the network.
    fn flops(self, input: Shape) -> usize {
        match self {
            Layer::Convolution { kernel, .. } => 2 * kernel * kernel * input.width() * self.after(input).count(),
            Layer::Linear { output } => 2 * input.width() * output,
            _ => 0,
        }
    }
}

impl Head {
    /// Each layer with its input.
    fn steps(&self) -> impl Iterator<Item = (Layer, Shape)> {
        self.layers.iter().scan(self.input, |shape, &layer| {
            let input = *shape;
            *shape = layer.after(input);
            Some((layer, input))
        })
    }

    /// Its parameters, named as in PyTorch by the number of the layer. Their stage is `stage`.
    pub fn parameters(&self, stage: usize) -> Vec<Parameter> {
        let of_layer = |(number, (layer, input)): (usize, (Layer, Shape))| {
            let parts = ["weight", "bias"].into_iter().zip(layer.rows(input));
            let parameter = |(part, (shape, start)): (&str, (Vec<usize>, Start))| Parameter {
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

    /// The numbers of all layers' outputs for one sample.
    pub fn activations(&self) -> f64 {
        self.steps().map(|(layer, input)| layer.after(input).count()).sum::<usize>() as f64
    }
}
