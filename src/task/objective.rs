//! The losses with which a network trains, and the outputs that they read. The first objective is the task's loss on the network's
//! output. Other objectives add losses on the outputs of stages, with heads of their own.

use super::{Loss, Part, Task};
use crate::config::Config;
use crate::family::Model;
use crate::family::parameter::Parameter;
use crate::model::{Network, Tap};
use anyhow::Result;
use tch::Tensor;

/// The objectives of training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// Only the task's loss, through the whole network.
    EndToEnd(Task),
    /// For tests: also the same loss of a linear head on the output of the first stage.
    #[cfg(test)]
    WithLocal(Task),
}

impl Objective {
    /// The objective of a config.
    pub fn of(config: &Config) -> Objective {
        let task = Task::of(config);
        match config.model {
            #[cfg(test)]
            Model::Toy(ref toy) if toy.has_local_loss => Objective::WithLocal(task),
            _ => Objective::EndToEnd(task),
        }
    }

    /// The outputs of the network that the losses read.
    pub fn taps(self) -> Vec<Tap> {
        match self {
            Objective::EndToEnd(task) => task.taps(),
            #[cfg(test)]
            Objective::WithLocal(_) => vec![Tap::Head, Tap::Stage(0)],
        }
    }

    /// The task that the objective learns.
    pub fn task(self) -> Task {
        match self {
            Objective::EndToEnd(task) => task,
            #[cfg(test)]
            Objective::WithLocal(task) => task,
        }
    }

    /// The parameters beside the network's: those of the task, and those of the heads of local losses, which are in checkpoints
    /// alone. Their stage is the number of the network's stages.
    #[cfg_attr(
        not(test),
        expect(unused_variables, reason = "only the tests have local losses, whose heads depend on the model")
    )]
    pub fn auxiliary(self, model: &Model, depths: &[usize]) -> Vec<Parameter> {
        match self {
            Objective::EndToEnd(task) => task.parameters(depths.len()),
            #[cfg(test)]
            Objective::WithLocal(_) => tests::auxiliary(model, depths),
        }
    }

    /// The loss of a part of a batch, given its outputs at the taps and its training targets. Adds the gradients of the auxiliary
    /// parameters to the network's flat buffer. Collective over the part's group.
    pub fn loss(self, network: &Network, outputs: &[Tensor], targets: &Tensor, part: &Part) -> Result<Loss> {
        match self {
            Objective::EndToEnd(task) => task.loss(network, outputs, targets, part),
            #[cfg(test)]
            Objective::WithLocal(task) => tests::loss(task, network, outputs, targets, part),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::parameter::{Role, Start};

    const HEAD: &str = "local.weight";

    pub fn auxiliary(model: &Model, depths: &[usize]) -> Vec<Parameter> {
        let Model::Toy(toy) = model else { unreachable!() };
        let shape = vec![toy.classes as i64, toy.width as i64];
        let start = Start::FanIn { fan_in: toy.width };
        vec![Parameter { stage: depths.len(), name: HEAD.into(), shape, start, role: Role::Decayed }]
    }

    pub fn loss(task: Task, network: &Network, outputs: &[Tensor], targets: &Tensor, part: &Part) -> Result<Loss> {
        let [logits, first] = outputs else { unreachable!("there are two taps") };
        let head = network.flat().get(network.stages(), HEAD, true).unwrap();
        let end_to_end = task.loss(network, &[logits.shallow_clone()], targets, part)?;
        let local = task.loss(network, &[first.mm(&head.value.tr())], targets, part)?;
        head.accumulate(|| local.gradients[0].tr().mm(first));
        let at_first = local.gradients[0].mm(&head.value);
        let gradients = vec![end_to_end.gradients[0].shallow_clone(), at_first];
        Ok(Loss { sum: end_to_end.sum + local.sum, gradients })
    }
}
