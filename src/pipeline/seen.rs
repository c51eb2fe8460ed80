//! What a model sees in an image, as data.

use serde::Serialize;
use std::path::PathBuf;

/// What a model sees in an image.
#[derive(Debug, Serialize)]
pub struct Prediction {
    pub image: PathBuf,
    pub picture: PathBuf,
    /// The largest first.
    pub classes: Vec<Share>,
}

/// A class with its probability, its share of the pixels, or the score of an object of this class, in percent.
#[derive(Debug, Clone, Serialize)]
pub struct Share {
    pub class: usize,
    pub name: String,
    pub percent: f64,
    /// Left, top, width and height in pixels, if the share is the score of an object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bbox: Option<[f64; 4]>,
}
