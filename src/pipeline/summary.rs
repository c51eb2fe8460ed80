//! The table at the end of a run: accuracy and cost of every model, and where it lies.

use crate::plan::cost::cost;
use crate::plan::phases::{ASSEMBLED, E2E, FINETUNE, META, MODULE, Phase};
use crate::plan::{PhasePlan, Plan};
use crate::store::progress::{Progress, duration};
use crate::store::{RunDir, artefact, durable};
use anyhow::Result;
use serde::Serialize;
use std::fmt::Write;

/// One model of the run.
#[derive(Debug, Serialize)]
pub struct Row {
    pub model: String,
    pub top1: Option<f64>,
    pub top5: Option<f64>,
    /// Training images that passed through the network.
    pub images: u64,
    pub flops: f64,
    pub seconds: f64,
    pub device_hours: f64,
    pub file: String,
    /// Of the whole run, on all ranks and through all restarts: images that could not be read and were skipped.
    pub unreadable_images: usize,
}

/// Rows of every artefact that is there, in the order of the run, which skipped so many unreadable images.
pub fn rows(plan: &Plan, run: &RunDir, unreadable_images: usize) -> Result<Vec<Row>> {
    let stages = plan.config.model.stages();
    let single = |phase: &'static Phase| plan.phase(phase, None);
    let mut rows = Vec::new();
    rows.extend(trained(plan, run, &single(&META), "meta model")?);
    for index in 0..stages {
        let phase = plan.phase(&MODULE, Some(index));
        rows.extend(trained(plan, run, &phase, &format!("hybrid {index}"))?);
    }
    if let Some((top1, top5, file)) = accuracy(run, ASSEMBLED)? {
        let (images, flops, seconds, device_hours) = (0, 0.0, 0.0, 0.0);
        let model = "assembled".into();
        rows.push(Row { model, top1, top5, images, flops, seconds, device_hours, file, unreadable_images });
    }
    rows.extend(trained(plan, run, &single(&FINETUNE), "fine-tuned")?);
    rows.extend(trained(plan, run, &single(&E2E), "end to end")?);
    rows.iter_mut().for_each(|row| row.unreadable_images = unreadable_images);
    Ok(rows)
}

fn trained(plan: &Plan, run: &RunDir, phase: &PhasePlan, model: &str) -> Result<Option<Row>> {
    let Some((top1, top5, file)) = accuracy(run, &phase.file)? else { return Ok(None) };
    // Nothing was trained for a model that was imported.
    let trained = Progress::read(&run.path, &phase.name).map(|progress| (progress, cost(plan, phase)));
    let (images, flops, seconds, ranks) =
        trained.map_or((0, 0.0, 0.0, 1), |(p, cost)| (cost.images, cost.flops, p.seconds, p.ranks));
    let device_hours = seconds * ranks as f64 / 3600.0;
    let (model, unreadable_images) = (model.to_string(), 0);
    Ok(Some(Row { model, top1, top5, images, flops, seconds, device_hours, file, unreadable_images }))
}

type Accuracy = (Option<f64>, Option<f64>, String);

fn accuracy(run: &RunDir, file: &str) -> Result<Option<Accuracy>> {
    let path = run.file(file);
    if !path.exists() {
        return Ok(None);
    }
    let (header, _) = artefact::read_header(&path)?;
    let metric = |name: &str| header.metrics.get(name).copied();
    Ok(Some((metric("top1"), metric("top5"), path.display().to_string())))
}

/// The table for people.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<12} {:>7} {:>7} {:>12} {:>10} {:>8} {:>12}  {}\n",
        "model", "top-1 %", "top-5 %", "images", "FLOPs", "time", "device-hours", "file"
    );
    for row in rows {
        let percent = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.2}"));
        let _ = writeln!(
            text,
            "{:<12} {:>7} {:>7} {:>12} {:>10.2e} {:>8} {:>12.4}  {}",
            row.model,
            percent(row.top1),
            percent(row.top5),
            row.images,
            row.flops,
            duration(row.seconds),
            row.device_hours,
            row.file
        );
    }
    // The baseline is no part of incubation's cost.
    let ours = rows.iter().filter(|row| row.model != "end to end");
    let (hours, flops) = ours.fold((0.0, 0.0), |(h, f), row| (h + row.device_hours, f + row.flops));
    let _ = writeln!(
        text,
        "incubation in all: {flops:.2e} FLOPs, {hours:.4} device-hours (a device is a GPU, or the cores of a replica)"
    );
    if let Some(count) = unreadable(rows) {
        let _ = writeln!(text, "unreadable images skipped: {count}, named in the log");
    }
    text
}

/// How many images could not be read, if any.
pub fn unreadable(rows: &[Row]) -> Option<usize> {
    rows.first().map(|row| row.unreadable_images).filter(|&count| count > 0)
}

/// Writes `summary.json` into the run directory.
pub fn write(run: &RunDir, rows: &[Row]) -> Result<()> {
    durable::replace_bytes(&run.file("summary.json"), &serde_json::to_vec_pretty(rows)?)
}
