//! `incubate study`: trains the cells of a study one after the other, and reports on all of them.

use super::args::StudyArgs;
use super::load::{devices, start_libtorch, start_threads};
use super::{finish, on_config, print_either};
use crate::bench::step::{Work, measure};
use crate::collective::mpi::World;
use crate::config::{Config, TaskKind};
use crate::error::Failure;
use crate::launcher::{launched_rank, launched_ranks};
use crate::model::off::Off;
use crate::plan::gpus::GpuModel;
use crate::report;
use crate::run::table::{DETECT_E2E, E2E, SEGMENT_E2E};
use crate::stop::stop_requested;
use crate::study::shares::Share;
use crate::study::table::{Line, text};
use crate::study::{Cell, Method, Study, only};
use anyhow::{Context, Result, anyhow};
use std::collections::BTreeMap;

/// Trains the unfinished cells of this process's share, and then writes the study's report. If a cell fails, the other cells are
/// still trained, but no report is written.
pub fn study(args: &StudyArgs) -> Result<()> {
    let study = Study::load(&args.study)?;
    let cells = only(&study, &args.only)?;
    let share = args.share.unwrap_or(Share { index: launched_rank(), of: launched_ranks() });
    start_libtorch(&study.cells[0].plan.config);
    if args.dry_run {
        let lines = lines(&study, &cells, args.gpu)?;
        return print_either(args.json, &lines, || text(&lines, share.of, args.gpu));
    }
    start_threads()?;
    let mut failed: Vec<(&str, anyhow::Error)> = Vec::new();
    let own = share.of(&cells);
    for (number, cell) in own.iter().enumerate() {
        if stop_requested() {
            return Err(Failure::Interrupted { activity: format!("training study {}", study.name) }.into());
        }
        log::info!("{}: cell {} of {}", cell.name, number + 1, own.len());
        match train(&study, cell) {
            Err(error) if Failure::is_stop(&error) => return Err(error),
            Err(error) => {
                log::warn!("{}: {error:#}; going on with the other cells", cell.name);
                failed.push((&cell.name, error));
            }
            Ok(()) => {}
        }
    }
    let number = failed.len();
    if let Some((name, error)) = failed.into_iter().next() {
        return Err(error.context(format!("{number} cell(s) of {} have failed, the first one {name}", study.name)));
    }
    let written = report::write(std::slice::from_ref(&study.dir), None, None)?;
    print_either(args.json, &written, || {
        written.summary.iter().map(|sentence| format!("{sentence}\n")).collect::<String>()
            + &format!("report: {}\n", written.page.display())
    })
}

/// Trains a cell, unless it is finished.
fn train(study: &Study, cell: &Cell) -> Result<()> {
    if study.is_done(cell)? {
        log::info!("{}: done already", cell.name);
        return Ok(());
    }
    on_config(&World::alone(), cell.plan.config.clone(), (false, TaskKind::Classification), |job| {
        // The time since the last cell does not count for this cell.
        job.clock.leave_uncounted();
        match cell.method {
            Method::Incubation => job.run()?,
            baseline => {
                job.row(baseline.last_row())?;
                let downstream = [&SEGMENT_E2E, &DETECT_E2E].into_iter().filter(|_| baseline == Method::E2e);
                downstream.filter(|row| (row.is_wanted)(&job.plan.config)).try_for_each(|row| job.row(row))?;
            }
        }
        finish(job).map(|_| ())
    })
}

/// The lines of the dry run. If a GPU is named, the times are for one such GPU. Otherwise they are for this machine, whose speed is
/// measured once for each combination of model, precision and micro-batch.
fn lines(study: &Study, cells: &[&Cell], gpu: Option<GpuModel>) -> Result<Vec<Line>> {
    let mut rates: BTreeMap<String, f64> = BTreeMap::new();
    let mut line = |cell: &&Cell| {
        let config = &cell.plan.config;
        let key = config.recipe(&["model"]) + &format!("{:?} {:?}", config.run.precision, config.run.micro_batch);
        let rate = match (gpu, rates.get(&key)) {
            (Some(gpu), _) => gpu.rate(config.run.precision),
            (None, Some(rate)) => *rate,
            (None, None) => speed(config.clone())?,
        };
        rates.insert(key, rate);
        // Damaged files count as unfinished here. Without --dry-run, the study reports the damage.
        Ok(Line::new(cell, study.is_done(cell).unwrap_or(false), rate))
    };
    cells.iter().map(&mut line).collect()
}

/// How many steps are timed for each combination of model, precision and micro-batch.
const STEPS: usize = 3;

/// Measures the floating-point operations per second of end-to-end training steps on the first device of this machine.
fn speed(config: Config) -> Result<f64> {
    let device = devices(&config)?.device(0);
    let batch = config.run.micro_batch.samples().min(config.e2e.global_batch) / 2 * 2;
    let name = config.run.name.clone();
    let off = Off::default();
    let batch = batch.max(2);
    let work = Work { row: &E2E, stage: None, batch, steps: STEPS, device, off, trace: None };
    let report = measure(config, &name, work).with_context(|| format!("measuring the speed of cell {name}"))?;
    let rate = report.gflops * 1e9;
    (rate > 0.0).then_some(rate).ok_or_else(|| anyhow!("{name}: a step took no time"))
}
