//! The images of a batch on their way to a device: normalised by the data workers, or as bytes that the device normalises. Bytes
//! take a quarter of the memory, and the device computes exactly the same values from them.

use crate::config::{Config, TaskKind};
use crate::data::image::erase::{Erased, write_noise};
use crate::data::image::normalise::{Normalise, normalised};
use crate::data::image::recipe::Out;
use crate::weights::{Staging, bytes_mut, floats_mut, upload};
use tch::{Device, Kind, Tensor};

/// The form in which data workers hand over images.
#[derive(Debug, Clone)]
pub enum Handover {
    /// Normalised. Images with classes are also mixed (by Mixup or CutMix).
    Finished,
    /// Normalised. The device of this [`Staging`] mixes the images that have classes.
    Unmixed(Staging),
    /// Images with classes are bytes, which the device of this [`Staging`] normalises and mixes. Images with label maps or objects
    /// are normalised by the workers. Their padding is 0 after the normalisation, and usually no byte gives exactly 0.
    Bytes(Staging),
}

impl Handover {
    /// The form for the device of `staging`. A CPU gets finished images. A GPU gets bytes if `as_bytes`, and unmixed images
    /// otherwise.
    pub fn new(staging: Staging, as_bytes: bool) -> Handover {
        match (staging.is_pinned(), as_bytes) {
            (false, _) => Handover::Finished,
            (true, false) => Handover::Unmixed(staging),
            (true, true) => Handover::Bytes(staging),
        }
    }

    /// The allocator of the host memory from which the device copies the images.
    pub fn staging(&self) -> Staging {
        match self {
            Handover::Finished => Staging::of_cpu(),
            Handover::Unmixed(staging) | Handover::Bytes(staging) => staging.clone(),
        }
    }

    /// [`Normalise::numbers`] for a device that gets the config's images as bytes; none if the workers normalise the images.
    pub fn numbers(&self, config: &Config) -> Option<Tensor> {
        match (self, config.task) {
            (Handover::Bytes(staging), TaskKind::Classification) => {
                Some(staging.staged(Normalise::new(&config.data.mean, &config.data.std).numbers()))
            }
            _ => None,
        }
    }
}

/// The tensor kind of the images that the workers write. Images are bytes if there are `numbers`, with which a device normalises
/// the images, and fp32 otherwise.
pub(super) fn kind(numbers: &Option<Tensor>) -> Kind {
    if numbers.is_some() { Kind::Uint8 } else { Kind::Float }
}

/// The images of a batch in host memory.
#[derive(Debug)]
pub enum BatchImages {
    /// (batch, channel, row, column), normalised.
    Normalised(Tensor),
    /// Images as bytes, which a device normalises.
    Bytes {
        /// (batch, channel, row, column)
        bytes_bchw: Tensor,
        /// [`Normalise::numbers`]
        numbers: Tensor,
        /// [`Erased::tensors`]
        erased: Option<[Tensor; 2]>,
    },
}

impl From<Tensor> for BatchImages {
    /// Takes normalised images.
    fn from(images_bchw: Tensor) -> BatchImages {
        BatchImages::Normalised(images_bchw)
    }
}

impl BatchImages {
    /// Makes a batch from the tensor into which a worker has written images. If there are `numbers`, the images are bytes, and
    /// `erased` is their noise of RandomErasing.
    pub(super) fn written(
        images_bchw: Tensor,
        erased: &Erased,
        numbers: &Option<Tensor>,
        staging: &Staging,
    ) -> BatchImages {
        let Some(numbers) = numbers else { return images_bchw.into() };
        let staged = |tensors: [Tensor; 2]| tensors.map(|tensor| staging.staged(tensor));
        BatchImages::Bytes {
            bytes_bchw: images_bchw,
            numbers: numbers.shallow_clone(),
            erased: erased.tensors().map(staged),
        }
    }

    /// How many images there are.
    pub fn count(&self) -> i64 {
        let (BatchImages::Normalised(tensor) | BatchImages::Bytes { bytes_bchw: tensor, .. }) = self;
        tensor.size()[0]
    }

    /// A batch of the same images that shares their memory.
    pub fn shallow_clone(&self) -> BatchImages {
        match self {
            BatchImages::Normalised(images_bchw) => images_bchw.shallow_clone().into(),
            BatchImages::Bytes { bytes_bchw, numbers, erased } => BatchImages::Bytes {
                bytes_bchw: bytes_bchw.shallow_clone(),
                numbers: numbers.shallow_clone(),
                erased: erased.as_ref().map(|erased| erased.each_ref().map(Tensor::shallow_clone)),
            },
        }
    }

    /// Gives the normalised images (batch, channel, row, column) on a device. Copies them to a GPU, and shares normalised images
    /// with a CPU. If the images are bytes, the device normalises them and writes their noise. The host does not wait for a copy
    /// from pinned memory.
    pub fn on(&self, device: Device) -> Tensor {
        match self {
            BatchImages::Normalised(images_bchw) => upload(images_bchw, device),
            BatchImages::Bytes { bytes_bchw, numbers, erased } => {
                let images_bchw = normalised(&upload(bytes_bchw, device), &upload(numbers, device));
                if let Some([rows, values]) = erased {
                    write_noise(&images_bchw, [&upload(rows, device), &upload(values, device)]);
                }
                images_bchw
            }
        }
    }
}

/// The memory of the image `number` in a host tensor of images (batch, channel, row, column) of bytes or fp32. If the images are
/// bytes, `erased` receives the noise of RandomErasing.
pub(super) fn out<'a>(images_bchw: &'a mut Tensor, number: usize, erased: &'a mut Erased) -> Out<'a> {
    let image = images_bchw.numel() / images_bchw.size()[0] as usize;
    let start = number * image;
    match images_bchw.kind() {
        Kind::Uint8 => Out::Bytes { bytes: &mut bytes_mut(images_bchw)[start..start + image], start, erased },
        _ => Out::Normalised(&mut floats_mut(images_bchw)[start..start + image]),
    }
}
