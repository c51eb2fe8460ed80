//! `incubate status RUN_DIR`: where each phase stands, from heartbeats, artefacts and, where there is one, the queue.

use super::queue::{self, Queued};
use crate::data::source::packed;
use crate::plan::Plan;
use crate::plan::phases::{ASSEMBLED, BEFORE_ASSEMBLED, E2E, FINETUNE, MODULE};
use crate::store::progress::{Progress, State, duration, unix_time};
use crate::store::{RunDir, artefact, lease};
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A heartbeat older than this many seconds means that nobody is working.
const STALE: f64 = 60.0;

/// One line of the status.
#[derive(Debug, Serialize)]
pub struct Line {
    pub phase: String,
    /// `waiting`, `queued`, `running`, `stalled`, `stopped`, `failed`, `cancelled`, `done` or `damaged`.
    pub state: &'static str,
    /// Why: the queue's reason, or the error that it failed with.
    pub why: Option<String>,
    /// Its Slurm job, as `squeue` names it.
    pub job: Option<String>,
    pub step: u64,
    pub steps: u64,
    pub images_per_s: f64,
    pub eta_s: Option<f64>,
    /// Over all starts.
    pub seconds: f64,
    pub restarts: u32,
    /// Time in steps that count over all time spent, of 1.
    pub goodput: Option<f64>,
    pub host: Option<String>,
    /// Seconds since the last heartbeat.
    pub heartbeat_s: Option<f64>,
    pub top1: Option<f64>,
}

/// What finished artefacts say, by file, with the length and time of change at which it was read. A file is hashed whole
/// before it is believed, which is too much for every look of `--watch`.
#[derive(Default)]
pub struct Seen(BTreeMap<PathBuf, (u64, SystemTime, Finished)>);

/// What the status tells of an artefact.
#[derive(Debug, Clone, Copy)]
struct Finished {
    top1: Option<f64>,
    /// Whether it derives from no meta model.
    is_imported: bool,
}

impl Seen {
    /// None where there is no such file.
    fn look(&mut self, file: &Path) -> Option<Result<Finished>> {
        file.exists().then(|| self.finished(file))
    }

    fn finished(&mut self, file: &Path) -> Result<Finished> {
        let found = std::fs::metadata(file)?;
        let as_it_is = (found.len(), found.modified()?);
        match self.0.get(file) {
            Some(&(length, changed, finished)) if (length, changed) == as_it_is => Ok(finished),
            _ => {
                let header = artefact::read_header(file)?.0;
                let finished =
                    Finished { top1: header.metrics.get("top1").copied(), is_imported: header.meta.is_none() };
                self.0.insert(file.into(), (as_it_is.0, as_it_is.1, finished));
                Ok(finished)
            }
        }
    }

    /// As `RunDir::is_imported`: whether there is a model that needs none of the phases before it.
    fn has_imported(&mut self, run: &RunDir) -> bool {
        let is_imported = |name| self.look(&run.file(name)).is_some_and(|found| found.is_ok_and(|it| it.is_imported));
        [FINETUNE.writes, ASSEMBLED].into_iter().any(is_imported)
    }
}

/// Every phase of a run directory.
pub fn status(path: &Path, seen: &mut Seen) -> Result<Vec<Line>> {
    let mut config = RunDir::config_of(path)?;
    let run = RunDir { path: path.into() };
    // `incubate e2e` trains the baseline whatever the config says.
    config.run.e2e |= run.file(E2E.writes).exists() || Progress::read(path, E2E.name).is_some();
    // Steps come from the heartbeats: the data need not be reachable here.
    let plan = Plan::without_data(config);
    let mut entries = entries(&plan);
    if seen.has_imported(&run) {
        // Those will never be run; what was run all the same is shown.
        entries.retain(|entry| !entry.is_before || run.file(&entry.file).exists());
    }
    let packs = !plan.config.data.pack_from.as_os_str().is_empty();
    let names = entries.iter().map(|entry| entry.name.clone());
    let phases: Vec<String> = packs.then(|| PACK.to_string()).into_iter().chain(names).collect();
    let jobs = queue::submitted(&run)?;
    // The heartbeats tell most of it, also where no Slurm can be asked.
    let queued = queue::ask(&jobs).unwrap_or_else(|error| {
        log::warn!("{error:#}");
        Vec::new()
    });
    let by_phase = queue::by_phase(&jobs, &queued, &phases);
    let queued = |name: &str| by_phase.get(name).copied();
    let mut lines = Vec::new();
    if packs {
        let done = packed::open(&plan.config.data.path).is_ok();
        lines.push(line(&run, PACK, done.then_some(Ok(None)), 0, queued(PACK)));
    }
    for Entry { name, file, global_batch, .. } in &entries {
        let finished = seen.look(&run.file(file)).map(|found| found.map(|it| it.top1));
        lines.push(line(&run, name, finished, *global_batch, queued(name)));
    }
    Ok(lines)
}

/// The job that packs the data, where there is one.
const PACK: &str = "pack";

/// What gets a line.
struct Entry {
    name: String,
    /// Its artefact.
    file: String,
    global_batch: usize,
    /// Whether it comes before the assembled model, or is that.
    is_before: bool,
}

fn entries(plan: &Plan) -> Vec<Entry> {
    let mut entries = Vec::new();
    for phase in plan.wanted() {
        let is_before = BEFORE_ASSEMBLED.contains(&phase.name);
        for phase in plan.phases(phase) {
            let global_batch = phase.training.global_batch;
            entries.push(Entry { name: phase.name, file: phase.file, global_batch, is_before });
        }
        if phase.name == MODULE.name {
            let (name, file) = ("assemble".into(), ASSEMBLED.into());
            entries.push(Entry { name, file, global_batch: 0, is_before: true });
        }
    }
    entries
}

/// A phase's line; `finished` is what its artefact says, if it is there.
fn line(
    run: &RunDir,
    name: &str,
    finished: Option<Result<Option<f64>>>,
    global_batch: usize,
    queued: Option<&Queued>,
) -> Line {
    let progress = Progress::read(&run.path, name);
    let since = |time: f64| (unix_time() - time).max(0.0);
    // During a long step or evaluation the lease alone is renewed, by a thread of its own.
    let renewed = lease::holder(run, name).map(|holder| since(holder.renewed));
    let age = progress.as_ref().map(|p| renewed.unwrap_or(f64::INFINITY).min(since(p.updated)));
    let (state, why) = match (&finished, &progress) {
        (Some(Ok(_)), _) => ("done", None),
        (Some(Err(error)), _) => ("damaged", Some(format!("{error:#}"))),
        (None, progress) => stands(progress.as_ref(), age, queued),
    };
    let running = progress.as_ref().filter(|_| state == "running");
    let began = progress.as_ref();
    Line {
        phase: name.into(),
        state,
        why,
        job: queued.map(|q| q.id.clone()).or_else(|| began.and_then(|p| p.job.clone())),
        step: began.map_or(0, |p| p.step),
        steps: began.map_or(0, |p| p.steps),
        images_per_s: running.map_or(0.0, |p| p.images_per_s),
        eta_s: running.and_then(|p| p.eta(global_batch)),
        seconds: began.map_or(0.0, |p| p.seconds),
        restarts: began.map_or(0, |p| p.restarts),
        goodput: began.filter(|p| p.seconds > 0.0 && p.steps > 0).map(|p| (p.useful_s / p.seconds).min(1.0)),
        host: running.map(|p| p.host.clone()),
        heartbeat_s: age.filter(|_| state != "done"),
        top1: finished.and_then(Result::ok).flatten(),
    }
}

/// How an unfinished phase stands, and why.
fn stands(progress: Option<&Progress>, age: Option<f64>, queued: Option<&Queued>) -> (&'static str, Option<String>) {
    let fresh = age.is_some_and(|age| age <= STALE);
    // A job that waits, whatever its earlier starts left behind; and one that ended without saying why.
    if let Some(q) = queued {
        if q.state == "PENDING" || q.state == "REQUEUED" {
            return ("queued", Some(q.reason.clone()));
        }
        let said = progress.is_some_and(|p| p.state != State::Running);
        if q.state == "CANCELLED" && !said {
            return ("cancelled", Some(q.reason.clone()));
        }
        if !q.is_alive() && q.state != "COMPLETED" && !said {
            return ("failed", Some(format!("{} ({})", q.state, q.reason)));
        }
    }
    match progress.map(|p| (p.state, p)) {
        None => ("waiting", None),
        Some((State::Stopped, _)) => ("stopped", Some("start it again to resume".into())),
        Some((State::Failed, p)) => ("failed", p.error.clone()),
        Some(_) if fresh => ("running", None),
        Some(_) => ("stalled", Some("no heartbeat; if its process is gone, start it again".into())),
    }
}

/// The status for people.
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
        "top-1 %",
        "job",
        "where, why"
    );
    for l in lines {
        let time = |s: Option<f64>| s.map_or("-".into(), duration);
        let percent = |p: Option<f64>| p.map_or("-".into(), |p| format!("{:.0} %", 100.0 * p));
        let _ = writeln!(
            out,
            "{:<10} {:<9} {:>15} {:>9.0} {:>8} {:>8} {:>9} {:>8} {:>8} {:>8}  {:<10} {}",
            l.phase,
            l.state,
            format!("{}/{}", l.step, l.steps),
            l.images_per_s,
            time(l.eta_s),
            duration(l.seconds),
            l.restarts,
            percent(l.goodput),
            time(l.heartbeat_s),
            l.top1.map_or("-".into(), |t| format!("{t:.2}")),
            l.job.as_deref().unwrap_or("-"),
            l.host.as_deref().or(l.why.as_deref()).unwrap_or("-")
        );
    }
    out
}

/// Whether nothing of the run is left to do.
pub fn is_over(lines: &[Line]) -> bool {
    lines.iter().all(|line| line.state == "done")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::lease::Lease;

    #[test]
    fn a_phase_in_a_long_evaluation_is_running_while_its_lease_is_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir { path: folder.path().into() };
        ["leases", "progress"].iter().for_each(|name| std::fs::create_dir(run.file(name)).unwrap());
        Progress { updated: unix_time() - 2.0 * STALE, ..Progress::begun("meta") }.write(&run.path).unwrap();
        let state = || line(&run, "meta", None, 8, None).state;
        assert_eq!(state(), "stalled");
        let lease = Lease::take(&run, "meta", || false).unwrap();
        assert_eq!(state(), "running");
        drop(lease);
        assert_eq!(state(), "stalled");
    }

    #[test]
    fn what_slurm_took_back_is_cancelled_and_not_failed() {
        let queued = |state: &str| Queued { id: "7".into(), state: state.into(), reason: "Dependency".into() };
        assert_eq!(stands(None, None, Some(&queued("CANCELLED"))).0, "cancelled");
        assert_eq!(stands(None, None, Some(&queued("TIMEOUT"))).0, "failed");
    }
}
