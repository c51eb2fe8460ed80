//! `incubate submit`: writes the scripts into the run directory and hands them to sbatch, each waiting for the one before.

use super::slurm::{Done, Job, Places, jobs};
use crate::plan::phases::{META, MODULE};
use crate::plan::{PhasePlan, Plan};
use crate::store::{RunDir, artefact, durable};
use crate::usage;
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A job that was written, and submitted unless it was a dry run.
#[derive(Debug, Serialize)]
pub struct Submitted {
    pub name: String,
    pub modules: Vec<usize>,
    pub script: PathBuf,
    pub id: Option<String>,
    /// What `sbatch --test-only` says, in a dry run where Slurm is there.
    pub check: Option<String>,
}

/// Submits what is not done. A dry run writes the scripts and has Slurm, where there is one, check them.
pub fn submit(plan: &Plan, binary: &Path, dry_run: bool) -> Result<Vec<Submitted>> {
    let run = RunDir::open(&plan.config)?;
    let run_dir = run.path.canonicalize()?;
    let config = run_dir.join("config.toml");
    let folder = run_dir.join("slurm");
    std::fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    let places = Places { binary, config: &config, run_dir: &run_dir };
    let mut submitted: Vec<Submitted> = Vec::new();
    for job in jobs(plan, places, &done(plan, &run)?) {
        let script = folder.join(format!("{}.sh", job.name));
        durable::replace_bytes(&script, job.script.as_bytes())?;
        let before = submitted.last().and_then(|job| job.id.clone());
        let (id, check) =
            if dry_run { (None, test_only(&script)) } else { (Some(sbatch(&script, before.as_deref())?), None) };
        let Job { name, array, .. } = job;
        submitted.push(Submitted { name: name.into(), modules: array, script, id, check });
    }
    if !dry_run {
        durable::replace_bytes(&folder.join("jobs.json"), &serde_json::to_vec_pretty(&submitted)?)?;
    }
    Ok(submitted)
}

fn done(plan: &Plan, run: &RunDir) -> Result<Done> {
    let is_done = |phase: &PhasePlan| -> Result<bool> {
        let path = run.file(&phase.file);
        Ok(path.exists() && artefact::read_header(&path)?.0.recipe == phase.recipe)
    };
    let mut done = Done { meta: is_done(&plan.phase(&META, None))?, modules: Vec::new() };
    for index in 0..plan.config.model.stages() {
        if is_done(&plan.phase(&MODULE, Some(index)))? {
            done.modules.push(index);
        }
    }
    Ok(done)
}

/// Submits one script; returns the job's number.
fn sbatch(script: &Path, after: Option<&str>) -> Result<String> {
    let mut command = Command::new("sbatch");
    command.arg("--parsable");
    if let Some(id) = after {
        // Without --kill-on-invalid-dep a job behind a failed one would wait for ever.
        command.args([&format!("--dependency=afterok:{id}"), "--kill-on-invalid-dep=yes"]);
    }
    let output = command.arg(script).output().map_err(|e| {
        usage!("sbatch cannot be started: {e}; submit from a machine of the cluster, or look at it with --dry-run")
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let refused = String::from_utf8_lossy(&output.stderr);
        return Err(usage!("{}: sbatch refuses it: {}", script.display(), refused.trim()));
    }
    // «number» or «number;cluster»
    Ok(text.trim().split(';').next().unwrap_or_default().to_string())
}

fn test_only(script: &Path) -> Option<String> {
    let output = Command::new("sbatch").arg("--test-only").arg(script).output().ok()?;
    Some(String::from_utf8_lossy(&output.stderr).trim().to_string())
}

/// The jobs for people.
pub fn table(submitted: &[Submitted]) -> String {
    let mut out = String::new();
    for job in submitted {
        let what = match (&job.id, &job.check) {
            (Some(id), _) => format!("job {id}"),
            (None, Some(check)) => format!("not submitted; {check}"),
            (None, None) => "not submitted; no Slurm here to check it".into(),
        };
        let modules = if job.modules.is_empty() { String::new() } else { format!(" {:?}", job.modules) };
        out += &format!("{}{modules}: {what}\n  {}\n", job.name, job.script.display());
    }
    out
}
