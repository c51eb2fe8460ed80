//! The table of a study's cells, with their costs and the hours that they need.

use super::{Cell, Method};
use crate::plan::gpus::{GpuModel, UTILISATION};
use serde::Serialize;
use std::fmt::Write;

/// A cell as `study --dry-run` shows it.
#[derive(Debug, Serialize)]
pub struct Line {
    pub cell: String,
    pub method: Method,
    /// The names of the phases of the cell's method, each with its epochs.
    pub epochs: Vec<(&'static str, usize)>,
    pub flops: f64,
    /// The cell whose cost this cell should equal.
    pub equal_to: Option<String>,
    /// The cost of this cell divided by the cost of that cell, minus 1, without phases downstream.
    pub difference: Option<f64>,
    pub is_done: bool,
    /// Hours of training on this machine, or on one GPU of the kind that was named. Phases downstream are assumed to be as fast as
    /// training on images with classes.
    pub hours: f64,
}

impl Line {
    /// The line of a cell on a machine that computes `rate` operations per second of this cell's network.
    pub fn new(cell: &Cell, is_done: bool, rate: f64) -> Line {
        Line {
            cell: cell.name.clone(),
            method: cell.method,
            epochs: cell.epochs(),
            flops: cell.flops,
            equal_to: cell.equal_to.as_ref().map(|(name, _)| name.clone()),
            difference: cell.equal_to.as_ref().map(|(_, difference)| *difference),
            is_done,
            hours: cell.flops / rate / 3600.0,
        }
    }
}

/// The table as a text for people. `shares` is the number of processes that train the study. `gpu` is the kind of GPU to which the
/// hours apply; none if they apply to this machine.
pub fn text(lines: &[Line], shares: usize, gpu: Option<GpuModel>) -> String {
    let width = lines.iter().map(|line| line.cell.len()).max().unwrap_or(0).max(4);
    let mut out = format!(
        "{:<width$} {:<10} {:<32} {:>9} {:>8} {:>6}  {}\n",
        "cell", "method", "epochs", "FLOPs", "hours", "state", "cost"
    );
    for line in lines {
        let epochs: Vec<String> = line.epochs.iter().map(|(name, epochs)| format!("{name} {epochs}")).collect();
        let method = line.method.key();
        let compared = match (&line.equal_to, line.difference) {
            (Some(other), Some(difference)) => format!("{:+.1} % of {other}'s", 100.0 * difference),
            _ => String::new(),
        };
        let state = if line.is_done { "done" } else { "open" };
        let _ = writeln!(
            out,
            "{:<width$} {method:<10} {:<32} {:>9.2e} {:>8.2} {state:>6}  {compared}",
            line.cell,
            epochs.join(", "),
            line.flops,
            line.hours
        );
    }
    let sum = |open: bool, of: fn(&Line) -> f64| {
        lines.iter().filter(|line| !(open && line.is_done)).map(of).fold(0.0, |sum, of| sum + of)
    };
    let measured = match gpu {
        None => "measured here for each network".into(),
        Some(gpu) => format!("estimated for one {} at {:.0} % of its peak", gpu.name, 100.0 * UTILISATION),
    };
    let _ = writeln!(
        out,
        "{} cell(s): {:.2e} FLOPs, {:.1} hours; open: {:.1} hours, {:.1} hours with {shares} process(es). Hours are those of \
         training steps, {measured}; evaluations and start-up come on top.",
        lines.len(),
        sum(false, |line| line.flops),
        sum(false, |line| line.hours),
        sum(true, |line| line.hours),
        sum(true, |line| line.hours) / shares as f64
    );
    out
}
