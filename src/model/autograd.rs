//! A stage whose backward pass libtorch's autograd computes, so that its family only writes the forward pass.

use super::Weight;
use super::stage::{Backward, Pass, Stage};
use tch::Tensor;

/// Computes the output of a stage from its input and the values of its parameters, in the order of the parameters.
pub type Function = Box<dyn Fn(&Tensor, &[Tensor]) -> Tensor>;

pub struct Autograd {
    pub parameters: Vec<Weight>,
    /// Whether the input is images, which need no gradient.
    pub takes_images: bool,
    pub function: Function,
}

impl Stage for Autograd {
    fn forward<'a>(&'a self, input: Tensor, _: &Pass, keep: bool) -> (Tensor, Option<Backward<'a>>) {
        let values = self.parameters.iter().map(|parameter| &parameter.value);
        if !keep {
            let values: Vec<Tensor> = values.map(Tensor::shallow_clone).collect();
            return ((self.function)(&input, &values), None);
        }
        let leaf = |tensor: &Tensor, trains: bool| tensor.detach().set_requires_grad(trains);
        let input = leaf(&input, !self.takes_images);
        let trains = self.parameters.iter().map(|parameter| parameter.gradient.is_some());
        let values: Vec<Tensor> = values.zip(trains).map(|(value, trains)| leaf(value, trains)).collect();
        let output = tch::with_grad(|| (self.function)(&input, &values));
        let detached = output.detach();
        let backward = move |gradient: Tensor| {
            let trained: Vec<usize> = (0..values.len()).filter(|&i| values[i].requires_grad()).collect();
            let leaves = trained.iter().map(|&i| &values[i]).chain(input.requires_grad().then_some(&input));
            let leaves: Vec<&Tensor> = leaves.collect();
            let weighted = tch::with_grad(|| (&output * gradient).sum(output.kind()));
            let mut gradients = Tensor::run_backward(&[weighted], &leaves, false, false);
            let of_input = input.requires_grad().then(|| gradients.pop().expect("the input is the last leaf"));
            for (i, gradient) in trained.into_iter().zip(gradients) {
                self.parameters[i].accumulate(|| gradient);
            }
            of_input
        };
        (detached, Some(Box::new(backward)))
    }
}
