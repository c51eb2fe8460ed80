//! Metrics as data: how each is named, printed and compared.

use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;

/// A kind of number that an evaluation gives.
#[derive(Debug, PartialEq)]
pub struct Metric {
    /// Its name in JSON, in the metrics of artefacts and, after `test/`, in the curves.
    pub key: &'static str,
    /// Its name for people.
    pub name: &'static str,
    /// Empty for a plain number.
    pub unit: &'static str,
    /// The number of digits after the decimal point.
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

    /// A value without its unit.
    pub fn number(&self, value: f64) -> String {
        format!("{value:.*}", self.decimals)
    }

    /// A value with its name and unit, for a sentence.
    pub fn text(&self, value: f64) -> String {
        [self.name, &self.number(value), self.unit].join(" ").trim_end().to_string()
    }
}

/// The figures of one class of a segmentation or a detection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassFigures {
    pub class: usize,
    pub name: String,
    #[serde(flatten)]
    pub figures: OfClass,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OfClass {
    Pixels {
        /// Intersection over union in percent; none if the class has neither labels nor predictions.
        #[serde(rename = "IoU")]
        iou: Option<f64>,
        /// The share of the labelled pixels that are right, in percent; none if no pixel has this label.
        #[serde(rename = "Acc")]
        accuracy: Option<f64>,
        /// How many pixels have this label.
        pixels: u64,
    },
    Objects {
        /// Average precision in percent; none if no object has this class, and for masks if there are none.
        box_ap: Option<f64>,
        mask_ap: Option<f64>,
        /// How many annotated objects have this class, crowds excepted.
        objects: u64,
    },
}

/// A figure of a class for a table.
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

/// The value of a metric for a model; none before the first evaluation. It is serialised as a map with the metric's key.
#[derive(Debug, Clone, Copy)]
pub struct Score {
    pub metric: &'static Metric,
    pub value: Option<f64>,
}

/// The scores of a model in several metrics, in their order. They are serialised as one map.
#[derive(Debug, Clone)]
pub struct Scores(pub Vec<Score>);

impl Score {
    pub(super) fn of(metric: &'static Metric, values: Option<&BTreeMap<String, f64>>) -> Score {
        Score { metric, value: values.and_then(|values| values.get(metric.key)).copied() }
    }

    /// The value for a column whose title says the unit; `missing` stands for no value.
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
