//! Detected objects for people, as marked photographs, and for other programs, as a results file of COCO's format.

use super::predict::Share;
use crate::coco::objects::{Detected, Object, Scene, detected_from_row};
use crate::coco::outlines::runs_of;
use crate::coco::results::Ids;
use crate::config::Config;
use crate::data::source::samples::Split;
use crate::store::durable;
use crate::svg::{Marked, Picture, colour};
use anyhow::Result;
use serde_json::Value;
use std::path::Path;
use tch::{Device, Tensor};

/// The least score of an object that is shown to people.
const SHOWN: f64 = 0.5;

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

/// The scene of an image's labels (1, numbers).
pub fn scene(labels: &Tensor) -> Scene {
    let (scene, _) =
        Scene::from_row(&numbers(labels)).map(|(scene, rest)| (scene, rest.len())).expect("labels hold a scene");
    scene
}

/// The objects that the task has detected, from its output (1, numbers).
fn detected(output: &Tensor) -> Vec<Detected> {
    detected_from_row(&numbers(output)).map(|(detected, _)| detected).expect("the output holds objects")
}

fn numbers(row: &Tensor) -> Vec<f64> {
    Vec::try_from(row.to_device(Device::Cpu).contiguous().view(-1)).expect("a row holds numbers")
}

/// The detected objects that people are shown, the likeliest first.
pub fn shown(output: &Tensor) -> Vec<Detected> {
    let mut shown: Vec<Detected> = detected(output).into_iter().filter(|one| one.score >= SHOWN).collect();
    shown.sort_by(|a, b| b.score.total_cmp(&a.score));
    shown
}

/// Each object with its score, given the names of the classes.
pub fn shares(objects: &[Detected], name: impl Fn(usize) -> String) -> Vec<Share> {
    let share = |one: &Detected| Share {
        class: one.class,
        name: name(one.class),
        percent: 100.0 * one.score,
        bbox: Some(one.bbox),
    };
    objects.iter().map(share).collect()
}

/// A photograph with detected objects marked in it.
pub fn mark_detected(photo: &Picture, objects: &[Detected]) -> Picture {
    // The likeliest object lies over the others.
    let marked =
        objects.iter().rev().map(|one| Marked { bbox: one.bbox, runs: &one.runs, colour: colour(one.class as u8) });
    photo.marked(&marked.collect::<Vec<_>>())
}

/// A photograph with its annotated objects marked in it.
pub fn mark_annotated(photo: &Picture, scene: &Scene) -> Result<Picture> {
    let runs = scene.objects.iter().map(|object| runs_of(&object.outline, scene.size)).collect::<Result<Vec<_>>>()?;
    let marked = |(object, runs): (&Object, &'_ Vec<u32>)| (object.bbox, runs.clone(), colour(object.class as u8));
    let all: Vec<_> = scene.objects.iter().zip(&runs).map(marked).collect();
    let marked = all.iter().map(|(bbox, runs, colour)| Marked { bbox: *bbox, runs, colour: *colour });
    Ok(photo.marked(&marked.collect::<Vec<_>>()))
}
