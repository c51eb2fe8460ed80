//! What a network asks of its parts: a forward pass, and the backward pass that belongs to it.

use tch::Tensor;

/// A stage of a network, or its head: one tensor in, one tensor out, in shapes that the family owns. The first stage takes
/// images (b, channels, rows, columns); the head gives what the task's loss takes, in fp32.
pub trait Stage {
    /// The output and, if `keep`, the backward pass, which holds what it needs of the forward pass.
    fn forward<'a>(&'a self, input: Tensor, pass: &Pass, keep: bool) -> (Tensor, Option<Backward<'a>>);
}

/// Takes the gradient of a stage's output, adds the gradients of the stage's trained parameters to the flat buffer, and gives
/// the gradient of the input. There is none for images.
pub type Backward<'a> = Box<dyn FnOnce(Tensor) -> Option<Tensor> + 'a>;

/// What one forward pass depends on beside its input.
pub struct Pass<'a> {
    /// Stochastic depth; none in evaluation.
    pub drop: Option<&'a DropPath>,
    /// Probability of dropout, whose masks libtorch's generator draws; 0 in evaluation.
    pub dropout: f64,
}

/// Stochastic depth masks of one forward pass: 0, or 1 / keep probability, for each residual branch and sample.
pub struct DropPath {
    /// (branches, b, 1, 1), with the branches in the order of the network; none if nothing is dropped.
    pub scale: Option<Tensor>,
}

/// Where a task reads a network, and where it hands gradients back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tap {
    /// The output of a stage.
    Stage(usize),
    /// The output of the head.
    Head,
}
