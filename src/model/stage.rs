//! The interface of a network's parts: a forward pass, and the backward pass that belongs to it.

use crate::weights::{Staging, floats, upload};
use tch::{Kind, Tensor};

/// A stage of a network, or its head. It maps one tensor to one tensor. The model family decides the shapes. The first stage takes
/// images (b, channels, rows, columns). The head returns logits in fp32.
pub trait Stage {
    /// Returns the output. If `keep`, also returns the backward pass, which holds the tensors that it needs from the forward pass.
    fn forward<'a>(&'a self, input: Tensor, pass: &Pass, keep: bool) -> (Tensor, Option<Backward<'a>>);
}

/// Takes the gradient of a stage's output, adds the gradients of the stage's trained parameters to the flat buffer of gradients,
/// and returns the gradient of the input. Returns none if the input is images.
pub type Backward<'a> = Box<dyn FnOnce(Tensor) -> Option<Tensor> + 'a>;

/// The settings of one forward pass.
pub struct Pass<'a> {
    /// Stochastic depth. None in evaluation. In training it is always given, even if it drops nothing.
    pub drop: Option<&'a DropPath>,
    /// The probability of dropout; 0 in evaluation. libtorch's random generator draws the masks.
    pub dropout: f64,
}

/// Stochastic depth (arXiv 1603.09382) in one forward pass: the samples that keep each residual branch.
pub struct DropPath {
    /// The residual branches in the order of the network; empty if nothing is dropped.
    branches: Vec<Samples>,
}

/// The samples of one residual branch.
pub struct Samples {
    /// The factor of each sample (b, 1, 1): 0 if the sample drops the branch, else 1 / keep probability.
    pub scale_b11: Tensor,
    /// The indices of the samples that keep the branch, as 64-bit integers.
    kept: Tensor,
}

impl DropPath {
    /// Stochastic depth that drops nothing.
    pub fn none() -> DropPath {
        DropPath { branches: Vec::new() }
    }

    /// Copies the factors (branches, b) of all branches and samples from host memory to the device. Each factor is 0 or 1 / keep
    /// probability.
    pub fn new(scale_rb: &Tensor, staging: &Staging) -> DropPath {
        let (branches, b) = scale_rb.size2().expect("scales are (branches, b)");
        let scales = floats(scale_rb);
        let kept_of = |scales: &[f32]| -> Vec<f32> {
            let kept = scales.iter().enumerate().filter(|(_, scale)| **scale != 0.0);
            kept.map(|(sample, _)| sample as f32).collect()
        };
        let kept: Vec<Vec<f32>> = scales.chunks(b as usize).map(kept_of).collect();
        // Factors and indices are copied to the device in one fp32 tensor. An fp32 number holds the index of a sample exactly.
        let all: Vec<f32> = scales.iter().chain(kept.iter().flatten()).copied().collect();
        let all = upload(&staging.staged(Tensor::from_slice(&all)), staging.device());
        let scale_rb11 = all.narrow(0, 0, branches * b).view([branches, b, 1, 1]);
        let lengths: Vec<i64> =
            std::iter::once(branches * b).chain(kept.iter().map(|kept| kept.len() as i64)).collect();
        let kept = all.to_kind(Kind::Int64).split_with_sizes(lengths, 0).into_iter().skip(1);
        let branch = |(number, kept)| Samples { scale_b11: scale_rb11.get(number), kept };
        DropPath { branches: (0..branches).zip(kept).map(branch).collect() }
    }

    /// The samples of the residual branch with this number, counted from 0 through the whole network. None if nothing is dropped.
    pub fn branch(&self, number: usize) -> Option<&Samples> {
        self.branches.get(number)
    }
}

impl Samples {
    /// The indices of the samples that keep the branch, if at least a quarter of all samples drop the branch. If fewer samples drop
    /// the branch, copying the kept samples out and back takes more time than skipping the dropped samples saves.
    pub fn worth_taking(&self) -> Option<&Tensor> {
        let (kept, all) = (self.kept.size()[0], self.scale_b11.size()[0]);
        (4 * (all - kept) >= all).then_some(&self.kept)
    }
}

/// A place in a network at which a task reads activations and returns their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tap {
    /// The output of a stage.
    Stage(usize),
    /// The output of the head.
    Head,
}
