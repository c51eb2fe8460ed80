//! The models of a run that were fine-tuned for segmentation or detection: their scores, their scores for each class, and pictures
//! of test images with predictions.

use crate::config::TaskKind;
use crate::run::graph::Node;
use crate::store::RunDir;
use crate::task::{ClassFigures, Scores, Task};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// The texts with which a report's page shows the models of a downstream task.
pub struct Section {
    pub kind: TaskKind,
    /// The heading of the section.
    pub title: &'static str,
    /// The name of the table of models.
    pub models: &'static str,
    /// The name of the table of classes.
    pub classes: &'static str,
    /// The caption of the pictures.
    pub pictures: &'static str,
}

/// The sections of a report's page for the downstream tasks.
pub static SECTIONS: [Section; 2] = [
    Section {
        kind: TaskKind::Segmentation,
        title: "Segmentation",
        models: "segmentations",
        classes: "classes",
        pictures: "Test images: the prediction at the left, the labels at the right. Pixels without a label are bare.",
    },
    Section {
        kind: TaskKind::Detection,
        title: "Detection",
        models: "detections",
        classes: "detected-classes",
        pictures: "Test images: the detected objects with a score of at least 0.5 at the left, the annotated ones at the right.",
    },
];

/// The scores for each class that a finished phase has recorded. Empty if there is no readable record, as for classification.
pub fn figures_of_classes(run: &RunDir, node: &Node) -> Vec<ClassFigures> {
    let figures = std::fs::read(run.classes(&node.name)).ok();
    figures.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// A finished model of a downstream task: segmentation or detection.
pub struct Downstream {
    pub kind: TaskKind,
    pub label: String,
    pub task: Task,
    pub scores: Scores,
    /// The scores for each class; empty if the run has not recorded any.
    pub classes: Vec<ClassFigures>,
    /// The pictures of test images, as `data:` addresses that contain the PNGs.
    pub pictures: Vec<String>,
}

impl Downstream {
    /// Reads a node's scores for each class and its pictures from the run directory.
    pub fn read(run: &RunDir, node: &Node, (label, task, scores): (String, Task, Scores)) -> Downstream {
        let classes = figures_of_classes(run, node);
        let mut files: Vec<_> = std::fs::read_dir(run.predictions(&node.name))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "png"));
        files.sort();
        let address = |bytes: Vec<u8>| format!("data:image/png;base64,{}", BASE64_STANDARD.encode(bytes));
        let pictures = files.iter().filter_map(|file| std::fs::read(file).ok()).map(address).collect();
        Downstream { kind: node.row.task(), label, task, scores, classes, pictures }
    }
}
