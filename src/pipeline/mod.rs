//! The whole job: walks the table of phases, assembles, evaluates, reports.

pub mod assemble;
pub mod bars;
pub mod evaluate;
mod micro_batch;
pub mod plan_report;
pub mod report;
pub mod summary;

use crate::collective::mpi::World;
use crate::collective::replicas::on_replicas;
use crate::collective::{Collective, Solo, agree, on_zero, zero_says};
use crate::config::{Config, Ranks, SlurmMode};
use crate::data::{self, Source};
use crate::device::memory::{self, OutOfMemory};
use crate::device::{self, Devices};
use crate::error::Failure;
use crate::libtorch::empty_cache;
use crate::model::fresh;
use crate::plan::cost::fitting_micro_batch;
use crate::plan::groups::{assignment, share};
use crate::plan::phases::{ASSEMBLED, E2E, FINETUNE, META, MODULE, Phase, Start};
use crate::plan::{PhasePlan, Plan};
use crate::store::lease::Lease;
use crate::store::progress::Progress;
use crate::store::{RunDir, artefact};
use crate::train::{self, Clock, Setting};
use crate::weights::{Weights, on_device};
use crate::{require, usage};
use anyhow::Result;
use std::path::Path;
use std::sync::Mutex;
use tch::Device;

/// One config on one world of ranks.
pub struct Job<'a> {
    pub plan: Plan,
    pub run: RunDir,
    pub source: Source,
    pub world: &'a World,
    /// This rank's.
    pub devices: Devices,
    /// The time of this rank.
    pub clock: Clock,
}

impl<'a> Job<'a> {
    /// Opens the data on every rank and the run directory; all ranks fail together if one does.
    pub fn open(config: Config, world: &'a World, devices: Devices) -> Result<Job<'a>> {
        let whole = world.whole();
        // The first rank lists a large source and keeps the list, which the others then read.
        let first = on_zero(whole, || data::open(&config))?;
        let source = agree(whole, first.map_or_else(|| data::open(&config), Ok))?;
        let plan = agree(whole, Plan::new(config, source.train.len()))?;
        agree(whole, check_shares(&plan, whole.size(), devices.replicas()))?;
        on_zero(whole, || RunDir::open(&plan.config))?;
        let run = RunDir { path: plan.config.run.dir.clone() };
        Ok(Job { plan, run, source, world, devices, clock: Clock::of_process() })
    }

    /// Everything, in order. What is done already is verified and skipped, and so is what comes before an imported model.
    pub fn run(&self) -> Result<()> {
        if !zero_says(self.world.whole(), || self.run.is_imported())? {
            self.phase(&META)?;
            self.modules(None)?;
            self.assemble()?;
        }
        self.phase(&FINETUNE)?;
        if self.plan.config.run.e2e {
            self.phase(&E2E)?;
        }
        Ok(())
    }

    /// One phase of the whole network.
    pub fn phase(&self, phase: &Phase) -> Result<()> {
        let plan = self.plan.phase(phase, None);
        match plan.training.on {
            Ranks::Zero => self.train_on_zero(&plan),
            Ranks::World | Ranks::Group => self.train(&plan, self.world.whole()),
        }
    }

    /// All modules, or one: each trained by its group of ranks, the groups independent of each other.
    pub fn modules(&self, only: Option<usize>) -> Result<()> {
        let whole = self.world.whole();
        let stages = self.plan.config.model.stages();
        if let Some(index) = only {
            if index >= stages {
                return Err(usage!("module {index}: the model has stages 0 to {}", stages - 1));
            }
            let plan = self.plan.phase(&MODULE, Some(index));
            return self.train(&plan, whole);
        }
        let part = assignment(whole.rank(), whole.size(), stages);
        let group = self.world.split(part.group.start);
        let train = |index: &usize| self.train(&self.plan.phase(&MODULE, Some(*index)), group.as_ref());
        let trained = part.modules.iter().try_for_each(train);
        self.rejoin(trained)
    }

    /// Rank zero trains a phase alone, or on GPUs with the ranks of its node: each of them has its own part of these.
    fn train_on_zero(&self, phase: &PhasePlan) -> Result<()> {
        let group: Option<Box<dyn Collective>> = match self.world.node_of_zero()? {
            Some(node) if self.devices.are_gpus() => Some(node),
            Some(_) if self.world.whole().is_zero() => Some(Box::new(Solo)),
            _ => None,
        };
        self.rejoin(group.map_or(Ok(()), |group| self.train(phase, group.as_ref())))
    }

    /// The ranks leave what they did in groups together. A failure is told at once, not when the other groups are done:
    /// they may train for hours.
    fn rejoin(&self, trained: Result<()>) -> Result<()> {
        if trained.as_ref().is_err_and(|error| !Failure::is_stop(error)) {
            return trained;
        }
        self.world.whole().barrier()?;
        self.clock.skip();
        agree(self.world.whole(), trained)
    }

    /// Assembles the target from the modules and evaluates it.
    pub fn assemble(&self) -> Result<()> {
        let noted = |error: &anyhow::Error| self.note_failure("assemble", error);
        on_zero(self.world.whole(), || assemble::assemble(self).inspect_err(noted)).map(|_| ())
    }

    /// For `status`. The phase's own error is the one to tell, not that it could not be noted either.
    fn note_failure(&self, phase: &str, error: &anyhow::Error) {
        if !Failure::is_stop(error) {
            let noted = Progress::fail(&self.run.path, phase, &format!("{error:#}"));
            noted.unwrap_or_else(|error| log::warn!("{error:#}"));
        }
    }

    /// Trains a phase on a group of ranks, unless its artefact is there. An error of one rank alone is returned at once,
    /// to end the world: the others may be waiting for it in a collective call.
    fn train(&self, phase: &PhasePlan, group: &dyn Collective) -> Result<()> {
        if zero_says(group, || self.is_done(phase))? {
            if group.is_zero() {
                log::info!("{}: done already ({})", phase.name, self.run.file(&phase.file).display());
            }
            return Ok(());
        }
        let lease = on_zero(group, || Lease::take(&self.run, &phase.name, train::stop_requested))?;
        if lease.as_ref().is_some_and(|lease| lease.has_waited) {
            self.clock.skip();
        }
        // While this one waited, the holder may have finished it.
        if zero_says(group, || self.is_done(phase))? {
            return Ok(());
        }
        let trained = self.train_on(phase, group, lease.as_ref());
        if let (Err(error), Some(lease)) = (&trained, &lease)
            && lease.fence().check().is_ok()
        {
            self.note_failure(&phase.name, error);
        }
        trained
    }

    /// Whether the phase's artefact is there. It must then be of this recipe, and of the meta model that is there now.
    fn is_done(&self, phase: &PhasePlan) -> Result<bool> {
        let path = self.run.file(&phase.file);
        let meta_file = self.run.file(META.writes);
        let meta = match phase.start {
            Start::Meta if path.exists() && meta_file.exists() => Some(artefact::read_header(&meta_file)?.1),
            _ => None,
        };
        is_done(&path, &phase.recipe, meta.as_deref())
    }

    /// Runs the loop on each replica of each rank of the group.
    fn train_on(&self, phase: &PhasePlan, group: &dyn Collective, lease: Option<&Lease>) -> Result<()> {
        let Job { plan, run, source, devices, clock, .. } = self;
        let (start, meta) = agree(group, self.start(phase))?;
        // Each replica takes its own out, so that nothing is left here once all have begun.
        let starts = Mutex::new((0..devices.replicas()).map(|_| on_device(&start, Device::Cpu)).collect::<Vec<_>>());
        drop(start);
        on_replicas(group, devices.replicas(), devices.suit_nccl(), &|replica| {
            devices.take_up(replica.local)?;
            let device = devices.device(replica.local);
            let own = share(phase.training.global_batch, replica.rank(), replica.size()).len();
            let usual = plan.config.run.micro_batch.samples();
            let start = memory::caught(|| {
                // What an earlier phase has left there.
                empty_cache(device);
                replica.join_nccl()?;
                check_share(plan, phase, devices.replicas(), replica.size())?;
                let start = starts.lock().expect("taking does not panic").pop().expect("there is one for each");
                Ok(on_device(&start, device))
            })
            .map_err(|error| with_what_fits(error, (plan, phase), usual, own, device))?;
            let micro_batch = micro_batch::decide(plan, run, phase, &start, replica, device)
                .map_err(|error| with_what_fits(error, (plan, phase), usual, own, device))?;
            let lease = lease.filter(|_| replica.is_zero());
            let setting = Setting { plan, run, source, group: replica, device, micro_batch, lease, clock };
            memory::caught(|| train::run(&setting, phase, start, meta.as_deref()))
                .map_err(|error| with_what_fits(error, (plan, phase), micro_batch, own, device))
        })
    }

    /// Every weight at step 0, and the content hash of the meta model it derives from.
    fn start(&self, phase: &PhasePlan) -> Result<(Weights, Option<String>)> {
        let mut weights = fresh(phase.parameters(&self.plan).iter(), phase.seed);
        let (file, recipe) = match phase.start {
            Start::Fresh => return Ok((weights, None)),
            Start::Meta => (META.writes, self.plan.recipe(META.recipe)),
            Start::Assembled => (ASSEMBLED, self.plan.recipe(MODULE.recipe)),
        };
        let path = self.run.file(file);
        if !path.exists() {
            return Err(usage!(
                "{}: phase {} starts from it; run the phases before it first",
                path.display(),
                phase.name
            ));
        }
        let from = artefact::read(&path)?;
        if from.header.recipe != recipe {
            let what = "written by another recipe; delete it and run its phase again".into();
            return Err(Failure::Damaged { path, what }.into());
        }
        // A module's own stage stays fresh: there every stage but the one that trains comes from the meta model.
        let own = |stage: usize| phase.index == Some(stage);
        weights.extend(from.weights.into_iter().filter(|((stage, _), _)| !own(*stage)));
        let meta = if phase.start == Start::Meta { Some(from.hash) } else { from.header.meta };
        Ok((weights, meta))
    }
}

/// Refuses at the start what a later phase could not do, as far as the world tells: so many ranks with so many replicas
/// each.
pub fn check_shares(plan: &Plan, ranks: usize, in_rank: usize) -> Result<()> {
    for phase in plan.wanted().flat_map(|phase| plan.phases(phase)) {
        check_share(plan, &phase, in_rank, plan.ranks_on(phase.training.on, phase.index, ranks) * in_rank)?;
    }
    Ok(())
}

/// The same for the jobs that `submit` writes: in an array each module has all of slurm.ranks to itself. And each node has as
/// many ranks.
pub fn check_jobs(plan: &Plan) -> Result<()> {
    let (slurm, in_rank) = (&plan.config.slurm, plan.replicas_per_rank());
    require!(
        slurm.ranks.is_multiple_of(slurm.nodes),
        "slurm.ranks = {} cannot be spread evenly over slurm.nodes = {}, so that GPUs would idle; make it a multiple",
        slurm.ranks,
        slurm.nodes
    );
    check_shares(plan, slurm.ranks, in_rank)?;
    let mut modules = (slurm.mode == SlurmMode::Array).then(|| plan.phases(&MODULE)).into_iter().flatten();
    modules.try_for_each(|phase| check_share(plan, &phase, in_rank, slurm.ranks * in_rank))
}

/// Refuses what several replicas cannot do.
fn check_share(plan: &Plan, phase: &PhasePlan, in_rank: usize, in_group: usize) -> Result<()> {
    let batch = phase.training.global_batch;
    require!(
        batch / 2 >= in_group,
        "{}.global_batch = {batch} is too small for {in_group} replicas (samples are mixed in pairs); raise it to {}, or \
         use fewer ranks or replicas",
        phase.row,
        2 * in_group
    );
    require!(
        plan.config.model.dropout() == 0.0 || in_rank == 1,
        "model.dropout = {} needs one replica per rank, as the replicas of a process share libtorch's generator; set \
         run.replicas = 1 and start a rank for each device",
        plan.config.model.dropout()
    );
    Ok(())
}

/// Adds to an error about memory the micro-batch that would fit, of a replica's `own` samples of a step; leaves any other
/// error as it is.
fn with_what_fits(
    error: anyhow::Error,
    (plan, phase): (&Plan, &PhasePlan),
    micro: usize,
    own: usize,
    device: Device,
) -> anyhow::Error {
    if !error.is::<OutOfMemory>() {
        return error;
    }
    let half = micro.min(own) / 4 * 2;
    let (fitting, hope) = match device::memory_of(device) {
        Some(memory) => (fitting_micro_batch(plan, phase, memory, half), "should fit"),
        None => (Some(half).filter(|&half| half > 0), "may fit"),
    };
    let cure = match fitting {
        Some(fitting) => format!("{fitting} {hope}: --set run.micro_batch={fitting} (the results stay)"),
        None => "no smaller one fits; this phase needs a device with more memory".into(),
    };
    usage!("{}: run.micro_batch = {micro} on {}: {error}; {cure}", phase.name, device::name(device))
}

/// Whether the artefact is there; it then must verify, be of this recipe, and derive from this meta model if one is given.
fn is_done(path: &Path, recipe: &str, meta: Option<&str>) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let (header, _) = artefact::read_header(path)?;
    let foreign = if header.recipe != recipe {
        "was written by another recipe; delete it, or choose another --run-dir"
    } else if meta.is_some() && header.meta.as_deref() != meta {
        "grew in another meta model than the meta.h5 beside it; delete it to train it again, or restore that meta.h5"
    } else {
        return Ok(true);
    };
    Err(Failure::Damaged { path: path.into(), what: foreign.into() }.into())
}
