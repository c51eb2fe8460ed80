//! The memory in which a worker decodes and transforms an image with a label map or with objects.

use super::decode::Decoder;
use super::pixels::{Pixels, View};
use super::resize::Resample;
use crate::data::source::samples::Stored;
use anyhow::Result;

/// The memory of one worker.
pub struct Workbench {
    pub(super) decoder: Decoder,
    pub(super) resample: Resample,
    pub(super) pixels: Pixels,
    pub(super) planes: Vec<f32>,
}

impl Workbench {
    pub(super) fn new(resample: Resample) -> Result<Workbench> {
        Ok(Workbench { decoder: Decoder::new()?, resample, pixels: Pixels::default(), planes: Vec::new() })
    }

    /// Reads an image's height and width, upright by its EXIF orientation. The transforms must then be given the same bytes.
    ///
    /// # Errors
    /// If the bytes are no image.
    pub fn open(&mut self, bytes: &[u8], stored: Stored) -> Result<(usize, usize)> {
        self.decoder.open_upright(bytes, stored)
    }

    /// As [`Workbench::open`], but decodes the whole image at once, for several transforms and [`Workbench::photo`].
    ///
    /// # Errors
    /// If the bytes are no image.
    pub fn open_whole(&mut self, bytes: &[u8], stored: Stored) -> Result<(usize, usize)> {
        let size = self.open(bytes, stored)?;
        self.decoder.keep_whole(bytes, size)?;
        Ok(size)
    }

    /// Words for an error about the size of the opened image.
    pub fn turned(&self) -> &'static str {
        if self.decoder.is_turned() { " after its EXIF orientation is applied" } else { "" }
    }

    /// The whole upright image that [`Workbench::open_whole`] has opened, given the same bytes.
    pub fn photo<'a>(&'a self, bytes: &'a [u8]) -> View<'a> {
        self.decoder.whole(bytes)
    }
}
