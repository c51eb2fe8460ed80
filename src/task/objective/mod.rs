//! The objective of training: which losses the network learns from, and through which of its stages the gradient of each passes.
//!
//! An objective divides the stages into segments that train one after the other: the forward pass of a segment, its losses, its
//! backward pass. No gradient passes from a segment to the one before it, so the activations of one segment exist at a time.

mod contrast;
mod head;
mod local;
mod reconstruction;

use super::{Loss, Part, Task};
use crate::config::Config;
use crate::family::parameter::Parameter;
use crate::model::{Network, Tap};
use crate::plan::local::{Border, LocalLoss};
use anyhow::Result;
use std::ops::Range;
use tch::Tensor;

/// The images (b, c, h, w) and the training targets of a part of a batch.
pub struct Given {
    pub images_bchw: Tensor,
    pub targets: Tensor,
}

/// The losses of a phase.
#[derive(Debug, Clone)]
pub struct Objective {
    task: Task,
    segments: Vec<Segment>,
    /// K, the number of stages.
    stages: usize,
}

/// Neighbouring stages that one gradient passes.
#[derive(Debug, Clone)]
pub struct Segment {
    pub stages: Range<usize>,
    /// The outputs that the losses read.
    pub taps: Vec<Tap>,
    losses: Losses,
}

#[derive(Debug, Clone)]
enum Losses {
    Task(Task),
    Local(Vec<LocalLoss>),
}

impl Objective {
    /// The task's loss at the end of the network, and local losses at `borders`, which are in the order of the stages.
    pub fn of(config: &Config, borders: &[Border]) -> Objective {
        let (task, stages) = (Task::of(config), config.model.stages());
        let mut segments = Vec::new();
        let mut start = 0;
        for Border { stage, losses } in borders {
            let taps = if losses.is_empty() { Vec::new() } else { vec![Tap::Stage(*stage)] };
            segments.push(Segment { stages: start..stage + 1, taps, losses: Losses::Local(losses.clone()) });
            start = stage + 1;
        }
        segments.push(Segment { stages: start..stages, taps: task.taps(), losses: Losses::Task(task) });
        Objective { task, segments, stages }
    }

    /// The task that the objective learns.
    pub fn task(&self) -> Task {
        self.task
    }

    /// The segments in the order in which they train.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The parameters beside the network's: those of the task, and those of the heads of local losses, which are in checkpoints
    /// alone. Their stage is the number of the network's stages.
    pub fn auxiliary(&self) -> Vec<Parameter> {
        let local = self.segments.iter().flat_map(|segment| match &segment.losses {
            Losses::Task(_) => &[][..],
            Losses::Local(losses) => losses,
        });
        let of_heads = local.flat_map(|loss| loss.head.parameters(self.stages));
        self.task.parameters(self.stages).into_iter().chain(of_heads).collect()
    }
}

impl Segment {
    /// The losses of a part of a batch, given the outputs at the taps. Adds the gradients of the auxiliary parameters to the
    /// network's flat buffer.
    pub fn loss(&self, network: &Network, outputs: &[Tensor], given: &Given, part: &Part) -> Result<Loss> {
        match &self.losses {
            Losses::Task(task) => task.loss(network, outputs, &given.targets, part),
            Losses::Local(losses) => Ok(local::loss(losses, network, outputs, given, part)),
        }
    }
}
