//! Micro-batches of training images, and their way to a device.

use super::batch_memory::Borrowed;
use super::images::BatchImages;
use crate::data::image::mix::Mix;
use crate::weights::upload;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// One micro-batch of training images.
#[derive(Debug)]
pub struct Batch {
    /// The parts of the micro-batch, in the order of their samples.
    pub(super) pieces: Vec<Piece>,
    /// The positions of the samples in the global batch.
    pub positions: Range<usize>,
}

/// A part of a micro-batch. For a GPU, the loader puts its images and most targets into pinned memory.
#[derive(Debug)]
pub(super) struct Piece {
    pub images: BatchImages,
    /// The targets of the task: distributions over the classes (batch, class), label maps (batch, row, column), or rows of
    /// objects in fp64 (batch, number). Rows of objects are not in pinned memory.
    pub targets: Tensor,
    /// The mixing of the images, if the device must still mix them.
    pub mix: Option<Mix>,
    /// The memory of the images, if it is reused.
    pub memory: Option<Borrowed>,
}

impl Batch {
    /// Makes a batch of one piece, from images and targets that need no mixing. A tensor of images is (batch, channel, row,
    /// column) and normalised.
    pub fn of(images: impl Into<BatchImages>, targets: Tensor, positions: Range<usize>) -> Batch {
        Batch { pieces: vec![Piece { images: images.into(), targets, mix: None, memory: None }], positions }
    }

    /// Copies the batch to a device, and normalises and mixes its images there if the workers have not done so. Returns the
    /// images (batch, channel, row, column), the targets, and the memory of the images if it is reused. The memory must be
    /// dropped after the images. If the batch has several pieces, the images are a copy and no memory is returned. Rows of
    /// objects stay on the host, where the task reads them.
    pub fn on(self, device: Device) -> (Tensor, Tensor, Option<Borrowed>) {
        let on_device = |Piece { images, targets, mix, memory }: Piece| {
            let images_bchw = images.on(device);
            mix.iter().for_each(|mix| mix.tensor(&images_bchw));
            let targets = if is_rows(&targets) { targets } else { upload(&targets, device) };
            (images_bchw, targets, memory)
        };
        let mut pieces: Vec<_> = self.pieces.into_iter().map(on_device).collect();
        if pieces.len() == 1 {
            return pieces.swap_remove(0);
        }
        let images: Vec<&Tensor> = pieces.iter().map(|(images_bchw, ..)| images_bchw).collect();
        let targets: Vec<&Tensor> = pieces.iter().map(|(_, targets, _)| targets).collect();
        (Tensor::cat(&images, 0), joined(&targets), None)
    }
}

/// Whether targets are rows of objects. No other targets are in fp64.
pub(super) fn is_rows(targets: &Tensor) -> bool {
    targets.kind() == Kind::Double
}

/// Joins the targets of all pieces. The rows of objects of each piece are as long as its longest row. They get zeros up to the
/// longest row of all pieces.
fn joined(targets: &[&Tensor]) -> Tensor {
    let longest = targets.iter().map(|targets| targets.size()[1]).max().unwrap_or(0);
    let padded = |targets: &&Tensor| match longest - targets.size()[1] {
        0 => targets.shallow_clone(),
        missing => targets.constant_pad_nd([0, missing]),
    };
    Tensor::cat(&targets.iter().map(padded).collect::<Vec<_>>(), 0)
}
