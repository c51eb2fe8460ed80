//! Turns the bytes of an image into the network's numbers: [`decode`] gives pixels, and [`recipe`] crops, resizes, augments and
//! normalises them. Then [`mix`] mixes the images of a batch. [`shrink`] makes the images of a pack.

pub mod crop;
pub mod decode;
pub mod erase;
pub mod mix;
pub mod normalise;
pub mod pixels;
pub mod randaugment;
pub mod recipe;
pub mod resize;
pub mod shrink;
