//! Derives the phases of a run from the config by pure arithmetic: steps, learning rates, local losses, groups of ranks, file names
//! and cost. Training code takes these values from the plan.

pub mod cost;
pub mod detection;
pub mod gpus;
pub mod groups;
pub mod head;
pub mod local;
pub mod schedule;
pub mod segmentation;

use crate::config::{Config, DeviceChoice, Ranks, TaskKind, Training};
use crate::family::parameter::{Parameter, flat_order};
use crate::random::key_of_text;
use crate::require;
use crate::run::graph::{Graph, Node};
use crate::run::table::{Row, TABLE, Trains};
use anyhow::Result;
use groups::ranks_of;
use local::Border;
use std::ops::Range;

/// The config and the number of training images. All other values of the plan are computed from these two.
#[derive(Debug, Clone)]
pub struct Plan {
    pub config: Config,
    /// The number of training images that are left after `data.train_fraction`.
    pub train_images: usize,
}

/// The plan of one phase: everything that a rank must know to train the phase.
#[derive(Debug, Clone)]
pub struct PhasePlan {
    /// The name of the phase's logs, checkpoints and heartbeats, such as `meta`, `module-2` or `finetune`.
    pub name: String,
    /// The name of the phase's row in [`TABLE`], such as `meta`, `module` or `finetune`.
    pub row: &'static str,
    /// The finished artefact's file name in the run directory.
    pub file: String,
    /// The stage that a module phase trains; none in other phases.
    pub index: Option<usize>,
    /// The number of blocks of each stage of the phase's network.
    pub depths: Vec<usize>,
    /// The stages that train.
    pub trained: Range<usize>,
    /// The borders through which no gradient passes, with their losses; empty if the phase trains end to end.
    pub borders: Vec<Border>,
    /// The config table of the phase. If the phase was extended, `epochs` counts only the epochs after the extension.
    pub training: Training,
    /// The file of the artefact of the earlier epochs, from which an extended phase starts; none if the phase was not extended.
    pub extends: Option<String>,
    pub steps_per_epoch: u64,
    pub steps: u64,
    /// The key of all randomness in this phase.
    pub seed: u64,
    /// The hash of the seed and of the config keys that change the result of this phase.
    pub recipe: String,
}

impl Plan {
    /// Makes the plan. Refuses fewer than 2 training images, and a phase of the config's task whose global batch exceeds the
    /// samples of an epoch.
    pub fn new(config: Config, train_images: usize) -> Result<Plan> {
        let plan = Plan { config, train_images };
        require!(train_images >= 2, "data: {train_images} training image(s) are too few; at least 2 are needed");
        for (name, training) in plan.config.phases() {
            require!(
                plan.steps_per_epoch(training) >= 1,
                "{name}.global_batch = {} exceeds the {} samples of an epoch; lower it to at most {}",
                training.global_batch,
                plan.epoch_samples(),
                plan.epoch_samples() / 2 * 2
            );
        }
        Ok(plan)
    }

    /// A plan without data. Its recipes, sizes and phases are right, but its numbers of steps are not.
    pub fn without_data(config: Config) -> Plan {
        Plan { config, train_images: 0 }
    }

    /// The plan of the run's phases for this task. If `task` is not the plan's own task, the numbers of steps are right only if the
    /// config gives the number of images of `task`.
    pub fn of_task(&self, task: TaskKind) -> Plan {
        if task == self.config.task {
            return self.clone();
        }
        Plan { config: self.config.of_task(task), train_images: self.config.given_train_images(task) }
    }

    /// The graph of all rows of [`TABLE`].
    pub fn graph(&self) -> Graph {
        Graph::new(&self.config, &TABLE)
    }

    /// The phases of the plan's task that a run of this config trains, in order.
    pub fn wanted_phases(&self) -> Vec<PhasePlan> {
        let is_own = |node: &&Node| node.is_wanted && node.row.task() == self.config.task;
        self.graph().nodes().iter().filter(is_own).filter_map(|node| self.phase_of(node)).collect()
    }

    /// The phase of a row that trains. `index` is the stage of a module phase.
    pub fn phase(&self, row: &'static Row, index: Option<usize>) -> PhasePlan {
        self.phase_of(&Node::new(&self.config, row, index)).expect("the row trains")
    }

    /// The phase that a node trains; none if the node does not train.
    pub fn phase_of(&self, node: &Node) -> Option<PhasePlan> {
        let (row, model) = (node.row.phase()?, node.expected.as_ref()?);
        let mut training = (row.training)(&self.config).clone();
        let before = training.epochs_before;
        training.epochs -= before;
        // After an extension, a phase draws other random numbers than before the extension.
        let key = [self.config.run.seed, key_of_text(&node.name), before as u64];
        let key = if before > 0 { &key[..] } else { &key[..2] };
        let steps_per_epoch = self.steps_per_epoch(&training);
        Some(PhasePlan {
            name: node.name.clone(),
            row: node.row.name,
            file: node.file.clone(),
            index: node.index,
            depths: model.depths.clone(),
            trained: match (row.trains, node.index) {
                (Trains::Module, Some(index)) => index..index + 1,
                _ => 0..self.config.model.stages(),
            },
            borders: local::borders(&self.config, row.objective),
            steps_per_epoch,
            steps: steps_per_epoch * training.epochs as u64,
            seed: crate::random::key(key),
            extends: (before > 0).then(|| node.row.kept(before)),
            recipe: model.recipe.clone(),
            training,
        })
    }

    /// The number of replicas of one rank by the config: `run.replicas` if it is not 0, else the rank's share of the node's GPUs,
    /// but at least one.
    pub fn replicas_per_rank(&self) -> usize {
        match self.config.run.replicas {
            0 => (self.gpus_per_node() / self.ranks_per_node()).max(1),
            replicas => replicas,
        }
    }

    /// The number of ranks, out of `ranks` in all, that train a phase whose config key `on` has this value. `index` is the stage of
    /// a module.
    pub fn ranks_on(&self, on: Ranks, index: Option<usize>, ranks: usize) -> usize {
        let stages = self.config.model.stages();
        match on {
            Ranks::World => ranks,
            Ranks::Zero if self.gpus_per_node() > 0 => ranks.min(self.ranks_per_node()),
            Ranks::Zero => 1,
            Ranks::Group => ranks_of(index.unwrap_or(0), ranks, stages),
        }
    }

    /// Whether the run computes on CPUs. If `run.device` is "auto", it does so if `slurm.gpus_per_node` is 0 and this machine has
    /// no GPU. `has_gpu` says whether this machine has a GPU.
    pub fn is_for_cpu(&self, has_gpu: bool) -> bool {
        match self.config.run.device {
            DeviceChoice::Cpu => true,
            DeviceChoice::Auto => self.gpus_per_node() == 0 && !has_gpu,
            DeviceChoice::Cuda => false,
        }
    }

    fn gpus_per_node(&self) -> usize {
        if self.config.run.device == DeviceChoice::Cpu { 0 } else { self.config.slurm.gpus_per_node }
    }

    fn ranks_per_node(&self) -> usize {
        self.config.slurm.ranks.div_ceil(self.config.slurm.nodes)
    }

    /// The number of samples of one epoch. With repeated augmentation and at least 256 images, their number is a multiple of 256,
    /// as in DeiT's RASampler.
    pub fn epoch_samples(&self) -> usize {
        match (self.config.data.repeats, self.train_images) {
            (1, n) => n,
            (_, n) if n < 256 => n,
            (_, n) => n / 256 * 256,
        }
    }

    /// The number of steps of one epoch. The last, incomplete batch of an epoch is dropped, as in DeiT's code.
    fn steps_per_epoch(&self, training: &Training) -> u64 {
        (self.epoch_samples() / training.global_batch) as u64
    }
}

impl PhasePlan {
    /// The parameters and buffers of the phase's network, in the order of its family's table.
    pub fn parameters(&self, plan: &Plan) -> Vec<Parameter> {
        plan.config.model.parameters(&self.depths)
    }

    /// The factors of the learning rate by the phase's `layer_decay`. Each factor comes with the range of the flat buffer of
    /// weights to which it applies. This buffer holds the parameters of the trained stages and the `auxiliary` parameters. The
    /// factor of `auxiliary` parameters is 1. The factor of a block is the factor of the next block times the decay (BEiT, arXiv
    /// 2106.08254).
    pub fn rates(&self, plan: &Plan, auxiliary: &[Parameter]) -> Vec<(Range<usize>, f64)> {
        let model = &plan.config.model;
        let trained = self.parameters(plan).into_iter().filter(|parameter| self.trained.contains(&parameter.stage));
        let ordered = flat_order(trained.chain(auxiliary.iter().cloned()).collect());
        let layers = self.depths.iter().sum::<usize>() + 1;
        let decays = self.training.layer_decay != 1.0;
        let before_last = |parameter: &Parameter| match parameter.stage {
            stage if decays && stage < self.depths.len() => layers - model.layer(parameter, &self.depths),
            _ => 0,
        };
        let trainable: Vec<_> = ordered.into_iter().filter(|(_, parameter)| parameter.is_trainable()).collect();
        let part = |same: &[(usize, Parameter)]| {
            let ((start, first), (last, parameter)) = (&same[0], &same[same.len() - 1]);
            (*start..last + parameter.count(), self.training.layer_decay.powi(before_last(first) as i32))
        };
        trainable.chunk_by(|(_, a), (_, b)| before_last(a) == before_last(b)).map(part).collect()
    }

    /// The learning rate of an optimiser step; steps are counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        schedule::learning_rate(&self.training, step, self.steps_per_epoch)
    }
}
