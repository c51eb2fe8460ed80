//! Turns the bytes of an image into the network's input: [`decode`] gives pixels, and [`recipe`] crops, resizes, augments and
//! normalises them. Then [`mix`] mixes the images of a batch. [`joint`] transforms images together with their label maps,
//! [`scale_jitter`] images together with their objects, both in the memory of a [`workbench`]. [`shrink`] makes the images of a pack.

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
