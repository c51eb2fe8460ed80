//! Micro-batches of training images, and how they get to a device.

use super::batch_memory::Borrowed;
use super::images::BatchImages;
use crate::data::image::mix::Mix;
use crate::weights::upload;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// One micro-batch of training images.
#[derive(Debug)]
pub struct Batch {
    pub(super) pieces: Vec<Piece>,
    /// The positions of the samples in the global batch.
    pub positions: Range<usize>,
}

/// A part of a micro-batch. For a GPU the loader puts its tensors into pinned memory.
#[derive(Debug)]
pub(super) struct Piece {
    pub images: BatchImages,
    /// The task's targets, whose first dimension counts samples: distributions over the classes (batch, class), label maps (batch,
    /// row, column), or rows of objects in fp64 (batch, number), which are not in pinned memory.
    pub targets: Tensor,
    /// The mixing of the images, if the device has still to do it.
    pub mix: Option<Mix>,
    /// The memory of the images, if it is reused.
    pub memory: Option<Borrowed>,
}

impl Batch {
    /// Makes a batch of images, or of normalised images (batch, channel, row, column), and targets that are already mixed.
    pub fn of(images: impl Into<BatchImages>, targets: Tensor, positions: Range<usize>) -> Batch {
        Batch { pieces: vec![Piece { images: images.into(), targets, mix: None, memory: None }], positions }
    }

    /// Copies the batch to a device, and normalises and mixes its images there if that is not done yet. Returns the images (batch,
    /// channel, row, column), the targets and, if it is reused, the memory of the images, which must be dropped after them. Rows of
    /// objects stay on the host, which reads them.
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

/// Whether targets are rows of objects, the only targets in fp64.
pub(super) fn is_rows(targets: &Tensor) -> bool {
    targets.kind() == Kind::Double
}

/// The targets of all pieces. Rows of objects have the length of the longest row of their piece, and get zeros up to the longest row
/// of all pieces.
fn joined(targets: &[&Tensor]) -> Tensor {
    let longest = targets.iter().map(|targets| targets.size()[1]).max().unwrap_or(0);
    let padded = |targets: &&Tensor| match longest - targets.size()[1] {
        0 => targets.shallow_clone(),
        missing => targets.constant_pad_nd([0, missing]),
    };
    Tensor::cat(&targets.iter().map(padded).collect::<Vec<_>>(), 0)
}
