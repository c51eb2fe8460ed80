//! `incubate submit`: writes the scripts into the run directory and hands them to sbatch, each waiting for those before.

use super::queue::{self, Queued, Submitted};
use super::slurm::{Alive, Job, Places, Situation, jobs};
use crate::data::source::packed;
use crate::plan::cost::cost;
use crate::plan::phases::{BEFORE_ASSEMBLED, E2E, FINETUNE, META, MODULE};
use crate::plan::{PhasePlan, Plan};
use crate::store::progress::Progress;
use crate::store::{RunDir, artefact, durable};
use crate::{require, usage};
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeSet;
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

/// Submits what is neither done nor on its way. A dry run writes the scripts and has Slurm, where there is one, check them.
///
/// # Errors
/// A usage error if sbatch refuses, or if all that is left is queued or running already.
pub fn submit(plan: &Plan, binary: &Path, dry_run: bool) -> Result<Vec<Written>> {
    let run = RunDir::open(&plan.config)?;
    let earlier = queue::submitted(&run)?;
    let queued = match queue::ask(&earlier) {
        Err(error) if dry_run => {
            log::warn!("{error:#}");
            Vec::new()
        }
        asked => asked?,
    };
    let run_dir = run.path.canonicalize()?;
    let folder = run_dir.join("slurm");
    let config = folder.join("config.toml");
    let places = Places { binary, config: &config, run_dir: &run_dir };
    // Each phase's recipe is a hash of the whole config: with a thousand modules once is enough.
    let phases: Vec<PhasePlan> = plan.wanted().flat_map(|row| plan.phases(row)).collect();
    let left = left(&phases, &run)?;
    let situation = situation(plan, &phases, &left, &run, alive(&earlier, &queued));
    let mut graph = jobs(plan, places, &situation)?;
    graph.extend(downstream(plan, &graph, &situation, &earlier, &queued, &run_dir)?);
    let of_alive: Vec<&str> = queued.iter().filter(|q| q.is_alive()).map(|q| q.id.as_str()).collect();
    require!(
        dry_run || !graph.is_empty() || of_alive.is_empty(),
        "{}: already submitted as job {}; look with `incubate status`, or take it back with `incubate cancel`",
        run.path.display(),
        of_alive.join(", ")
    );
    std::fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    // Jobs read this one: what they run with is of the last submission, such as threads, and not of the run's first start.
    if !dry_run || earlier.is_empty() {
        durable::replace_bytes(&config, plan.config.to_toml().as_bytes())?;
    }
    if !dry_run {
        withdraw(&graph, &earlier, &queued)?;
    }
    let costs = costs(plan, left);
    let mut written: Vec<Written> = Vec::new();
    let mut refused = None;
    for job in graph {
        let script = folder.join(format!("{}.sh", job.name));
        durable::replace_bytes(&script, job.script.as_bytes())?;
        let before: Vec<&Submitted> = job.after.iter().map(|&place| &written[place].job).collect();
        let ids: Vec<&str> =
            before.iter().filter_map(|job| job.id.as_deref()).chain(job.alive.iter().map(String::as_str)).collect();
        let id = if dry_run { None } else { Some(sbatch(&script, &job.arguments, &ids)?) };
        let alive = job.alive.iter().map(|id| format!("job {id}"));
        let after = before.iter().map(|job| job.name.clone()).chain(alive).collect();
        let flops = flops(&costs, &job);
        let check = if dry_run { test_only(&script) } else { None };
        let Job { name, modules, first, script: text, .. } = job;
        let text = dry_run.then_some(text);
        let job = Submitted { name, modules, first, script, id };
        if let Some(Err(words)) = &check {
            refused.get_or_insert_with(|| usage!("{}: sbatch refuses it: {words}", job.script.display()));
        }
        let check = check.map(|said| said.unwrap_or_else(|words| words));
        written.push(Written { job, after, flops, check, text });
        if !dry_run {
            // After every job, so that `cancel` knows those that were submitted before one was refused.
            let new: Vec<Submitted> = written.iter().map(|w| w.job.clone()).collect();
            queue::keep(&run, &queue::following(&new, &earlier, &queued))?;
        }
    }
    refused.map_or(Ok(written), Err)
}

/// The jobs of earlier submissions that may still do something.
fn alive(earlier: &[Submitted], queued: &[Queued]) -> Alive {
    let mut alive = Alive::default();
    let living = |job: &Submitted, module| job.among(queued, module).filter(|q| q.is_alive()).map(|q| q.id.clone());
    for job in earlier {
        match job.name.as_str() {
            "pack" => alive.pack = alive.pack.or(living(job, None)),
            "meta" => alive.meta = alive.meta.or(living(job, None)),
            "finalize" | "run" => alive.last = alive.last.or(living(job, None)),
            _ => {
                for &module in &job.modules {
                    if let Some(id) = living(job, Some(module)) {
                        alive.modules.insert(module, id);
                    }
                }
            }
        }
    }
    alive
}

/// The user's own scripts: after the last job where that is submitted, else those that did not end well.
fn downstream(
    plan: &Plan,
    graph: &[Job],
    situation: &Situation,
    earlier: &[Submitted],
    queued: &[Queued],
    run_dir: &Path,
) -> Result<Vec<Job>> {
    let before: Vec<usize> = graph.len().checked_sub(1).into_iter().collect();
    let alive: Vec<String> = if before.is_empty() { situation.alive.last.iter().cloned().collect() } else { vec![] };
    let mut jobs = Vec::new();
    for path in &plan.config.slurm.downstream {
        let script =
            std::fs::read_to_string(path).map_err(|e| usage!("{}: {e}; correct slurm.downstream", path.display()))?;
        let job = Job::downstream(path, script, before.clone(), alive.clone(), &run_dir.join("export"));
        let recorded = earlier.iter().find(|old| old.name == job.name);
        // One that Slurm has forgotten has ended.
        let is_well = |old: &Submitted| old.among(queued, None).is_none_or(|q| q.is_alive() || q.state == "COMPLETED");
        if !before.is_empty() || !recorded.is_some_and(is_well) {
            jobs.push(job);
        }
    }
    Ok(jobs)
}

/// Cancels what waits for something that failed and is submitted again with new jobs to wait for.
fn withdraw(graph: &[Job], earlier: &[Submitted], queued: &[Queued]) -> Result<()> {
    let is_last = |name: &str| name == "finalize" || name == "run";
    let mut ids = Vec::new();
    for old in earlier.iter().filter(|old| old.modules.is_empty()) {
        let again = graph.iter().any(|job| job.name == old.name || is_last(&job.name) && is_last(&old.name));
        let Some(q) = old.among(queued, None).filter(|q| again && q.is_alive()) else { continue };
        require!(
            q.state == "PENDING",
            "job {} ({}) is running, though what it needs is not done; wait for its end, or take it back with `incubate cancel`",
            q.id,
            old.name
        );
        ids.push(q.id.clone());
    }
    queue::scancel(&ids)
}

/// The phases that are neither done nor before an imported model.
fn left(phases: &[PhasePlan], run: &RunDir) -> Result<Vec<PhasePlan>> {
    let is_imported = run.is_imported()?;
    let mut left = Vec::new();
    for phase in phases {
        let path = run.file(&phase.file);
        let is_done = path.exists() && artefact::read_header(&path)?.0.recipe == phase.recipe;
        let is_replaced = is_imported && BEFORE_ASSEMBLED.contains(&phase.row);
        if !is_done && !is_replaced {
            left.push(phase.clone());
        }
    }
    Ok(left)
}

fn situation(plan: &Plan, phases: &[PhasePlan], left: &[PhasePlan], run: &RunDir, alive: Alive) -> Situation {
    let is_left = |name: &str| left.iter().any(|phase| phase.row == name);
    let modules_left: BTreeSet<usize> = left.iter().filter_map(|phase| phase.index).collect();
    let modules = phases.iter().filter_map(|phase| phase.index);
    let progress = phases.iter().filter_map(|phase| Progress::read(&run.path, &phase.name));
    let measured = progress.filter_map(|p| p.save_s).fold(0.0, f64::max);
    let data = &plan.config.data;
    Situation {
        packed: data.pack_from.as_os_str().is_empty() || packed::open(&data.path).is_ok(),
        meta_done: !is_left(META.name),
        modules_done: modules.filter(|index| !modules_left.contains(index)).collect(),
        // The report is the last thing that the last job writes.
        all_done: !is_left(FINETUNE.name) && !is_left(E2E.name) && run.file("report.html").exists(),
        alive,
        max_array_size: queue::max_array_size().unwrap_or(Situation::default().max_array_size),
        save_s: if measured > 0.0 { measured } else { save_s(plan, phases) },
    }
}

/// Seconds that the largest checkpoint may take, where none was written yet: weights and two moments in fp32.
fn save_s(plan: &Plan, phases: &[PhasePlan]) -> f64 {
    const BYTES_PER_S: f64 = 100e6;
    let largest = phases.iter().map(|phase| cost(plan, phase).trained_parameters).max().unwrap_or(0);
    12.0 * largest as f64 / BYTES_PER_S
}

/// Every phase that is asked for, with what it costs.
fn costs(plan: &Plan, phases: Vec<PhasePlan>) -> Vec<(PhasePlan, f64)> {
    let costed = |phase: PhasePlan| {
        let flops = cost(plan, &phase).flops;
        (phase, flops)
    };
    phases.into_iter().map(costed).collect()
}

fn flops(costs: &[(PhasePlan, f64)], job: &Job) -> f64 {
    let runs = |phase: &PhasePlan| match job.name.as_str() {
        "run" => true,
        "meta" => phase.row == META.name,
        "finalize" => phase.row != META.name && phase.row != MODULE.name,
        _ => phase.index.is_some_and(|index| job.modules.binary_search(&index).is_ok()),
    };
    costs.iter().filter(|(phase, _)| runs(phase)).map(|(_, flops)| flops).sum()
}

/// What tells a job or step who it is.
const INHERITED: [&str; 6] = ["SLURM_ARRAY_", "SLURM_RESTART_COUNT", "SLURM_STEP", "PMI_", "PMIX_RANK", "OMPI_COMM_"];

/// Submits one script; returns the job's number.
fn sbatch(script: &Path, arguments: &[String], after: &[&str]) -> Result<String> {
    let mut command = Command::new("sbatch");
    command.arg("--parsable");
    // Submitted from within a job, the new one would inherit what that one is.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if INHERITED.iter().any(|start| text.starts_with(start)) {
            command.env_remove(&name);
        }
    }
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

/// What Slurm, where there is one, says of a script; an error if it refuses it.
fn test_only(script: &Path) -> Option<Result<String, String>> {
    let output = Command::new("sbatch").arg("--test-only").arg(script).output().ok()?;
    let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
    // Installed here, but no cluster's: as good as none.
    if ["configuration source", "Unable to contact"].iter().any(|unreached| words.contains(unreached)) {
        return None;
    }
    Some(if output.status.success() { Ok(words) } else { Err(words) })
}

/// The jobs for people: the graph, and in a dry run each script.
pub fn table(written: &[Written]) -> String {
    if written.is_empty() {
        return "nothing to submit: all is done\n".into();
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_thousand_modules_each_in_its_own_job_cost_what_the_plan_does() {
        let depths = vec!["1"; 1000].join(", ");
        let plan =
            Plan::new(Config::parse(&format!("[model]\ndepths = [{depths}]\n"), &[]).unwrap(), 1_281_167).unwrap();
        let places = Places { binary: Path::new("/i"), config: Path::new("/r/c.toml"), run_dir: Path::new("/r") };
        let jobs = jobs(&plan, places, &Situation { max_array_size: 1, ..Situation::default() }).unwrap();
        assert_eq!(jobs.len(), 1002);
        // Once for all jobs: a thousand modules by a thousand jobs would take minutes.
        let costs = costs(&plan, plan.wanted().flat_map(|row| plan.phases(row)).collect());
        let of_jobs: f64 = jobs.iter().map(|job| flops(&costs, job)).sum();
        let of_plan: f64 = costs.iter().map(|(_, flops)| flops).sum();
        assert!((of_jobs / of_plan - 1.0).abs() < 1e-9, "{of_jobs} {of_plan}");
    }
}
