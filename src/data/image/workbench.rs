//! The memory in which a worker decodes and transforms an image.

use super::decode::Decoder;
use super::pixels::Pixels;
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

    /// Reads an image's height and width. The transforms must then be given the same bytes.
    ///
    /// # Errors
    /// If the bytes are no image.
    pub fn open(&mut self, bytes: &[u8], stored: Stored) -> Result<(usize, usize)> {
        self.decoder.open(bytes, stored)
    }
}
