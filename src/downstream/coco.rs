//! Computes COCO's twelve metrics for a results file.

use super::coco_files::{self, Files, Id};
use crate::coco::figures::{Curve, Figures, figures};
use crate::{svg, usage};
use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt::Write;
use std::path::Path;

/// The metrics of one results file.
#[derive(Debug, Serialize)]
pub struct CocoReport {
    /// The shapes that were compared: `bbox` or `segm`.
    pub iou: &'static str,
    /// AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm and ARl, from 0 to 1. A metric is −1 if there are no annotations
    /// to find for it.
    pub figures: Map<String, Value>,
    /// The average precision of each category, from 0 to 1. It is −1 if the category has no annotations to find.
    pub categories: Vec<Category>,
    /// For each IoU threshold, the mean precision over the categories at recalls 0, 0.01, …, 1.
    #[serde(skip)]
    curves: Vec<svg::Curve>,
}

#[derive(Debug, Serialize)]
pub struct Category {
    pub id: Id,
    pub name: String,
    pub ap: f64,
}

/// Evaluates a results file (a JSON list of detections) against annotations in COCO's format. Compares masks if `segm` is true,
/// else boxes.
///
/// If masks are compared, the boxes of the detections are ignored, as in detectron2 and mmdetection. If the
/// detections kept their boxes, pycocotools would take their sizes for APs, APm and APl from the boxes instead of the masks.
///
/// # Errors
/// A usage error that names the file if a file cannot be read or is malformed, or if the two files do not belong together.
pub fn evaluate(annotations: &Path, results: &Path, segm: bool) -> Result<CocoReport> {
    let Files { annotations, detections, categories } = coco_files::read(annotations, results, segm)?;
    let Figures { all, of_categories, curves } =
        figures(annotations, detections, segm).map_err(|e| usage!("{}: {e}", results.display()))?;
    let category = |(position, ap): (usize, f64)| {
        let (id, name) = categories[position].clone();
        Category { id, name, ap }
    };
    Ok(CocoReport {
        iou: if segm { "segm" } else { "bbox" },
        figures: all.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect(),
        categories: of_categories.into_iter().map(category).collect(),
        curves: curves.into_iter().map(curve).collect(),
    })
}

fn curve(Curve { threshold, points }: Curve) -> svg::Curve {
    svg::Curve { name: format!("IoU {threshold:.2}"), points }
}

impl CocoReport {
    /// The metrics as text tables for people, in percent, as the literature gives them.
    pub fn text(&self) -> String {
        let percent = |value: f64| if value < 0.0 { "-".into() } else { format!("{:.2}", 100.0 * value) };
        let mut text = format!("COCO {}, percent\n", self.iou);
        for (name, value) in &self.figures {
            let _ = writeln!(text, "{name:<6} {:>6}", percent(value.as_f64().unwrap_or(-1.0)));
        }
        let _ = writeln!(text, "\n{:<24} {:>6}", "category", "AP");
        for category in &self.categories {
            let _ = writeln!(text, "{:<24} {:>6}", category.name, percent(category.ap));
        }
        text
    }

    /// An SVG of precision over recall, with a curve for each IoU threshold.
    pub fn plot(&self) -> String {
        let axis = |name| svg::Axis { name, low: 0.0, high: 1.0 };
        svg::curves(&format!("COCO {}", self.iou), axis("recall"), axis("precision"), &self.curves)
    }
}
