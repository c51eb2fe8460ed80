//! The local losses at the border between two stages. libtorch's autograd differentiates the heads and the losses.

use super::super::classification::cross_entropy;
use super::{Given, Loss, Part, contrast, head, reconstruction};
use crate::model::{Network, Weight};
use crate::plan::local::{LocalLoss, LossKind};
use tch::{Kind, Tensor};

/// A head's parameters: views of the network's flat buffer, and leaves of autograd's graph.
struct Parameters {
    weights: Vec<Weight>,
    leaves: Vec<Tensor>,
}

/// The contribution of a part of a batch to the weighted sum of the mean losses, and its gradient at the stage's output. The
/// stage's output is the only element of `outputs`, which is empty if there are no losses. Adds the gradients of the heads'
/// parameters to their sums in the network's flat buffer.
pub fn loss(losses: &[LocalLoss], network: &Network, outputs: &[Tensor], given: &Given, part: &Part) -> Loss {
    let [output] = outputs else {
        return Loss { sum: Tensor::zeros([], (Kind::Float, network.options().1)), gradients: Vec::new() };
    };
    let tap = output.detach().set_requires_grad(true);
    let heads: Vec<Parameters> = losses.iter().map(|loss| parameters(loss, network)).collect();
    let value = |(loss, parameters): (&LocalLoss, &Parameters)| {
        let of_head = head::forward(&loss.head, &parameters.leaves, &tap);
        let sum = match &loss.kind {
            LossKind::CrossEntropy => cross_entropy(&of_head, &given.targets),
            LossKind::Contrast => contrast::loss(&of_head, &given.targets.argmax(1, false)),
            LossKind::Reconstruction { mean, std } => reconstruction::loss(&of_head, &given.images_bchw, mean, std),
        };
        sum * (loss.weight / part.global_batch)
    };
    let sum: Tensor = tch::with_grad(|| losses.iter().zip(&heads).map(value).sum());
    let of_heads = heads.iter().flat_map(|parameters| &parameters.leaves);
    let leaves: Vec<&Tensor> = std::iter::once(&tap).chain(of_heads).collect();
    let mut gradients = Tensor::run_backward(&[&sum], &leaves, false, false).into_iter();
    let at_tap = gradients.next().expect("the tap is the first leaf");
    for (weight, gradient) in heads.iter().flat_map(|parameters| &parameters.weights).zip(gradients) {
        weight.accumulate(|| gradient);
    }
    Loss { sum: sum.detach(), gradients: vec![at_tap] }
}

fn parameters(loss: &LocalLoss, network: &Network) -> Parameters {
    let stage = network.stages();
    let exact = loss.head.layers.iter().flat_map(|layer| std::iter::repeat_n(layer.is_exact(), layer.parameters()));
    let weight = |(parameter, exact): (crate::family::parameter::Parameter, bool)| {
        let weight = network.flat().get(stage, &parameter.name, exact);
        weight.expect("the network was built with the objective's parameters")
    };
    let weights: Vec<Weight> = loss.head.parameters(stage).into_iter().zip(exact).map(weight).collect();
    let leaves = weights.iter().map(|weight| weight.value.detach().set_requires_grad(true)).collect();
    Parameters { weights, leaves }
}
