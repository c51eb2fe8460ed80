//! COCO's twelve figures, as pycocotools computes them.

use crate::{svg, usage};
use anyhow::{Context, Result};
use hotcoco::detection::AccumulatedEval;
use hotcoco::params::IouType;
use hotcoco::{Annotation, COCO, COCOeval};
use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// The figures of one results file.
#[derive(Debug, Serialize)]
pub struct Report {
    /// `bbox` or `segm`.
    pub iou: &'static str,
    /// AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, from 0 to 1; −1 where nothing was there to find.
    pub figures: Map<String, Value>,
    /// Average precision of each category, from 0 to 1; −1 without annotations.
    pub categories: Vec<Category>,
    /// Precision at recalls 0, 0.01, … 1 for each IoU threshold, over all categories.
    #[serde(skip)]
    curves: Vec<svg::Curve>,
}

#[derive(Debug, Serialize)]
pub struct Category {
    pub id: u64,
    pub name: String,
    pub ap: f64,
}

/// Evaluates a results file (a JSON list of detections) against annotations in COCO's format.
///
/// Masks that come with a box are evaluated without it, as detectron2 and mmdetection do: pycocotools would otherwise take
/// an object's size, for APs, APm and APl, from the box instead of the mask.
///
/// # Errors
/// A usage error that names the file if one cannot be read, is malformed, or the two do not belong together.
pub fn evaluate(annotations: &Path, results: &Path, segm: bool) -> Result<Report> {
    let named = |path: &Path, error: hotcoco::error::Error| usage!("{}: {error}", path.display());
    let truth = COCO::new(annotations).map_err(|e| named(annotations, e))?;
    let found = truth.load_res_anns(detections(results, segm)?).map_err(|e| named(results, e))?;
    // Detections of images or categories that do not exist would lower the figures in silence.
    if let Some(warning) = found.load_warnings().first() {
        return Err(usage!("{}: {warning}", results.display()));
    }
    let (iou, kind) = if segm { ("segm", IouType::Segm) } else { ("bbox", IouType::Bbox) };
    let mut evaluation = COCOeval::new(truth, found, kind);
    evaluation.evaluate().map_err(|e| named(results, e))?;
    evaluation.accumulate();
    evaluation.summarize_lines();
    let names = evaluation.metric_keys();
    let stats = evaluation.stats().context("the evaluation gave no figures")?;
    let figures = names.into_iter().map(String::from).zip(stats.iter().map(|&value| value.into())).collect();
    let all = evaluation.accumulated().context("the evaluation gave no curves")?;
    let name = |id: u64| evaluation.coco_gt().cat_name(id);
    let categories = all
        .cat_ids
        .iter()
        .enumerate()
        .map(|(k, &id)| Category { id, name: name(id), ap: category_ap(all, k) })
        .collect();
    Ok(Report { iou, figures, categories, curves: curves(all, &evaluation.params.iou_thrs) })
}

/// The results, of masks without the boxes beside them.
fn detections(results: &Path, segm: bool) -> Result<Vec<Annotation>> {
    let broken = |what: String| usage!("{}: {what}", results.display());
    let file = File::open(results).map_err(|e| broken(e.to_string()))?;
    let mut found: Vec<Annotation> =
        serde_json::from_reader(BufReader::new(file)).map_err(|e| broken(e.to_string()))?;
    if let Some(number) = found.iter().position(|one| one.score.is_none()) {
        return Err(broken(format!("its entry {number} (from 0) has no score; give a JSON list of detections")));
    }
    if segm {
        found.iter_mut().filter(|one| one.segmentation.is_some()).for_each(|one| one.bbox = None);
    }
    Ok(found)
}

/// Mean precision over thresholds and recalls, at all areas and the most detections.
fn category_ap(all: &AccumulatedEval, category: usize) -> f64 {
    let shape = &all.shape;
    let at = |t: usize, r: usize| all.precision[shape.precision_idx(t, r, category, 0, shape.m - 1)];
    mean((0..shape.t).flat_map(|t| (0..shape.r).map(move |r| (t, r))).map(|(t, r)| at(t, r)))
}

fn curves(all: &AccumulatedEval, thresholds: &[f64]) -> Vec<svg::Curve> {
    let shape = &all.shape;
    let at = |t, r, k| all.precision[shape.precision_idx(t, r, k, 0, shape.m - 1)];
    let curve = |(t, threshold): (usize, &f64)| svg::Curve {
        name: format!("IoU {threshold:.2}"),
        points: (0..shape.r)
            .map(|r| (r as f64 / (shape.r - 1).max(1) as f64, mean((0..shape.k).map(|k| at(t, r, k))).max(0.0)))
            .collect(),
    };
    thresholds.iter().enumerate().map(curve).collect()
}

/// The mean of what is there: −1 marks what is not.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.filter(|&v| v > -1.0).fold((0.0, 0), |(sum, count), v| (sum + v, count + 1));
    if count == 0 { -1.0 } else { sum / f64::from(count) }
}

impl Report {
    /// The tables for people: the figures as the literature gives them, in percent.
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

    /// Precision over recall, a curve for each IoU threshold.
    pub fn plot(&self) -> String {
        let axis = |name| svg::Axis { name, low: 0.0, high: 1.0 };
        svg::curves(&format!("COCO {}", self.iou), axis("recall"), axis("precision"), &self.curves)
    }
}
