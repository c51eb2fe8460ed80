//! What Slurm says about a run's jobs, by `squeue` and `scontrol` alone: many sites keep no accounting database.

use crate::plan::phases::{META, MODULE};
use crate::store::{RunDir, durable};
use crate::usage;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
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
    /// Whether it may still do something.
    pub fn is_alive(&self) -> bool {
        ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED"]
            .contains(&self.state.as_str())
    }
}

/// The jobs that were submitted last, if any were.
pub fn submitted(run: &RunDir) -> Vec<Submitted> {
    let bytes = std::fs::read(run.file("slurm/jobs.json")).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Keeps what was submitted.
pub fn keep(run: &RunDir, jobs: &[Submitted]) -> Result<()> {
    durable::replace_bytes(&run.file("slurm/jobs.json"), &serde_json::to_vec_pretty(jobs)?)
}

/// The jobs as Slurm sees them now; empty where there is no Slurm, or where it has forgotten them.
pub fn ask(jobs: &[Submitted]) -> Vec<Queued> {
    let ids: Vec<&str> = jobs.iter().filter_map(|job| job.id.as_deref()).collect();
    if ids.is_empty() {
        return Vec::new();
    }
    let format = ["--noheader", "--states=all", "--array", "--format=%i|%T|%r"];
    let text = output(Command::new("squeue").args(format).arg(format!("--jobs={}", ids.join(","))));
    let queued = |line: &str| -> Option<Queued> {
        let mut fields = line.trim().splitn(3, '|').map(str::to_string);
        Some(Queued { id: fields.next()?, state: fields.next()?, reason: fields.next()? })
    };
    text.unwrap_or_default().lines().filter_map(queued).collect()
}

/// Each phase's job: the last one submitted that does it.
pub fn by_phase<'a>(jobs: &[Submitted], queued: &'a [Queued], phases: &[String]) -> BTreeMap<String, &'a Queued> {
    let id_of = |phase: &str| -> Option<String> {
        let module = phase.strip_prefix(&format!("{}-", MODULE.name)).and_then(|index| index.parse::<usize>().ok());
        let does = |job: &&Submitted| match (job.name.as_str(), module) {
            ("run", _) => true,
            ("meta", _) => phase == META.name,
            ("finalize", None) => phase != META.name,
            (_, Some(module)) => job.modules.contains(&module),
            _ => false,
        };
        let job = jobs.iter().find(does)?;
        let id = job.id.as_ref()?;
        Some(if job.modules.is_empty() { id.clone() } else { format!("{id}_{}", module? - job.first) })
    };
    let find = |phase: &String| Some((phase.clone(), queued.iter().find(|q| Some(&q.id) == id_of(phase).as_ref())?));
    phases.iter().filter_map(find).collect()
}

/// `incubate cancel RUN_DIR`: cancels what is queued or running; returns the jobs' numbers.
pub fn cancel(run: &RunDir) -> Result<Vec<String>> {
    let jobs = submitted(run);
    let alive: Vec<Queued> = ask(&jobs).into_iter().filter(Queued::is_alive).collect();
    let belongs = |queued: &Queued, id: &str| queued.id == id || queued.id.starts_with(&format!("{id}_"));
    let ids: Vec<String> =
        jobs.into_iter().filter_map(|job| job.id).filter(|id| alive.iter().any(|q| belongs(q, id))).collect();
    if !ids.is_empty() {
        let output = Command::new("scancel").args(&ids).output().context("scancel")?;
        let refused = String::from_utf8_lossy(&output.stderr).trim().to_string();
        crate::require!(output.status.success(), "scancel refuses: {refused}");
    }
    Ok(ids)
}

/// Slurm's MaxArraySize, where there is a Slurm.
pub fn max_array_size() -> Option<usize> {
    let text = output(Command::new("scontrol").args(["show", "config"])).ok()?;
    let line = text.lines().find(|line| line.starts_with("MaxArraySize"))?;
    line.split('=').nth(1)?.trim().parse().ok()
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|e| usage!("{}: {e}", command.get_program().to_string_lossy()))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
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
}
