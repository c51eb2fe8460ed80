//! Random objects for trial steps and benchmarks.

use crate::coco::objects::{Object, Outline, Scene};
use crate::plan::detection::Architecture;
use crate::random::Random;
use tch::Tensor;

/// The number of objects of each image.
const OBJECTS: usize = 7;

/// The rows (b, numbers) of scenes, one for each image. The outlines of the objects are octagons.
pub fn random_targets(architecture: Architecture, samples: usize) -> Tensor {
    let rows: Vec<f64> = (0..samples).flat_map(|sample| scene(architecture, sample).to_row()).collect();
    Tensor::from_slice(&rows).view([samples as i64, -1])
}

fn scene(architecture: Architecture, image: usize) -> Scene {
    let mut random = Random::new(&[image as u64]);
    let side = architecture.crop as f64;
    let mut object = |_| {
        let [width, height] = [(); 2].map(|()| side * random.between(0.1, 0.5));
        let [left, top] = [width, height].map(|length| random.between(0.0, side - length));
        // The corners of the octagon, as shares of the box's sides: the box with its four corners cut off.
        let corners = [0.25, 0.0, 0.75, 0.0, 1.0, 0.25, 1.0, 0.75, 0.75, 1.0, 0.25, 1.0, 0.0, 0.75, 0.0, 0.25];
        let points = corners.as_chunks::<2>().0.iter().flat_map(|[x, y]| [left + x * width, top + y * height]);
        Object {
            class: random.below(architecture.classes),
            bbox: [left, top, width, height],
            area: 0.875 * width * height,
            is_crowd: false,
            outline: Outline::Polygons(vec![points.collect()]),
        }
    };
    Scene { image, size: [architecture.crop; 2], objects: (0..OBJECTS).map(&mut object).collect() }
}
