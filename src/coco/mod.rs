//! COCO's objects: how their annotations are read, and how they travel between rooms.

pub mod annotations;
pub mod json;
pub mod masks;
pub mod objects;
pub mod polygons;
pub mod results;
