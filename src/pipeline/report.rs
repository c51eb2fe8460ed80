//! `report.html`: the table, curves and config of a run in one file, which needs no script and no download.

use super::summary::{self, unreadable};
use crate::plan::Plan;
use crate::run::graph::Graph;
use crate::run::table::Row;
use crate::store::metrics;
use crate::store::{RunDir, durable};
use crate::svg::{self, Axis, Curve, escaped};
use anyhow::Result;
use serde_json::{Map, Value};
use std::fmt::Write;

/// The most points in one picture, so that a thousand modules still open in a browser, and the fewest points of one curve.
const POINTS: usize = 20_000;
const FEWEST: usize = 20;

/// Writes the report into the run directory.
pub fn write(plan: &Plan, graph: &Graph, run: &RunDir, rows: &[summary::Row]) -> Result<()> {
    let config = &plan.config;
    let mut html = format!(
        "<!doctype html><meta charset=utf-8><title>{name}</title><style>body{{font:15px sans-serif;margin:2em;max-width:80em}}\
         table{{border-collapse:collapse}}td,th{{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}}\
         td:first-child,th:first-child{{text-align:left}}svg{{width:38em}}meter{{width:12em}}</style><h1>{name}</h1>\
         <p>Written by incubate {version} at {now} in {run_dir}. {images} training images of {data}.",
        name = escaped(&config.run.name),
        version = env!("CARGO_PKG_VERSION"),
        now = jiff::Timestamp::now().strftime("%F %H:%M UTC"),
        run_dir = escaped(&run.path.display().to_string()),
        images = plan.train_images,
        data = escaped(&config.data.path.display().to_string()),
    );
    html += "<h2>Models</h2><table><tr><th>model<th>top-1 %<th><th>top-5 %<th>training images<th>FLOPs<th>device-hours</tr>";
    for row in rows {
        let percent = |v: Option<f64>| v.map_or("–".into(), |v| format!("{v:.2}"));
        let _ = write!(
            html,
            "<tr><td>{}<td>{}<td><meter max=100 value={:.2}></meter><td>{}<td>{}<td>{:.2e}<td>{:.4}</tr>",
            escaped(&row.model),
            percent(row.top1),
            row.top1.unwrap_or_default(),
            percent(row.top5),
            row.images,
            row.flops,
            row.device_hours
        );
    }
    html += "</table>";
    if let Some(count) = unreadable(rows) {
        let _ = write!(html, "<p>{count} image(s) could not be read and were skipped; the log names them.");
    }
    html += "<h2>Curves</h2>";
    for row in graph.rows(false).into_iter().filter(|row| row.phase().is_some()) {
        html += &curves(graph, run, row)?;
    }
    let _ = write!(html, "<h2>Config</h2><pre>{}</pre>", escaped(&config.to_toml()));
    durable::replace_bytes(&run.file("report.html"), html.as_bytes())
}

/// The curves of one row of the table, with all modules in one picture.
fn curves(graph: &Graph, run: &RunDir, row: &Row) -> Result<String> {
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
    Ok([("loss", "training loss"), ("test/top1", "test top-1 %")].map(picture).concat())
}

/// The logged values of a key by step, thinned out to about `most`. The last one is always among them.
fn points(lines: &[Map<String, Value>], key: &str, most: usize) -> Vec<(f64, f64)> {
    let all: Vec<(f64, f64)> =
        lines.iter().filter_map(|line| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?))).collect();
    let every = all.len().div_ceil(most).max(1);
    let mut points: Vec<(f64, f64)> = all.iter().rev().step_by(every).copied().collect();
    points.reverse();
    points
}
