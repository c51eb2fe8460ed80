//! Detected objects for other programs: a results file of COCO's format.

use crate::coco::objects::{Detected, Scene, detected_from_row};
use crate::coco::results::Ids;
use crate::config::Config;
use crate::data::source::samples::Split;
use crate::store::durable;
use anyhow::Result;
use serde_json::Value;
use std::path::Path;
use tch::{Device, Tensor};

/// Collects the detections of an evaluation.
pub struct Results {
    ids: Ids,
    entries: Vec<Value>,
}

impl Results {
    pub fn new(config: &Config, images: &Split) -> Results {
        let numbers = || Ids::numbers(images.len(), config.detection.classes);
        Results { ids: images.ids().unwrap_or_else(numbers), entries: Vec::new() }
    }

    /// Adds the objects that were detected in an image with these labels.
    pub fn keep(&mut self, labels: &Tensor, detected: &Tensor) {
        let scene = scene(labels);
        self.entries.extend(self::detected(detected).iter().map(|one| self.ids.entry(&scene, one)));
    }

    pub fn write(&self, into: &Path) -> Result<()> {
        durable::replace_bytes(into, &serde_json::to_vec(&self.entries)?)
    }
}

/// The annotated objects of an image, from its labels (1, numbers).
pub fn scene(labels: &Tensor) -> Scene {
    Scene::from_row(&numbers(labels)).expect("labels hold a scene").0
}

/// The detected objects of an image, from the task's output (1, numbers).
pub fn detected(output: &Tensor) -> Vec<Detected> {
    detected_from_row(&numbers(output)).expect("the output holds objects").0
}

fn numbers(row: &Tensor) -> Vec<f64> {
    Vec::try_from(row.to_device(Device::Cpu).contiguous().view(-1)).expect("a row holds numbers")
}
