//! COCO's twelve figures of a results file.

use super::coco_files::{self, Files, Id};
use crate::coco::figures::{Curve, Figures, figures};
use crate::{svg, usage};
use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt::Write;
use std::path::Path;

/// The figures of one results file.
#[derive(Debug, Serialize)]
pub struct CocoReport {
    /// `bbox` or `segm`.
    pub iou: &'static str,
    /// AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm and ARl, from 0 to 1. −1 if there were no annotations to find.
    pub figures: Map<String, Value>,
    /// The average precision of each category, from 0 to 1. −1 without annotations.
    pub categories: Vec<Category>,
    /// For each IoU threshold, the mean precision of all categories at recalls 0, 0.01, …, 1.
    #[serde(skip)]
    curves: Vec<svg::Curve>,
}

#[derive(Debug, Serialize)]
pub struct Category {
    pub id: Id,
    pub name: String,
    pub ap: f64,
}

/// Evaluates a results file (a JSON list of detections) against annotations in COCO's format: by masks if `segm` is true, else by
/// boxes.
///
/// If masks are evaluated, the boxes of detections are ignored, as in detectron2 and mmdetection. With boxes, pycocotools would
/// take the size of a detection for APs, APm and APl from its box instead of its mask.
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
    /// The figures as tables for people, in percent, as the literature gives them.
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
