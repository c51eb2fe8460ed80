//! `incubate submit`: writes the scripts into the run directory and hands them to sbatch, each waiting for those before.

use super::queue::{self, Submitted};
use super::slurm::{Job, Places, Situation, jobs};
use crate::data::packed;
use crate::plan::cost::cost;
use crate::plan::phases::{META, MODULE, PHASES};
use crate::plan::{PhasePlan, Plan};
use crate::store::progress::Progress;
use crate::store::{RunDir, artefact, durable};
use crate::{require, usage};
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;
use std::process::Command;

/// A job that was written, and submitted unless it was a dry run.
#[derive(Debug, Serialize)]
pub struct Written {
    #[serde(flatten)]
    pub job: Submitted,
    /// The names of the jobs that it waits for.
    pub after: Vec<String>,
    /// Of the whole job: training, forward and backward.
    pub flops: f64,
    /// What `sbatch --test-only` says, in a dry run where Slurm is there.
    pub check: Option<String>,
    /// The script, in a dry run.
    pub text: Option<String>,
}

/// Submits what is not done. A dry run writes the scripts and has Slurm, where there is one, check them.
///
/// # Errors
/// A usage error if sbatch refuses, or if jobs of this run are still queued or running.
pub fn submit(plan: &Plan, binary: &Path, dry_run: bool) -> Result<Vec<Written>> {
    let run = RunDir::open(&plan.config)?;
    if !dry_run {
        refuse_twice(&run)?;
    }
    let run_dir = run.path.canonicalize()?;
    let config = run_dir.join("config.toml");
    let folder = run_dir.join("slurm");
    std::fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    let places = Places { binary, config: &config, run_dir: &run_dir };
    let mut written: Vec<Written> = Vec::new();
    let mut graph = jobs(plan, places, &situation(plan, &run)?);
    let last = graph.len() - 1;
    for path in &plan.config.slurm.downstream {
        let script =
            std::fs::read_to_string(path).map_err(|e| usage!("{}: {e}; correct slurm.downstream", path.display()))?;
        graph.push(Job::downstream(path, script, last, &run_dir.join("export")));
    }
    for job in graph {
        let script = folder.join(format!("{}.sh", job.name));
        durable::replace_bytes(&script, job.script.as_bytes())?;
        let before: Vec<&Submitted> = job.after.iter().map(|&place| &written[place].job).collect();
        let ids: Vec<&str> = before.iter().filter_map(|job| job.id.as_deref()).collect();
        let id = if dry_run { None } else { Some(sbatch(&script, &job.arguments, &ids)?) };
        let after = before.iter().map(|job| job.name.clone()).collect();
        let flops = flops(plan, &job);
        let check = if dry_run { test_only(&script) } else { None };
        let Job { name, modules, first, script: text, .. } = job;
        let text = dry_run.then_some(text);
        let job = Submitted { name, modules, first, script, id };
        written.push(Written { job, after, flops, check, text });
        if !dry_run {
            // After every job, so that `cancel` knows those that were submitted before one was refused.
            queue::keep(&run, &written.iter().map(|w| w.job.clone()).collect::<Vec<_>>())?;
        }
    }
    Ok(written)
}

fn refuse_twice(run: &RunDir) -> Result<()> {
    let alive: Vec<String> =
        queue::ask(&queue::submitted(run)).into_iter().filter(|q| q.is_alive()).map(|q| q.id).collect();
    require!(
        alive.is_empty(),
        "{}: already submitted as job {}; look with `incubate status`, or take it back with `incubate cancel`",
        run.path.display(),
        alive.join(", ")
    );
    Ok(())
}

fn situation(plan: &Plan, run: &RunDir) -> Result<Situation> {
    let is_done = |phase: &PhasePlan| -> Result<bool> {
        let path = run.file(&phase.file);
        Ok(path.exists() && artefact::read_header(&path)?.0.recipe == phase.recipe)
    };
    let mut modules_done = Vec::new();
    for (index, phase) in plan.phases(&MODULE).iter().enumerate() {
        if is_done(phase)? {
            modules_done.push(index);
        }
    }
    let progress = PHASES.iter().flat_map(|row| plan.phases(row)).filter_map(|p| Progress::read(&run.path, &p.name));
    let default = Situation::default();
    let data = &plan.config.data;
    Ok(Situation {
        packed: data.pack_from.as_os_str().is_empty() || packed::open(&data.path).is_ok(),
        meta_done: is_done(&plan.phase(&META, None))?,
        modules_done,
        max_array_size: queue::max_array_size().unwrap_or(default.max_array_size),
        save_s: progress.filter_map(|p| p.save_s).fold(0.0, f64::max),
    })
}

fn flops(plan: &Plan, job: &Job) -> f64 {
    let of = |phase: &PhasePlan| cost(plan, phase).flops;
    let runs = |phase: &PhasePlan| match job.name.as_str() {
        "run" => true,
        "meta" => phase.row == META.name,
        "finalize" => phase.row != META.name && phase.row != MODULE.name,
        _ => phase.index.is_some_and(|index| job.modules.contains(&index)),
    };
    let wanted = PHASES.iter().filter(|row| row.name != "e2e" || plan.config.run.e2e);
    wanted.flat_map(|row| plan.phases(row)).filter(runs).map(|phase| of(&phase)).sum()
}

/// Submits one script; returns the job's number.
fn sbatch(script: &Path, arguments: &[String], after: &[&str]) -> Result<String> {
    let mut command = Command::new("sbatch");
    command.arg("--parsable");
    if !after.is_empty() {
        // Without --kill-on-invalid-dep a job behind a failed one would wait for ever.
        command.args([&format!("--dependency=afterok:{}", after.join(":")), "--kill-on-invalid-dep=yes"]);
    }
    let output = command.arg(script).args(arguments).output().map_err(|e| {
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

/// The jobs for people: the graph, and in a dry run each script.
pub fn table(written: &[Written]) -> String {
    let mut out = String::new();
    for Written { job, after, flops, check, text } in written {
        let what = match (&job.id, check) {
            (Some(id), _) => format!("job {id}"),
            (None, Some(check)) => format!("not submitted; {check}"),
            (None, None) => "not submitted; no Slurm here to check it".into(),
        };
        let modules = match job.modules.len() {
            0 => String::new(),
            n => format!(" ({n} modules)"),
        };
        let after = if after.is_empty() { String::new() } else { format!(", after {}", after.join(", ")) };
        out += &format!("{}{modules}: {what}{after}, {flops:.2e} FLOPs\n  {}\n", job.name, job.script.display());
        for line in text.iter().flat_map(|text| text.lines()) {
            out += &format!("  | {line}\n");
        }
    }
    out
}
