//! Detected objects for people: photographs with marked objects.

use super::results::detected;
use super::seen::Share;
use crate::coco::objects::{Detected, Scene};
use crate::coco::outlines::runs_of;
use crate::svg::{Marked, Picture, colour};
use anyhow::Result;
use tch::Tensor;

/// The lowest score of a detected object that is shown to people.
const SHOWN: f64 = 0.5;

/// The detected objects that are shown to people, the likeliest first.
pub fn shown(output: &Tensor) -> Vec<Detected> {
    let mut shown: Vec<Detected> = detected(output).into_iter().filter(|one| one.score >= SHOWN).collect();
    shown.sort_by(|a, b| b.score.total_cmp(&a.score));
    shown
}

/// Each object with its score in percent. `name` gives the names of the classes.
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
    // The likeliest object is drawn last, over the others.
    let marked =
        objects.iter().rev().map(|one| Marked { bbox: one.bbox, runs: &one.runs, colour: colour(one.class as u8) });
    photo.marked(&marked.collect::<Vec<_>>())
}

/// A photograph with its annotated objects marked in it.
pub fn mark_annotated(photo: &Picture, scene: &Scene) -> Result<Picture> {
    let runs = scene.objects.iter().map(|object| runs_of(&object.outline, scene.size)).collect::<Result<Vec<_>>>()?;
    let marked = scene.objects.iter().zip(&runs);
    let marked = marked.map(|(object, runs)| Marked { bbox: object.bbox, runs, colour: colour(object.class as u8) });
    Ok(photo.marked(&marked.collect::<Vec<_>>()))
}
