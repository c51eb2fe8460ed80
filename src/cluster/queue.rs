//! What Slurm says about a run's jobs, by `squeue` and `scontrol` alone: many sites keep no accounting database.

use crate::error::Failure;
use crate::plan::phases::{META, MODULE};
use crate::store::{RunDir, durable};
use crate::usage;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;

/// A job that was submitted, as `RUN_DIR/slurm/jobs.json` keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Submitted {
    pub name: String,
    pub modules: Vec<usize>,
    /// The module of the array's task 0.
    pub first: usize,
    pub script: PathBuf,
    /// None in a dry run.
    pub id: Option<String>,
}

impl Submitted {
    /// Whether this is the job, or one of its tasks.
    fn is(&self, queued: &Queued) -> bool {
        let id = self.id.as_deref().unwrap_or("?");
        queued.id == id || queued.id.strip_prefix(id).is_some_and(|rest| rest.starts_with('_'))
    }

    /// How it stands; of an array, the task of a module.
    pub fn among<'a>(&self, queued: &'a [Queued], module: Option<usize>) -> Option<&'a Queued> {
        let id = self.id.as_ref()?;
        let id = match module {
            Some(module) => format!("{id}_{}", module.checked_sub(self.first)?),
            None => id.clone(),
        };
        queued.iter().find(|q| q.id == id)
    }
}

/// A job or task in Slurm's own words.
#[derive(Debug, Clone)]
pub struct Queued {
    /// `17`, or `17_2` for a task of an array.
    pub id: String,
    /// `PENDING`, `RUNNING`, `COMPLETED`, `FAILED`, `NODE_FAIL`, …
    pub state: String,
    /// Why it waits or how it ended, such as `Priority` or `NonZeroExitCode`.
    pub reason: String,
}

impl Queued {
    /// Whether it may still do something: what Slurm does not say is over (`squeue`, JOB STATE CODES).
    pub fn is_alive(&self) -> bool {
        const OVER: [&str; 12] = [
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "LAUNCH_FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "RECONFIG_FAIL",
            "REVOKED",
            "TIMEOUT",
        ];
        !OVER.contains(&self.state.as_str())
    }
}

/// The jobs that were submitted last, if any were.
///
/// # Errors
/// A usage error if the record is there and cannot be read, or [`Failure::Damaged`]: they may be in the queue.
pub fn submitted(run: &RunDir) -> Result<Vec<Submitted>> {
    let path = run.file("slurm/jobs.json");
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
            let what = format!("not a record of jobs ({error}); look with squeue for jobs of this run, then delete it");
            Failure::Damaged { path, what }.into()
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(usage!("{}: cannot be read: {error}; try again", path.display())),
    }
}

/// Keeps what was submitted.
pub fn keep(run: &RunDir, jobs: &[Submitted]) -> Result<()> {
    durable::replace_bytes(&run.file("slurm/jobs.json"), &serde_json::to_vec_pretty(jobs)?)
}

/// What was submitted after what is kept of before: all that is alive, and what no later job does.
pub fn following(new: &[Submitted], before: &[Submitted], queued: &[Queued]) -> Vec<Submitted> {
    let superseded = |old: &Submitted| match old.modules.as_slice() {
        [] => new.iter().any(|job| job.name == old.name),
        modules => modules.iter().all(|module| new.iter().any(|job| job.modules.contains(module))),
    };
    let alive = |old: &Submitted| queued.iter().any(|q| q.is_alive() && old.is(q));
    let kept = before.iter().filter(|old| alive(old) || !superseded(old));
    new.iter().chain(kept).cloned().collect()
}

/// The jobs as Slurm sees them now, without those that it has forgotten. Asks nobody where nothing was submitted.
///
/// # Errors
/// A usage error if Slurm cannot be asked: that is not to be taken for an empty queue.
pub fn ask(jobs: &[Submitted]) -> Result<Vec<Queued>> {
    let ids: Vec<&str> = jobs.iter().filter_map(|job| job.id.as_deref()).collect();
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let format = ["--noheader", "--states=all", "--array", "--format=%i|%T|%r"];
    let mut squeue = Command::new("squeue");
    squeue.args(format).arg(format!("--jobs={}", ids.join(",")));
    let output = squeue.output().map_err(|e| cannot_ask(&ids, &e.to_string()))?;
    let words = String::from_utf8_lossy(&output.stderr);
    // One job alone that Slurm has forgotten is an error to squeue.
    if !output.status.success() && !words.contains("Invalid job id") {
        return Err(cannot_ask(&ids, words.trim()));
    }
    let queued = |line: &str| -> Option<Queued> {
        let mut fields = line.trim().splitn(3, '|').map(str::to_string);
        Some(Queued { id: fields.next()?, state: fields.next()?, reason: fields.next()? })
    };
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(queued).collect())
}

fn cannot_ask(ids: &[&str], why: &str) -> anyhow::Error {
    usage!(
        "squeue cannot say how job {} stands: {why}; try again on a machine of the cluster, when its Slurm answers",
        ids.join(", ")
    )
}

/// Each phase's job: the last one submitted that does it.
pub fn by_phase<'a>(jobs: &[Submitted], queued: &'a [Queued], phases: &[String]) -> BTreeMap<String, &'a Queued> {
    let find = |phase: &String| -> Option<&'a Queued> {
        let module = phase.strip_prefix(&format!("{}-", MODULE.name)).and_then(|index| index.parse::<usize>().ok());
        let does = |job: &&Submitted| match (job.name.as_str(), module) {
            ("pack", _) => phase == "pack",
            _ if phase == "pack" => false,
            ("run", _) => true,
            ("meta", _) => phase == META.name,
            ("finalize", None) => phase != META.name,
            (_, Some(module)) => job.modules.contains(&module),
            _ => false,
        };
        let job = jobs.iter().find(does)?;
        job.among(queued, module.filter(|_| !job.modules.is_empty()))
    };
    phases.iter().filter_map(|phase| Some((phase.clone(), find(phase)?))).collect()
}

/// `incubate cancel RUN_DIR`: cancels what is queued or running; returns the jobs' numbers.
pub fn cancel(run: &RunDir) -> Result<Vec<String>> {
    let jobs = submitted(run)?;
    let alive: Vec<Queued> = ask(&jobs)?.into_iter().filter(Queued::is_alive).collect();
    let jobs = jobs.into_iter().filter(|job| alive.iter().any(|q| job.is(q)));
    let ids: Vec<String> = jobs.filter_map(|job| job.id).collect();
    scancel(&ids)?;
    Ok(ids)
}

/// Takes jobs back.
pub fn scancel(ids: &[String]) -> Result<()> {
    if !ids.is_empty() {
        let output = Command::new("scancel").args(ids).output().context("scancel")?;
        let refused = String::from_utf8_lossy(&output.stderr).trim().to_string();
        crate::require!(output.status.success(), "scancel refuses: {refused}");
    }
    Ok(())
}

/// Slurm's MaxArraySize, where there is a Slurm.
pub fn max_array_size() -> Option<usize> {
    let output = Command::new("scontrol").args(["show", "config"]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with("MaxArraySize"))?;
    line.split('=').nth(1)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_finds_its_job_or_task() {
        let job = |name: &str, modules: &[usize], first, id: &str| Submitted {
            name: name.into(),
            modules: modules.to_vec(),
            first,
            script: PathBuf::new(),
            id: Some(id.into()),
        };
        let jobs = [
            job("meta", &[], 0, "7"),
            job("modules", &[0, 1], 0, "8"),
            job("modules-1", &[2], 2, "9"),
            job("finalize", &[], 0, "10"),
        ];
        let queued = ["7", "8_0", "8_1", "9_0", "10"].map(|id| Queued {
            id: id.into(),
            state: "PENDING".into(),
            reason: "Priority".into(),
        });
        let phases = ["meta", "module-0", "module-1", "module-2", "assemble", "finetune"].map(String::from);
        let found = by_phase(&jobs, &queued, &phases);
        let ids: Vec<&str> = phases.iter().map(|phase| found[phase].id.as_str()).collect();
        assert_eq!(ids, ["7", "8_0", "8_1", "9_0", "10", "10"]);
    }
    #[test]
    fn what_was_submitted_before_is_kept_while_it_is_alive_or_nobody_does_it_again() {
        let job = |name: &str, modules: &[usize], id: &str| Submitted {
            name: name.into(),
            modules: modules.to_vec(),
            first: 0,
            script: PathBuf::new(),
            id: Some(id.into()),
        };
        let before = [
            job("meta", &[], "1"),
            job("modules", &[0, 1], "2"),
            job("finalize", &[], "3"),
            job("downstream-a", &[], "4"),
        ];
        let queued = [Queued { id: "2_0".into(), state: "RUNNING".into(), reason: "None".into() }];
        let ids = |jobs: Vec<Submitted>| jobs.into_iter().filter_map(|job| job.id).collect::<Vec<_>>();
        let new = [job("modules", &[1], "5"), job("finalize", &[], "6")];
        assert_eq!(ids(following(&new, &before, &queued)), ["5", "6", "1", "2", "4"]);
        let all = [job("modules", &[0, 1], "7")];
        assert_eq!(ids(following(&all, &before, &queued)), ["7", "1", "2", "3", "4"], "a task of 2 runs");
        assert_eq!(ids(following(&all, &before, &[])), ["7", "1", "3", "4"]);
        assert!(!job("meta", &[], "2").is(&Queued { id: "21_0".into(), ..queued[0].clone() }));
    }
}
