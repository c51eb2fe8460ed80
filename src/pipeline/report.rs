//! `report.html`: the table, curves and config of a run in one file, which needs no script and no download.

use super::summary::{self, unreadable};
use crate::plan::Plan;
use crate::run::graph::Graph;
use crate::run::table::Row;
use crate::store::metrics;
use crate::store::{RunDir, durable};
use crate::svg::{self, Axis, Curve};
use crate::task::{Better, Metric, Task};
use anyhow::Result;
use serde_json::{Map, Value};
use std::fmt::Write;

/// The most points in one picture, so that a browser can open a picture of a thousand modules, and the fewest points of one curve.
const POINTS: usize = 20_000;
const FEWEST: usize = 20;

/// Writes the report into the run directory.
pub fn write(plan: &Plan, graph: &Graph, run: &RunDir, rows: &[summary::Row]) -> Result<()> {
    let config = &plan.config;
    let mut html = format!(
        "<!doctype html><meta charset=utf-8><title>{name}</title><style>:root{{color-scheme:light dark}}body{{font:15px sans-serif;margin:2em;max-width:80em}}\
         table{{border-collapse:collapse}}td,th{{padding:.25em .8em;text-align:right;border-bottom:1px solid #8886}}\
         td:first-child,th:first-child{{text-align:left}}svg{{width:38em;height:auto}}meter{{width:12em}}</style><h1>{name}</h1>\
         <p>Written by incubate {version} at {now} in {run_dir}. {images} training images of {data}.",
        name = escaped(&config.run.name),
        version = env!("CARGO_PKG_VERSION"),
        now = jiff::Timestamp::now().strftime("%F %H:%M UTC"),
        run_dir = escaped(&run.path.display().to_string()),
        images = plan.train_images,
        data = escaped(&config.data.path.display().to_string()),
    );
    html += &table(Task::of(config), rows);
    if let Some(count) = unreadable(rows) {
        let _ = write!(html, "<p>{count} image(s) could not be read and were skipped; the log names them.");
    }
    html += "<h2>Curves</h2>";
    for row in graph.rows(false).into_iter().filter(|row| row.phase().is_some()) {
        html += &curves(graph, run, row, Task::of(config).headline())?;
    }
    let _ = write!(html, "<h2>Config</h2><pre>{}</pre>", escaped(&config.to_toml()));
    durable::replace_bytes(&run.file("report.html"), html.as_bytes())
}

/// The models with their scores and costs.
fn table(task: Task, rows: &[summary::Row]) -> String {
    let title = |metric: &'static Metric| {
        let meter = if full_meter(task, metric).is_some() { "<th>" } else { "" };
        format!("<th>{}{meter}", escaped(&metric.title()))
    };
    let titles: String = task.columns().map(title).collect();
    let mut html =
        format!("<h2>Models</h2><table><tr><th>model{titles}<th>training images<th>FLOPs<th>device-hours</tr>");
    for row in rows {
        let _ = write!(html, "<tr><td>{}", escaped(&row.model));
        for score in &row.scores.0 {
            let _ = write!(html, "<td>{}", score.cell("–"));
            if let Some(full) = full_meter(task, score.metric) {
                let value = score.metric.number(score.value.unwrap_or_default());
                let _ = write!(html, "<td><meter max={full} value={value}></meter>");
            }
        }
        let total = &row.total;
        let _ = write!(html, "<td>{}<td>{:.2e}<td>{:.4}</tr>", total.images, total.flops, total.device_hours);
    }
    html + "</table>"
}

/// The value at which the meter beside a score is full. Only the headline has a meter, and only if a perfect value is known.
fn full_meter(task: Task, metric: &Metric) -> Option<f64> {
    match metric.better {
        Better::Higher { perfect } if metric == task.headline() => Some(perfect),
        _ => None,
    }
}

/// The curves of one row of the run's table. All modules share a picture.
fn curves(graph: &Graph, run: &RunDir, row: &Row, headline: &Metric) -> Result<String> {
    let logged = graph.of(row).map(|node| Ok((&node.name, metrics::read(&run.logs(&node.name))?)));
    let logged: Vec<_> = logged.collect::<Result<_>>()?;
    let most = (POINTS / logged.len()).max(FEWEST);
    let picture = |(key, title): (&str, &str)| {
        let curves =
            logged.iter().map(|(name, lines)| Curve { name: name.to_string(), points: points(lines, key, most) });
        let all: Vec<Curve> = curves.filter(|curve| !curve.points.is_empty()).collect();
        let values = || all.iter().flat_map(|curve| &curve.points);
        let (x, y) = (Axis::around("step", values().map(|p| p.0)), Axis::around(title, values().map(|p| p.1)));
        if all.is_empty() { String::new() } else { svg::curves(&format!("{}: {title}", row.name), x, y, &all) }
    };
    let (key, title) = (format!("test/{}", headline.key), format!("test {}", headline.title()));
    Ok([("loss", "training loss"), (&key, &title)].map(picture).concat())
}

/// The logged values of a key by step, thinned out to about `most` values, which include the last.
fn points(lines: &[Map<String, Value>], key: &str, most: usize) -> Vec<(f64, f64)> {
    let all: Vec<(f64, f64)> =
        lines.iter().filter_map(|line| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?))).collect();
    let every = all.len().div_ceil(most).max(1);
    let mut points: Vec<(f64, f64)> = all.iter().rev().step_by(every).copied().collect();
    points.reverse();
    points
}

/// Escapes a text for HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
