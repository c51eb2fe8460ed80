//! Plans the Slurm jobs of a run, as a pure function of its graph and of the nodes that are done or have an open job.
//! `submit.rs` submits the jobs.
//!
//! A job is open if it is queued or running.

use super::job::{JobKind, PlannedJob};
use super::script::{Paths, Script};
use crate::config::SlurmMode;
use crate::plan::Plan;
use crate::run::graph::{Graph, Node};
use crate::run::table::SlurmJob;
use anyhow::Result;
use std::collections::BTreeMap;

/// The facts on which the jobs depend, apart from the plan.
#[derive(Debug, Clone)]
pub struct Situation {
    /// The positions in the graph of the nodes that are needed and not done.
    pub unfinished: Vec<usize>,
    pub open: OpenJobs,
    /// Slurm's MaxArraySize: the largest index of an array plus one.
    pub max_array_size: usize,
    /// The seconds that the slowest checkpoint of the run took so far.
    pub save_s: f64,
}

/// The open jobs of earlier submissions, by the names that `squeue` gives them.
#[derive(Debug, Clone, Default)]
pub struct OpenJobs {
    /// All jobs but the last, by the position of the node that they execute.
    pub nodes: BTreeMap<usize, String>,
    /// The job `finalize` or `run`.
    pub last: Option<String>,
}

/// Slurm's default of MaxArraySize.
pub const MAX_ARRAY_SIZE: usize = 1001;

/// The jobs for the nodes that are not done and have no open job, in order. If there are such jobs and the last job is open, the
/// open one waits for jobs that failed. Then a new last job is among the results, and the caller must cancel the open one first.
///
/// # Errors
/// A usage error for text that cannot be written into a script.
pub fn jobs(plan: &Plan, graph: &Graph, paths: Paths, situation: &Situation) -> Result<Vec<PlannedJob>> {
    let script = Script::new(plan, graph, paths, situation.save_s)?;
    let mut jobs: Vec<PlannedJob> = Vec::new();
    for mut job in candidates(plan, graph, situation.max_array_size) {
        let is_last = job.kind.is_last();
        let has_job = |node: &usize| !is_last && situation.open.nodes.contains_key(node);
        job.nodes.retain(|node| situation.unfinished.contains(node) && !has_job(node));
        let waits_in_vain = is_last && !jobs.is_empty();
        if job.nodes.is_empty() || is_last && situation.open.last.is_some() && !waits_in_vain {
            continue;
        }
        if !job.modules.is_empty() {
            job.modules = job.nodes.iter().filter_map(|&node| graph.nodes()[node].index).collect();
        }
        job.after = (0..jobs.len()).filter(|&before| needs_any(graph, &job, &jobs[before].nodes)).collect();
        job.after_open = open_before(graph, &job, &situation.open);
        job.script = script.of(&job);
        jobs.push(job);
    }
    Ok(jobs)
}

/// The program's own jobs for a run of which nothing is done, without the texts of their scripts.
fn candidates(plan: &Plan, graph: &Graph, max_array_size: usize) -> Vec<PlannedJob> {
    let mut jobs: Vec<PlannedJob> = Vec::new();
    for (position, node) in graph.nodes().iter().enumerate() {
        let Some((kind, first)) = kind_of(node, plan.config.slurm.mode, max_array_size) else { continue };
        let index = jobs.iter().rposition(|job| job.kind == kind).unwrap_or(jobs.len());
        if index == jobs.len() {
            let (nodes, modules, after, after_open, arguments) = (vec![], vec![], vec![], vec![], vec![]);
            jobs.push(PlannedJob { kind, nodes, modules, first, after, after_open, script: String::new(), arguments });
        }
        jobs[index].nodes.push(position);
        if let JobKind::Array { .. } = jobs[index].kind {
            jobs[index].modules.extend(node.index);
        }
    }
    jobs
}

/// The kind of the program's own job that executes a node, and the module of the job's task 0; none for a user's script.
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

/// The open jobs that execute a node that a job needs or, in one allocation, a node of the job itself.
fn open_before(graph: &Graph, job: &PlannedJob, open: &OpenJobs) -> Vec<String> {
    let is_before = |node: &usize| job.nodes.contains(node) || needs_any(graph, job, &[*node]);
    open.nodes.iter().filter(|(node, _)| is_before(node)).map(|(_, id)| id.clone()).collect()
}

#[cfg(test)]
mod tests;
