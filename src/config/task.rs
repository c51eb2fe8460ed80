//! The tasks that the phases of a config learn.

use super::{Config, Training};
use std::path::Path;

/// The kind of task that a network learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TaskKind {
    #[default]
    Classification,
    Segmentation,
    Detection,
}

impl TaskKind {
    /// The tasks for which a trained target is fine-tuned, each on images of its own.
    pub const DOWNSTREAM: [TaskKind; 2] = [TaskKind::Segmentation, TaskKind::Detection];
}

impl Config {
    /// The downstream tasks for which the config names images.
    pub fn downstream(&self) -> impl Iterator<Item = TaskKind> {
        TaskKind::DOWNSTREAM.into_iter().filter(|task| match task {
            TaskKind::Classification => false,
            TaskKind::Segmentation => self.segmentation.has_images(),
            TaskKind::Detection => self.detection.has_images(),
        })
    }

    /// The path of the images of the config's task.
    pub fn images_path(&self) -> &Path {
        match self.task {
            TaskKind::Classification => &self.data.path,
            TaskKind::Segmentation => &self.segmentation.path,
            TaskKind::Detection => &self.detection.path,
        }
    }

    /// The number of training images that the config gives for a task. 0 if only the data tell the number.
    pub fn given_train_images(&self, task: TaskKind) -> usize {
        match task {
            TaskKind::Classification => self.data.train_images,
            TaskKind::Segmentation => self.segmentation.train_images,
            TaskKind::Detection => self.detection.train_images,
        }
    }

    /// The config with which the phases of this task train. For segmentation and detection, its model has no head and takes images
    /// of the size of the crop, and its images are not repeated.
    pub fn of_task(&self, task: TaskKind) -> Config {
        let mut config = Config { task, ..self.clone() };
        config.model = match task {
            TaskKind::Classification => return config,
            TaskKind::Segmentation => self.model.without_head(self.segmentation.crop, 0),
            TaskKind::Detection => self.model.without_head(self.detection.crop, self.detection.window),
        };
        config.data.repeats = 1;
        config
    }

    /// The tables of the phases of the config's task, with the phases' names. The tables of DGL and InfoPro are included only if
    /// the run has these phases.
    pub fn phases(&self) -> Vec<(&'static str, &Training)> {
        match self.task {
            TaskKind::Segmentation => return vec![("segment", &self.segment)],
            TaskKind::Detection => return vec![("detect", &self.detect)],
            TaskKind::Classification => {}
        }
        let mut phases = vec![
            ("meta", &self.meta),
            ("module", &self.module.training),
            ("finetune", &self.finetune),
            ("e2e", &self.e2e),
        ];
        let local = [("dgl", self.run.dgl, &self.dgl.training), ("infopro", self.run.infopro, &self.infopro.training)];
        let wanted = local.into_iter().filter(|(_, is_wanted, _)| *is_wanted);
        phases.extend(wanted.map(|(name, _, training)| (name, training)));
        phases
    }
}
