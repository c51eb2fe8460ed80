//! Metrics as data: how each is named, printed and compared.

use serde::{Serialize, Serializer};
use std::collections::BTreeMap;

/// A number that an evaluation measures.
#[derive(Debug, PartialEq)]
pub struct Metric {
    /// Its name in JSON, in the metrics of artefacts and, after `test/`, in the curves.
    pub key: &'static str,
    /// Its name for people.
    pub name: &'static str,
    /// Empty for a plain number.
    pub unit: &'static str,
    /// Digits that are printed after the decimal point.
    pub decimals: usize,
    pub better: Better,
    /// Whether tables of models have a column for it.
    pub has_column: bool,
}

/// Which of two values of a metric is the better one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Better {
    /// The higher one; a perfect model reaches `perfect`.
    Higher {
        perfect: f64,
    },
    Lower,
}

impl Metric {
    /// The name with its unit: the title of a column or an axis.
    pub fn title(&self) -> String {
        [self.name, self.unit].join(" ").trim_end().to_string()
    }

    /// A value for a column that the title says the unit of.
    pub fn cell(&self, value: f64) -> String {
        format!("{value:.*}", self.decimals)
    }

    /// A value with its name and unit, for a sentence.
    pub fn text(&self, value: f64) -> String {
        [self.name, &self.cell(value), self.unit].join(" ").trim_end().to_string()
    }
}

/// The values of some metrics, in their order; a model that was never evaluated has none. Serialised as a map from the
/// metrics' keys.
#[derive(Debug, Clone)]
pub struct Scores(Vec<(&'static Metric, Option<f64>)>);

impl Scores {
    pub(super) fn of(metrics: impl IntoIterator<Item = &'static Metric>, values: &BTreeMap<String, f64>) -> Scores {
        Scores(metrics.into_iter().map(|metric| (metric, values.get(metric.key).copied())).collect())
    }

    /// The metrics and their values.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Metric, Option<f64>)> {
        self.0.iter().copied()
    }
}

impl Serialize for Scores {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(metric, value)| (metric.key, value)))
    }
}
