//! Log lines, metrics and heartbeats of a running phase, written by the first replica of the group.

use super::step::Outcome;
use super::{Clock, Setting, evaluate};
use crate::config::Precision;
use crate::device::memory;
use crate::plan::PhasePlan;
use crate::plan::cost::sample_flops;
use crate::run::start::{Peak, Start};
use crate::run::state::Activity;
use crate::store::RunDir;
use crate::store::metrics::Metrics;
use crate::store::process::{host, slurm_job, unix_time};
use crate::store::progress::{Progress, duration};
use crate::task::Task;
use anyhow::Result;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tch::Device;

/// The logs of a phase. Only the group's first replica has logs. The other replicas only mark the time of their rank as counted
/// when the phase is done.
pub struct Logging<'a> {
    clock: &'a Clock,
    logs: Option<Logs<'a>>,
}

/// The logs that the group's first replica writes.
struct Logs<'a> {
    run: &'a RunDir,
    clock: &'a Clock,
    task: Task,
    device: Device,
    global_batch: usize,
    flops_per_image: f64,
    metrics: Metrics,
    progress: Progress,
    /// The seconds that earlier starts of the phase took.
    seconds_before: f64,
    /// The moment from which this start's time counts. It is before the first step, because preparations count too.
    started: Instant,
    /// The moment at which the current step began: the end of the last step, evaluation or checkpoint.
    step_began: Instant,
    last_heartbeat: Instant,
    window: Window,
    /// How many steps of this start had gradients that were not finite.
    skipped: u64,
    /// Whether the next failed write gives a warning. After a warning, no other warning is given until a heartbeat is written.
    warns: bool,
}

/// The sums over the steps since the last log line or evaluation.
struct Window {
    since: Instant,
    step: u64,
    loss: f64,
    waited_for_data: Duration,
}

impl Window {
    fn from(step: u64) -> Window {
        Window { since: Instant::now(), step, loss: 0.0, waited_for_data: Duration::ZERO }
    }
}

/// The least time between two regular heartbeats. A heartbeat is the phase's progress file, written anew.
const HEARTBEAT: Duration = Duration::from_millis(500);

impl<'a> Logging<'a> {
    /// Opens the logs of a phase that continues after `step`.
    pub fn open(setting: &'a Setting, phase: &PhasePlan, step: u64) -> Result<Logging<'a>> {
        let logs = setting.group.is_zero().then(|| Logs::new(setting, phase, step)).transpose()?;
        Ok(Logging { clock: setting.clock, logs })
    }

    /// Records a step that is done. Writes a log line if the number of steps is a multiple of `log_steps` or if this step is the
    /// last. Writes a heartbeat if the last heartbeat is old enough.
    pub fn step(&mut self, outcome: &Outcome, lr: f64, log_steps: u64) {
        let Some(logs) = &mut self.logs else { return };
        let step = outcome.step + 1;
        logs.window.loss += outcome.loss;
        logs.window.waited_for_data += outcome.times.data;
        if let Some(start) = &mut logs.progress.start {
            start.spent.data += outcome.times.data.as_secs_f64();
            start.spent.all_reduce += outcome.times.all_reduce.as_secs_f64();
        }
        logs.progress.step = step;
        logs.progress.useful_s += logs.since_step();
        if !outcome.norm.is_finite() {
            logs.warn_of_skipped(step);
        }
        if step.is_multiple_of(log_steps) || step == logs.progress.steps {
            logs.write_line(step, lr);
        }
        if logs.last_heartbeat.elapsed() >= HEARTBEAT {
            logs.heartbeat(Activity::Running);
        }
    }

    /// Logs the metrics of an evaluation after `step`, and records its time.
    pub fn evaluation(&mut self, step: u64, metrics: &BTreeMap<String, f64>) {
        let Some(logs) = &mut self.logs else { return };
        log::info!("{}: step {step}: test {}", logs.progress.phase, logs.task.text(metrics));
        let measured = metrics.iter().filter(|(key, _)| *key != evaluate::IMAGES);
        let named: Vec<(String, f64)> = measured.map(|(key, value)| (format!("test/{key}"), *value)).collect();
        let values: Vec<(&str, f64)> = named.iter().map(|(key, value)| (key.as_str(), *value)).collect();
        let written = logs.metrics.log(step, &values);
        logs.warn_once(written);
        // The time of an evaluation does not count in the training speed of the next log line.
        logs.window = Window::from(step);
        let seconds = logs.since_step();
        logs.progress.start.iter_mut().for_each(|start| start.spent.evaluation += seconds);
    }

    /// Records how long the last checkpoint took. Counts the time since the last step, evaluation or checkpoint as time of
    /// checkpoints, not of a step.
    pub fn saved(&mut self, save_s: Option<f64>) {
        let Some(logs) = &mut self.logs else { return };
        logs.progress.save_s = save_s.or(logs.progress.save_s);
        let seconds = logs.since_step();
        logs.progress.start.iter_mut().for_each(|start| start.spent.checkpoints += seconds);
    }

    /// Writes into the heartbeat why the phase cannot be saved at present. `why` is none if the phase can be saved.
    pub fn trouble(&mut self, why: Option<&str>) {
        let Some(logs) = &mut self.logs else { return };
        let has_changed = logs.progress.trouble.as_deref() != why;
        if has_changed || why.is_some() && logs.last_heartbeat.elapsed() >= HEARTBEAT {
            logs.progress.trouble = why.map(str::to_string);
            logs.heartbeat(Activity::Running);
        }
    }

    /// Logs that the phase has stopped at a checkpoint.
    pub fn stopped(&mut self, step: u64) {
        let Some(logs) = &mut self.logs else { return };
        log::warn!("{}: stopped by a signal; checkpoint written at step {step}", logs.progress.phase);
        logs.heartbeat(Activity::Stopped);
        logs.enter();
    }

    /// Logs that the phase is done and its artefact is written.
    pub fn done(&mut self, step: u64) {
        // Every replica marks its rank's time up to now as counted. If the replica becomes the first of the next phase's group,
        // the next phase would otherwise include the time of this phase.
        self.clock.count_up_to(Instant::now());
        let Some(logs) = &mut self.logs else { return };
        logs.progress.step = step;
        logs.heartbeat(Activity::Done);
        logs.enter();
        log::info!("{}: done in {}", logs.progress.phase, duration(logs.progress.seconds));
    }
}

impl<'a> Logs<'a> {
    fn new(setting: &'a Setting, phase: &PhasePlan, step: u64) -> Result<Logs<'a>> {
        let Setting { plan, run, group, micro_batch, clock, .. } = *setting;
        let earlier = Progress::read(&run.path, &phase.name);
        let seconds_before = earlier.as_ref().map_or(0.0, |p| p.seconds);
        // The steps after the checkpoint are repeated, so their time was not useful.
        let kept = |p: &Progress| p.useful_s * (step as f64 / p.step.max(1) as f64).min(1.0);
        let flops_per_image = sample_flops(plan, phase);
        if let Some(mut last) = run.starts(plan, phase).pop() {
            if last.to < step {
                // The last start was killed after it had written this checkpoint, and before its next heartbeat.
                last.count(step, phase.training.global_batch, flops_per_image, last.seconds);
            }
            run.enter(&phase.name, &last)?;
            warn_of_precision(&phase.name, &last, plan.config.run.precision, step);
        }
        memory::begin_peak();
        let now = Instant::now();
        let started = clock.begin_phase(now);
        let progress = Progress {
            step,
            steps: phase.steps,
            seconds: seconds_before + (now - started).as_secs_f64(),
            useful_s: earlier.as_ref().map_or(0.0, kept),
            restarts: earlier.as_ref().map_or(0, |p| p.restarts + 1),
            save_s: earlier.and_then(|p| p.save_s),
            micro_batch: Some(micro_batch),
            replicas: group.size(),
            start: Some(start(setting, step)),
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
        Ok(Logs {
            run,
            clock,
            task: Task::of(&plan.config),
            device: setting.device,
            global_batch: phase.training.global_batch,
            flops_per_image,
            metrics: Metrics::open(&run.logs(&phase.name), step)?,
            progress,
            seconds_before,
            started,
            step_began: now,
            last_heartbeat: now,
            window: Window::from(step),
            skipped: 0,
            warns: true,
        })
    }

    /// Returns the seconds since the last step, evaluation or checkpoint ended, and starts to count anew.
    fn since_step(&mut self) -> f64 {
        let now = Instant::now();
        (now - std::mem::replace(&mut self.step_began, now)).as_secs_f64()
    }

    /// Writes a log line and the metrics of the steps in the window.
    fn write_line(&mut self, step: u64, lr: f64) {
        let steps = (step - self.window.step).max(1) as f64;
        let seconds = self.window.since.elapsed().as_secs_f64().max(1e-9);
        self.progress.images_per_s = steps * self.global_batch as f64 / seconds;
        let loss = self.window.loss / steps;
        self.progress.loss = Some(loss);
        let rate = self.progress.images_per_s;
        let waiting = self.window.waited_for_data.as_secs_f64() / seconds;
        log::info!(
            target: "incubate::steps",
            "{}: step {step}/{} loss {loss:.4} lr {lr:.2e} {rate:.0} images/s, waiting for data {:.0} %, ETA {}",
            self.progress.phase,
            self.progress.steps,
            100.0 * waiting,
            self.progress.eta(self.global_batch).map_or("?".into(), duration)
        );
        let values = [("loss", loss), ("lr", lr), ("images_per_s", rate), ("data_wait", waiting)];
        let written = self.metrics.log(step, &values);
        self.warn_once(written);
        self.window = Window::from(step);
    }

    /// Warns of the first skipped step, of the second, the fourth, the eighth, and so on.
    fn warn_of_skipped(&mut self, step: u64) {
        self.skipped += 1;
        if self.skipped.is_power_of_two() {
            log::warn!(
                "{}: step {step}: the gradients are not finite, so the step changes nothing (such steps since the start: {}); \
                 if it happens often, lower base_lr or set run.precision = \"fp32\"",
                self.progress.phase,
                self.skipped
            );
        }
    }

    fn heartbeat(&mut self, state: Activity) {
        self.progress.state = state;
        let (seconds, step) = (self.started.elapsed().as_secs_f64(), self.progress.step);
        self.progress.seconds = self.seconds_before + seconds;
        if let Some(start) = &mut self.progress.start {
            start.count(step, self.global_batch, self.flops_per_image, seconds);
            start.peak = Peak { host: memory::peak_on_host(), gpu: memory::peak_on_gpu(self.device) };
        }
        self.progress.updated = unix_time();
        self.last_heartbeat = Instant::now();
        self.clock.count_up_to(self.last_heartbeat);
        let written = self.progress.write(&self.run.path);
        self.warns |= written.is_ok();
        self.warn_once(written);
    }

    /// Enters this start in the phase's list of starts, the ledger. If that fails, the next start enters it from the heartbeat.
    fn enter(&mut self) {
        let start = Start { end: Some(self.progress.state), ..self.progress.start.clone().expect("it was begun") };
        let entered = self.run.enter(&self.progress.phase, &start);
        self.warn_once(entered);
    }

    /// Warns of the first of several failed writes. Training continues: a shared file system may refuse a heartbeat or a line of
    /// the curves for a moment. Only checkpoints and artefacts must not be lost.
    fn warn_once(&mut self, written: Result<()>) {
        if let (Err(error), true) = (written, self.warns) {
            self.warns = false;
            log::warn!(
                "{}: {error:#}; training goes on, but `status` and the curves may lack some values",
                self.progress.phase
            );
        }
    }
}

/// The record of a start that continues after `step` and has computed nothing yet.
fn start(setting: &Setting, step: u64) -> Start {
    Start {
        began: jiff::Timestamp::now().to_string(),
        end: None,
        ranks: setting.ranks,
        replicas: setting.group.size(),
        precision: setting.plan.config.run.precision,
        from: step,
        to: step,
        images: 0,
        flops: 0.0,
        seconds: 0.0,
        device_seconds: 0.0,
        host: host(),
        job: slurm_job(),
        spent: Default::default(),
        peak: Default::default(),
    }
}

/// Warns if a phase continues in another precision than its last start had.
fn warn_of_precision(phase: &str, last: &Start, now: Precision, step: u64) {
    if step > 0 && last.precision != now {
        log::warn!(
            "{phase}: goes on after step {step} with run.precision = {now:?}, after {:?} before; the ledger records it",
            last.precision
        );
    }
}
