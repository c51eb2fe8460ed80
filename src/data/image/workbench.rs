//! The memory in which a worker thread decodes and transforms an image that has a label map or objects.

use super::decode::Decoder;
use super::pixels::{Pixels, View};
use super::resize::Resample;
use crate::data::source::samples::Stored;
use anyhow::Result;

/// The memory of one worker thread. It is reused from image to image.
pub struct Workbench {
    pub(super) decoder: Decoder,
    pub(super) resample: Resample,
    /// The resized part of the image.
    pub(super) pixels: Pixels,
    /// The normalised image (channel, row, column) before it is padded.
    pub(super) planes: Vec<f32>,
}

impl Workbench {
    pub(super) fn new(resample: Resample) -> Result<Workbench> {
        Ok(Workbench { decoder: Decoder::new()?, resample, pixels: Pixels::default(), planes: Vec::new() })
    }

    /// Opens an image, and returns its (height, width). An EXIF orientation is applied before. The transforms that follow must get
    /// the same bytes.
    ///
    /// # Errors
    /// The bytes are not an image, or the image is damaged.
    pub fn open(&mut self, bytes: &[u8], stored: Stored) -> Result<(usize, usize)> {
        self.decoder.open_upright(bytes, stored)
    }

    /// Like [`Workbench::open`], but decodes the whole image at once. [`Workbench::photo`] then returns the pixels, and several
    /// transforms can share them.
    ///
    /// # Errors
    /// The bytes are not an image, or the image is damaged.
    pub fn open_whole(&mut self, bytes: &[u8], stored: Stored) -> Result<(usize, usize)> {
        let size = self.open(bytes, stored)?;
        self.decoder.keep_whole(bytes, size)?;
        Ok(size)
    }

    /// Text to append to an error message about the size of the opened image. It is empty unless an EXIF orientation was applied.
    pub fn turned(&self) -> &'static str {
        if self.decoder.is_turned() { " after its EXIF orientation is applied" } else { "" }
    }

    /// The whole upright image. [`Workbench::open_whole`] must have opened the image before, from the same `bytes`.
    pub fn photo<'a>(&'a self, bytes: &'a [u8]) -> View<'a> {
        self.decoder.whole(bytes)
    }
}
