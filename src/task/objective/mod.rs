//! The objective of training: the losses from which the network learns, and the stages through which the gradient of each loss
//! passes.
//!
//! An objective divides the stages into segments of consecutive stages. With each micro-batch, the segments train one after the
//! other: forward pass, losses, backward pass. No gradient passes from a segment to the segment before it. So only the
//! activations of one segment are in memory at a time.

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

/// The objective of a phase.
#[derive(Debug, Clone)]
pub struct Objective {
    task: Task,
    segments: Vec<Segment>,
    /// The number of stages of the network.
    stages: usize,
}

/// Consecutive stages that train together: the gradients of the segment's losses pass through these stages and no further.
#[derive(Debug, Clone)]
pub struct Segment {
    pub stages: Range<usize>,
    /// The places in the network whose outputs the losses read.
    pub taps: Vec<Tap>,
    losses: Losses,
}

/// The losses of a segment.
#[derive(Debug, Clone)]
enum Losses {
    Task(Task),
    Local(Vec<LocalLoss>),
}

impl Objective {
    /// The objective in which each border ends a segment with the border's local losses. The last segment has the task's loss. The
    /// borders must be in the order of the stages.
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

    /// The parameters that do not belong to the network: the parameters of the task and of the heads of local losses. Only
    /// checkpoints hold the heads of local losses; the artefact of a finished phase does not. The stage of all these parameters
    /// is the number of the network's stages.
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
    /// The segment's loss of a part of a batch, given the outputs at the taps. Adds the gradients of the parameters in
    /// [`Objective::auxiliary`] to their sums in the network's flat buffer.
    pub fn loss(&self, network: &Network, outputs: &[Tensor], given: &Given, part: &Part) -> Result<Loss> {
        match &self.losses {
            Losses::Task(task) => task.loss(network, outputs, &given.targets, part),
            Losses::Local(losses) => Ok(local::loss(losses, network, outputs, given, part)),
        }
    }
}
