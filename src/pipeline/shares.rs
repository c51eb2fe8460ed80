//! Refuses phases that the ranks and replicas of a run cannot train: because the global batch is too small for them, because their
//! replicas would share a generator for dropout, or because samples that must be computed together would be separated.

use crate::config::{MicroBatch, NormOver, SlurmMode, TaskKind};
use crate::plan::cost::smallest_micro_batch;
use crate::plan::groups::{micro_batches, share};
use crate::plan::local::{CONTRAST_BLOCK, LossKind};
use crate::plan::{PhasePlan, Plan};
use crate::require;
use crate::run::table::SlurmJob;
use anyhow::Result;

/// At the start of a run, refuses any phase that `ranks` ranks with `in_rank` replicas each cannot train.
pub fn check_shares(plan: &Plan, ranks: usize, in_rank: usize) -> Result<()> {
    check_shares_of(plan, plan.config.task, ranks, in_rank)?;
    plan.config.downstream().try_for_each(|task| check_shares_of(plan, task, ranks, in_rank))
}

/// Refuses any phase of this task that `ranks` ranks with `in_rank` replicas each cannot train.
pub(super) fn check_shares_of(plan: &Plan, task: TaskKind, ranks: usize, in_rank: usize) -> Result<()> {
    let plan = plan.of_task(task);
    let group = |phase: &PhasePlan| plan.ranks_on(phase.training.on, phase.index, ranks) * in_rank;
    plan.wanted_phases().iter().try_for_each(|phase| check_share(&plan, phase, in_rank, group(phase)))
}

/// Refuses phases that the jobs of `incubate submit` cannot train, and ranks that cannot be spread evenly over the machines. In a
/// job array, all of `slurm.ranks` train each module.
pub fn check_jobs(plan: &Plan) -> Result<()> {
    let (slurm, in_rank) = (&plan.config.slurm, plan.replicas_per_rank());
    require!(
        slurm.ranks.is_multiple_of(slurm.nodes),
        "slurm.ranks = {} cannot be spread evenly over slurm.nodes = {}, so that GPUs would idle; make it a multiple",
        slurm.ranks,
        slurm.nodes
    );
    check_shares(plan, slurm.ranks, in_rank)?;
    if slurm.mode == SlurmMode::Array {
        let graph = plan.graph();
        let in_arrays = graph.nodes().iter().filter(|node| node.is_wanted && node.row.job == SlurmJob::Array);
        for phase in in_arrays.filter_map(|node| plan.phase_of(node)) {
            check_share(plan, &phase, in_rank, slurm.ranks * in_rank)?;
        }
    }
    Ok(())
}

/// Refuses a phase that a group of `in_group` replicas, `in_rank` of them in each rank, cannot train.
pub(super) fn check_share(plan: &Plan, phase: &PhasePlan, in_rank: usize, in_group: usize) -> Result<()> {
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
    match plan.config.run.micro_batch {
        MicroBatch::Samples(samples) => check_micro_batch(plan, phase, samples, in_group),
        MicroBatch::Auto => Ok(()),
    }
}

/// Refuses three things. The first is a micro-batch of one sample, except for a detection. The second is norms over a whole step if a
/// replica computes its share of a step in several micro-batches. The third is contrastive losses if a replica or a micro-batch cuts a
/// block of samples.
pub(super) fn check_micro_batch(plan: &Plan, phase: &PhasePlan, micro_batch: usize, in_group: usize) -> Result<()> {
    let largest = (0..in_group).map(|replica| share(phase.training.global_batch, replica, in_group).len()).max();
    let largest = largest.unwrap_or(0);
    require!(
        micro_batch >= smallest_micro_batch(plan.config.task),
        "run.micro_batch = {micro_batch}: {} needs at least 2, as samples with classes are mixed in pairs and the heads of a \
         segmentation normalise over the micro-batch; try 2, or train the detection alone: incubate detect CONFIG --set \
         run.micro_batch=1",
        phase.row
    );
    require!(
        plan.config.task != TaskKind::Segmentation
            || plan.config.segmentation.norm_over == NormOver::MicroBatch
            || largest <= micro_batch,
        "segmentation.norm_over = \"step\": each of {in_group} replica(s) must compute its {largest} samples of a step at once, but \
         the micro-batch is {micro_batch}; set run.micro_batch = {largest} (and run.activation_checkpointing = true if the memory is \
         short), or use more replicas"
    );
    check_blocks(phase, micro_batch, in_group)
}

/// Refuses a contrastive loss if a replica or a micro-batch cuts one of its blocks of samples.
fn check_blocks(phase: &PhasePlan, micro_batch: usize, in_group: usize) -> Result<()> {
    let batch = phase.training.global_batch;
    let has_contrast =
        phase.borders.iter().flat_map(|border| &border.losses).any(|loss| loss.kind == LossKind::Contrast);
    let mut parts = (0..in_group).flat_map(|replica| micro_batches(share(batch, replica, in_group), micro_batch));
    require!(
        !has_contrast || parts.all(|part| part.start.is_multiple_of(CONTRAST_BLOCK)),
        "infopro.loss = \"contrast\" compares {CONTRAST_BLOCK} neighbours of a global batch with each other, which {}.global_batch = {batch} \
         in micro-batches of {micro_batch} on {in_group} replica(s) separates; set run.micro_batch = {CONTRAST_BLOCK} or a multiple of it, and \
         {}.global_batch = {} or a multiple of it",
        phase.row,
        phase.row,
        CONTRAST_BLOCK * in_group
    );
    Ok(())
}
