//! Executes the commands for a cluster: `submit`, `status`, `cancel`, `doctor`.

use super::load::{devices, start_libtorch, threads};
use super::overrides::{Overrides, TrainArgs};
use super::{print_either, print_unless_closed};
use crate::bench::input;
use crate::cluster::{doctor, queue, status, submit};
use crate::collective::Solo;
use crate::config::{DeviceChoice, TaskKind};
use crate::pipeline::{check_jobs, extend, preview};
use crate::plan::Plan;
use crate::stop::stop_requested;
use crate::store::{ArtefactCache, RunDir};
use crate::{data, device, require, usage};
use anyhow::{Context, Result};
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

pub fn submit(args: &TrainArgs, dry_run: bool, json: bool) -> Result<()> {
    let mut config = args.config.load()?;
    if let Some(epochs) = args.extend {
        require!(!dry_run, "--extend changes the run directory; leave out --dry-run");
        config = extend::extend(&Solo, config, epochs)?;
    }
    let images = data::train_images(&config)?;
    let binary = std::env::current_exe().context("this program's own path cannot be found")?;
    let plan = Plan::new(config, images)?;
    check_jobs(&plan)?;
    check_data(&plan, args.accept_data, dry_run)?;
    let jobs = submit::submit(&plan, &binary, dry_run)?;
    print_either(json, &jobs, || submit::table(&jobs))
}

/// Refuses to submit a run whose data have changed since it was started. If the data cannot be listed on this machine, only warns.
fn check_data(plan: &Plan, accept_data: bool, dry_run: bool) -> Result<()> {
    let run = RunDir::open(&plan.config)?;
    if run.data(TaskKind::Classification)?.is_none() {
        return Ok(());
    }
    let now = match data::open_read_only(&plan.config) {
        Ok(source) => data::data_set(&plan.config, &source),
        Err(error) if accept_data => {
            return Err(error.context("data that cannot be listed here cannot be accepted here"));
        }
        Err(error) => {
            log::warn!("{error:#}; the jobs compare the data with those that the run was started with");
            return Ok(());
        }
    };
    match (accept_data, dry_run) {
        (true, true) => Ok(()),
        (true, false) => run.accept_data(TaskKind::Classification, now, plan.graph().artefacts()).map(|_| ()),
        (false, _) => run.check_data(TaskKind::Classification, now).map(|_| ()),
    }
}

pub fn status(run_dir: &Path, json: bool) -> Result<()> {
    let lines = status::status(run_dir, &mut ArtefactCache::default())?;
    print_either(json, &lines, || status::table(&lines))
}

/// Evaluates what the modules have learnt so far, as `incubate status --preview` does.
pub fn preview(run_dir: &Path, images: usize, json: bool) -> Result<()> {
    let mut config = RunDir::config_of(run_dir)?;
    config.run.dir = run_dir.into();
    start_libtorch(&config);
    let device = devices(&config)?.device(0);
    let preview = preview::preview(config.clone(), images, device)?;
    print_either(json, &preview, || preview::table(&config, &preview))
}

/// Prints the status every two seconds until all its lines are done, a signal comes, or the reader closes the pipe. On a terminal
/// each print replaces the print before.
pub fn watch(run_dir: &Path) -> Result<()> {
    let mut artefacts = ArtefactCache::default();
    while !stop_requested() {
        let lines = status::status(run_dir, &mut artefacts)?;
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        let is_open = print_unless_closed(&format!("{clear}{}", status::table(&lines)))?;
        if !is_open || status::is_all_done(&lines) {
            break;
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    Ok(())
}

pub fn cancel(run_dir: &Path, json: bool) -> Result<()> {
    RunDir::config_of(run_dir)?;
    let ids = queue::cancel(&RunDir { path: run_dir.into() })?;
    print_either(json, &serde_json::json!({"cancelled": ids}), || match ids.as_slice() {
        [] => "nothing to cancel\n".into(),
        ids => format!("cancelled {}\n", ids.join(", ")),
    })
}

/// Prints the findings of the checks. Fails if a finding is not ok.
pub fn doctor(config: Option<&Path>, overrides: &Overrides, json: bool) -> Result<()> {
    let config = config.map(|path| overrides.load(path)).transpose()?;
    device::load(config.as_ref().map_or(DeviceChoice::Auto, |config| config.run.device));
    let findings = doctor::examine(config.as_ref(), config.as_ref().map_or(1, threads), input::finding);
    print_either(json, &findings, || doctor::table(&findings))?;
    let bad = findings.iter().filter(|finding| !finding.ok).count();
    if bad > 0 { Err(usage!("{bad} finding(s) need a cure")) } else { Ok(()) }
}
