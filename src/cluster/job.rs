//! The kinds of Slurm jobs, and the nodes of a run's graph that each kind of job executes. A node here is a piece of a run, such as
//! `module-2`.

use crate::run::graph::Node;
use crate::run::table::{DOWNSTREAM, SlurmJob};
use std::fmt;

/// A kind of Slurm job. As a text, the kind is the job's name in `jobs.json` and the file name of its script without `.sh`. For the
/// program's own jobs, the file names of the logs begin with this text, and the job's name in Slurm is the run's name, a hyphen and
/// this text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobKind {
    /// Executes the only node of the row with this name, such as `pack` or `meta`.
    Row(String),
    /// The array `modules`, with one task for each module that is still to be trained. `row_name` is the name of the modules' row.
    /// If the modules do not fit into Slurm's largest array, there are several arrays: part 0 is `modules`, part 1 is `modules-1`,
    /// and so on.
    Array { row_name: String, part: usize },
    /// The job `finalize`, which executes all nodes after the modules except the user's scripts.
    Finalize,
    /// The job `run`, which executes all nodes except packing and the user's scripts in one allocation.
    Run,
    /// Runs the user's script of the node that has this name, such as `downstream-detect`.
    Script(String),
}

impl JobKind {
    /// The kind of the job that has this name in `jobs.json`. `has_modules` is true for arrays alone.
    pub fn of_name(name: &str, has_modules: bool) -> JobKind {
        if has_modules {
            let numbered = name.rsplit_once('-').and_then(|(base, part)| Some((base, part.parse().ok()?)));
            let (base, part) = numbered.unwrap_or((name, 0));
            return JobKind::Array { row_name: base.strip_suffix('s').unwrap_or(base).into(), part };
        }
        match name {
            "finalize" => JobKind::Finalize,
            "run" => JobKind::Run,
            _ if name.starts_with(&format!("{}-", DOWNSTREAM.name)) => JobKind::Script(name.into()),
            _ => JobKind::Row(name.into()),
        }
    }

    /// Whether the job executes a node. `modules` are the modules of an array job, and empty for any other job.
    pub fn executes(&self, modules: &[usize], node: &Node) -> bool {
        match self {
            JobKind::Row(row_name) => node.row.name == row_name,
            JobKind::Array { row_name, .. } => {
                node.row.name == row_name && node.index.is_some_and(|index| modules.contains(&index))
            }
            JobKind::Finalize => node.row.job == SlurmJob::Last,
            JobKind::Run => matches!(node.row.job, SlurmJob::Own | SlurmJob::Array | SlurmJob::Last),
            JobKind::Script(name) => node.name == *name,
        }
    }

    /// Whether the job is the last of the program's own jobs, after which the user's scripts start.
    pub fn is_last(&self) -> bool {
        matches!(self, JobKind::Finalize | JobKind::Run)
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JobKind::Row(name) | JobKind::Script(name) => write!(out, "{name}"),
            JobKind::Array { row_name, part: 0 } => write!(out, "{row_name}s"),
            JobKind::Array { row_name, part } => write!(out, "{row_name}s-{part}"),
            JobKind::Finalize => write!(out, "finalize"),
            JobKind::Run => write!(out, "run"),
        }
    }
}

/// One job to submit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedJob {
    pub kind: JobKind,
    /// The nodes that the job executes, as positions in the graph.
    pub nodes: Vec<usize>,
    /// The modules that the job trains if it is an array. Otherwise empty.
    pub modules: Vec<usize>,
    /// In an array, task i trains module `first_module` + i. The array need not contain task 0. The number is 0 for other jobs.
    pub first_module: usize,
    /// The jobs of the same submission that this job waits for, as positions in the list of planned jobs.
    pub after: Vec<usize>,
    /// The open (queued or running) jobs of earlier submissions that this job also waits for, by their job IDs, such as `17` or
    /// `17_2`.
    pub after_open: Vec<String>,
    /// The text of the script that sbatch gets.
    pub script: String,
    /// The arguments that the script gets.
    pub arguments: Vec<String>,
}
