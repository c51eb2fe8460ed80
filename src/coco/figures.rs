//! COCO's twelve detection metrics, as pycocotools computes them.

use super::objects::{Detected, Object, Outline, Scene};
use anyhow::{Context, Result};
use hotcoco::detection::AccumulatedEval;
use hotcoco::params::IouType;
use hotcoco::{Annotation, COCO, COCOeval, Category, Dataset, Image, Segmentation};

/// COCO's metrics of a set of detections. Each value is from 0 to 1, or −1 if there are no objects to find.
#[derive(Debug)]
pub struct Figures {
    /// The names and values of AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, in this order.
    pub all: Vec<(&'static str, f64)>,
    /// The average precision of each category, after the category's position in the order of the ids.
    pub of_categories: Vec<(usize, f64)>,
    pub curves: Vec<Curve>,
}

/// The precision over the recall for one threshold of the IoU. The precision is the mean over the categories that have objects to
/// find.
#[derive(Debug)]
pub struct Curve {
    pub threshold: f64,
    /// Pairs of recall and precision, with recalls from 0 to 1.
    pub points: Vec<(f64, f64)>,
}

/// The metrics of the masks of detections if `of_masks` is true, otherwise of their boxes. The ids of images and of categories
/// count from 0.
///
/// # Errors
/// Fails if the detections cannot be evaluated against the annotations.
pub fn figures(annotations: COCO, detections: COCO, of_masks: bool) -> Result<Figures> {
    let kind = if of_masks { IouType::Segm } else { IouType::Bbox };
    let mut evaluation = COCOeval::new(annotations, detections, kind);
    evaluation.evaluate()?;
    evaluation.accumulate();
    evaluation.summarize_lines();
    let stats = evaluation.stats().context("the evaluation gave no figures")?;
    let all = evaluation.metric_keys().into_iter().zip(stats.iter().copied()).collect();
    let accumulated = evaluation.accumulated().context("the evaluation gave no curves")?;
    let category = |(k, &position): (usize, &u64)| (position as usize, category_ap(accumulated, k));
    let of_categories = accumulated.cat_ids.iter().enumerate().map(category).collect();
    Ok(Figures { all, of_categories, curves: curves(accumulated, &evaluation.params.iou_thrs) })
}

/// The mean precision of a category over all thresholds and recalls. Objects of all areas count. Of each image's detections, as
/// many count as COCO's highest limit allows: the 100 with the highest scores.
fn category_ap(accumulated: &AccumulatedEval, category: usize) -> f64 {
    let shape = &accumulated.shape;
    let precision = |t: usize, r: usize| accumulated.precision[shape.precision_idx(t, r, category, 0, shape.m - 1)];
    mean((0..shape.t).flat_map(|t| (0..shape.r).map(move |r| (t, r))).map(|(t, r)| precision(t, r)))
}

fn curves(accumulated: &AccumulatedEval, thresholds: &[f64]) -> Vec<Curve> {
    let shape = &accumulated.shape;
    let precision = |t, r, k| accumulated.precision[shape.precision_idx(t, r, k, 0, shape.m - 1)];
    let curve = |(t, &threshold): (usize, &f64)| Curve {
        threshold,
        points: (0..shape.r)
            .map(|r| (r as f64 / (shape.r - 1).max(1) as f64, mean((0..shape.k).map(|k| precision(t, r, k))).max(0.0)))
            .collect(),
    };
    thresholds.iter().enumerate().map(curve).collect()
}

/// The mean of the values, without the values −1, which mark missing values. −1 if all values are missing.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.filter(|&v| v > -1.0).fold((0.0, 0), |(sum, count), v| (sum + v, count + 1));
    if count == 0 { -1.0 } else { sum / f64::from(count) }
}

/// The metrics of the masks of detections if `of_masks` is true, otherwise of their boxes. `classes` is the number of classes.
///
/// If masks are evaluated, the boxes of detections are ignored, as in detectron2. If an annotated object then has no outline, its
/// box stands for its mask.
///
/// # Errors
/// Fails as [`figures`] does.
pub fn figures_of_scenes(images: &[(Scene, Vec<Detected>)], classes: usize, of_masks: bool) -> Result<Figures> {
    // pycocotools evaluates images in the order of their ids.
    let mut images: Vec<&(Scene, Vec<Detected>)> = images.iter().collect();
    images.sort_by_key(|(scene, _)| scene.image);
    let (mut annotations, mut detections) = (Vec::new(), Vec::new());
    for ((scene, detected), image_id) in images.iter().zip(0..) {
        for object in &scene.objects {
            let id = annotations.len() as u64 + 1;
            annotations.push(Annotation { id, image_id, ..annotation(object, scene.size, of_masks) });
        }
        detections.extend(detected.iter().map(|one| Annotation {
            image_id,
            category_id: one.class as u64,
            score: Some(one.score),
            bbox: (!of_masks).then_some(one.bbox),
            segmentation: of_masks.then(|| run_length_code(&one.runs, scene.size)),
            ..Annotation::default()
        }));
    }
    let image = |(id, (scene, _)): (u64, &&(Scene, Vec<Detected>))| Image {
        id,
        height: scene.size[0] as u32,
        width: scene.size[1] as u32,
        ..Image::default()
    };
    let category = |id: usize| Category { id: id as u64, name: id.to_string(), ..Category::default() };
    let annotated = COCO::from_dataset(Dataset {
        images: (0..).zip(&images).map(image).collect(),
        annotations,
        categories: (0..classes).map(category).collect(),
        ..Dataset::default()
    });
    let detections = annotated.load_res_anns(detections)?;
    figures(annotated, detections, of_masks)
}

fn annotation(object: &Object, size: [usize; 2], of_masks: bool) -> Annotation {
    let segmentation = || match &object.outline {
        Outline::None => Segmentation::Rect(object.bbox),
        Outline::Polygons(polygons) => Segmentation::Polygon(polygons.clone()),
        Outline::Runs(runs) => run_length_code(runs, size),
    };
    Annotation {
        category_id: object.class as u64,
        bbox: Some(object.bbox),
        area: Some(object.area),
        iscrowd: object.is_crowd,
        segmentation: of_masks.then(segmentation),
        ..Annotation::default()
    }
}

fn run_length_code(runs: &[u32], size: [usize; 2]) -> Segmentation {
    Segmentation::UncompressedRle { size: size.map(|length| length as u32), counts: runs.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_perfect_detection_of_one_of_two_objects_has_half_of_the_recall() {
        let square = |left: f64| vec![left, 4.0, left + 8.0, 4.0, left + 8.0, 12.0, left, 12.0];
        let object = |class: usize, left: f64| Object {
            class,
            bbox: [left, 4.0, 8.0, 8.0],
            area: 64.0,
            is_crowd: false,
            outline: Outline::Polygons(vec![square(left)]),
        };
        let runs = super::super::outlines::run_lengths([20, 30], [4..12, 2..10], |_, _| true);
        let found = |class, bbox| Detected { class, score: 0.9, bbox, runs: runs.clone() };
        // The images are not in the order of their numbers. Class 1 has no annotated object, so its detection does not count.
        let images = [
            (Scene { image: 7, size: [20, 30], objects: vec![object(2, 2.0)] }, Vec::new()),
            (
                Scene { image: 3, size: [20, 30], objects: vec![object(0, 2.0), object(2, 2.0)] },
                vec![found(0, [2.0, 4.0, 8.0, 8.0]), found(2, [2.0, 4.0, 8.0, 8.0]), found(1, [0.0, 0.0, 3.0, 3.0])],
            ),
        ];
        for of_masks in [false, true] {
            let Figures { all, of_categories, curves } = figures_of_scenes(&images, 3, of_masks).unwrap();
            // Half of class 2's objects are found. So the precision is 1 at the 51 recalls from 0 to 0.5, of 101 recalls in all.
            let half = 51.0 / 101.0;
            let is_near = |value: f64, expected: f64| (value - expected).abs() < 1e-12;
            for ((category, ap), expected) in of_categories.into_iter().zip([1.0, -1.0, half]) {
                assert!(is_near(ap, expected), "{category}: {ap}");
            }
            assert!(all[0].0 == "AP" && is_near(all[0].1, (1.0 + half) / 2.0), "{all:?}");
            assert_eq!((all[3].1, all[4].1), (all[0].1, -1.0), "all objects are small");
            assert_eq!(curves.len(), 10);
            let nothing = figures_of_scenes(&images.clone().map(|(scene, _)| (scene, Vec::new())), 3, of_masks);
            assert_eq!(nothing.unwrap().all[0].1, 0.0);
        }
    }
}
