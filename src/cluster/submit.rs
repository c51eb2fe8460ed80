//! `incubate submit`: writes the scripts into the run directory and submits them with sbatch. Each job waits for the jobs that it
//! needs.

use super::evidence::{gather, is_imported};
use super::job::{JobKind, PlannedJob};
use super::queue::{self, Queue, Submitted};
use super::sbatch;
use super::script::Paths;
use super::slurm::{DEFAULT_MAX_ARRAY_SIZE, OpenJobs, Situation, jobs};
use crate::plan::Plan;
use crate::plan::cost::cost;
use crate::run::graph::{Graph, Node};
use crate::run::state::{Found, JobState, State, states};
use crate::store::progress::Progress;
use crate::store::{ArtefactCache, RunDir, durable};
use crate::{require, usage};
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A job whose script was written. Unless this was a dry run, the job was also submitted.
#[derive(Debug, Serialize)]
pub struct Written {
    #[serde(flatten)]
    pub job: Submitted,
    /// The jobs that this job waits for: jobs of this submission by their names, jobs of earlier submissions as `job 17`.
    pub after: Vec<String>,
    /// The floating-point operations of the forward and backward passes in the phases that the job trains.
    pub flops: f64,
    /// The output of `sbatch --test-only`, in a dry run on a machine that reaches Slurm.
    pub check: Option<String>,
    /// The text of the script, in a dry run.
    pub text: Option<String>,
}

/// Submits jobs for the nodes that are not done and have no open job, and for the user's scripts that are due. First cancels the
/// pending jobs that the new jobs replace. A dry run submits and cancels nothing. It writes the scripts, and lets Slurm check them
/// if Slurm can be asked.
///
/// # Errors
/// A usage error if sbatch refuses a script, if a job that must be replaced is running, or if there is nothing to submit while
/// earlier jobs are open. [`crate::error::Failure::Damaged`] if an artefact is damaged or does not fit, so that the jobs would
/// refuse it.
pub fn submit(plan: &Plan, binary: &Path, dry_run: bool) -> Result<Vec<Written>> {
    let run = RunDir::open(&plan.config)?;
    let graph = plan.graph();
    let queue = if dry_run { Queue::as_far_as_known(&run)? } else { Queue::of_run(&run)? };
    let run_dir = run.path.canonicalize()?;
    let folder = run_dir.join("slurm");
    let config = folder.join("config.toml");
    let paths = Paths { binary, config: &config, run_dir: &run_dir };
    let situation = situation(plan, &graph, &run, &queue)?;
    let mut jobs = jobs(plan, &graph, paths, &situation)?;
    jobs.extend(scripts(&graph, &jobs, &situation, &run_dir)?);
    let open: Vec<&str> = queue.reports.iter().filter(|job| job.is_open()).map(|job| job.id.as_str()).collect();
    require!(
        dry_run || !jobs.is_empty() || open.is_empty(),
        "{}: already submitted as job {}; follow the run with `incubate status`, or cancel its jobs with `incubate cancel`",
        run.path.display(),
        open.join(", ")
    );
    std::fs::create_dir_all(&folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    // The jobs read this config. A dry run does not replace the config that submitted jobs read.
    if !dry_run || queue.jobs.is_empty() {
        durable::replace_bytes(&config, plan.config.to_toml().as_bytes())?;
    }
    let flops = |job: &PlannedJob| {
        let phases = job.nodes.iter().filter_map(|&node| plan.phase_of(&graph.nodes()[node]));
        phases.map(|phase| cost(plan, &phase).flops).sum()
    };
    if dry_run {
        return check(jobs, flops, &folder);
    }
    cancel_replaced(&jobs, &queue)?;
    submit_all(jobs, flops, &folder, |new| queue::write_record(&run, &queue.with_new(new)))
}

/// Writes the scripts, and lets Slurm check them if Slurm can be asked. Fails if Slurm refuses a script.
fn check(jobs: Vec<PlannedJob>, flops: impl Fn(&PlannedJob) -> f64, folder: &Path) -> Result<Vec<Written>> {
    let mut written: Vec<Written> = Vec::new();
    let mut refused = None;
    for job in jobs {
        let script = write_script(&job, folder)?;
        let check = sbatch::test_only(&script);
        if let Some(Err(words)) = &check {
            refused.get_or_insert_with(|| usage!("{}: sbatch refuses it: {words}", script.display()));
        }
        let (after, flops) = (names_before(&job, &written), flops(&job));
        let check = check.map(|said| said.unwrap_or_else(|words| words));
        let PlannedJob { kind, modules, first_module, script: text, .. } = job;
        let job = Submitted { kind, modules, first_module, script, id: None };
        written.push(Written { job, after, flops, check, text: Some(text) });
    }
    refused.map_or(Ok(written), Err)
}

/// Writes the scripts and submits them. After every job, `record` stores the jobs that were submitted so far. So `incubate cancel`
/// knows these jobs even if a later job is refused.
fn submit_all(
    jobs: Vec<PlannedJob>,
    flops: impl Fn(&PlannedJob) -> f64,
    folder: &Path,
    record: impl Fn(&[Submitted]) -> Result<()>,
) -> Result<Vec<Written>> {
    let mut written: Vec<Written> = Vec::new();
    let mut submitted: Vec<Submitted> = Vec::new();
    for job in jobs {
        let script = write_script(&job, folder)?;
        let ids = job.after.iter().filter_map(|&position| submitted[position].id.as_deref());
        let ids: Vec<&str> = ids.chain(job.after_open.iter().map(String::as_str)).collect();
        let id = sbatch::submit(&script, &job.arguments, &ids)?;
        let (after, flops) = (names_before(&job, &written), flops(&job));
        let PlannedJob { kind, modules, first_module, .. } = job;
        let job = Submitted { kind, modules, first_module, script, id: Some(id) };
        submitted.push(job.clone());
        written.push(Written { job, after, flops, check: None, text: None });
        record(&submitted)?;
    }
    Ok(written)
}

fn write_script(job: &PlannedJob, folder: &Path) -> Result<PathBuf> {
    let script = folder.join(format!("{}.sh", job.kind));
    durable::replace_bytes(&script, job.script.as_bytes())?;
    Ok(script)
}

/// The jobs that a job waits for: jobs of this submission by their names, jobs of earlier submissions as `job 17`.
fn names_before(job: &PlannedJob, written: &[Written]) -> Vec<String> {
    let open = job.after_open.iter().map(|id| format!("job {id}"));
    job.after.iter().map(|&position| written[position].job.kind.to_string()).chain(open).collect()
}

/// The jobs for the user's own scripts. `jobs` are the program's own jobs that are submitted now. If there are any, all scripts run
/// after the last of them. Otherwise only the scripts run that have not succeeded and have no open job, and they wait for the open
/// last job, if there is one.
fn scripts(graph: &Graph, jobs: &[PlannedJob], situation: &Situation, run_dir: &Path) -> Result<Vec<PlannedJob>> {
    let after: Vec<usize> = jobs.len().checked_sub(1).into_iter().collect();
    let after_open: Vec<String> = if after.is_empty() { situation.open.last.iter().cloned().collect() } else { vec![] };
    let mut scripts = Vec::new();
    for (position, node) in graph.nodes().iter().enumerate() {
        let Some(path) = &node.script else { continue };
        let is_due = situation.unfinished.contains(&position) && !situation.open.of_nodes.contains_key(&position);
        if after.is_empty() && !is_due {
            continue;
        }
        let script =
            std::fs::read_to_string(path).map_err(|e| usage!("{}: {e}; correct slurm.downstream", path.display()))?;
        scripts.push(PlannedJob {
            kind: JobKind::Script(node.name.clone()),
            nodes: vec![position],
            modules: vec![],
            first_module: 0,
            after: after.clone(),
            after_open: after_open.clone(),
            script,
            arguments: vec![run_dir.join("export").to_string_lossy().into_owned()],
        });
    }
    Ok(scripts)
}

/// Cancels the pending jobs of earlier submissions that the new jobs replace, because an old job does not wait for the new jobs.
/// Arrays are not replaced, because a new array leaves out modules with an open task. Fails if a job to be replaced is running.
fn cancel_replaced(jobs: &[PlannedJob], queue: &Queue) -> Result<()> {
    let mut ids = Vec::new();
    for old in queue.jobs.iter().filter(|old| old.modules.is_empty()) {
        let is_replaced = jobs.iter().any(|job| job.kind == old.kind || job.kind.is_last() && old.kind.is_last());
        let Some(queued) = queue.about_job(old, None).filter(|queued| is_replaced && queued.is_open()) else {
            continue;
        };
        require!(
            queued.state == JobState::Pending,
            "job {} ({}) is running, although jobs that it needs are not done; wait for its end, or cancel it with `incubate cancel`",
            queued.id,
            old.kind
        );
        ids.push(queued.id.clone());
    }
    queue::scancel(&ids)
}

/// Gathers the [`Situation`] of the run.
fn situation(plan: &Plan, graph: &Graph, run: &RunDir, queue: &Queue) -> Result<Situation> {
    let nodes = graph.nodes().iter().enumerate();
    let open = nodes.filter_map(|(position, node)| Some((position, queue.open_job(node, |kind| !kind.is_last())?)));
    let open = open.collect();
    let last = graph.nodes().iter().find_map(|node| queue.open_job(node, JobKind::is_last));
    Ok(Situation {
        unfinished: unfinished(plan, graph, run, queue)?,
        open: OpenJobs { of_nodes: open, last },
        max_array_size: queue::max_array_size().unwrap_or(DEFAULT_MAX_ARRAY_SIZE),
        save_s: save_s(plan, run),
    })
}

/// The nodes that the run needs and that are not done, as positions in the graph.
fn unfinished(plan: &Plan, graph: &Graph, run: &RunDir, queue: &Queue) -> Result<Vec<usize>> {
    let mut artefacts = ArtefactCache::default();
    let find = |node: &Node| if node.is_wanted { artefacts.find(run, node) } else { Ok(Found::Nothing) };
    let evidence = gather(graph, &plan.config, queue, find)?;
    let is_imported = is_imported(graph, &evidence);
    let mut unfinished = Vec::new();
    for (position, state) in states(graph, &evidence).into_iter().enumerate() {
        let node = &graph.nodes()[position];
        if node.is_needed(is_imported) && state.or_refusal(node, run.file(&node.file))? != State::Done {
            unfinished.push(position);
        }
    }
    Ok(unfinished)
}

/// The seconds that a checkpoint takes: the time of each phase's last checkpoint, and of these times the longest. Before the first
/// checkpoint, an estimate for the phase that trains most parameters: the weights and two moments in fp32, at 100 MB per second.
fn save_s(plan: &Plan, run: &RunDir) -> f64 {
    const BYTES_PER_S: f64 = 100e6;
    let phases = plan.wanted_phases();
    let measured = phases.iter().filter_map(|phase| Progress::read(&run.path, &phase.name)?.save_s).fold(0.0, f64::max);
    if measured > 0.0 {
        return measured;
    }
    let largest = phases.iter().map(|phase| cost(plan, phase).trained_parameters).max().unwrap_or(0);
    12.0 * largest as f64 / BYTES_PER_S
}

/// The jobs as a text for people. After a dry run, the text includes the scripts.
pub fn table(written: &[Written]) -> String {
    if written.is_empty() {
        return "nothing to submit: all is done\n".into();
    }
    let mut out = String::new();
    for Written { job, after, flops, check, text } in written {
        let state = match (&job.id, check) {
            (Some(id), _) => format!("job {id}"),
            (None, Some(check)) => format!("not submitted; {check}"),
            (None, None) => "not submitted; no Slurm here to check it".into(),
        };
        let modules = match job.modules.len() {
            0 => String::new(),
            n => format!(" ({n} modules)"),
        };
        let after = if after.is_empty() { String::new() } else { format!(", after {}", after.join(", ")) };
        out += &format!("{}{modules}: {state}{after}, {flops:.2e} FLOPs\n  {}\n", job.kind, job.script.display());
        for line in text.iter().flat_map(|text| text.lines()) {
            out += &format!("  | {line}\n");
        }
    }
    out
}
