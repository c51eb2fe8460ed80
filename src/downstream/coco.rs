//! Computes COCO's twelve figures as pycocotools does.

use super::coco_files::{self, Files, Id};
use crate::{svg, usage};
use anyhow::{Context, Result};
use hotcoco::COCOeval;
use hotcoco::detection::AccumulatedEval;
use hotcoco::params::IouType;
use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt::Write;
use std::path::Path;

/// The figures of one results file.
#[derive(Debug, Serialize)]
pub struct CocoReport {
    /// `bbox` or `segm`.
    pub iou: &'static str,
    /// AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, from 0 to 1; −1 if there were no annotations to find.
    pub figures: Map<String, Value>,
    /// Average precision of each category, from 0 to 1; −1 without annotations.
    pub categories: Vec<Category>,
    /// Mean precision of all categories at recalls 0, 0.01, … 1, for each IoU threshold.
    #[serde(skip)]
    curves: Vec<svg::Curve>,
}

#[derive(Debug, Serialize)]
pub struct Category {
    pub id: Id,
    pub name: String,
    pub ap: f64,
}

/// Evaluates a results file (a JSON list of detections) against annotations in COCO's format.
///
/// If masks are evaluated, the boxes of detections are ignored, as in detectron2 and mmdetection. Otherwise pycocotools would
/// take the size of a detection, for APs, APm and APl, from its box instead of its mask.
///
/// # Errors
/// A usage error that names the file if a file cannot be read or is malformed, or if the two files do not belong together.
pub fn evaluate(annotations: &Path, results: &Path, segm: bool) -> Result<CocoReport> {
    let Files { annotations, detections, categories } = coco_files::read(annotations, results, segm)?;
    let (iou, kind) = if segm { ("segm", IouType::Segm) } else { ("bbox", IouType::Bbox) };
    let mut evaluation = COCOeval::new(annotations, detections, kind);
    evaluation.evaluate().map_err(|e| usage!("{}: {e}", results.display()))?;
    evaluation.accumulate();
    evaluation.summarize_lines();
    let names = evaluation.metric_keys();
    let stats = evaluation.stats().context("the evaluation gave no figures")?;
    let figures = names.into_iter().map(String::from).zip(stats.iter().map(|&value| value.into())).collect();
    let accumulated = evaluation.accumulated().context("the evaluation gave no curves")?;
    let category = |(k, &position): (usize, &u64)| {
        let (id, name) = categories[position as usize].clone();
        Category { id, name, ap: category_ap(accumulated, k) }
    };
    let categories = accumulated.cat_ids.iter().enumerate().map(category).collect();
    Ok(CocoReport { iou, figures, categories, curves: curves(accumulated, &evaluation.params.iou_thrs) })
}

/// The mean precision of a category over all thresholds and recalls, for objects of all areas and the highest limit of
/// detections.
fn category_ap(accumulated: &AccumulatedEval, category: usize) -> f64 {
    let shape = &accumulated.shape;
    let precision = |t: usize, r: usize| accumulated.precision[shape.precision_idx(t, r, category, 0, shape.m - 1)];
    mean((0..shape.t).flat_map(|t| (0..shape.r).map(move |r| (t, r))).map(|(t, r)| precision(t, r)))
}

fn curves(accumulated: &AccumulatedEval, thresholds: &[f64]) -> Vec<svg::Curve> {
    let shape = &accumulated.shape;
    let precision = |t, r, k| accumulated.precision[shape.precision_idx(t, r, k, 0, shape.m - 1)];
    let curve = |(t, threshold): (usize, &f64)| svg::Curve {
        name: format!("IoU {threshold:.2}"),
        points: (0..shape.r)
            .map(|r| (r as f64 / (shape.r - 1).max(1) as f64, mean((0..shape.k).map(|k| precision(t, r, k))).max(0.0)))
            .collect(),
    };
    thresholds.iter().enumerate().map(curve).collect()
}

/// The mean of the values except −1, which marks a missing value; −1 if all are missing.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.filter(|&v| v > -1.0).fold((0.0, 0), |(sum, count), v| (sum + v, count + 1));
    if count == 0 { -1.0 } else { sum / f64::from(count) }
}

impl CocoReport {
    /// The figures as tables for people, in percent as the literature gives them.
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
