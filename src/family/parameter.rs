//! The rows of a family's table of parameters and buffers. The model, the store, the exports and the plan read this table.

use serde::{Deserialize, Serialize};

/// One named tensor of a network, or of a head that trains beside the network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parameter {
    /// The stage of the tensor, counted from 0. The first stage has the embeddings or the stem, and the last stage has the final
    /// norm and the head (paper, section 3). The tensors of heads beside the network have the stage K, the number of stages.
    pub stage: usize,
    /// The name within the stage, in which blocks are numbered from 0. For a ViT it is the name in the official code's
    /// `model_stages[stage]`.
    pub name: String,
    pub shape: Vec<i64>,
    pub start: Initial,
    pub role: Role,
}

/// The initial value of a parameter or buffer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Initial {
    /// Normal with a standard deviation of 0.02. timm truncates the distribution at ±2, which is a hundred standard deviations away
    /// and so makes no difference.
    Normal,
    /// Uniform in ±1/√`fan_in`, as torch initialises convolutions and linear layers.
    FanIn {
        fan_in: usize,
    },
    /// Normal with a standard deviation of √(2 / `fan_out`), as He et al. (arXiv 1502.01852) derive it for the backward pass.
    FanOut {
        fan_out: usize,
    },
    /// Uniform between −`bound` and `bound`.
    Uniform {
        bound: f64,
    },
    /// Normal with this standard deviation.
    Deviation {
        deviation: f64,
    },
    Zeros,
    Ones,
}

/// The initial value of a parameter whose stage grows from a shallower stage.
#[derive(Debug, Clone, PartialEq)]
pub enum Grown {
    /// The value that [`Initial`] describes.
    Fresh,
    Zeros,
    /// The value of the parameter of this name in the shallower stage.
    Copied(String),
}

/// How training changes a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Role {
    /// The optimiser changes the tensor, with weight decay.
    Decayed,
    /// The optimiser changes the tensor, without weight decay.
    Plain,
    /// A buffer, such as BatchNorm's running mean, which is saved but not trained. During a step, its stage sums statistics over
    /// the samples of the global batch. After the step, the buffer moves by the factor `momentum` towards the mean of these
    /// statistics.
    Buffer { momentum: f64 },
}

impl Parameter {
    /// How many numbers the tensor holds.
    pub fn count(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Whether the tensor belongs to the network's own head, so that its shape depends on the number of classes.
    pub fn is_of_head(&self) -> bool {
        self.name.starts_with("head.") || self.name.starts_with("fc.")
    }

    /// Whether the tensor is a parameter that the optimiser changes, not a buffer.
    pub fn is_trainable(&self) -> bool {
        !matches!(self.role, Role::Buffer { .. })
    }
}

/// Parameters in the order of flat buffers, each with the offset of its first number. First come the parameters with weight decay,
/// then the parameters without weight decay, then the buffers. Each of these groups keeps the order of the table.
pub fn flat_order(parameters: Vec<Parameter>) -> Vec<(usize, Parameter)> {
    let (trainable, buffers): (Vec<_>, Vec<_>) = parameters.into_iter().partition(Parameter::is_trainable);
    let (decayed, plain): (Vec<_>, Vec<_>) = trainable.into_iter().partition(|p| p.role == Role::Decayed);
    let mut end = 0;
    let with_offset = |parameter: Parameter| {
        let offset = end;
        end += parameter.count();
        (offset, parameter)
    };
    decayed.into_iter().chain(plain).chain(buffers).map(with_offset).collect()
}
