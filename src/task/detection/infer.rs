//! Detection in one image, as detectron2 does it: `fast_rcnn_inference_single_image`, `mask_rcnn_inference` and
//! `detector_postprocess`.

use super::Detection;
use super::boxes::{Corners, OF_REGIONS, clipped, decode, is_empty};
use super::heads::Heads;
use super::nms::grouped_nms;
use super::paste::pasted;
use super::pooling::pool;
use super::proposals::{Limits, proposals};
use super::regions::Region;
use crate::coco::objects::Detected;
use crate::plan::detection::{BOX_SIDE, MASK_OUTPUT, MASK_SIDE};
use crate::weights::{floats, upload};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// The score of a detection must be above this value.
const LEAST_SCORE: f32 = 0.05;
/// Of two detections of one class whose overlap (IoU) is above this value, the one with the lower score is removed.
const MOST_OVERLAP: f64 = 0.5;
/// The largest number of detections of an image.
const MOST: usize = 100;

/// A detection in pixels of the resized image.
struct Found {
    class: usize,
    score: f32,
    corners: Corners,
}

/// Detects the objects in an image, given the map of its tokens (1, d, row, column). The image was resized to `size` from its
/// `original` height and width. Returns the detections in pixels of the original image, the highest score first.
pub fn detected(task: Detection, heads: &Heads, map: &Tensor, size: [usize; 2], original: [usize; 2]) -> Vec<Detected> {
    let maps = heads.pyramid(map);
    let limits = Limits { of_level: task.limits.of_level.min(MOST_OF_LEVEL), ..task.limits };
    let boxes = proposals(&heads.anchored(&maps), &task.anchors(), &[size], limits).swap_remove(0);
    if boxes.is_empty() {
        return Vec::new();
    }
    let region = |&corners: &Corners| Region { image: 0, corners };
    let regions: Vec<Region> = boxes.iter().map(region).collect();
    let [logits, deltas] = heads.boxes(&pool(&maps, &regions, BOX_SIDE, task.patch).features);
    let found = best(&boxes, &logits.softmax(-1, Kind::Float), &deltas, size);
    let regions: Vec<Region> = found.iter().map(|found| region(&found.corners)).collect();
    let masks = (task.architecture.masks && !found.is_empty()).then(|| {
        let classes: Vec<i64> = found.iter().map(|found| found.class as i64).collect();
        let classes = upload(&Tensor::from_slice(&classes), map.device());
        let logits = heads.masks(&pool(&maps, &regions, MASK_SIDE, task.patch).features, &classes);
        logits.sigmoid().to_device(Device::Cpu).contiguous()
    });
    let pixels = masks.as_ref().map(floats);
    let mask = |number: usize| pixels.map(|pixels| &pixels[number * MASK_OUTPUT.pow(2)..][..MASK_OUTPUT.pow(2)]);
    let [down, across] = [0, 1].map(|axis| (original[axis] as f64 / size[axis] as f64) as f32);
    let of_original = |(number, found): (usize, &Found)| {
        let [left, top, right, bottom] = found.corners;
        let corners = [left * across, top * down, right * across, bottom * down];
        let corners = clipped(&corners, original.map(|length| length as f32));
        (!is_empty(&corners)).then(|| Detected {
            class: found.class,
            score: found.score.into(),
            bbox: [corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]].map(f64::from),
            runs: mask(number).map_or_else(Vec::new, |mask| pasted(mask, &corners, original)),
        })
    };
    found.par_iter().enumerate().filter_map(of_original).collect()
}

/// The largest number of proposals of a level before suppression in an evaluation: half of that in training.
const MOST_OF_LEVEL: usize = 1000;

/// The detections in an image of this size. The regions `boxes` have these class probabilities (r, classes + 1) and deltas (r,
/// classes, 4).
fn best(boxes: &[Corners], probabilities: &Tensor, deltas: &Tensor, size: [usize; 2]) -> Vec<Found> {
    let [probabilities, deltas] =
        [probabilities, deltas].map(|tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous());
    let classes = deltas.size()[1] as usize;
    let (probabilities, deltas) = (floats(&probabilities), floats(&deltas));
    let size = size.map(|length| length as f32);
    let mut all = Vec::new();
    for (number, of_region) in probabilities.chunks_exact(classes + 1).enumerate() {
        for (class, &score) in of_region[..classes].iter().enumerate() {
            if score > LEAST_SCORE {
                let deltas = &deltas[(number * classes + class) * 4..][..4];
                let corners = decode(&boxes[number], deltas, OF_REGIONS);
                if corners.iter().all(|length| length.is_finite()) {
                    all.push(Found { class, score, corners: clipped(&corners, size) });
                }
            }
        }
    }
    let boxes: Vec<Corners> = all.iter().map(|found| found.corners).collect();
    let scores: Vec<f32> = all.iter().map(|found| found.score).collect();
    let classes: Vec<usize> = all.iter().map(|found| found.class).collect();
    let kept = grouped_nms(&boxes, &scores, &classes, MOST_OVERLAP);
    let mut all: Vec<Option<Found>> = all.into_iter().map(Some).collect();
    kept.into_iter().take(MOST).filter_map(|number| all[number].take()).collect()
}
