//! `incubate status RUN_DIR`: where each phase stands, from heartbeats and artefacts alone.

use crate::config::Config;
use crate::plan::Plan;
use crate::plan::phases::{ASSEMBLED, MODULE, PHASES};
use crate::store::progress::{Progress, State, duration, unix_time};
use crate::store::{RunDir, artefact};
use anyhow::Result;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;

/// A heartbeat older than this many seconds means that nobody is working.
const STALE: f64 = 60.0;

/// One line of the status.
#[derive(Debug, Serialize)]
pub struct Line {
    pub phase: String,
    /// `waiting`, `running`, `stalled`, `stopped`, `failed`, `done` or `damaged`.
    pub state: &'static str,
    pub step: u64,
    pub steps: u64,
    pub images_per_s: f64,
    pub eta_s: Option<f64>,
    pub seconds: f64,
    pub host: Option<String>,
    /// Seconds since the last heartbeat.
    pub heartbeat_s: Option<f64>,
    pub top1: Option<f64>,
}

/// Every phase of a run directory.
pub fn status(path: &Path) -> Result<Vec<Line>> {
    let config = RunDir::config_of(path)?;
    let run = RunDir { path: path.into() };
    // Steps come from the heartbeats: the data need not be reachable here.
    let plan = Plan { config, train_images: 0 };
    let mut lines = Vec::new();
    for (name, file, global_batch) in entries(&plan) {
        lines.push(line(&run, &name, &file, global_batch));
    }
    Ok(lines)
}

fn entries(plan: &Plan) -> Vec<(String, String, usize)> {
    let config: &Config = &plan.config;
    let mut entries = Vec::new();
    for phase in PHASES.iter().filter(|p| p.name != "e2e" || config.run.e2e) {
        for phase in plan.phases(phase) {
            entries.push((phase.name, phase.file, phase.training.global_batch));
        }
        if phase.name == MODULE.name {
            entries.push(("assemble".into(), ASSEMBLED.into(), 0));
        }
    }
    entries
}

fn line(run: &RunDir, name: &str, file: &str, global_batch: usize) -> Line {
    let progress = Progress::read(&run.path, name);
    let finished = run.file(file).exists().then(|| artefact::read_header(&run.file(file)));
    let age = progress.as_ref().map(|p| (unix_time() - p.updated).max(0.0));
    let state = match (&finished, &progress) {
        (Some(Ok(_)), _) => "done",
        (Some(Err(_)), _) => "damaged",
        (None, None) => "waiting",
        (None, Some(p)) => match p.state {
            State::Stopped => "stopped",
            State::Failed => "failed",
            _ if age.is_some_and(|age| age > STALE) => "stalled",
            _ => "running",
        },
    };
    let running = progress.as_ref().filter(|_| state == "running");
    Line {
        phase: name.into(),
        state,
        step: progress.as_ref().map_or(0, |p| p.step),
        steps: progress.as_ref().map_or(0, |p| p.steps),
        images_per_s: running.map_or(0.0, |p| p.images_per_s),
        eta_s: running.and_then(|p| p.eta(global_batch)),
        seconds: progress.as_ref().map_or(0.0, |p| p.seconds),
        host: running.map(|p| p.host.clone()),
        heartbeat_s: age,
        top1: finished.and_then(Result::ok).and_then(|(header, _)| header.metrics.get("top1").copied()),
    }
}

/// The status for people.
pub fn table(lines: &[Line]) -> String {
    let mut out = format!(
        "{:<10} {:<8} {:>15} {:>10} {:>9} {:>9} {:>10} {:>8}  {}\n",
        "phase", "state", "step", "images/s", "ETA", "time", "heartbeat", "top-1 %", "host"
    );
    for l in lines {
        let time = |s: Option<f64>| s.map_or("-".into(), duration);
        let _ = writeln!(
            out,
            "{:<10} {:<8} {:>15} {:>10.0} {:>9} {:>9} {:>10} {:>8}  {}",
            l.phase,
            l.state,
            format!("{}/{}", l.step, l.steps),
            l.images_per_s,
            time(l.eta_s),
            duration(l.seconds),
            time(l.heartbeat_s),
            l.top1.map_or("-".into(), |t| format!("{t:.2}")),
            l.host.as_deref().unwrap_or("-")
        );
    }
    out
}
