//! Which Slurm job does which nodes of a run.

use crate::run::graph::Node;
use crate::run::table::{DOWNSTREAM, SlurmJob};
use std::fmt;

/// What a Slurm job does. Its text names the job, its script and its logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobKind {
    /// The one node of this row: `pack`, `meta`.
    Row(String),
    /// Modules of this row, each a task of an array: `modules`, and `modules-1`, … for those beyond the largest array.
    Array { row: String, number: usize },
    /// All that comes after the modules: `finalize`.
    Finalize,
    /// Everything but packing, in one allocation: `run`.
    Run,
    /// The user's script of the node with this name, such as `downstream-detect`.
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

    /// Whether it does a node; `modules` are those of an array.
    pub fn does(&self, modules: &[usize], node: &Node) -> bool {
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

    /// Whether it is the last of the program's own jobs, after which the user's scripts start.
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
    /// The nodes that it does, by their positions in the graph.
    pub nodes: Vec<usize>,
    /// The modules of an array.
    pub modules: Vec<usize>,
    /// The module of the array's task 0.
    pub first: usize,
    /// The jobs that it waits for, by their places in the list.
    pub after: Vec<usize>,
    /// The jobs of an earlier submission that it waits for too, as `squeue` names them.
    pub after_alive: Vec<String>,
    pub script: String,
    /// The arguments of the script.
    pub arguments: Vec<String>,
}
