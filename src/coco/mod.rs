//! COCO's objects: how their annotations are read, how they travel between rooms, and the figures of detections.

pub mod annotations;
pub mod figures;
pub mod json;
pub mod objects;
pub mod outlines;
pub mod polygons;
pub mod results;
