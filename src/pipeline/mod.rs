//! Executes a run: follows the run's graph of phases, trains, assembles and evaluates.

pub mod assemble;
pub mod bars;
pub mod evaluate;
pub mod extend;
mod micro_batch;
mod objects;
mod periodic;
mod phase;
pub mod plan_report;
pub mod predict;
pub mod preview;
mod results;
pub mod seen;
mod shares;
mod statistics;

use periodic::PeriodicPreviews;
use shares::check_shares_of;
pub use shares::{check_jobs, check_shares};

use crate::collective::mpi::World;
use crate::collective::{Collective, Solo, agree, ask_zero, on_zero};
use crate::config::{Config, Ranks, TaskKind};
use crate::data::{self, Source};
use crate::device::{Devices, memory};
use crate::error::Failure;
use crate::plan::Plan;
use crate::plan::groups::assignment;
use crate::run::data::DataRecord;
use crate::run::graph::{Graph, Node};
use crate::run::table::{Kind, Row, Trains};
use crate::store::progress::Progress;
use crate::store::{ArtefactCache, RunDir};
use crate::train::Clock;
use crate::{require, usage};
use anyhow::Result;

/// Records the images of a config's task, or compares them with the record of the run. The images of a downstream task
/// (segmentation or detection) are compared only after one of the task's phases has written a checkpoint or an artefact. Before
/// that, the user may still correct the images.
fn record(run: &RunDir, config: &Config, source: &Source, (accept, graph): (bool, &Graph)) -> Result<()> {
    let (task, data) = (config.task, data::data_set(config, source));
    let is_downstream = TaskKind::DOWNSTREAM.contains(&task);
    let own = graph.nodes().iter().filter(|node| node.row.task() == task && node.row.phase().is_some());
    let mut has_begun = !is_downstream;
    for node in own {
        has_begun |= run.file(&node.file).exists() || !run.checkpoints(&node.name)?.is_empty();
    }
    match (has_begun, accept) {
        (false, _) => run.record_data(task, data),
        // The artefacts of a downstream task do not record the data on which they were trained.
        (true, true) => run.accept_data(task, data, graph.artefacts().filter(|_| !is_downstream)),
        (true, false) => run.check_data(task, data),
    }
    .map(drop)
}

/// The work of one config on one world of ranks.
pub struct Job<'a> {
    pub plan: Plan,
    pub graph: Graph,
    pub run: RunDir,
    /// The images of `task`.
    pub source: Source,
    /// The task whose images are open. The images of another task are opened when its phase begins.
    pub task: TaskKind,
    /// The record of the run's images for classification; none if the run has only fine-tuned an imported model for another task.
    pub data: Option<DataRecord>,
    accept_data: bool,
    pub world: &'a World,
    /// The devices of this rank.
    pub devices: Devices,
    /// Counts the working time of this rank.
    pub clock: Clock,
}

impl<'a> Job<'a> {
    /// Opens the data of a task on every rank, and the run directory. If one rank fails, all ranks fail together. Refuses data that
    /// differ from the data with which the run was started, unless `accept_data` is true.
    pub fn open(
        config: Config,
        world: &'a World,
        devices: Devices,
        accept_data: bool,
        task: TaskKind,
    ) -> Result<Job<'a>> {
        let all_ranks = world.all_ranks();
        let own = config.of_task(task);
        // Listing a large source takes long. The first rank lists it and writes the list into the run directory for the other
        // ranks.
        let first = on_zero(all_ranks, || data::open(&own))?;
        let source = agree(all_ranks, first.map_or_else(|| data::open(&own), Ok))?;
        let plan = match task {
            TaskKind::Classification => agree(all_ranks, Plan::new(config, source.train.len()))?,
            TaskKind::Segmentation | TaskKind::Detection => Plan::without_data(config),
        };
        let (ranks, replicas) = (all_ranks.size(), devices.replicas());
        // A command for a downstream task trains only the phases of this task.
        agree(
            all_ranks,
            match task {
                TaskKind::Classification => check_shares(&plan, ranks, replicas),
                TaskKind::Segmentation | TaskKind::Detection => check_shares_of(&plan, task, ranks, replicas),
            },
        )?;
        let graph = plan.graph();
        on_zero(all_ranks, || {
            let run = RunDir::open(&plan.config)?;
            record(&run, &own, &source, (accept_data, &graph))
        })?;
        let run = RunDir { path: plan.config.run.dir.clone() };
        let data = agree(all_ranks, run.data(TaskKind::Classification))?;
        require!(
            data.is_some() || task != TaskKind::Classification,
            "dataset.json, which rank zero has written, is not seen here; try again"
        );
        Ok(Job { graph, plan, run, source, task, data, accept_data, world, devices, clock: Clock::of_process() })
    }

    /// Executes, in order, the rows of the run's table that train or assemble and that the config asks for. Verifies and skips
    /// finished nodes of the graph. If a target model was imported, also skips the rows that would make it.
    pub fn run(&self) -> Result<()> {
        let is_imported = ask_zero(self.world.all_ranks(), || self.is_imported())?;
        self.graph.rows(is_imported).into_iter().try_for_each(|row| self.row(row))
    }

    /// Executes a row that trains or assembles; does nothing for any other row.
    pub fn row(&self, row: &Row) -> Result<()> {
        match &row.kind {
            Kind::Train(phase) if phase.trains == Trains::Module => self.modules(row, None),
            Kind::Train(_) => {
                let node = self.graph.one(row);
                self.whole_network(node)?;
                self.keep_pictures(node);
                Ok(())
            }
            Kind::Assemble => self.assemble(self.graph.one(row)),
            // Packing has a command of its own. The command `run` exports and reports after this function returns. Slurm runs the
            // scripts.
            Kind::Pack | Kind::Export | Kind::Report | Kind::Script => Ok(()),
        }
    }

    /// Trains all modules of a row, each on its group of ranks. The groups wait for each other only at the end. If `only` is the
    /// number of a module, all ranks train this module alone.
    pub fn modules(&self, row: &Row, only: Option<usize>) -> Result<()> {
        let all_ranks = self.world.all_ranks();
        let nodes: Vec<&Node> = self.graph.nodes_of(row).collect();
        if let Some(index) = only {
            let last = nodes.len() - 1;
            let node = nodes.get(index).ok_or_else(|| usage!("module {index}: the model has stages 0 to {last}"))?;
            self.train(node, all_ranks)?;
            PeriodicPreviews::new(self, all_ranks.is_zero()).preview_if_due();
            return Ok(());
        }
        let part = assignment(all_ranks.rank(), all_ranks.size(), nodes.len());
        let group = self.world.split(part.group.start);
        let mut previews = PeriodicPreviews::new(self, group.is_zero());
        let trained = part.modules.iter().try_for_each(|&index| {
            self.train(nodes[index], group.as_ref())?;
            previews.preview_if_due();
            Ok(())
        });
        self.rejoin(trained, &mut || previews.look())
    }

    /// Trains a phase that is not a module phase, on the ranks that its config key `on` names.
    fn whole_network(&self, node: &Node) -> Result<()> {
        match node.row.phase().map(|phase| (phase.training)(&self.plan.config).on) {
            Some(Ranks::Zero) => self.train_on_zero(node),
            _ => self.train(node, self.world.all_ranks()),
        }
    }

    /// Trains a phase on rank zero alone. With GPUs, trains the phase on all ranks of rank zero's machine, because each of these
    /// ranks has some of the machine's GPUs.
    fn train_on_zero(&self, node: &Node) -> Result<()> {
        let group: Option<Box<dyn Collective>> = match self.world.node_of_zero()? {
            Some(ranks) if self.devices.are_gpus() => Some(ranks),
            Some(_) if self.world.all_ranks().is_zero() => Some(Box::new(Solo)),
            _ => None,
        };
        self.rejoin(group.map_or(Ok(()), |group| self.train(node, group.as_ref())), &mut || ())
    }

    /// Waits until all ranks have trained in their groups, and calls `idle` again and again while it waits. Returns a failure other
    /// than a stop at once, because the other groups may train for hours.
    fn rejoin(&self, trained: Result<()>, idle: &mut dyn FnMut()) -> Result<()> {
        if trained.as_ref().is_err_and(|error| !Failure::is_stop(error)) {
            return trained;
        }
        self.world.all_ranks().barrier_with(idle)?;
        self.clock.leave_uncounted();
        agree(self.world.all_ranks(), trained)
    }

    /// Writes pictures of test images for a finished node of a downstream task, if there are none yet. If that fails, only warns,
    /// because only the report uses the pictures.
    fn keep_pictures(&self, node: &Node) {
        let (task, folder) = (node.row.task(), self.run.predictions(&node.name));
        if TaskKind::DOWNSTREAM.contains(&task) && self.world.all_ranks().is_zero() && !folder.exists() {
            let kept = data::open(&self.plan.config.of_task(task)).and_then(|source| {
                let weights = self.run.file(&node.file);
                let compare =
                    || predict::compare(&self.plan.config, &weights, self.devices.device(0), &source, &folder);
                memory::catch(compare)
            });
            kept.unwrap_or_else(|error| log::warn!("{}: no pictures of test images: {error:#}", node.name));
        }
    }

    /// Assembles the target model from the modules and evaluates it.
    fn assemble(&self, node: &Node) -> Result<()> {
        let note = |error: &anyhow::Error| self.record_failure(node, error);
        on_zero(self.world.all_ranks(), || assemble::assemble(self, node).inspect_err(note)).map(|_| ())
    }

    /// Records a failure for `incubate status`. If that fails, only warns, because the user must see the first failure.
    fn record_failure(&self, node: &Node, error: &anyhow::Error) {
        if !Failure::is_stop(error) {
            let noted = Progress::fail(&self.run.path, &node.name, &format!("{error:#}"));
            noted.unwrap_or_else(|error| log::warn!("{error:#}"));
        }
    }

    /// Whether a target model was imported into the run directory.
    fn is_imported(&self) -> Result<bool> {
        for node in self.graph.nodes().iter().filter(|node| node.row.model.is_some_and(|model| model.may_be_imported)) {
            if ArtefactCache::default().find(&self.run, node)?.is_imported(node) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
