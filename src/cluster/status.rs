//! `incubate status RUN_DIR`: shows the state of the nodes of the run's graph that pack, train or assemble. The state follows from
//! heartbeats and artefacts, and from Slurm's queue if the run was submitted to Slurm.

use super::evidence::{gather, is_imported};
use super::queue::Queue;
use crate::plan::Plan;
use crate::run::graph::{Graph, Node};
use crate::run::state::{Evidence, Found, State, states};
use crate::store::ledger::Total;
use crate::store::progress::{Progress, duration};
use crate::store::{ArtefactCache, RunDir};
use crate::task::{Score, Task};
use anyhow::Result;
use serde::{Serialize, Serializer};
use std::fmt::Write;
use std::path::Path;

/// One line of the status, about one node.
#[derive(Debug, Serialize)]
pub struct Line {
    pub phase: String,
    #[serde(serialize_with = "as_word")]
    pub state: State,
    /// Why the node is in this state, with the cure if there is one. For a running node, why its checkpoints cannot be written at
    /// present.
    pub why: Option<String>,
    /// The ID of the node's Slurm job, such as `17`, or `17_2` for a task.
    pub job: Option<String>,
    pub step: u64,
    pub steps: u64,
    pub images_per_s: f64,
    pub eta_s: Option<f64>,
    /// The seconds spent on the node, over all starts.
    pub seconds: f64,
    pub restarts: u32,
    /// The share, from 0 to 1, of `seconds` that was spent in steps that did not have to be repeated.
    pub goodput: Option<f64>,
    pub host: Option<String>,
    /// The seconds since the last heartbeat or the last renewal of the lease. None if the node is done or has no heartbeat.
    pub heartbeat_s: Option<f64>,
    /// The images, floating-point operations and device-hours of the node, summed over all starts, and the number of starts.
    pub computed: Total,
    /// The score of the node's artefact in the headline metric.
    #[serde(flatten)]
    pub headline: Score,
}

fn as_word<S: Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.word())
}

/// All lines of the status of a run directory. `artefacts` caches the headers of artefacts for the next call.
pub fn status(path: &Path, artefacts: &mut ArtefactCache) -> Result<Vec<Line>> {
    let run = RunDir { path: path.into() };
    // The numbers of steps come from the heartbeats, so the plan does not need the data.
    let plan = Plan::without_data(RunDir::config_of(path)?);
    // If Slurm cannot be asked, the heartbeats and artefacts still show most of the status.
    lines(&plan, &plan.graph(), &run, &Queue::as_far_as_known(&run)?, artefacts)
}

/// One line for each node that the status shows.
pub fn lines(
    plan: &Plan,
    graph: &Graph,
    run: &RunDir,
    queue: &Queue,
    artefacts: &mut ArtefactCache,
) -> Result<Vec<Line>> {
    let find =
        |node: &Node| Ok(artefacts.find(run, node).unwrap_or_else(|error| Found::Unreadable(format!("{error:#}"))));
    let mut gathered = gather(graph, &plan.config, queue, find)?;
    let heartbeat = |node: &Node| Progress::read(&run.path, &node.name).filter(|_| node.row.has_heartbeat());
    let heartbeats: Vec<Option<Progress>> = graph.nodes().iter().map(heartbeat).collect();
    for (evidence, heartbeat) in gathered.iter_mut().zip(&heartbeats) {
        evidence.heartbeat = heartbeat.as_ref().map(|progress| progress.heartbeat(run));
    }
    let is_imported = is_imported(graph, &gathered);
    let states = states(graph, &gathered);
    let mut lines = Vec::new();
    for (((node, evidence), heartbeat), state) in graph.nodes().iter().zip(&gathered).zip(&heartbeats).zip(states) {
        if is_shown(node, evidence, is_imported) {
            let plan = &plan.of_task(node.row.task());
            let mut line = line_of(plan, node, state, evidence, heartbeat.as_ref());
            line.computed = plan.phase_of(node).map_or(Total::default(), |phase| run.total(plan, &phase));
            line.headline =
                Task::of(&plan.config).headline_score(artefacts.header(run, node).map(|header| &header.metrics));
            lines.push(line);
        }
    }
    Ok(lines)
}

/// Whether the status shows a node. Only nodes of rows with heartbeats are shown. If the target was imported, a wanted node that
/// would make it is shown if it has a file. Any other node is shown if the run wants it, or if it trains and has a file or a
/// heartbeat.
fn is_shown(node: &Node, evidence: &Evidence, is_imported: bool) -> bool {
    let has_file = evidence.found != Found::Nothing;
    let is_trained = node.row.phase().is_some() && (has_file || evidence.heartbeat.is_some());
    let is_before_imported = node.is_wanted && !node.is_needed(is_imported);
    node.row.has_heartbeat() && if is_before_imported { has_file } else { node.is_wanted || is_trained }
}

/// The line of a node without `computed` and `headline`, which the caller fills in. `heartbeat` is the node's last heartbeat.
fn line_of(plan: &Plan, node: &Node, state: State, evidence: &Evidence, heartbeat: Option<&Progress>) -> Line {
    let running = heartbeat.filter(|_| state == State::Running);
    let global_batch = plan.phase_of(node).map_or(0, |phase| phase.training.global_batch);
    Line {
        phase: node.name.clone(),
        why: running.and_then(|p| p.trouble.clone()).or_else(|| state.why(node)),
        job: evidence.queued.as_ref().map(|queued| queued.id.clone()).or_else(|| heartbeat.and_then(|p| p.job.clone())),
        step: heartbeat.map_or(0, |p| p.step),
        steps: heartbeat.map_or(0, |p| p.steps),
        images_per_s: running.map_or(0.0, |p| p.images_per_s),
        eta_s: running.and_then(|p| p.eta(global_batch)),
        seconds: heartbeat.map_or(0.0, |p| p.seconds),
        restarts: heartbeat.map_or(0, |p| p.restarts),
        goodput: heartbeat.filter(|p| p.seconds > 0.0 && p.steps > 0).map(|p| (p.useful_s / p.seconds).min(1.0)),
        host: running.map(|p| p.host.clone()),
        heartbeat_s: evidence.heartbeat.as_ref().map(|heartbeat| heartbeat.age).filter(|_| state != State::Done),
        computed: Total::default(),
        headline: Task::of(&plan.config).headline_score(None),
        state,
    }
}

/// The status as a table for people.
pub fn table(lines: &[Line]) -> String {
    let mut out = format!(
        "{:<10} {:<9} {:>15} {:>9} {:>8} {:>8} {:>9} {:>8} {:>8} {:>8}  {:<10} {}\n",
        "phase",
        "state",
        "step",
        "images/s",
        "ETA",
        "time",
        "restarts",
        "goodput",
        "beat",
        lines.first().map_or_else(String::new, |line| line.headline.metric.title()),
        "job",
        "where, why"
    );
    for line in lines {
        let time = |s: Option<f64>| s.map_or("-".into(), duration);
        let percent = |p: Option<f64>| p.map_or("-".into(), |p| format!("{:.0} %", 100.0 * p));
        let _ = writeln!(
            out,
            "{:<10} {:<9} {:>15} {:>9.0} {:>8} {:>8} {:>9} {:>8} {:>8} {:>8}  {:<10} {}",
            line.phase,
            line.state.word(),
            format!("{}/{}", line.step, line.steps),
            line.images_per_s,
            time(line.eta_s),
            duration(line.seconds),
            line.restarts,
            percent(line.goodput),
            time(line.heartbeat_s),
            headline(line, lines),
            line.job.as_deref().unwrap_or("-"),
            line.why.as_deref().or(line.host.as_deref()).unwrap_or("-")
        );
    }
    let sum = |number: fn(&Total) -> f64| lines.iter().map(|line| number(&line.computed)).sum::<f64>();
    let _ = writeln!(
        out,
        "computed so far: {} images, {:.2e} FLOPs, {:.4} device-hours in {} start(s)",
        sum(|total| total.images as f64),
        sum(|total| total.flops),
        sum(|total| total.device_hours),
        sum(|total| total.starts as f64)
    );
    out
}

/// The value of a line's headline metric. The column's title names the first line's metric. If this line has another metric, its
/// name precedes the value.
fn headline(line: &Line, lines: &[Line]) -> String {
    let value = line.headline.cell("-");
    let is_titled = lines.first().is_some_and(|first| first.headline.metric == line.headline.metric);
    if is_titled { value } else { format!("{} {value}", line.headline.metric.name) }
}

/// Whether all nodes that are shown are done.
pub fn is_all_done(lines: &[Line]) -> bool {
    lines.iter().all(|line| line.state == State::Done)
}
