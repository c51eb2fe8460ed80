//! The task that a network learns: the loss of a batch with its gradients, and the metrics of an evaluation. Other rooms print and
//! store metrics by the data here, and name none of them.
//!
//! A new task is a variant of [`Task`] with a file of its own beside `classification.rs`. The targets of a batch are one
//! tensor whose first dimension counts samples; only the task knows what its numbers mean.
//!
//! Shape suffixes: b = batch, c = classes, k = the best guesses.

mod classification;
mod metric;
mod objective;

pub use metric::{Better, Metric, Score, Scores};
pub use objective::Objective;

use crate::config::Config;
use crate::model::Tap;
use std::collections::BTreeMap;
use tch::Tensor;

/// The tasks that a network can learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// One class for each image.
    Classification { classes: usize },
}

/// The loss of a batch.
pub struct Loss {
    /// The loss summed over the samples: a scalar.
    pub sum: Tensor,
    /// The gradients of that sum with respect to the outputs at the taps, in the order of the taps.
    pub gradients: Vec<Tensor>,
}

impl Task {
    /// The task of a config.
    pub fn of(config: &Config) -> Task {
        Task::Classification { classes: config.model.classes() }
    }

    /// The outputs of the network that the task reads.
    pub fn taps(self) -> &'static [Tap] {
        match self {
            Task::Classification { .. } => &[Tap::Head],
        }
    }

    /// The loss of a batch with these outputs at the taps and these training targets.
    pub fn loss(self, outputs: &[Tensor], targets: &Tensor) -> Loss {
        match self {
            Task::Classification { .. } => classification::loss(outputs, targets),
        }
    }

    /// Random training targets of a batch, for trials and timings.
    pub fn random_targets(self, samples: usize) -> Tensor {
        match self {
            Task::Classification { classes } => classification::random_targets(samples, classes),
        }
    }

    /// The metrics in the order in which they are shown; the first one is the headline.
    pub fn metrics(self) -> &'static [Metric] {
        match self {
            Task::Classification { .. } => &classification::METRICS,
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
        }
    }

    /// The sums of an evaluation before its first batch. They add up over batches and over ranks.
    pub fn sums(self) -> Vec<f64> {
        vec![0.0; self.metrics().len()]
    }

    /// Adds a batch of evaluated images to the sums: the outputs at the taps and the labels, all in host memory.
    pub fn add(self, sums: &mut [f64], outputs: &[Tensor], labels: &Tensor) {
        match self {
            Task::Classification { .. } => classification::add(sums, outputs, labels),
        }
    }

    /// Computes the values of all metrics from the sums over this number of images.
    pub fn values(self, sums: &[f64], images: f64) -> BTreeMap<String, f64> {
        match self {
            Task::Classification { .. } => classification::values(sums, images),
        }
    }

    /// The outputs at the taps and the labels of an evaluated batch, named as in the file that is compared with the results of
    /// another program.
    pub fn named_outputs<'a>(self, outputs: &'a [Tensor], labels: &'a Tensor) -> Vec<(&'static str, &'a Tensor)> {
        match self {
            Task::Classification { .. } => vec![("logits", &outputs[0]), ("labels", labels)],
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
