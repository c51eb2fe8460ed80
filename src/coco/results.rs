//! Results files of COCO's format: a JSON list of detections, as pycocotools reads it.

use super::json::Id;
use super::objects::{Detected, Scene};
use hotcoco::Rle;
use hotcoco::mask::rle_to_string;
use serde_json::{Value, json};

/// The ids that the annotations give to the images of a split and to the classes, each in the order of their numbers.
#[derive(Debug, Clone)]
pub struct Ids {
    pub images: Vec<Id>,
    pub categories: Vec<Id>,
}

impl Ids {
    /// Ids that are the numbers of the images and classes themselves.
    pub fn numbers(images: usize, classes: usize) -> Ids {
        let numbers = |count: usize| (0..count as i64).map(Id::Number).collect();
        Ids { images: numbers(images), categories: numbers(classes) }
    }

    /// The entry of a results file for an object that was detected in an image. A mask is written as a compressed run-length
    /// code.
    pub fn entry(&self, scene: &Scene, detected: &Detected) -> Value {
        let mut entry = json!({
            "image_id": self.images[scene.image],
            "category_id": self.categories[detected.class],
            "bbox": detected.bbox,
            "score": detected.score,
        });
        if !detected.runs.is_empty() {
            let [h, w] = scene.size.map(|side| side as u32);
            let code = Rle { h, w, counts: detected.runs.clone() };
            entry["segmentation"] = json!({"size": scene.size, "counts": rle_to_string(&code)});
        }
        entry
    }
}
