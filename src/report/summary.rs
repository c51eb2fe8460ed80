//! The table at the end of a run: the accuracy, cost and file of every model.

use super::downstream::figures_of_classes;
use crate::plan::Plan;
use crate::run::graph::{Graph, Node};
use crate::run::table::Method;
use crate::store::ledger::Total;
use crate::store::progress::duration;
use crate::store::{ArtefactCache, RunDir, durable};
use crate::task::{ClassFigures, Scores, Task};
use anyhow::Result;
use serde::Serialize;
use std::fmt::Write;

/// One model of a run.
#[derive(Debug, Serialize)]
pub struct Row {
    pub model: String,
    #[serde(flatten)]
    pub scores: Scores,
    /// The cost of the phase that trained the model, over all starts of the phase; 0 if no phase trained the model.
    #[serde(flatten)]
    pub total: Total,
    pub file: String,
    /// The number of images of the whole run that could not be read and were skipped, on all ranks and over all starts.
    pub unreadable_images: usize,
    /// The scores for each class of a segmentation or detection model; empty if the run has not recorded them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassFigures>,
    #[serde(skip)]
    task: Task,
    #[serde(skip)]
    method: Method,
}

/// The rows of all existing artefacts, in the order of the run. `unreadable_images` is the number of images that the run skipped.
/// `artefacts` caches the headers of artefacts.
pub fn rows(
    plan: &Plan,
    graph: &Graph,
    run: &RunDir,
    unreadable_images: usize,
    artefacts: &mut ArtefactCache,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for node in graph.nodes() {
        artefacts.find(run, node)?;
        rows.extend(row(plan, run, node, unreadable_images, artefacts));
    }
    Ok(rows)
}

/// The row of a node; none if the node writes no artefact or has not written it.
fn row(plan: &Plan, run: &RunDir, node: &Node, unreadable_images: usize, artefacts: &ArtefactCache) -> Option<Row> {
    let (model, label, header) = (node.row.model?, node.label()?, artefacts.header(run, node)?);
    let plan = &plan.of_task(node.row.task());
    let task = Task::of(&plan.config);
    let total = plan.phase_of(node).map_or(Total::default(), |phase| run.total(plan, &phase));
    Some(Row {
        model: label,
        scores: task.scores(&header.metrics),
        total,
        file: run.file(&node.file).display().to_string(),
        unreadable_images,
        classes: figures_of_classes(run, node),
        task,
        method: model.method,
    })
}

/// The width of a column of scores in the table.
const SCORE_WIDTH: usize = 7;

/// The table for people. It has a part for each task, with the columns of the task's metrics. The part of `task`, the run's own
/// task, comes first.
pub fn table(task: Task, rows: &[Row]) -> String {
    let (own, others): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| row.task == task);
    let mut text = part(task, &own);
    for others in others.chunk_by(|a, b| a.task == b.task) {
        text += &part(others[0].task, others);
    }
    // The cost of incubation includes neither the baselines nor the models of other tasks.
    let ours = own.iter().filter(|row| row.method == Method::Incubation);
    let (hours, flops) = ours.fold((0.0, 0.0), |(h, f), row| (h + row.total.device_hours, f + row.total.flops));
    let _ = writeln!(
        text,
        "incubation in all: {flops:.2e} FLOPs, {hours:.4} device-hours (a device is a GPU, or the cores of a replica)"
    );
    if let Some(count) = unreadable(rows) {
        let _ = writeln!(text, "unreadable images skipped: {count}, named in the log");
    }
    text
}

/// The part of the table for the models of one task.
fn part(task: Task, rows: &[&Row]) -> String {
    let titles: String = task.columns().map(|metric| format!(" {:>SCORE_WIDTH$}", metric.title())).collect();
    let mut text = format!(
        "{:<12}{titles} {:>12} {:>10} {:>8} {:>12}  {}\n",
        "model", "images", "FLOPs", "time", "device-hours", "file"
    );
    for row in rows {
        let scores: String = row.scores.0.iter().map(|score| format!(" {:>SCORE_WIDTH$}", score.cell("-"))).collect();
        let _ = writeln!(
            text,
            "{:<12}{scores} {:>12} {:>10.2e} {:>8} {:>12.4}  {}",
            row.model,
            row.total.images,
            row.total.flops,
            duration(row.total.seconds),
            row.total.device_hours,
            row.file
        );
    }
    text
}

/// The number of images that could not be read; none if it is 0.
pub fn unreadable(rows: &[Row]) -> Option<usize> {
    rows.first().map(|row| row.unreadable_images).filter(|&count| count > 0)
}

/// Writes `summary.json` into the run directory.
pub fn write(run: &RunDir, rows: &[Row]) -> Result<()> {
    durable::replace_bytes(&run.file("summary.json"), &serde_json::to_vec_pretty(rows)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use std::collections::BTreeMap;

    #[test]
    fn scores_come_between_the_model_and_its_cost_in_json_and_in_the_table() {
        let task = Task::of(&Config::parse("", &[]).unwrap());
        let row = Row {
            model: "assembled".into(),
            scores: task.scores(&BTreeMap::from([("top1".into(), 85.5), ("loss".into(), 0.5)])),
            total: Total { images: 7, ..Total::default() },
            file: "assembled.h5".into(),
            unreadable_images: 0,
            classes: Vec::new(),
            task,
            method: Method::Incubation,
        };
        let json = serde_json::to_string(&row).unwrap();
        assert!(json.starts_with(r#"{"model":"assembled","top1":85.5,"top5":null,"images":7,"flops""#), "{json}");
        let table = table(task, &[row]);
        let [titles, values, ..] = table.lines().collect::<Vec<_>>()[..] else { panic!("{table}") };
        assert!(titles.starts_with("model        top-1 % top-5 %       images"), "{titles}");
        assert!(values.starts_with("assembled      85.50       -            7"), "{values}");
    }
}
