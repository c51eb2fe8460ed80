//! Stages whose backward pass libtorch's autograd computes. A family writes only the forward pass of such a stage.

use super::Weight;
use super::stage::{Backward, Pass, Stage};
use tch::Tensor;

/// Computes an output from an input, the values of the parameters (in the order of [`Autograd::parameters`]) and the settings of
/// the pass.
pub type Function = Box<dyn Fn(&Tensor, &[Tensor], &Mode) -> Tensor>;

/// The settings of a pass.
pub struct Mode {
    /// Whether the pass belongs to training and not to evaluation. It is also true for frozen stages.
    pub trains: bool,
    /// Whether the pass repeats an earlier pass with the same input, because the backward pass recomputes it.
    pub again: bool,
    /// The factors of stochastic depth for each residual branch of the function. Each tensor (b, 1, 1) has one factor per sample: 0
    /// if the sample drops the branch, else 1 / keep probability. An entry is none if nothing is dropped.
    pub scales: Vec<Option<Tensor>>,
}

/// A function of one tensor with its parameters: a stage, or a part of a stage.
pub struct Autograd {
    pub parameters: Vec<Weight>,
    /// Whether the input is images, which need no gradient.
    pub takes_images: bool,
    /// Whether to keep only the input, and to recompute the function in the backward pass (Chen et al., arXiv 1604.06174).
    pub recomputes: bool,
    /// The numbers of the function's residual branches, which are counted from 0 through the whole network.
    pub branches: std::ops::Range<usize>,
    pub function: Function,
}

/// A forward pass that autograd has recorded, so that it can differentiate the pass.
struct Recorded {
    input: Tensor,
    values: Vec<Tensor>,
    output: Tensor,
}

impl Autograd {
    /// Computes the output without a record for a backward pass.
    fn output(&self, input: &Tensor, mode: &Mode) -> Tensor {
        let values: Vec<Tensor> = self.parameters.iter().map(|parameter| parameter.value.shallow_clone()).collect();
        (self.function)(input, &values, mode)
    }

    fn record(&self, input: &Tensor, mode: &Mode) -> Recorded {
        let leaf = |tensor: &Tensor, trains: bool| tensor.detach().set_requires_grad(trains);
        let input = leaf(input, !self.takes_images);
        let values = self.parameters.iter().map(|parameter| leaf(&parameter.value, parameter.gradient.is_some()));
        let values: Vec<Tensor> = values.collect();
        let output = tch::with_grad(|| (self.function)(&input, &values, mode));
        Recorded { input, values, output }
    }

    /// Adds the gradient of each trained parameter to the sum in its [`Weight`]. Returns the gradient of the input, if the input
    /// needs a gradient.
    fn differentiate(&self, recorded: Recorded, gradient: &Tensor) -> Option<Tensor> {
        let Recorded { input, values, output } = recorded;
        let trained: Vec<usize> = (0..values.len()).filter(|&i| values[i].requires_grad()).collect();
        let leaves = trained.iter().map(|&i| &values[i]).chain(input.requires_grad().then_some(&input));
        let leaves: Vec<&Tensor> = leaves.collect();
        if leaves.is_empty() {
            return None;
        }
        let weighted = tch::with_grad(|| (&output * gradient).sum(output.kind()));
        let mut gradients = Tensor::run_backward(&[weighted], &leaves, false, false);
        let of_input = input.requires_grad().then(|| gradients.pop().expect("the input is the last leaf"));
        for (i, gradient) in trained.into_iter().zip(gradients) {
            self.parameters[i].accumulate(|| gradient);
        }
        of_input
    }
}

impl Stage for Autograd {
    fn forward<'a>(&'a self, input: Tensor, pass: &Pass, keep: bool) -> (Tensor, Option<Backward<'a>>) {
        let scale = |branch| pass.drop?.branch(branch).map(|samples| samples.scale_b11.shallow_clone());
        let scales = self.branches.clone().map(scale).collect();
        let mode = Mode { trains: pass.drop.is_some(), again: false, scales };
        if !keep {
            return (self.output(&input, &mode), None);
        }
        if self.recomputes {
            let output = self.output(&input, &mode);
            let mode = Mode { again: true, ..mode };
            let backward = move |gradient: Tensor| self.differentiate(self.record(&input, &mode), &gradient);
            return (output, Some(Box::new(backward)));
        }
        let recorded = self.record(&input, &mode);
        let detached = recorded.output.detach();
        (detached, Some(Box::new(move |gradient: Tensor| self.differentiate(recorded, &gradient))))
    }
}

/// A sequence of functions: each takes the output of the function before it.
pub struct Chain(pub Vec<Autograd>);

impl Stage for Chain {
    fn forward<'a>(&'a self, input: Tensor, pass: &Pass, keep: bool) -> (Tensor, Option<Backward<'a>>) {
        let (mut x, mut backwards) = (input, Vec::new());
        for link in &self.0 {
            let (output, backward) = link.forward(x, pass, keep);
            x = output;
            backwards.extend(backward);
        }
        let backward = move |gradient: Tensor| {
            let mut gradient = Some(gradient);
            for backward in backwards.into_iter().rev() {
                gradient = gradient.and_then(backward);
            }
            gradient
        };
        (x, keep.then(|| Box::new(backward) as Backward<'a>))
    }
}
