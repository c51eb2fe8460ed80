//! COCO's objects: how they travel between rooms.

pub mod objects;
