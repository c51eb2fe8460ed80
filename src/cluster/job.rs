//! The kinds of Slurm jobs, and the nodes of a run that each executes.

use crate::run::graph::Node;
use crate::run::table::{DOWNSTREAM, SlurmJob};
use std::fmt;

/// A kind of Slurm job. Its text is the name of the job, its script and its logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobKind {
    /// Executes the only node of this row: `pack`, `meta`.
    Row(String),
    /// An array with a task for each module of this row: `modules`. Modules beyond Slurm's largest array are in `modules-1`, ….
    Array { row: String, number: usize },
    /// Executes all nodes after the modules: `finalize`.
    Finalize,
    /// Executes everything except packing and the user's scripts, in one allocation: `run`.
    Run,
    /// Runs the user's script of the node with this name, such as `downstream-detect`.
    Script(String),
}

impl JobKind {
    /// The kind of a job by its name in `jobs.json`. Only an array has modules.
    pub fn of_name(name: &str, has_modules: bool) -> JobKind {
        if has_modules {
            let numbered = name.rsplit_once('-').and_then(|(base, number)| Some((base, number.parse().ok()?)));
            let (base, number) = numbered.unwrap_or((name, 0));
            return JobKind::Array { row: base.strip_suffix('s').unwrap_or(base).into(), number };
        }
        match name {
            "finalize" => JobKind::Finalize,
            "run" => JobKind::Run,
            _ if name.starts_with(&format!("{}-", DOWNSTREAM.name)) => JobKind::Script(name.into()),
            _ => JobKind::Row(name.into()),
        }
    }

    /// Whether the job executes a node; `modules` are the modules of an array.
    pub fn executes(&self, modules: &[usize], node: &Node) -> bool {
        match self {
            JobKind::Row(row) => node.row.name == row,
            JobKind::Array { row, .. } => {
                node.row.name == row && node.index.is_some_and(|index| modules.contains(&index))
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
            JobKind::Array { row, number: 0 } => write!(out, "{row}s"),
            JobKind::Array { row, number } => write!(out, "{row}s-{number}"),
            JobKind::Finalize => write!(out, "finalize"),
            JobKind::Run => write!(out, "run"),
        }
    }
}

/// One job to submit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedJob {
    pub kind: JobKind,
    /// The positions in the graph of the nodes that the job executes.
    pub nodes: Vec<usize>,
    /// The modules of an array.
    pub modules: Vec<usize>,
    /// The module that the array's task 0 trains.
    pub first_module: usize,
    /// The positions in the list of the jobs that the job waits for.
    pub after: Vec<usize>,
    /// The open jobs of earlier submissions that the job waits for too, by their job IDs, such as `17` or `17_2`.
    pub after_open: Vec<String>,
    pub script: String,
    /// The arguments of the script.
    pub arguments: Vec<String>,
}
