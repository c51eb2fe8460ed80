//! The task that a network learns: the loss of a batch with its gradients, and the metrics of an evaluation. Other rooms print and
//! store metrics by the data here, and name none of them.
//!
//! A new task is a variant of [`Task`] with a file of its own beside `classification.rs`. The targets of a batch are one
//! tensor whose first dimension counts samples; only the task knows what its numbers mean.
//!
//! Shape suffixes: b = batch, c = classes, k = the best guesses.

mod classification;
mod detection;
mod metric;
mod objective;
mod segmentation;

pub use metric::{Better, ClassFigures, Figure, Metric, OfClass, Score, Scores};
pub use objective::{Given, Objective};

use crate::collective::Collective;
use crate::config::{Config, TaskKind};
use crate::family::parameter::Parameter;
use crate::model::{Network, Tap};
use anyhow::Result;
use detection::Detection;
use segmentation::Segmentation;
use std::collections::BTreeMap;
use std::ops::Range;
use tch::{Device, Tensor};

/// The tasks that a network can learn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Task {
    /// One class for each image.
    Classification { classes: usize },
    /// One class for each pixel.
    Segmentation(Segmentation),
    /// The boxes, classes and masks of objects.
    Detection(Detection),
}

/// The part of a step's batch that a loss is computed of.
#[derive(Clone)]
pub struct Part<'a> {
    /// The replicas that compute the step together, which a loss may call.
    pub group: &'a dyn Collective,
    /// The key of the phase's randomness.
    pub seed: u64,
    pub step: u64,
    /// The positions of the samples in the global batch.
    pub positions: Range<usize>,
    /// The number of samples in the global batch.
    pub global_batch: f64,
}

/// The loss of a part of a batch.
pub struct Loss {
    /// Its contribution to the mean over the global batch: a scalar.
    pub sum: Tensor,
    /// The gradients of that contribution with respect to the outputs at the taps, in the order of the taps.
    pub gradients: Vec<Tensor>,
}

impl Loss {
    /// The contribution of a loss that is a sum over samples to the mean over so many.
    fn divided(self, samples: f64) -> Loss {
        let Loss { sum, gradients } = self;
        Loss { sum: sum / samples, gradients: gradients.into_iter().map(|gradient| gradient / samples).collect() }
    }
}

impl Task {
    /// The task of a config.
    pub fn of(config: &Config) -> Task {
        match config.task {
            TaskKind::Classification => Task::Classification { classes: config.model.classes() },
            TaskKind::Segmentation => Task::Segmentation(Segmentation::of(config)),
            TaskKind::Detection => Task::Detection(Detection::of(config)),
        }
    }

    /// The outputs of the network that the task reads.
    pub fn taps(self) -> Vec<Tap> {
        match self {
            Task::Classification { .. } => vec![Tap::Head],
            Task::Segmentation(task) => task.taps(),
            Task::Detection(task) => task.taps(),
        }
    }

    /// The parameters and buffers that the task's model has beside those of the network, which has so many stages. Their stage
    /// is the number of the network's stages.
    pub fn parameters(self, stages: usize) -> Vec<Parameter> {
        match self {
            Task::Classification { .. } => Vec::new(),
            Task::Segmentation(task) => task.parameters(stages),
            Task::Detection(task) => task.parameters(stages),
        }
    }

    /// The loss of a part of a batch, given its outputs at the taps and its training targets. Adds the gradients of the task's own
    /// parameters to the network's flat buffer. Collective over the part's group.
    pub fn loss(self, network: &Network, outputs: &[Tensor], targets: &Tensor, part: &Part) -> Result<Loss> {
        match self {
            Task::Classification { .. } => Ok(classification::loss(outputs, targets).divided(part.global_batch)),
            Task::Segmentation(task) => task.loss(network, outputs, targets, part),
            Task::Detection(task) => task.loss(network, outputs, targets, part),
        }
    }

    /// Random training targets of a batch, for trials and timings.
    pub fn random_targets(self, samples: usize) -> Tensor {
        match self {
            Task::Classification { classes } => classification::random_targets(samples, classes),
            Task::Segmentation(task) => task.random_targets(samples),
            Task::Detection(task) => task.random_targets(samples),
        }
    }

    /// The metrics in the order in which they are shown; the first one is the headline.
    pub fn metrics(self) -> &'static [Metric] {
        match self {
            Task::Classification { .. } => &classification::METRICS,
            Task::Segmentation(_) => &segmentation::METRICS,
            Task::Detection(task) => task.metrics(),
        }
    }

    /// The metric that stands for the quality of a model if there is room for only one.
    pub fn headline(self) -> &'static Metric {
        &self.metrics()[0]
    }

    /// The standard error of the headline on so many test images, were they drawn anew; none if it is no mean over images.
    pub fn headline_error(self, value: f64, images: usize) -> Option<f64> {
        match self {
            Task::Classification { .. } => classification::headline_error(value, images),
            Task::Segmentation(_) | Task::Detection(_) => None,
        }
    }

    /// The sums of an evaluation before its first batch. They add up over batches and over ranks, or grow into a list of all images.
    pub fn sums(self) -> Vec<f64> {
        match self {
            Task::Classification { .. } => vec![0.0; self.metrics().len()],
            Task::Segmentation(task) => task.sums(),
            Task::Detection(_) => Vec::new(),
        }
    }

    /// Whether the sums of several ranks are joined into one list instead of added up.
    pub fn joins_sums(self) -> bool {
        matches!(self, Task::Detection(_))
    }

    /// Evaluates a batch of images, or one image at several scales, whose labels are in host memory. Returns the outputs at the taps or
    /// the predictions, in host memory.
    pub fn infer(self, network: &Network, images_bchw: &[Tensor], labels: &Tensor) -> Result<Vec<Tensor>> {
        let outputs = match self {
            Task::Classification { .. } => network.forward(&images_bchw[0], &self.taps()),
            Task::Segmentation(task) => vec![task.infer(network, images_bchw, labels)?],
            Task::Detection(task) => vec![task.infer(network, &images_bchw[0], labels)?],
        };
        Ok(outputs.iter().map(|output| output.to_device(Device::Cpu)).collect())
    }

    /// Adds a batch of evaluated images to the sums: what [`Task::infer`] gave, and the labels, all in host memory.
    pub fn add(self, sums: &mut Vec<f64>, outputs: &[Tensor], labels: &Tensor) {
        match self {
            Task::Classification { .. } => classification::add(sums, outputs, labels),
            Task::Segmentation(task) => task.add(sums, &outputs[0], labels),
            Task::Detection(task) => task.add(sums, &outputs[0], labels),
        }
    }

    /// Computes the values of all metrics from the sums over this number of images, and the figures of each class, if the task has
    /// such figures, with the names that the config or the data give the classes.
    pub fn figures(
        self,
        sums: &[f64],
        images: f64,
        config: &Config,
        of_data: &[String],
    ) -> (BTreeMap<String, f64>, Vec<ClassFigures>) {
        match self {
            Task::Classification { .. } => (classification::values(sums, images), Vec::new()),
            Task::Segmentation(task) => {
                let name = |class| config.segmentation.class_name(class);
                (task.values(sums), segmentation::of_classes(sums, name))
            }
            Task::Detection(task) => task.figures(sums, of_data),
        }
    }

    /// What [`Task::infer`] gave and the labels of an evaluated batch, named as in the file that is compared with the results of
    /// another program.
    pub fn named_outputs<'a>(self, outputs: &'a [Tensor], labels: &'a Tensor) -> Vec<(&'static str, &'a Tensor)> {
        match self {
            Task::Classification { .. } => vec![("logits", &outputs[0]), ("labels", labels)],
            Task::Segmentation(_) => vec![("predictions", &outputs[0]), ("labels", labels)],
            Task::Detection(_) => vec![("detections", &outputs[0]), ("labels", labels)],
        }
    }

    /// All metrics of an evaluation in one line for people.
    pub fn text(self, values: &BTreeMap<String, f64>) -> String {
        let known = self.metrics().iter().filter_map(|metric| Some(metric.text(*values.get(metric.key)?)));
        known.collect::<Vec<_>>().join(", ")
    }

    /// The metrics that have a column in tables of models.
    pub fn columns(self) -> impl Iterator<Item = &'static Metric> {
        self.metrics().iter().filter(|metric| metric.has_column)
    }

    /// The scores of an evaluated model in the metrics that have a column in tables.
    pub fn scores(self, values: &BTreeMap<String, f64>) -> Scores {
        Scores(self.columns().map(|metric| Score::of(metric, Some(values))).collect())
    }

    /// The score of a model in the headline; `values` is none before the first evaluation of the model.
    pub fn headline_score(self, values: Option<&BTreeMap<String, f64>>) -> Score {
        Score::of(self.headline(), values)
    }
}
