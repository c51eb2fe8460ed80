//! How a stored image becomes the numbers that the network takes: decoding, the training and evaluation recipes, and Mixup
//! and CutMix of a batch. Pixels flow through here: stored bytes come in, normalised planes (channel, row, column) go out.

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
