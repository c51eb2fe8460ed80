//! The segmentations of a run: their figures, those of each class, and pictures of test images.

use crate::store::RunDir;
use crate::task::{ClassFigures, Scores, Task};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// A finished segmentation of a run.
pub struct Segmentation {
    pub label: String,
    pub task: Task,
    pub scores: Scores,
    /// Empty if the run has not recorded them.
    pub classes: Vec<ClassFigures>,
    /// The addresses of the pictures, which hold them.
    pub pictures: Vec<String>,
}

impl Segmentation {
    /// Reads the figures of the classes and the pictures of a phase of this name.
    pub fn read(run: &RunDir, phase: &str, (label, task, scores): (String, Task, Scores)) -> Segmentation {
        let figures = std::fs::read(run.classes(phase)).ok();
        let classes = figures.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let mut files: Vec<_> = std::fs::read_dir(run.predictions(phase))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "png"));
        files.sort();
        let address = |bytes: Vec<u8>| format!("data:image/png;base64,{}", BASE64_STANDARD.encode(bytes));
        let pictures = files.iter().filter_map(|file| std::fs::read(file).ok()).map(address).collect();
        Segmentation { label, task, scores, classes, pictures }
    }
}
