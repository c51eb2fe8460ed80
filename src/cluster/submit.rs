//! `incubate submit`: writes the scripts into the run directory and hands them to sbatch, each waiting for those before.

use super::evidence::{gather, is_imported};
use super::job::{JobKind, PlannedJob};
use super::queue::{self, Queue, Submitted};
use super::sbatch;
use super::script::Places;
use super::slurm::{Alive, MAX_ARRAY_SIZE, Situation, jobs};
use crate::plan::Plan;
use crate::plan::cost::cost;
use crate::run::graph::{Graph, Node};
use crate::run::state::{Found, JobState, State, states};
use crate::store::progress::Progress;
use crate::store::{RunDir, Seen, durable};
use crate::{require, usage};
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A job that was written, and submitted unless it was a dry run.
#[derive(Debug, Serialize)]
pub struct Written {
    #[serde(flatten)]
    pub job: Submitted,
    /// The names of the jobs that it waits for.
    pub after: Vec<String>,
    /// Operations of all its training, forward and backward.
    pub flops: f64,
    /// What `sbatch --test-only` says, in a dry run on a machine with Slurm.
    pub check: Option<String>,
    /// The script, in a dry run.
    pub text: Option<String>,
}

/// Submits what is neither done nor on its way. A dry run writes the scripts and has Slurm, if there is one, check them.
///
/// # Errors
/// A usage error if sbatch refuses a script, or if all that is left is queued or running already; an artefact that the jobs
/// would refuse is refused here.
pub fn submit(plan: &Plan, binary: &Path, dry_run: bool) -> Result<Vec<Written>> {
    let run = RunDir::open(&plan.config)?;
    let graph = plan.graph();
    let queue = if dry_run { Queue::as_far_as_known(&run)? } else { Queue::of_run(&run)? };
    let run_dir = run.path.canonicalize()?;
    let folder = run_dir.join("slurm");
    let config = folder.join("config.toml");
    let places = Places { binary, config: &config, run_dir: &run_dir };
    let situation = situation(plan, &graph, &run, &queue)?;
    let mut jobs = jobs(plan, &graph, places, &situation)?;
    jobs.extend(scripts(&graph, &jobs, &situation, &run_dir)?);
    let alive: Vec<&str> = queue.queued.iter().filter(|job| job.is_alive()).map(|job| job.id.as_str()).collect();
    require!(
        dry_run || !jobs.is_empty() || alive.is_empty(),
        "{}: already submitted as job {}; look with `incubate status`, or take it back with `incubate cancel`",
        run.path.display(),
        alive.join(", ")
    );
    std::fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    // The jobs read this config: keys that change no result, such as run.threads, are those of the last submission.
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
    withdraw(&jobs, &queue)?;
    hand_over(jobs, flops, &folder, |new| queue::keep(&run, &queue.with_new(new)))
}

/// Writes the scripts and has Slurm, if there is one, check them.
fn check(jobs: Vec<PlannedJob>, flops: impl Fn(&PlannedJob) -> f64, folder: &Path) -> Result<Vec<Written>> {
    let mut written: Vec<Written> = Vec::new();
    let mut refused = None;
    for job in jobs {
        let script = write(&job, folder)?;
        let check = sbatch::test_only(&script);
        if let Some(Err(words)) = &check {
            refused.get_or_insert_with(|| usage!("{}: sbatch refuses it: {words}", script.display()));
        }
        let (after, flops) = (names_before(&job, &written), flops(&job));
        let check = check.map(|said| said.unwrap_or_else(|words| words));
        let PlannedJob { kind, modules, first, script: text, .. } = job;
        let job = Submitted { kind, modules, first, script, id: None };
        written.push(Written { job, after, flops, check, text: Some(text) });
    }
    refused.map_or(Ok(written), Err)
}

/// Writes the scripts and submits them. `keep` records what was submitted after every job, so that `incubate cancel` knows
/// those that were submitted before one was refused.
fn hand_over(
    jobs: Vec<PlannedJob>,
    flops: impl Fn(&PlannedJob) -> f64,
    folder: &Path,
    keep: impl Fn(&[Submitted]) -> Result<()>,
) -> Result<Vec<Written>> {
    let mut written: Vec<Written> = Vec::new();
    let mut submitted: Vec<Submitted> = Vec::new();
    for job in jobs {
        let script = write(&job, folder)?;
        let ids = job.after.iter().filter_map(|&place| submitted[place].id.as_deref());
        let ids: Vec<&str> = ids.chain(job.after_alive.iter().map(String::as_str)).collect();
        let id = sbatch::submit(&script, &job.arguments, &ids)?;
        let (after, flops) = (names_before(&job, &written), flops(&job));
        let PlannedJob { kind, modules, first, .. } = job;
        let job = Submitted { kind, modules, first, script, id: Some(id) };
        submitted.push(job.clone());
        written.push(Written { job, after, flops, check: None, text: None });
        keep(&submitted)?;
    }
    Ok(written)
}

fn write(job: &PlannedJob, folder: &Path) -> Result<PathBuf> {
    let script = folder.join(format!("{}.sh", job.kind));
    durable::replace_bytes(&script, job.script.as_bytes())?;
    Ok(script)
}

/// What a job waits for: jobs of this submission by their names, and those of earlier ones by their numbers.
fn names_before(job: &PlannedJob, written: &[Written]) -> Vec<String> {
    let alive = job.after_alive.iter().map(|id| format!("job {id}"));
    job.after.iter().map(|&place| written[place].job.kind.to_string()).chain(alive).collect()
}

/// Jobs for the user's own scripts: all of them after a last job that is submitted, else those that did not end well.
fn scripts(graph: &Graph, jobs: &[PlannedJob], situation: &Situation, run_dir: &Path) -> Result<Vec<PlannedJob>> {
    let after: Vec<usize> = jobs.len().checked_sub(1).into_iter().collect();
    let alive: Vec<String> = if after.is_empty() { situation.alive.last.iter().cloned().collect() } else { vec![] };
    let mut scripts = Vec::new();
    for (position, node) in graph.nodes().iter().enumerate() {
        let Some(path) = &node.script else { continue };
        let is_left = situation.left.contains(&position) && !situation.alive.nodes.contains_key(&position);
        if after.is_empty() && !is_left {
            continue;
        }
        let script =
            std::fs::read_to_string(path).map_err(|e| usage!("{}: {e}; correct slurm.downstream", path.display()))?;
        scripts.push(PlannedJob {
            kind: JobKind::Script(node.name.clone()),
            nodes: vec![position],
            modules: vec![],
            first: 0,
            after: after.clone(),
            after_alive: alive.clone(),
            script,
            arguments: vec![run_dir.join("export").to_string_lossy().into_owned()],
        });
    }
    Ok(scripts)
}

/// Cancels jobs of earlier submissions that wait for something that failed: they are submitted again, with new jobs to wait
/// for.
fn withdraw(jobs: &[PlannedJob], queue: &Queue) -> Result<()> {
    let mut ids = Vec::new();
    for old in queue.jobs.iter().filter(|old| old.modules.is_empty()) {
        let is_again = jobs.iter().any(|job| job.kind == old.kind || job.kind.is_last() && old.kind.is_last());
        let Some(queued) = queue.about_job(old, None).filter(|queued| is_again && queued.is_alive()) else { continue };
        require!(
            queued.state == JobState::Pending,
            "job {} ({}) is running, though what it needs is not done; wait for its end, or take it back with `incubate cancel`",
            queued.id,
            old.kind
        );
        ids.push(queued.id.clone());
    }
    queue::scancel(&ids)
}

/// What is left to do, what is alive, and what the scripts depend on.
fn situation(plan: &Plan, graph: &Graph, run: &RunDir, queue: &Queue) -> Result<Situation> {
    let nodes = graph.nodes().iter().enumerate();
    let alive = nodes.filter_map(|(position, node)| Some((position, queue.alive(node, |kind| !kind.is_last())?)));
    let alive = alive.collect();
    let last = graph.nodes().iter().find_map(|node| queue.alive(node, JobKind::is_last));
    Ok(Situation {
        left: left(plan, graph, run, queue)?,
        alive: Alive { nodes: alive, last },
        max_array_size: queue::max_array_size().unwrap_or(MAX_ARRAY_SIZE),
        save_s: save_s(plan, run),
    })
}

/// The nodes that are needed and not done.
fn left(plan: &Plan, graph: &Graph, run: &RunDir, queue: &Queue) -> Result<Vec<usize>> {
    let mut seen = Seen::default();
    let look = |node: &Node| if node.is_wanted { seen.look(run, node) } else { Ok(Found::Nothing) };
    let evidence = gather(graph, &plan.config, queue, look)?;
    let is_imported = is_imported(graph, &evidence);
    let mut left = Vec::new();
    for (position, state) in states(graph, &evidence).into_iter().enumerate() {
        let node = &graph.nodes()[position];
        if node.is_needed(is_imported) && state.or_refusal(node, run.file(&node.file))? != State::Done {
            left.push(position);
        }
    }
    Ok(left)
}

/// Seconds that the slowest checkpoint took so far. Before the first one they are estimated, from weights and two moments
/// in fp32.
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
        out += &format!("{}{modules}: {what}{after}, {flops:.2e} FLOPs\n  {}\n", job.kind, job.script.display());
        for line in text.iter().flat_map(|text| text.lines()) {
            out += &format!("  | {line}\n");
        }
    }
    out
}
