//! The jobs that were submitted for a run, and Slurm's reports about them. The reports come from `squeue`, because many sites have
//! no accounting database.

use super::job::JobKind;
use crate::error::Failure;
use crate::run::graph::Node;
use crate::run::state::{JobState, Queued};
use crate::store::{RunDir, durable};
use crate::{require, usage};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;

/// The submitted jobs of a run, and Slurm's reports about them.
#[derive(Debug, Default)]
pub struct Queue {
    /// The jobs of the newest submission come first. Within a submission, jobs are in the order in which they were submitted.
    pub jobs: Vec<Submitted>,
    /// Slurm's reports about the jobs and tasks that it still knows. It still knows jobs that ended a short time ago.
    pub reports: Vec<Queued>,
}

/// A job that was submitted or, in a dry run, only planned. `RUN_DIR/slurm/jobs.json` records the submitted jobs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Record", into = "Record")]
pub struct Submitted {
    pub kind: JobKind,
    /// The modules that the job trains if it is an array. Otherwise empty.
    pub modules: Vec<usize>,
    /// In an array, task i trains module `first_module` + i. The array need not contain task 0. The number is 0 for other jobs.
    pub first_module: usize,
    pub script: PathBuf,
    /// The job's ID in Slurm. None in a dry run.
    pub id: Option<String>,
}

/// The form of a [`Submitted`] in `jobs.json`.
#[derive(Serialize, Deserialize)]
struct Record {
    name: String,
    modules: Vec<usize>,
    first: usize,
    script: PathBuf,
    id: Option<String>,
}

impl From<Record> for Submitted {
    fn from(Record { name, modules, first: first_module, script, id }: Record) -> Submitted {
        Submitted { kind: JobKind::of_name(&name, !modules.is_empty()), modules, first_module, script, id }
    }
}

impl From<Submitted> for Record {
    fn from(Submitted { kind, modules, first_module, script, id }: Submitted) -> Record {
        Record { name: kind.to_string(), modules, first: first_module, script, id }
    }
}

impl Submitted {
    fn executes(&self, node: &Node) -> bool {
        self.kind.executes(&self.modules, node)
    }

    /// Whether `queued` is this job or one of its tasks.
    fn includes(&self, queued: &Queued) -> bool {
        let id = self.id.as_deref().unwrap_or("?");
        queued.id == id || queued.id.strip_prefix(id).is_some_and(|rest| rest.starts_with('_'))
    }

    /// The ID of the array's task for `module`. Without a module, or if the job is no array, the ID of the job. None if the job was
    /// not submitted, or if no task of the array can have this module.
    fn id_of(&self, module: Option<usize>) -> Option<String> {
        let id = self.id.as_ref()?;
        match module.filter(|_| !self.modules.is_empty()) {
            Some(module) => Some(format!("{id}_{}", module.checked_sub(self.first_module)?)),
            None => Some(id.clone()),
        }
    }
}

impl Queue {
    /// Reads the record of submitted jobs and asks Slurm about them.
    ///
    /// # Errors
    /// A usage error if Slurm cannot be asked, because an empty queue would be a wrong answer. Also an error if the record exists
    /// but cannot be read.
    pub fn of_run(run: &RunDir) -> Result<Queue> {
        let jobs = read_record(run)?;
        Ok(Queue { reports: ask(&jobs)?, jobs })
    }

    /// Like [`Queue::of_run`], but only warns if Slurm cannot be asked.
    pub fn as_far_as_known(run: &RunDir) -> Result<Queue> {
        let jobs = read_record(run)?;
        let reports = ask(&jobs).unwrap_or_else(|error| {
            log::warn!("{error:#}");
            Vec::new()
        });
        Ok(Queue { jobs, reports })
    }

    /// Slurm's report about the newest job that executes a node. None if there is no such job, or if Slurm has no report about it.
    pub fn about(&self, node: &Node) -> Option<&Queued> {
        let job = self.jobs.iter().find(|job| job.executes(node))?;
        self.about_job(job, node.index)
    }

    /// Slurm's report about a job, or about the task of an array that trains `module`. None if Slurm has no report about it.
    pub fn about_job(&self, job: &Submitted, module: Option<usize>) -> Option<&Queued> {
        let id = job.id_of(module)?;
        self.reports.iter().find(|report| report.id == id)
    }

    /// The ID of the newest open job or task that executes a node and for whose kind `is_eligible` returns true.
    pub fn open_job(&self, node: &Node, is_eligible: impl Fn(&JobKind) -> bool) -> Option<String> {
        let jobs = self.jobs.iter().filter(|job| is_eligible(&job.kind) && job.executes(node));
        jobs.filter_map(|job| self.about_job(job, node.index)).find(|queued| queued.is_open()).map(|q| q.id.clone())
    }

    /// Whether the newest job that executes a node has succeeded. A job that Slurm has forgotten counts as succeeded. False if
    /// there is no such job.
    pub fn has_done(&self, node: &Node) -> bool {
        let is_done = |job: &Submitted| self.about_job(job, node.index).is_none_or(|q| q.state == JobState::Completed);
        self.jobs.iter().find(|job| job.executes(node)).is_some_and(is_done)
    }

    /// The record of jobs after the jobs of `new` are submitted. The record keeps the earlier jobs that are open or that are not
    /// replaced. An array is replaced if new jobs train all of its modules. Any other job is replaced by a new job of its kind.
    pub fn with_new(&self, new: &[Submitted]) -> Vec<Submitted> {
        let is_replaced = |old: &Submitted| match old.modules.as_slice() {
            [] => new.iter().any(|job| job.kind == old.kind),
            modules => modules.iter().all(|module| new.iter().any(|job| job.modules.contains(module))),
        };
        let is_open = |old: &Submitted| self.reports.iter().any(|report| report.is_open() && old.includes(report));
        let kept = self.jobs.iter().filter(|old| is_open(old) || !is_replaced(old));
        new.iter().chain(kept).cloned().collect()
    }
}

/// Reads the record of the jobs that were submitted for a run.
///
/// # Errors
/// A usage error if the record exists but cannot be read. [`Failure::Damaged`] if it can be read but not parsed. The jobs of the
/// record may still be in the queue.
fn read_record(run: &RunDir) -> Result<Vec<Submitted>> {
    let path = run.file("slurm/jobs.json");
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
            let what = format!(
                "not a record of jobs ({error}); cancel the jobs of this run that squeue shows, then delete this file"
            );
            Failure::Damaged { path, what }.into()
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(usage!("{}: cannot be read: {error}; try again", path.display())),
    }
}

/// Writes the record of the submitted jobs.
pub fn write_record(run: &RunDir, jobs: &[Submitted]) -> Result<()> {
    durable::replace_bytes(&run.file("slurm/jobs.json"), &serde_json::to_vec_pretty(jobs)?)
}

/// Asks Slurm about jobs. The answer lacks jobs that Slurm has forgotten. If no job was submitted, Slurm is not asked.
fn ask(jobs: &[Submitted]) -> Result<Vec<Queued>> {
    let ids: Vec<&str> = jobs.iter().filter_map(|job| job.id.as_deref()).collect();
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let format = ["--noheader", "--states=all", "--array", "--format=%i|%T|%r"];
    let mut squeue = Command::new("squeue");
    squeue.args(format).arg(format!("--jobs={}", ids.join(",")));
    let output = squeue.output().map_err(|e| cannot_ask(&ids, &e.to_string()))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    // squeue fails if it is asked about a single job and Slurm has forgotten that job.
    if !output.status.success() && !stderr.contains("Invalid job id") {
        return Err(cannot_ask(&ids, stderr.trim()));
    }
    let report = |line: &str| -> Option<Queued> {
        let mut fields = line.trim().splitn(3, '|').map(str::to_string);
        // A site may add lines of its own, which do not begin with a job number.
        let id = fields.next().filter(|id| id.starts_with(|first: char| first.is_ascii_digit()))?;
        Some(Queued { id, state: state_of(&fields.next()?), reason: fields.next()? })
    };
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(report).collect())
}

fn cannot_ask(ids: &[&str], why: &str) -> anyhow::Error {
    usage!(
        "squeue cannot say the state of job {}: {why}; try again on a machine of the cluster, when its Slurm answers",
        ids.join(", ")
    )
}

/// Translates the word by which `squeue` names a job's state. The section JOB STATE CODES of squeue's manual lists the words.
fn state_of(word: &str) -> JobState {
    match word {
        "PENDING" | "REQUEUED" => JobState::Pending,
        "COMPLETED" => JobState::Completed,
        "CANCELLED" => JobState::Cancelled,
        "BOOT_FAIL" | "DEADLINE" | "FAILED" | "LAUNCH_FAILED" | "NODE_FAIL" | "OUT_OF_MEMORY" | "PREEMPTED"
        | "RECONFIG_FAIL" | "REVOKED" | "TIMEOUT" => JobState::Failed(word.into()),
        _ => JobState::Active,
    }
}

/// Cancels all open jobs of a run and returns their IDs, for `incubate cancel RUN_DIR`.
pub fn cancel(run: &RunDir) -> Result<Vec<String>> {
    let Queue { jobs, reports } = Queue::of_run(run)?;
    let is_open = |job: &Submitted| reports.iter().any(|report| report.is_open() && job.includes(report));
    let ids: Vec<String> = jobs.into_iter().filter(is_open).filter_map(|job| job.id).collect();
    scancel(&ids)?;
    Ok(ids)
}

/// Cancels jobs, if there are any.
pub fn scancel(ids: &[String]) -> Result<()> {
    if !ids.is_empty() {
        let output = Command::new("scancel").args(ids).output().context("scancel cannot be started")?;
        let refused = String::from_utf8_lossy(&output.stderr).trim().to_string();
        require!(output.status.success(), "scancel refuses to cancel {}: {refused}", ids.join(", "));
    }
    Ok(())
}

/// Slurm's setting MaxArraySize. None if Slurm cannot be asked.
pub fn max_array_size() -> Option<usize> {
    let output = Command::new("scontrol").args(["show", "config"]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with("MaxArraySize"))?;
    line.split('=').nth(1)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::plan::Plan;
    use crate::run::table::SlurmJob;

    fn job(name: &str, modules: &[usize], first_module: usize, id: &str) -> Submitted {
        let kind = JobKind::of_name(name, !modules.is_empty());
        assert_eq!(kind.to_string(), name);
        Submitted { kind, modules: modules.to_vec(), first_module, script: PathBuf::new(), id: Some(id.into()) }
    }

    fn queued(id: &str, state: JobState) -> Queued {
        Queued { id: id.into(), state, reason: "Priority".into() }
    }

    #[test]
    fn every_node_finds_its_job_or_task() {
        let jobs = vec![
            job("pack", &[], 0, "6"),
            job("meta", &[], 0, "7"),
            job("modules", &[0, 1], 0, "8"),
            job("modules-1", &[2, 3], 2, "9"),
            job("finalize", &[], 0, "10"),
            job("downstream-detect", &[], 0, "11"),
        ];
        let ids = ["6", "7", "8_0", "8_1", "9_0", "9_1", "10", "11"];
        let queue = Queue { jobs, reports: ids.map(|id| queued(id, JobState::Pending)).to_vec() };
        let graph =
            Plan::without_data(Config::parse("[slurm]\ndownstream = [\"/a/detect.sh\"]\n", &[]).unwrap()).graph();
        let found = |queue: &Queue| -> Vec<String> {
            graph.nodes().iter().map(|node| queue.about(node).unwrap().id.clone()).collect()
        };
        let of_last_job = graph.nodes().iter().filter(|node| node.row.job == SlurmJob::Last).count();
        let last = vec!["10"; of_last_job];
        assert_eq!(found(&queue), [&ids[..6], &last, &["11"]].concat());
        let jobs = vec![job("pack", &[], 0, "6"), job("run", &[], 0, "12"), job("downstream-detect", &[], 0, "11")];
        let queue = Queue { jobs, reports: ["6", "11", "12"].map(|id| queued(id, JobState::Pending)).to_vec() };
        let of_run = vec!["12"; graph.nodes().len() - 2];
        assert_eq!(found(&queue), [&["6"][..], &of_run, &["11"]].concat());
    }

    #[test]
    fn the_record_keeps_an_earlier_job_that_is_open_or_not_replaced() {
        let jobs = || {
            vec![
                job("meta", &[], 0, "1"),
                job("modules", &[0, 1], 0, "2"),
                job("finalize", &[], 0, "3"),
                job("downstream-a", &[], 0, "4"),
            ]
        };
        let running = Queue { jobs: jobs(), reports: vec![queued("2_0", JobState::Active)] };
        let ended = Queue { jobs: jobs(), reports: vec![] };
        let ids = |jobs: Vec<Submitted>| jobs.into_iter().filter_map(|job| job.id).collect::<Vec<_>>();
        let new = [job("modules", &[1], 0, "5"), job("finalize", &[], 0, "6")];
        assert_eq!(ids(running.with_new(&new)), ["5", "6", "1", "2", "4"]);
        let all = [job("modules", &[0, 1], 0, "7")];
        assert_eq!(ids(running.with_new(&all)), ["7", "1", "2", "3", "4"], "a task of job 2 still runs");
        assert_eq!(ids(ended.with_new(&all)), ["7", "1", "3", "4"]);
        assert!(!job("meta", &[], 0, "2").includes(&queued("21_0", JobState::Active)));
    }

    #[test]
    fn a_record_of_an_earlier_version_is_read_and_written_unchanged() {
        let text = r#"[{"name":"modules-1","modules":[2,3],"first":2,"script":"/r/modules-1.sh","id":"9"},{"name":"finalize","modules":[],"first":0,"script":"/r/finalize.sh","id":null}]"#;
        let jobs: Vec<Submitted> = serde_json::from_str(text).unwrap();
        assert_eq!(jobs[0].kind, JobKind::Array { row_name: "module".into(), part: 1 });
        assert_eq!(jobs[1].kind, JobKind::Finalize);
        assert_eq!(serde_json::to_string(&jobs).unwrap(), text);
    }
}
