//! `report.html`: the run's curves and table as one file that opens anywhere, with no script and no download.

use super::summary::{Row, unreadable};
use crate::plan::Plan;
use crate::store::metrics;
use crate::store::{RunDir, durable};
use anyhow::Result;
use serde_json::{Map, Value};
use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 220.0;
const MARGIN: f64 = 45.0;

/// Writes the report from what the run directory holds.
pub fn write(plan: &Plan, run: &RunDir, rows: &[Row]) -> Result<()> {
    let mut html = format!(
        "<!doctype html><meta charset=utf-8><title>{name}</title><style>body{{font:15px sans-serif;margin:2em;max-width:70em}}\
         table{{border-collapse:collapse}}td,th{{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}}\
         td:first-child,th:first-child{{text-align:left}}svg{{background:#fafafa;margin:.3em}}</style><h1>{name}</h1>",
        name = escape(&plan.config.run.name)
    );
    html +=
        "<h2>Models</h2><table><tr><th>model<th>top-1 %<th>top-5 %<th>training images<th>FLOPs<th>device-hours</tr>";
    for row in rows {
        let percent = |v: Option<f64>| v.map_or("–".into(), |v| format!("{v:.2}"));
        let _ = write!(
            html,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{:.2e}<td>{:.4}</tr>",
            escape(&row.model),
            percent(row.top1),
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
    for phase in super::bars::phase_names(plan).into_iter().map(|(name, _)| name) {
        let lines = metrics::read(&run.logs(&phase));
        for (key, title) in [("loss", "training loss"), ("test/top1", "test top-1 %")] {
            html += &curve(&format!("{phase}: {title}"), &points(&lines, key));
        }
    }
    durable::replace_bytes(&run.file("report.html"), html.as_bytes())
}

fn points(lines: &[Map<String, Value>], key: &str) -> Vec<(f64, f64)> {
    lines.iter().filter_map(|line| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?))).collect()
}

/// One curve as SVG; nothing for fewer than two points.
fn curve(title: &str, points: &[(f64, f64)]) -> String {
    if points.len() < 2 {
        return String::new();
    }
    let range = |pick: fn(&(f64, f64)) -> f64| {
        let (low, high) = points.iter().map(pick).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        (low, (high - low).max(1e-12))
    };
    let ((x0, dx), (y0, dy)) = (range(|p| p.0), range(|p| p.1));
    let x = |v: f64| MARGIN + (v - x0) / dx * (WIDTH - 2.0 * MARGIN);
    let y = |v: f64| HEIGHT - MARGIN / 2.0 - (v - y0) / dy * (HEIGHT - 1.5 * MARGIN);
    let path: String = points.iter().map(|&(a, b)| format!("{:.1},{:.1} ", x(a), y(b))).collect();
    let label = |at: f64| format!("<text x=4 y={:.0} font-size=11>{at:.3}</text>", y(at) + 4.0);
    format!(
        "<svg width={WIDTH} height={HEIGHT}><text x={MARGIN} y=16 font-size=13>{}</text>{}{}\
         <text x={:.0} y={} font-size=11 text-anchor=end>step {}</text>\
         <polyline points=\"{path}\" fill=none stroke=#1668b0 stroke-width=1.5 /></svg>",
        escape(title),
        label(y0),
        label(y0 + dy),
        WIDTH - MARGIN,
        HEIGHT - 6.0,
        x0 + dx
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
