//! The rows of a family's table of parameters and buffers, which the model, the store, the exports and `plan` read.

use serde::{Deserialize, Serialize};

/// One named tensor of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parameter {
    /// The stage of the tensor. The first stage has the embeddings, the last stage has the final norm and the head (paper, section
    /// 3).
    pub stage: usize,
    /// The name within the stage, where blocks are numbered from 0. For a ViT it is the official `model_stages[stage]` name.
    pub name: String,
    pub shape: Vec<i64>,
    pub start: Start,
    pub role: Role,
}

/// The value of a parameter before training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Start {
    /// Normal with a standard deviation of 0.02. timm truncates it at ±2, a hundred standard deviations away.
    Normal,
    /// Uniform in ±1/√`fan_in`, as torch initialises convolutions and linear layers.
    FanIn {
        fan_in: usize,
    },
    /// Normal with a standard deviation of √(2 / `fan_out`), which is that of He et al. (arXiv 1502.01852) for the backward pass.
    FanOut {
        fan_out: usize,
    },
    /// Uniform in ± this bound.
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

/// The value of a parameter before training, if its stage grows from a shallower one.
#[derive(Debug, Clone, PartialEq)]
pub enum Grown {
    /// As [`Start`] says.
    Fresh,
    Zeros,
    /// The value of the parameter of this name in the shallower stage.
    Copied(String),
}

/// How training changes a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Role {
    /// The optimiser changes it, with weight decay.
    Decayed,
    /// The optimiser changes it, without weight decay.
    Plain,
    /// A buffer, such as BatchNorm's statistics, which is saved but not trained. After each step it moves by `momentum` towards the
    /// mean over the global batch of the values that its stage has accumulated.
    Buffer { momentum: f64 },
}

impl Parameter {
    /// How many numbers the tensor holds.
    pub fn count(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Whether it belongs to the head, whose shape depends on the classes.
    pub fn is_of_head(&self) -> bool {
        self.name.starts_with("head.") || self.name.starts_with("fc.")
    }

    /// Whether it is a parameter that the optimiser changes, not a buffer.
    pub fn is_trainable(&self) -> bool {
        !matches!(self.role, Role::Buffer { .. })
    }
}

/// Parameters in the order of flat buffers, each with the offset of its first number: the decayed ones come first, then the
/// plain ones, then the buffers, each group in the order of the table.
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
