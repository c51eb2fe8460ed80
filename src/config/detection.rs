//! The keys of `[detection]`: images with annotated objects, the size of their crops, and the heads of the network.

use crate::bounds::at_most;
use crate::family::{Model, Tokens};
use crate::{require, usage};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The table `[detection]`, whose keys are documented in `configs/default.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detection {
    pub format: ObjectFormat,
    pub path: PathBuf,
    pub train_images: usize,
    pub test_images: usize,
    pub classes: usize,
    pub masks: bool,
    pub width: usize,
    pub hidden: usize,
    pub regions: usize,
    pub crop: usize,
    pub window: usize,
    pub resize: [f64; 2],
}

/// The format of the images with annotated objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectFormat {
    Coco,
    Shapes,
}

/// The largest number of classes that a config may give.
const MOST_CLASSES: usize = 1 << 16;
/// The side of a cell of the coarsest map of the feature pyramid, in patches.
const COARSEST: usize = 4;

impl Detection {
    /// Whether the config names images with annotated objects.
    pub fn has_images(&self) -> bool {
        self.format == ObjectFormat::Shapes || !self.path.as_os_str().is_empty()
    }

    pub(super) fn validate(&self, model: &Model) -> Result<()> {
        if !self.has_images() {
            return Ok(());
        }
        let Some(Tokens { patch, .. }) = model.tokens_given() else {
            return Err(usage!(
                "detection.path is set, but the stages of this model.family give no tokens, which the heads read; leave the path \
                 out, or set model.family = \"vit\""
            ));
        };
        let channels = model.channels();
        require!(channels == 3, "model.channels = {channels}: detection reads colour images, which have 3");
        let multiple = COARSEST * patch;
        require!(
            self.crop.is_multiple_of(multiple) && self.crop > 0,
            "detection.crop = {} is not a multiple of {COARSEST} · model.patch_size = {multiple}; try {}",
            self.crop,
            self.crop.div_ceil(multiple).max(1) * multiple
        );
        at_most("detection.crop", self.crop, 1 << 14)?;
        at_most("detection.window", self.window, self.crop / patch)?;
        require!(self.classes >= 1, "detection.classes = 0: give the number of categories");
        at_most("detection.classes", self.classes, MOST_CLASSES)?;
        for (key, value) in [("width", self.width), ("hidden", self.hidden), ("regions", self.regions)] {
            require!(value >= 1, "detection.{key} = 0: it must be at least 1");
            at_most(&format!("detection.{key}"), value, 1 << 16)?;
        }
        for (key, value) in [("train_images", self.train_images), ("test_images", self.test_images)] {
            require!(
                self.format != ObjectFormat::Shapes || value > 0,
                "detection.format = \"shapes\" needs detection.{key}, the number of images to draw"
            );
            at_most(&format!("detection.{key}"), value, 1 << 32)?;
        }
        let [low, high] = self.resize;
        require!(
            low > 0.0 && low <= high && high <= 16.0,
            "detection.resize = [{low}, {high}]: give a range of positive numbers up to 16, the smaller one first"
        );
        Ok(())
    }
}
