//! COCO's average precision of boxes and of masks in percent, as pycocotools computes it. The sums of an evaluation are a list.
//! For each image it holds the row of its label, which is a scene, and the row of its detections.

use crate::coco::figures::{Figures, figures_of_scenes};
use crate::coco::objects::{Detected, Scene, detected_from_row};
use crate::task::{Better, ClassFigures, Metric, OfClass};
use std::collections::BTreeMap;
use tch::Tensor;

const BOX_AP: Metric = Metric {
    key: "box_ap",
    name: "box AP",
    unit: "%",
    decimals: 2,
    better: Better::Higher { perfect: 100.0 },
    has_column: true,
};

const fn other(key: &'static str, name: &'static str, has_column: bool) -> Metric {
    Metric { key, name, has_column, ..BOX_AP }
}

/// How many of COCO's figures are average precisions.
const PRECISIONS: usize = 6;

/// The metrics of boxes, then the metrics of masks, each in the order of COCO's figures.
static METRICS: [Metric; 2 * PRECISIONS] = [
    BOX_AP,
    other("box_ap50", "box AP50", true),
    other("box_ap75", "box AP75", true),
    other("box_ap_small", "box AP small", false),
    other("box_ap_medium", "box AP medium", false),
    other("box_ap_large", "box AP large", false),
    other("mask_ap", "mask AP", true),
    other("mask_ap50", "mask AP50", true),
    other("mask_ap75", "mask AP75", true),
    other("mask_ap_small", "mask AP small", false),
    other("mask_ap_medium", "mask AP medium", false),
    other("mask_ap_large", "mask AP large", false),
];

pub fn metrics(masks: bool) -> &'static [Metric] {
    if masks { &METRICS } else { &METRICS[..PRECISIONS] }
}

/// Adds the rows of an image to the list: its label, then its detections.
pub fn add(sums: &mut Vec<f64>, detected: &Tensor, label: &Tensor) {
    for row in [label, detected] {
        sums.extend(Vec::<f64>::try_from(row.get(0)).expect("a row holds f64"));
    }
}

/// The scene and the detections of each image in a list of sums.
fn images(mut sums: &[f64]) -> Vec<(Scene, Vec<Detected>)> {
    let mut images = Vec::new();
    while !sums.is_empty() {
        let (scene, rest) = Scene::from_row(sums).expect("the row was written as one of a scene");
        let (detected, rest) = detected_from_row(rest).expect("the row was written as one of detections");
        images.push((scene, detected));
        sums = rest;
    }
    images
}

/// The metrics and the figures of each class.
pub fn figures(
    sums: &[f64],
    (classes, names): (usize, &[String]),
    masks: bool,
) -> (BTreeMap<String, f64>, Vec<ClassFigures>) {
    let images = images(sums);
    let of = |of_masks| figures_of_scenes(&images, classes, of_masks).expect("detections belong to their images");
    let figures: Vec<Figures> = [false, true].into_iter().take(1 + usize::from(masks)).map(of).collect();
    let mut objects = vec![0u64; classes];
    let all = images.iter().flat_map(|(scene, _)| &scene.objects).filter(|object| !object.is_crowd);
    all.for_each(|object| objects[object.class] += 1);
    (values(&figures), of_classes(&figures, &objects, names))
}

/// The metrics in percent. A metric without objects to find is left out. Only the headline is never left out; it is then 0.
fn values(figures: &[Figures]) -> BTreeMap<String, f64> {
    let precisions = figures.iter().flat_map(|figures| &figures.all[..PRECISIONS]).map(|&(_, value)| value);
    let known = METRICS.iter().zip(precisions).filter(|(_, value)| *value >= 0.0);
    let mut values: BTreeMap<String, f64> =
        known.map(|(metric, value)| (metric.key.to_string(), 100.0 * value)).collect();
    values.entry(BOX_AP.key.into()).or_insert(0.0);
    values
}

/// The figures of each class. `objects` holds the number of objects of each class.
fn of_classes(figures: &[Figures], objects: &[u64], names: &[String]) -> Vec<ClassFigures> {
    let precision = |number: usize, class: usize| {
        let of_categories = &figures.get(number)?.of_categories;
        let (_, precision) = of_categories.iter().find(|(category, _)| *category == class)?;
        (*precision >= 0.0).then_some(100.0 * precision)
    };
    let of_class = |(class, &objects): (usize, &u64)| ClassFigures {
        class,
        name: names.get(class).cloned().unwrap_or_else(|| format!("class {class}")),
        figures: OfClass::Objects { box_ap: precision(0, class), mask_ap: precision(1, class), objects },
    };
    objects.iter().enumerate().map(of_class).collect()
}
