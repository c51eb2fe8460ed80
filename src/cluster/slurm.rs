//! Plans the program's own Slurm jobs of a run, as a pure function of the plan, its graph, the paths and a [`Situation`].
//! `submit.rs` plans the jobs of the user's scripts, and submits all jobs.
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

/// The facts on which the jobs depend, apart from the plan, the graph and the paths.
#[derive(Debug, Clone)]
pub struct Situation {
    /// The nodes that the run needs and that are not done, as positions in the graph.
    pub unfinished: Vec<usize>,
    pub open: OpenJobs,
    /// Slurm's MaxArraySize: the largest index of an array plus one.
    pub max_array_size: usize,
    /// The seconds that a checkpoint takes: the time of each phase's last checkpoint, and of these times the longest. Before the
    /// first checkpoint, an estimate.
    pub save_s: f64,
}

/// The open jobs of earlier submissions, by their job IDs, such as `17` or `17_2`.
#[derive(Debug, Clone, Default)]
pub struct OpenJobs {
    /// The open job or array task that executes each node, by the node's position in the graph. The job `last` is left out.
    pub of_nodes: BTreeMap<usize, String>,
    /// The open last job of the program, which is `finalize` or `run`.
    pub last: Option<String>,
}

/// Slurm's default value of MaxArraySize.
pub const DEFAULT_MAX_ARRAY_SIZE: usize = 1001;

/// The program's own jobs that must be submitted, in order, so that every unfinished node has a job. The user's scripts are left
/// out. An open last job does not wait for jobs that are submitted now. So if jobs before it are submitted now, the result also has
/// a new last job. The caller must then first cancel the open last job.
///
/// # Errors
/// A usage error if a path or a text of the config cannot be written into a script.
pub fn jobs(plan: &Plan, graph: &Graph, paths: Paths, situation: &Situation) -> Result<Vec<PlannedJob>> {
    let script = Script::new(plan, graph, paths, situation.save_s)?;
    let mut jobs: Vec<PlannedJob> = Vec::new();
    for mut job in candidates(plan, graph, situation.max_array_size) {
        let is_last = job.kind.is_last();
        let has_job = |node: &usize| !is_last && situation.open.of_nodes.contains_key(node);
        job.nodes.retain(|node| situation.unfinished.contains(node) && !has_job(node));
        let open_last_stays = is_last && situation.open.last.is_some() && jobs.is_empty();
        if job.nodes.is_empty() || open_last_stays {
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

/// Jobs for all nodes of the graph except the user's scripts, even for nodes that are done or that the run does not want. The
/// dependencies and scripts of these jobs are still empty.
fn candidates(plan: &Plan, graph: &Graph, max_array_size: usize) -> Vec<PlannedJob> {
    let mut jobs: Vec<PlannedJob> = Vec::new();
    for (position, node) in graph.nodes().iter().enumerate() {
        let Some((kind, first_module)) = kind_of(node, plan.config.slurm.mode, max_array_size) else { continue };
        let index = jobs.iter().rposition(|job| job.kind == kind).unwrap_or(jobs.len());
        if index == jobs.len() {
            let (nodes, modules, after, after_open, arguments) = (vec![], vec![], vec![], vec![], vec![]);
            let script = String::new();
            jobs.push(PlannedJob { kind, nodes, modules, first_module, after, after_open, script, arguments });
        }
        jobs[index].nodes.push(position);
        if let JobKind::Array { .. } = jobs[index].kind {
            jobs[index].modules.extend(node.index);
        }
    }
    jobs
}

/// The kind of the program's own job that executes a node, and the job's `first_module`. None for a user's script.
fn kind_of(node: &Node, mode: SlurmMode, max_array_size: usize) -> Option<(JobKind, usize)> {
    let row_name = node.row.name.to_string();
    match (node.row.job, mode) {
        (SlurmJob::Script, _) => None,
        (SlurmJob::Alone, _) | (SlurmJob::Own, SlurmMode::Array) => Some((JobKind::Row(row_name), 0)),
        (SlurmJob::Array, SlurmMode::Array) => {
            let size = max_array_size.max(1);
            let part = node.index.unwrap_or(0) / size;
            Some((JobKind::Array { row_name, part }, part * size))
        }
        (SlurmJob::Last, SlurmMode::Array) => Some((JobKind::Finalize, 0)),
        (_, SlurmMode::Allocation) => Some((JobKind::Run, 0)),
    }
}

/// Whether any node of the job directly needs any of `nodes`.
fn needs_any(graph: &Graph, job: &PlannedJob, nodes: &[usize]) -> bool {
    job.nodes.iter().any(|&node| graph.nodes()[node].needs.iter().any(|need| nodes.contains(need)))
}

/// The open jobs for which a job must wait. Each of them executes a node that the job needs, or a node that the job itself would
/// execute. The second case concerns `run` alone, if jobs of an earlier submission with `slurm.mode` "array" are still open.
fn open_before(graph: &Graph, job: &PlannedJob, open: &OpenJobs) -> Vec<String> {
    let is_before = |node: &usize| job.nodes.contains(node) || needs_any(graph, job, &[*node]);
    open.of_nodes.iter().filter(|(node, _)| is_before(node)).map(|(_, id)| id.clone()).collect()
}

#[cfg(test)]
mod tests;
