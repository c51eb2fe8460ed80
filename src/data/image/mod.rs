//! Turns the bytes of an image into the network's input. [`decode`] gives pixels. For classification, [`recipe`] crops, resizes,
//! augments and normalises them, and [`mix`] then mixes the images of a batch. For segmentation, [`joint`] transforms an image
//! together with its label map. For detection, [`scale_jitter`] transforms an image together with its objects. [`joint`] and
//! [`scale_jitter`] work in the memory of a [`workbench`]. [`shrink`] makes the smaller images that `incubate pack` stores.

pub mod crop;
pub mod decode;
mod distort;
pub mod erase;
pub mod joint;
pub mod mix;
pub mod normalise;
pub mod pixels;
pub mod randaugment;
pub mod recipe;
pub mod resize;
pub mod scale_jitter;
pub mod shrink;
pub mod workbench;
