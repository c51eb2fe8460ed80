//! Computes the official figures of downstream results: COCO's average precision and ADE20K's intersection over union.

pub mod ade20k;
pub mod coco;
mod coco_files;
