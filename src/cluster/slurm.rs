//! The Slurm jobs of a run, as a pure function of its graph and of what is done or on its way. `submit.rs` submits them.

use super::job::{JobKind, PlannedJob};
use super::script::{Places, Script};
use crate::config::SlurmMode;
use crate::plan::Plan;
use crate::run::graph::{Graph, Node};
use crate::run::table::SlurmJob;
use anyhow::Result;
use std::collections::BTreeMap;

/// What the jobs depend on beside the plan.
#[derive(Debug, Clone)]
pub struct Situation {
    /// The nodes that are needed and not done, by their positions in the graph.
    pub left: Vec<usize>,
    pub alive: Alive,
    /// Slurm's MaxArraySize: the largest index of an array plus one.
    pub max_array_size: usize,
    /// Seconds that the slowest save of the run took so far.
    pub save_s: f64,
}

/// Jobs of earlier submissions that may still do something, as `squeue` names them.
#[derive(Debug, Clone, Default)]
pub struct Alive {
    /// By the position of the node that they do: all jobs but the last.
    pub nodes: BTreeMap<usize, String>,
    /// The job `finalize` or `run`.
    pub last: Option<String>,
}

/// Slurm's own default of MaxArraySize.
pub const MAX_ARRAY_SIZE: usize = 1001;

/// The jobs for what is neither done nor alive, in order. If any of them comes before a last job that is alive, the last job
/// is among them again: the one that is alive waits for something that failed, so the caller cancels it first.
///
/// # Errors
/// A usage error for text that cannot be written into a script.
pub fn jobs(plan: &Plan, graph: &Graph, places: Places, situation: &Situation) -> Result<Vec<PlannedJob>> {
    let script = Script::new(plan, graph, places, situation.save_s)?;
    let mut jobs: Vec<PlannedJob> = Vec::new();
    for mut job in candidates(plan, graph, situation.max_array_size) {
        let is_last = job.kind.is_last();
        let is_alive = |node: &usize| !is_last && situation.alive.nodes.contains_key(node);
        job.nodes.retain(|node| situation.left.contains(node) && !is_alive(node));
        let waits_in_vain = is_last && !jobs.is_empty();
        if job.nodes.is_empty() || is_last && situation.alive.last.is_some() && !waits_in_vain {
            continue;
        }
        if !job.modules.is_empty() {
            job.modules = job.nodes.iter().filter_map(|&node| graph.nodes()[node].index).collect();
        }
        job.after = (0..jobs.len()).filter(|&place| needs_any(graph, &job, &jobs[place].nodes)).collect();
        job.after_alive = alive_before(graph, &job, &situation.alive);
        job.script = script.of(&job);
        jobs.push(job);
    }
    Ok(jobs)
}

/// The program's own jobs that a run with nothing done has, with no script yet.
fn candidates(plan: &Plan, graph: &Graph, max_array_size: usize) -> Vec<PlannedJob> {
    let mut jobs: Vec<PlannedJob> = Vec::new();
    for (position, node) in graph.nodes().iter().enumerate() {
        let Some((kind, first)) = kind_of(node, plan.config.slurm.mode, max_array_size) else { continue };
        let place = jobs.iter().rposition(|job| job.kind == kind).unwrap_or(jobs.len());
        if place == jobs.len() {
            let (nodes, modules, after, after_alive, arguments) = (vec![], vec![], vec![], vec![], vec![]);
            jobs.push(PlannedJob { kind, nodes, modules, first, after, after_alive, script: String::new(), arguments });
        }
        jobs[place].nodes.push(position);
        if let JobKind::Array { .. } = jobs[place].kind {
            jobs[place].modules.extend(node.index);
        }
    }
    jobs
}

/// The kind of the program's own job that does a node, and the module of its task 0.
fn kind_of(node: &Node, mode: SlurmMode, max_array_size: usize) -> Option<(JobKind, usize)> {
    let row = node.row.name.to_string();
    match (node.row.job, mode) {
        (SlurmJob::Script, _) => None,
        (SlurmJob::Alone, _) | (SlurmJob::Own, SlurmMode::Array) => Some((JobKind::Row(row), 0)),
        (SlurmJob::Array, SlurmMode::Array) => {
            let size = max_array_size.max(1);
            let number = node.index.unwrap_or(0) / size;
            Some((JobKind::Array { row, number }, number * size))
        }
        (SlurmJob::Last, SlurmMode::Array) => Some((JobKind::Finalize, 0)),
        (_, SlurmMode::Allocation) => Some((JobKind::Run, 0)),
    }
}

/// Whether a node of a job needs any of these nodes.
fn needs_any(graph: &Graph, job: &PlannedJob, nodes: &[usize]) -> bool {
    job.nodes.iter().any(|&node| graph.nodes()[node].needs.iter().any(|need| nodes.contains(need)))
}

/// The jobs of earlier submissions that do what a job needs, or in one allocation do a part of it.
fn alive_before(graph: &Graph, job: &PlannedJob, alive: &Alive) -> Vec<String> {
    let is_before = |node: &usize| job.nodes.contains(node) || needs_any(graph, job, &[*node]);
    alive.nodes.iter().filter(|(node, _)| is_before(node)).map(|(_, id)| id.clone()).collect()
}

#[cfg(test)]
mod tests;
