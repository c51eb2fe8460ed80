//! Non-maximum suppression as in torchvision's `nms` and `batched_nms`. A box is removed if its overlap (IoU) with a kept box of
//! a higher score is above a limit. Between equal scores, the box with the lower number counts as the higher.

use super::boxes::{Corners, iou};
use std::collections::BTreeMap;

/// The numbers of the boxes that are kept, the highest score first.
pub fn nms(boxes: &[Corners], scores: &[f32], limit: f64) -> Vec<usize> {
    let mut kept: Vec<usize> = Vec::new();
    for number in by_score((0..boxes.len()).collect(), scores) {
        let overlaps = |&other: &usize| f64::from(iou(&boxes[other], &boxes[number])) > limit;
        if !kept.iter().any(overlaps) {
            kept.push(number);
        }
    }
    kept
}

/// As [`nms`], but only boxes of the same group suppress each other.
pub fn grouped_nms(boxes: &[Corners], scores: &[f32], groups: &[usize], limit: f64) -> Vec<usize> {
    let mut of_groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (number, &group) in groups.iter().enumerate() {
        of_groups.entry(group).or_default().push(number);
    }
    let kept = of_groups.into_values().flat_map(|numbers| {
        let (boxes, scores): (Vec<Corners>, Vec<f32>) = numbers.iter().map(|&i| (boxes[i], scores[i])).unzip();
        nms(&boxes, &scores, limit).into_iter().map(move |i| numbers[i]).collect::<Vec<_>>()
    });
    by_score(kept.collect(), scores)
}

/// The numbers by descending scores. Of equal scores, the lower number comes first.
fn by_score(mut numbers: Vec<usize>, scores: &[f32]) -> Vec<usize> {
    numbers.sort_unstable_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    numbers
}

#[cfg(test)]
mod tests {
    use super::super::tests::{corners, golden};
    use super::*;

    #[test]
    fn kept_boxes_are_torchvisions() {
        let golden = golden();
        let numbers = |name: &str| -> Vec<usize> {
            Vec::<i64>::try_from(&golden[name]).unwrap().into_iter().map(|number| number as usize).collect()
        };
        let boxes = corners(&golden["nms.boxes"]);
        let scores = Vec::<f32>::try_from(&golden["nms.scores"]).unwrap();
        for limit in [0.5, 0.7] {
            assert_eq!(nms(&boxes, &scores, limit), numbers(&format!("nms.kept.{limit}")));
            let groups = numbers("nms.groups");
            let kept = grouped_nms(&boxes, &scores, &groups, limit);
            assert_eq!(kept, numbers(&format!("nms.grouped.{limit}")));
            assert!(kept.len() > nms(&boxes, &scores, limit).len() && kept.len() < boxes.len());
        }
        // No box, one box, the same box several times, and equal scores.
        assert!(grouped_nms(&[], &[], &[], 0.5).is_empty());
        assert_eq!(nms(&boxes[..1], &scores[..1], 0.5), [0]);
        assert_eq!(nms(&[boxes[0]; 5], &[0.5, 0.75, 0.75, 0.25, 0.5], 0.5), [1]);
        assert_eq!(grouped_nms(&[boxes[0]; 4], &[0.5; 4], &[1, 0, 1, 0], 0.5), [0, 1]);
    }
}
