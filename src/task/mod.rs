//! The task that a network learns: the loss of a part of a batch with its gradients, and the metrics of an evaluation. Other code
//! prints and stores metrics as [`Metric`] describes them, and names no single metric.
//!
//! A new task is a variant of [`Task`] with a file of its own beside `classification.rs`. The training targets of a batch are one
//! tensor, whose first dimension counts samples. Only the task knows the meaning of its numbers.
//!
//! Tensor names end in their shape: b = batch, c = channels, h and w = rows and columns.

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

/// The part of a step's global batch for which a loss is computed: in training, one micro-batch of a replica.
#[derive(Clone)]
pub struct Part<'a> {
    /// The replicas that compute the step together. A loss may sum tensors over them.
    pub group: &'a dyn Collective,
    /// The seed of the phase's random numbers.
    pub seed: u64,
    pub step: u64,
    /// The positions of the part's samples in the global batch.
    pub positions: Range<usize>,
    /// The number of samples in the global batch.
    pub global_batch: f64,
}

/// The loss of a part of a batch.
pub struct Loss {
    /// The part's contribution to the mean loss over the global batch: a scalar.
    pub sum: Tensor,
    /// The gradients of `sum` with respect to the outputs at the taps, in the order of the taps.
    pub gradients: Vec<Tensor>,
}

impl Loss {
    /// Divides a loss that is a sum over samples by the number of samples in the global batch.
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

    /// The places in the network whose outputs the task reads.
    pub fn taps(self) -> Vec<Tap> {
        match self {
            Task::Classification { .. } => vec![Tap::Head],
            Task::Segmentation(task) => task.taps(),
            Task::Detection(task) => task.taps(),
        }
    }

    /// The parameters and buffers that the task adds to a network of `stages` stages. Their stage number is `stages`, the number
    /// after that of the last stage.
    pub fn parameters(self, stages: usize) -> Vec<Parameter> {
        match self {
            Task::Classification { .. } => Vec::new(),
            Task::Segmentation(task) => task.parameters(stages),
            Task::Detection(task) => task.parameters(stages),
        }
    }

    /// The loss of a part of a batch, given the network's outputs at the taps and the training targets. Adds the gradients of the
    /// task's own parameters to their sums in the network's flat buffer. Collective over the part's group.
    pub fn loss(self, network: &Network, outputs: &[Tensor], targets: &Tensor, part: &Part) -> Result<Loss> {
        match self {
            Task::Classification { .. } => Ok(classification::loss(outputs, targets).divided(part.global_batch)),
            Task::Segmentation(task) => task.loss(network, outputs, targets, part),
            Task::Detection(task) => task.loss(network, outputs, targets, part),
        }
    }

    /// Random training targets of `samples` samples, for trial steps and benchmarks.
    pub fn random_targets(self, samples: usize) -> Tensor {
        match self {
            Task::Classification { classes } => classification::random_targets(samples, classes),
            Task::Segmentation(task) => task.random_targets(samples),
            Task::Detection(task) => task.random_targets(samples),
        }
    }

    /// The metrics in the order of display. The first metric is the headline.
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

    /// The standard error of the headline's value on a random choice of `images` test images. None if there are no images, or if
    /// the headline is not a mean over images.
    pub fn headline_error(self, value: f64, images: usize) -> Option<f64> {
        match self {
            Task::Classification { .. } => classification::headline_error(value, images),
            Task::Segmentation(_) | Task::Detection(_) => None,
        }
    }

    /// The state of an evaluation before its first batch. For classification and segmentation, it is a list of sums that add up
    /// over batches and ranks. For detection, it is an empty list, to which each image adds its numbers.
    pub fn sums(self) -> Vec<f64> {
        match self {
            Task::Classification { .. } => vec![0.0; self.metrics().len()],
            Task::Segmentation(task) => task.sums(),
            Task::Detection(_) => Vec::new(),
        }
    }

    /// Whether the lists of several ranks are joined end to end instead of being added up.
    pub fn joins_sums(self) -> bool {
        matches!(self, Task::Detection(_))
    }

    /// Runs the network on a batch of test images, given once for each scale of the evaluation. Only segmentation has several
    /// scales. Segmentation and detection take one image at a time. The labels are in host memory. Returns the outputs at the
    /// taps (classification) or the predictions (other tasks), in host memory.
    pub fn infer(self, network: &Network, images_bchw: &[Tensor], labels: &Tensor) -> Result<Vec<Tensor>> {
        let outputs = match self {
            Task::Classification { .. } => network.forward(&images_bchw[0], &self.taps()),
            Task::Segmentation(task) => vec![task.infer(network, images_bchw, labels)?],
            Task::Detection(task) => vec![task.infer(network, &images_bchw[0], labels)?],
        };
        Ok(outputs.iter().map(|output| output.to_device(Device::Cpu)).collect())
    }

    /// Adds a batch of evaluated images to the sums. `outputs` is the result of [`Task::infer`]. Outputs and labels are in host
    /// memory.
    pub fn add(self, sums: &mut Vec<f64>, outputs: &[Tensor], labels: &Tensor) {
        match self {
            Task::Classification { .. } => classification::add(sums, outputs, labels),
            Task::Segmentation(task) => task.add(sums, &outputs[0], labels),
            Task::Detection(task) => task.add(sums, &outputs[0], labels),
        }
    }

    /// Computes the values of all metrics from the sums over `images` images, and the figures of each class. Classification has
    /// no figures of classes. The names of the classes come from the config for segmentation, and from the data for detection.
    pub fn figures(
        self,
        sums: &[f64],
        images: f64,
        config: &Config,
        names_in_data: &[String],
    ) -> (BTreeMap<String, f64>, Vec<ClassFigures>) {
        match self {
            Task::Classification { .. } => (classification::values(sums, images), Vec::new()),
            Task::Segmentation(task) => {
                let name = |class| config.segmentation.class_name(class);
                (task.values(sums), segmentation::of_classes(sums, name))
            }
            Task::Detection(task) => task.figures(sums, names_in_data),
        }
    }

    /// The result of [`Task::infer`] and the labels of an evaluated batch, with their names in the safetensors file that
    /// `evaluate --outputs` writes. This file serves to compare the results with those of another program.
    pub fn named_outputs<'a>(self, outputs: &'a [Tensor], labels: &'a Tensor) -> Vec<(&'static str, &'a Tensor)> {
        match self {
            Task::Classification { .. } => vec![("logits", &outputs[0]), ("labels", labels)],
            Task::Segmentation(_) => vec![("predictions", &outputs[0]), ("labels", labels)],
            Task::Detection(_) => vec![("detections", &outputs[0]), ("labels", labels)],
        }
    }

    /// The metrics of an evaluation in one line for people. Metrics without a value are left out.
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
