//! Describes metrics as data: how each metric is named, printed and compared.

use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;

/// A number by which an evaluation describes the quality of a model.
#[derive(Debug, PartialEq)]
pub struct Metric {
    /// The metric's name in JSON, in the headers of artefacts and, after the prefix `test/`, in the learning curves.
    pub key: &'static str,
    /// The metric's name in texts for people.
    pub name: &'static str,
    /// The unit, such as %; empty for a plain number.
    pub unit: &'static str,
    /// The number of digits after the decimal point.
    pub decimals: usize,
    pub better: Better,
    /// Whether tables of models have a column for the metric.
    pub has_column: bool,
}

/// Which of two values of a metric is the better one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Better {
    /// The higher value is better. A perfect model reaches `perfect`.
    Higher { perfect: f64 },
    /// The lower value is better.
    Lower,
}

impl Metric {
    /// The name with its unit: the title of a column or an axis.
    pub fn title(&self) -> String {
        [self.name, self.unit].join(" ").trim_end().to_string()
    }

    /// A value with the metric's number of decimals and without its unit.
    pub fn number(&self, value: f64) -> String {
        format!("{value:.*}", self.decimals)
    }

    /// A value with its name and unit, for a sentence.
    pub fn text(&self, value: f64) -> String {
        [self.name, &self.number(value), self.unit].join(" ").trim_end().to_string()
    }
}

/// The figures of one class in an evaluation of segmentation or detection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassFigures {
    pub class: usize,
    pub name: String,
    #[serde(flatten)]
    pub figures: OfClass,
}

/// The numbers that describe how well a model predicts one class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OfClass {
    Pixels {
        /// Intersection over union in percent; none if neither a label nor a prediction has the class. Pixels whose label is no
        /// class do not count.
        #[serde(rename = "IoU")]
        iou: Option<f64>,
        /// The share of the pixels with this label that are predicted as this class, in percent; none if no pixel has this label.
        #[serde(rename = "Acc")]
        accuracy: Option<f64>,
        /// How many pixels have this label.
        pixels: u64,
    },
    Objects {
        /// The average precision of boxes in percent; none if `objects` is 0.
        box_ap: Option<f64>,
        /// The average precision of masks in percent; none if `objects` is 0, or if masks are not evaluated.
        mask_ap: Option<f64>,
        /// How many annotated objects have this class, without crowds.
        objects: u64,
    },
}

/// A figure of a class, as a table shows it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Figure {
    Percent(Option<f64>),
    Count(u64),
}

impl OfClass {
    /// The figures with their names.
    pub fn named(&self) -> [(&'static str, Figure); 3] {
        match *self {
            OfClass::Pixels { iou, accuracy, pixels } => {
                [("IoU", Figure::Percent(iou)), ("Acc", Figure::Percent(accuracy)), ("pixels", Figure::Count(pixels))]
            }
            OfClass::Objects { box_ap, mask_ap, objects } => [
                ("box AP", Figure::Percent(box_ap)),
                ("mask AP", Figure::Percent(mask_ap)),
                ("objects", Figure::Count(objects)),
            ],
        }
    }
}

/// The value of a metric for a model. It is serialised as a map from the metric's key to the value.
#[derive(Debug, Clone, Copy)]
pub struct Score {
    pub metric: &'static Metric,
    /// None if the model has not been evaluated, or if its evaluation does not have this metric.
    pub value: Option<f64>,
}

/// The scores of a model in several metrics. They are serialised as one map.
#[derive(Debug, Clone)]
pub struct Scores(pub Vec<Score>);

impl Score {
    pub(super) fn of(metric: &'static Metric, values: Option<&BTreeMap<String, f64>>) -> Score {
        Score { metric, value: values.and_then(|values| values.get(metric.key)).copied() }
    }

    /// The value for a column whose title names the unit; `missing` if there is no value.
    pub fn cell(&self, missing: &str) -> String {
        self.value.map_or(missing.into(), |value| self.metric.number(value))
    }
}

impl Serialize for Score {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map([(self.metric.key, self.value)])
    }
}

impl Serialize for Scores {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|score| (score.metric.key, score.value)))
    }
}
