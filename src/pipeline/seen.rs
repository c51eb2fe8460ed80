//! Predictions as data, for tables and JSON.

use serde::Serialize;
use std::path::PathBuf;

/// The classes or objects that a model sees in an image.
#[derive(Debug, Serialize)]
pub struct Prediction {
    /// The file of the image.
    pub image: PathBuf,
    /// The file of the picture that shows the prediction.
    pub picture: PathBuf,
    /// The classes or objects, the largest percentage first.
    pub classes: Vec<Share>,
}

/// A class with a percentage: the probability of the class, its share of the pixels, or the score of an object of the class.
#[derive(Debug, Clone, Serialize)]
pub struct Share {
    pub class: usize,
    pub name: String,
    pub percent: f64,
    /// Left, top, width and height of the object in pixels; none if the percentage is not the score of an object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bbox: Option<[f64; 4]>,
}
