//! mIoU, mAcc and aAcc as mmsegmentation's `IoUMetric` computes them. They follow from counts of pixels, summed over all images.
//! mIoU and mAcc are means over the classes that have an IoU, or an accuracy.

use super::IGNORED;
use crate::task::{Better, ClassFigures, Metric, OfClass};
use std::collections::BTreeMap;
use tch::Tensor;

const MEAN_IOU: Metric = Metric {
    key: "mIoU",
    name: "mIoU",
    unit: "%",
    decimals: 2,
    better: Better::Higher { perfect: 100.0 },
    has_column: true,
};

const MEAN_ACCURACY: Metric = Metric { key: "mAcc", name: "mAcc", ..MEAN_IOU };

const PIXEL_ACCURACY: Metric = Metric { key: "aAcc", name: "aAcc", ..MEAN_IOU };

pub const METRICS: [Metric; 3] = [MEAN_IOU, MEAN_ACCURACY, PIXEL_ACCURACY];

/// The sums before the first image, all 0. They are the numbers of right pixels of all classes, then of pixels predicted as each
/// class, then of pixels labelled as each class.
pub fn sums(classes: usize) -> Vec<f64> {
    vec![0.0; 3 * classes]
}

/// Adds the pixels of predictions and labels, which have the same size and are in host memory. Pixels whose label is no class do
/// not count.
pub fn add(sums: &mut [f64], predictions: &Tensor, labels: &Tensor) {
    let classes = sums.len() / 3;
    let numbers = |tensor: &Tensor| Vec::<u8>::try_from(tensor.flatten(0, -1)).expect("classes are bytes");
    let mut counts = vec![0u64; sums.len()];
    for (prediction, label) in numbers(predictions).into_iter().zip(numbers(labels)) {
        if label != IGNORED {
            let (prediction, label) = (usize::from(prediction), usize::from(label));
            counts[label] += u64::from(prediction == label);
            counts[classes + prediction] += 1;
            counts[2 * classes + label] += 1;
        }
    }
    sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count as f64);
}

/// The metrics in percent.
pub fn values(sums: &[f64]) -> BTreeMap<String, f64> {
    let classes = sums.len() / 3;
    let [right, predicted, labelled] = [0, 1, 2].map(|part| &sums[part * classes..(part + 1) * classes]);
    let mean = |whole: &dyn Fn(usize) -> f64| {
        let shares: Vec<f64> =
            (0..classes).filter(|&class| whole(class) > 0.0).map(|class| right[class] / whole(class)).collect();
        100.0 * shares.iter().sum::<f64>() / shares.len().max(1) as f64
    };
    let all = labelled.iter().sum::<f64>().max(1.0);
    let figures = [
        mean(&|class| predicted[class] + labelled[class] - right[class]),
        mean(&|class| labelled[class]),
        100.0 * right.iter().sum::<f64>() / all,
    ];
    METRICS.iter().map(|metric| metric.key.to_string()).zip(figures).collect()
}

/// The figures of each class. `name` returns the name of a class.
pub fn of_classes(sums: &[f64], name: impl Fn(usize) -> String) -> Vec<ClassFigures> {
    let classes = sums.len() / 3;
    let [right, predicted, labelled] = [0, 1, 2].map(|part| &sums[part * classes..(part + 1) * classes]);
    let figures = |class: usize| {
        let share = |whole: f64| (whole > 0.0).then(|| 100.0 * right[class] / whole);
        ClassFigures {
            class,
            name: name(class),
            figures: OfClass::Pixels {
                iou: share(predicted[class] + labelled[class] - right[class]),
                accuracy: share(labelled[class]),
                pixels: labelled[class] as u64,
            },
        }
    };
    (0..classes).map(figures).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_sums_over_images_and_means_over_the_classes_that_are_there() {
        let maps = |values: [u8; 4]| Tensor::from_slice(&values).view([1, 2, 2]);
        let mut all = sums(4);
        add(&mut all, &maps([0, 0, 1, 3]), &maps([0, 1, 1, IGNORED]));
        add(&mut all, &maps([1, 1, 0, 0]), &maps([1, 1, 0, 1]));
        let values = values(&all);
        // Class 0: 2 right of 4 predicted or labelled. Class 1: 3 of 5. Class 3 is predicted on an ignored pixel alone.
        let expected = [(2.0 / 4.0 + 3.0 / 5.0) / 2.0, (2.0 / 2.0 + 3.0 / 5.0) / 2.0, 5.0 / 7.0];
        for (metric, expected) in METRICS.iter().zip(expected) {
            assert!((values[metric.key] - 100.0 * expected).abs() < 1e-12, "{}: {values:?}", metric.key);
        }
        let figures = of_classes(&all, |class| format!("class {class}"));
        let of = |class: usize| figures[class].figures.clone();
        let pixels = |iou, accuracy, pixels| OfClass::Pixels { iou, accuracy, pixels };
        assert_eq!(of(0), pixels(Some(50.0), Some(100.0), 2));
        assert_eq!(of(1), pixels(Some(60.0), Some(60.0), 5));
        assert_eq!([of(2), of(3)], [(); 2].map(|()| pixels(None, None, 0)));
    }
}
