//! What the outside sees of a running phase: log lines, metrics, heartbeats. Written by the first replica of the group.

use super::step::Outcome;
use crate::collective::Collective;
use crate::plan::PhasePlan;
use crate::store::RunDir;
use crate::store::lease::process_age;
use crate::store::metrics::Metrics;
use crate::store::progress::{Progress, State, duration, unix_time};
use anyhow::Result;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The open logs; silent on all replicas but the group's first.
pub struct Logging<'a> {
    run: &'a RunDir,
    global_batch: usize,
    open: Option<Open>,
}

struct Open {
    metrics: Metrics,
    progress: Progress,
    /// Seconds of earlier starts.
    before: f64,
    /// Where this one's time counts from: what was allocated, not only what was trained.
    started: Instant,
    /// Since the last step ended, or what came after it.
    step_began: Instant,
    heartbeat: Instant,
    /// Since the last log line.
    window: Window,
    /// The file system took the last heartbeat, and no complaint was made since.
    is_heard: bool,
}

struct Window {
    since: Instant,
    step: u64,
    loss: f64,
    waited: Duration,
}

impl Window {
    fn from(step: u64) -> Window {
        Window { since: Instant::now(), step, loss: 0.0, waited: Duration::ZERO }
    }
}

const HEARTBEAT: Duration = Duration::from_millis(500);

/// Up to when this process's time is counted. What is not counted yet, such as its start, is of the next phase.
static COUNTED: Mutex<Option<Instant>> = Mutex::new(None);

/// This rank has waited for others, which is the time of no phase of its own.
pub fn waited() {
    counted_up_to(Instant::now());
}

fn counted_up_to(time: Instant) {
    *COUNTED.lock().expect("nobody panics with it") = Some(time);
}

/// When the time began that no phase has counted: this process's start, or the end of the phase before.
fn uncounted_since(now: Instant) -> Instant {
    let counted = *COUNTED.lock().expect("nobody panics with it");
    counted.or_else(|| now.checked_sub(Duration::from_secs_f64(process_age()))).unwrap_or(now)
}

impl<'a> Logging<'a> {
    /// Opens the logs of a phase that goes on after `step`.
    pub fn open(run: &'a RunDir, phase: &PhasePlan, group: &dyn Collective, step: u64) -> Result<Logging<'a>> {
        let mut logging = Logging { run, global_batch: phase.training.global_batch, open: None };
        if group.is_zero() {
            let earlier = Progress::read(&run.path, &phase.name);
            let before = earlier.as_ref().map_or(0.0, |p| p.seconds);
            // The time of steps after the checkpoint is lost: they are done again.
            let kept = |p: &Progress| p.useful_s * (step as f64 / p.step.max(1) as f64).min(1.0);
            let now = Instant::now();
            let started = uncounted_since(now);
            counted_up_to(now);
            let progress = Progress {
                step,
                steps: phase.steps,
                seconds: before + (now - started).as_secs_f64(),
                useful_s: earlier.as_ref().map_or(0.0, kept),
                restarts: earlier.as_ref().map_or(0, |p| p.restarts + 1),
                save_s: earlier.and_then(|p| p.save_s),
                micro_batch: Some(phase.micro_batch),
                ranks: group.size(),
                ..Progress::begun(&phase.name)
            };
            log::info!(
                "{}: {} steps of {} samples on {} replica(s), {} blocks per stage, training stages {:?}",
                phase.name,
                phase.steps,
                phase.training.global_batch,
                group.size(),
                phase.depths.iter().map(usize::to_string).collect::<Vec<_>>().join("+"),
                phase.trained.clone().collect::<Vec<_>>()
            );
            progress.write(&run.path)?;
            let metrics = Metrics::open(&run.logs(&phase.name), step)?;
            logging.open = Some(Open {
                metrics,
                progress,
                before,
                started,
                step_began: now,
                heartbeat: now,
                window: Window::from(step),
                is_heard: true,
            });
        }
        Ok(logging)
    }

    /// After every step, as soon as it is known to be done.
    pub fn step(&mut self, outcome: &Outcome, lr: f64, log_steps: u64) {
        let (global_batch, run, step) = (self.global_batch, self.run, outcome.step + 1);
        let Some(open) = &mut self.open else { return };
        open.window.loss += outcome.loss;
        open.window.waited += outcome.times.data;
        open.progress.step = step;
        open.progress.useful_s += open.step_began.elapsed().as_secs_f64();
        open.step_began = Instant::now();
        if step.is_multiple_of(log_steps) || step == open.progress.steps {
            open.line(step, lr, global_batch);
        }
        if open.heartbeat.elapsed() >= HEARTBEAT {
            open.beat(run, State::Running);
        }
    }

    /// After an evaluation.
    pub fn evaluation(&mut self, step: u64, metrics: &BTreeMap<String, f64>) {
        let Some(open) = &mut self.open else { return };
        log::info!(
            "{}: step {step}: test top-1 {:.2} %, top-5 {:.2} %, loss {:.4}",
            open.progress.phase,
            metrics["top1"],
            metrics["top5"],
            metrics["loss"]
        );
        let named: Vec<(String, f64)> =
            metrics.iter().filter(|(k, _)| *k != "images").map(|(k, v)| (format!("test/{k}"), *v)).collect();
        let values: Vec<(&str, f64)> = named.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        let logged = open.metrics.log(step, &values);
        open.heard(logged);
        // The time of an evaluation is no training time.
        open.window = Window::from(step);
        open.step_began = Instant::now();
    }

    /// After a checkpoint was begun, or might have been: what the last one took.
    pub fn saved(&mut self, save_s: Option<f64>) {
        let Some(open) = &mut self.open else { return };
        open.progress.save_s = save_s.or(open.progress.save_s);
        open.step_began = Instant::now();
    }

    /// The phase stops at a checkpoint.
    pub fn stopped(&mut self, step: u64) {
        let run = self.run;
        let Some(open) = &mut self.open else { return };
        log::warn!("{}: stopped by a signal; checkpoint written at step {step}", open.progress.phase);
        open.beat(run, State::Stopped);
    }

    /// The artefact is written.
    pub fn done(&mut self, step: u64) {
        let run = self.run;
        // On the other ranks too: each may be the first of the next phase's group.
        counted_up_to(Instant::now());
        let Some(open) = &mut self.open else { return };
        open.progress.step = step;
        open.beat(run, State::Done);
        log::info!("{}: done in {}", open.progress.phase, duration(open.progress.seconds));
    }
}

impl Open {
    fn line(&mut self, step: u64, lr: f64, global_batch: usize) {
        let steps = (step - self.window.step).max(1) as f64;
        let seconds = self.window.since.elapsed().as_secs_f64().max(1e-9);
        self.progress.images_per_s = steps * global_batch as f64 / seconds;
        let loss = self.window.loss / steps;
        self.progress.loss = Some(loss);
        let rate = self.progress.images_per_s;
        let waiting = self.window.waited.as_secs_f64() / seconds;
        log::info!(
            target: "incubate::steps",
            "{}: step {step}/{} loss {loss:.4} lr {lr:.2e} {rate:.0} images/s, waiting for data {:.0} %, ETA {}",
            self.progress.phase,
            self.progress.steps,
            100.0 * waiting,
            self.progress.eta(global_batch).map_or("?".into(), duration)
        );
        let values = [("loss", loss), ("lr", lr), ("images_per_s", rate), ("data_wait", waiting)];
        let logged = self.metrics.log(step, &values);
        self.heard(logged);
        self.window = Window::from(step);
    }

    fn beat(&mut self, run: &RunDir, state: State) {
        self.progress.state = state;
        self.progress.seconds = self.before + self.started.elapsed().as_secs_f64();
        self.progress.updated = unix_time();
        self.heartbeat = Instant::now();
        counted_up_to(self.heartbeat);
        let written = self.progress.write(&run.path);
        self.is_heard |= written.is_ok();
        self.heard(written);
    }

    /// Training goes on where the file system does not take a heartbeat or a line for the curves, as one that is shared may
    /// for a moment; what must not be lost are checkpoints and artefacts.
    fn heard(&mut self, written: Result<()>) {
        if let (Err(error), true) = (written, self.is_heard) {
            self.is_heard = false;
            log::warn!(
                "{}: {error:#}; training goes on, `status` and the curves may lack some of it",
                self.progress.phase
            );
        }
    }
}
