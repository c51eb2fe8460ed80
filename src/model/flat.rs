//! Trained parameters as views of one flat buffer: one all-reduce, one norm, one optimiser pass and one write per
//! buffer in place of hundreds.

use crate::plan::parameters::Parameter;
use crate::weights::{Weights, floats_mut};
use anyhow::{Context, Result};
use std::sync::Arc;
use tch::Tensor;

/// The flat buffer and its parts. Parameters with weight decay come first.
pub struct FlatParameters {
    buffer: Tensor,
    /// Leaf tensors that share the buffer's memory and require gradients.
    views: Vec<Tensor>,
    layout: Arc<Layout>,
    decayed: usize,
}

/// What lies where in a flat buffer.
#[derive(Debug)]
pub struct Layout {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    stage: usize,
    name: String,
    shape: Vec<i64>,
    /// The first number.
    start: usize,
}

impl FlatParameters {
    /// Copies the given parameters' weights into a new buffer.
    pub fn new<'a>(parameters: impl Iterator<Item = &'a Parameter>, weights: &Weights) -> Result<FlatParameters> {
        let (mut ordered, plain): (Vec<_>, Vec<_>) = parameters.partition(|p| p.decays());
        let decayed = ordered.iter().map(|p| p.count()).sum();
        ordered.extend(plain);
        let total: usize = ordered.iter().map(|p| p.count()).sum();
        let buffer = Tensor::zeros([total as i64], super::OPTIONS);
        let (mut views, mut parts, mut start) = (Vec::new(), Vec::new(), 0);
        for parameter in ordered {
            let weight = weights
                .get(&(parameter.stage, parameter.name.clone()))
                .with_context(|| format!("stage {} has no {}", parameter.stage, parameter.name))?;
            anyhow::ensure!(
                weight.size() == parameter.shape,
                "stage {} {} has shape {:?}, expected {:?}",
                parameter.stage,
                parameter.name,
                weight.size(),
                parameter.shape
            );
            let mut view = buffer.narrow(0, start as i64, parameter.count() as i64).view(&parameter.shape[..]);
            view.copy_(weight);
            views.push(view.detach().set_requires_grad(true));
            let (name, shape) = (parameter.name.clone(), parameter.shape.clone());
            parts.push(Part { stage: parameter.stage, name, shape, start });
            start += parameter.count();
        }
        let layout = Arc::new(Layout { parts });
        Ok(FlatParameters { buffer, views, layout, decayed })
    }

    /// Numbers in the buffer.
    pub fn len(&self) -> usize {
        self.buffer.numel()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many of them, from the start, have weight decay.
    pub fn decayed(&self) -> usize {
        self.decayed
    }

    /// The leaf tensors, in the order of the buffer.
    pub fn views(&self) -> &[Tensor] {
        &self.views
    }

    /// Stage and name of each view.
    pub fn names(&self) -> impl Iterator<Item = (usize, &str)> {
        self.layout.parts.iter().map(|part| (part.stage, part.name.as_str()))
    }

    /// The buffer itself.
    pub fn buffer(&self) -> &Tensor {
        &self.buffer
    }

    /// The buffer's numbers, for the optimiser. No autograd graph over the views is alive between two steps.
    pub fn numbers_mut(&mut self) -> &mut [f32] {
        floats_mut(&mut self.buffer)
    }

    /// Copies another buffer of this layout in.
    pub fn set(&mut self, numbers: &Tensor) {
        self.buffer.copy_(numbers);
    }

    /// The view of one parameter.
    pub fn get(&self, stage: usize, name: &str) -> Option<Tensor> {
        let at = self.layout.parts.iter().position(|part| part.stage == stage && part.name == name)?;
        Some(self.views[at].shallow_clone())
    }

    /// What lies where in the buffer.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }
}

impl Layout {
    /// Views of the parameters by name, in any buffer of this layout (the weights, or their average).
    pub fn named(&self, buffer: &Tensor) -> Weights {
        let view = |part: &Part| {
            let numbers = part.shape.iter().product();
            buffer.narrow(0, part.start as i64, numbers).view(&part.shape[..])
        };
        self.parts.iter().map(|part| ((part.stage, part.name.clone()), view(part))).collect()
    }
}
