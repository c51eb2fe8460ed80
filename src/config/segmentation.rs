//! The keys of `[segmentation]`: images with label maps, the heads of the network, and the evaluation.

use crate::bounds::{at_most, probability};
use crate::family::{Model, Tokens};
use crate::{require, usage};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The table `[segmentation]`, whose keys are documented in `configs/default.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segmentation {
    pub format: MapFormat,
    pub path: PathBuf,
    pub train_images: usize,
    pub test_images: usize,
    pub classes: usize,
    pub class_names: Vec<String>,
    pub ignore: usize,
    pub reduce_zero_label: bool,
    pub crop: usize,
    pub resize: [f64; 2],
    pub category_limit: f64,
    pub distortion: bool,
    pub taps: Vec<usize>,
    pub neck: Neck,
    pub width: usize,
    pub auxiliary_width: usize,
    pub auxiliary_weight: f64,
    pub head_dropout: f64,
    pub loss_mean: PixelMean,
    pub norm_over: NormOver,
    pub inference: Inference,
    pub stride: usize,
    pub test_scales: Vec<f64>,
    pub test_flip: bool,
}

/// The format of the images with label maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MapFormat {
    Folder,
    Shapes,
}

/// The layers between the outputs of the stages and the heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Neck {
    /// No layers. The heads read four maps of the same size.
    None,
    /// `MultiLevelNeck` of mmsegmentation: convolutions and interpolation to four sizes.
    Mln,
    /// `Feature2Pyramid` of mmsegmentation, as in BEiT and MAE: transposed convolutions and max pooling.
    Pyramid,
}

/// The divisor of the sum of the pixels' losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PixelMean {
    /// The number of all pixels of the micro-batch's crops, as in mmsegmentation.
    All,
    /// The number of the micro-batch's pixels that have a class, as in torch's cross entropy with `ignore_index`.
    Labelled,
}

/// The samples over which the BatchNorm of the heads normalises in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormOver {
    /// The samples of one micro-batch on one replica.
    MicroBatch,
    /// The samples of the global batch, on all replicas of all ranks, as with SyncBatchNorm.
    Step,
}

/// How an image is evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Inference {
    /// In one pass. The position embeddings are resampled to the size of the image.
    Whole,
    /// In windows of the size of the crop. A pixel's logits are averaged over the windows that contain the pixel.
    Slide,
}

/// The label, in the network's targets, of a pixel without a class.
pub const IGNORED: u8 = 255;

/// The number of stage outputs that the heads read.
pub const TAPS: usize = 4;

impl Segmentation {
    /// Whether the config gives images with label maps.
    pub fn has_images(&self) -> bool {
        self.format == MapFormat::Shapes || !self.path.as_os_str().is_empty()
    }

    /// The stages whose outputs the heads read. If the config names no stages, the chosen stages are spread as evenly as possible
    /// over the network's `stages` stages. If the network has fewer than [`TAPS`] stages, some stages then occur several times.
    pub fn tapped_stages(&self, stages: usize) -> [usize; TAPS] {
        let even = |level: usize| ((level + 1) * stages).div_ceil(TAPS) - 1;
        std::array::from_fn(|level| self.taps.get(level).copied().unwrap_or_else(|| even(level)))
    }

    /// The class of a label in a label map, or [`IGNORED`] for a pixel without a class. None if the config does not allow the
    /// label.
    pub fn class_of(&self, label: u8) -> Option<u8> {
        if label == IGNORED || usize::from(label) == self.ignore || (self.reduce_zero_label && label == 0) {
            return Some(IGNORED);
        }
        let class = label - u8::from(self.reduce_zero_label);
        (usize::from(class) < self.classes).then_some(class)
    }

    /// The name of a class. If the config does not name the class, «label N», where N is the class's label in the label maps.
    pub fn class_name(&self, class: usize) -> String {
        let by_label = || format!("label {}", class + usize::from(self.reduce_zero_label));
        self.class_names.get(class).cloned().unwrap_or_else(by_label)
    }

    /// The distance in pixels between neighbouring windows of a sliding evaluation. By default it is two thirds of the crop, as in
    /// mmsegmentation: 341 for a crop of 512.
    pub fn window_stride(&self) -> usize {
        if self.stride > 0 { self.stride } else { (2 * self.crop / 3).max(1) }
    }

    pub(super) fn validate(&self, model: &Model) -> Result<()> {
        if !self.has_images() {
            return Ok(());
        }
        let Some(Tokens { patch, .. }) = model.tokens_given() else {
            return Err(usage!(
                "segmentation.path is set, but the stages of this model.family give no tokens, which the heads read; leave the \
                 path out, or set model.family = \"vit\""
            ));
        };
        let channels = model.channels();
        require!(channels == 3, "model.channels = {channels}: segmentation reads colour images, which have 3");
        require!(
            self.crop.is_multiple_of(patch) && self.crop > 0,
            "segmentation.crop = {} is not a multiple of model.patch_size = {patch}; try {}",
            self.crop,
            self.crop.div_ceil(patch).max(1) * patch
        );
        require!(
            (2..=usize::from(IGNORED)).contains(&self.classes),
            "segmentation.classes = {}: give the number of classes, from 2 to 255",
            self.classes
        );
        let named = self.class_names.len();
        require!(
            named == 0 || named == self.classes,
            "segmentation.class_names holds {named} names, but segmentation.classes = {}; name all classes, or none",
            self.classes
        );
        require!(
            self.neck == Neck::None || self.crop >= 2 * patch,
            "segmentation.neck: a crop of {} pixels is one patch, which no neck can halve; set segmentation.crop to at least {}",
            self.crop,
            2 * patch
        );
        self.validate_heads(model.stages())?;
        self.validate_images()
    }

    fn validate_heads(&self, stages: usize) -> Result<()> {
        require!(
            self.taps.is_empty() || self.taps.len() == TAPS && self.taps.iter().all(|&tap| tap < stages),
            "segmentation.taps = {:?}: give {TAPS} stages from 0 to {}, or none",
            self.taps,
            stages - 1
        );
        for (key, value) in [("width", self.width), ("auxiliary_width", self.auxiliary_width)] {
            require!(value >= 1, "segmentation.{key} = 0: it must be at least 1");
            at_most(&format!("segmentation.{key}"), value, 1 << 16)?;
        }
        let weight = self.auxiliary_weight;
        require!(
            weight >= 0.0 && weight.is_finite(),
            "segmentation.auxiliary_weight = {weight}: it must be a number of at least 0"
        );
        require!(
            (0.0..1.0).contains(&self.head_dropout),
            "segmentation.head_dropout = {}: it must be in [0, 1)",
            self.head_dropout
        );
        Ok(())
    }

    fn validate_images(&self) -> Result<()> {
        for (key, value) in [("train_images", self.train_images), ("test_images", self.test_images)] {
            require!(
                self.format != MapFormat::Shapes || value > 0,
                "segmentation.format = \"shapes\" needs segmentation.{key}, the number of images to draw"
            );
            at_most(&format!("segmentation.{key}"), value, 1 << 32)?;
        }
        for (key, value, most) in [
            ("crop", self.crop, 1 << 14),
            ("stride", self.stride, self.crop),
            ("ignore", self.ignore, usize::from(IGNORED)),
        ] {
            at_most(&format!("segmentation.{key}"), value, most)?;
        }
        let [low, high] = self.resize;
        require!(
            low > 0.0 && low <= high && high <= 16.0,
            "segmentation.resize = [{low}, {high}]: give a range of positive numbers up to 16, the smaller one first"
        );
        require!(
            !self.test_scales.is_empty() && self.test_scales.iter().all(|&scale| (0.1..=8.0).contains(&scale)),
            "segmentation.test_scales = {:?}: give numbers from 0.1 to 8, such as [1.0]",
            self.test_scales
        );
        probability("segmentation.category_limit", self.category_limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn keys(sets: &[&str]) -> Result<Segmentation> {
        let sets: Vec<String> =
            ["segmentation.format=shapes", "segmentation.train_images=4", "segmentation.test_images=2"]
                .iter()
                .chain(sets)
                .map(|set| set.to_string())
                .collect();
        Ok(Config::parse("", &sets)?.segmentation)
    }

    #[test]
    fn taps_divide_the_stages_evenly_as_mmsegmentation_divides_the_blocks() {
        let taps = |stages| keys(&[]).unwrap().tapped_stages(stages);
        assert_eq!([1, 2, 3].map(taps), [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 2]]);
        assert_eq!([4, 12, 24].map(taps), [[0, 1, 2, 3], [2, 5, 8, 11], [5, 11, 17, 23]]);
        assert_eq!(keys(&["segmentation.taps=[0, 1, 2, 2]"]).unwrap().tapped_stages(4), [0, 1, 2, 2]);
    }

    #[test]
    fn labels_become_classes_as_in_mmsegmentation() {
        let ade = keys(&["segmentation.reduce_zero_label=true"]).unwrap();
        assert_eq!(
            [0, 1, 150, 151, 255].map(|label| ade.class_of(label)),
            [Some(255), Some(0), Some(149), None, Some(255)]
        );
        let camvid =
            keys(&["segmentation.reduce_zero_label=false", "segmentation.classes=11", "segmentation.ignore=11"])
                .unwrap();
        assert_eq!(
            [0, 10, 11, 12, 255].map(|label| camvid.class_of(label)),
            [Some(0), Some(10), Some(255), None, Some(255)]
        );
    }

    #[test]
    fn a_wrong_key_is_refused_by_name_with_the_cure() {
        for (set, words) in [
            ("segmentation.crop=500", &["segmentation.crop = 500", "model.patch_size = 16", "try 512"][..]),
            ("segmentation.taps=[0, 4, 1, 2]", &["segmentation.taps", "from 0 to 3"]),
            ("segmentation.classes=1", &["segmentation.classes = 1", "2 to 255"]),
            ("segmentation.stride=600", &["segmentation.stride = 600", "512"]),
            ("segmentation.resize=[2.0, 0.5]", &["segmentation.resize"]),
        ] {
            let error = keys(&[set]).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{set}: {error}");
        }
    }
}
