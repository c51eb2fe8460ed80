//! Annotated and detected objects as in COCO: reading annotations, objects as rows of numbers, outlines and masks, COCO's
//! figures, and results files. COCO's figures are average precisions and average recalls.

pub mod annotations;
pub mod figures;
pub mod json;
pub mod objects;
pub mod outlines;
pub mod polygons;
pub mod results;
