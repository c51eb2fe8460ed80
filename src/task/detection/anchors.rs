//! The anchors of the maps of the pyramid: detectron2's `DefaultAnchorGenerator` with one size for each level and offset 0.

use super::boxes::Corners;
use crate::plan::detection::{LEVELS, RATIOS};

/// The side of a square anchor, in cells of its level's map.
const CELLS: f64 = 8.0;

/// The anchors of a square image.
pub struct Anchors {
    /// All anchors, level after level. Within a level they are ordered by row, then by column, then by ratio.
    pub all: Vec<Corners>,
    /// The number of anchors of each level.
    pub counts: [usize; LEVELS],
}

impl Anchors {
    /// The anchors of the levels' maps, each of which has `sides` rows and as many columns. A token is `patch` pixels wide, and a
    /// cell of level 2 covers one token. With patches of 16 pixels, the sides of square anchors are 32, 64, 128, 256 and 512
    /// pixels.
    pub fn new(sides: [usize; LEVELS], patch: usize) -> Anchors {
        let of_levels = sides.into_iter().enumerate().flat_map(|(level, side)| of_level(side, stride(patch, level)));
        Anchors { all: of_levels.collect(), counts: sides.map(|side| RATIOS.len() * side.pow(2)) }
    }
}

/// The distance between neighbouring cells of a level's map, in pixels. Levels count from 0, the finest.
pub fn stride(patch: usize, level: usize) -> f64 {
    patch as f64 * 2f64.powi(level as i32 - 2)
}

fn of_level(side: usize, stride: f64) -> Vec<Corners> {
    let area = (CELLS * stride).powi(2);
    let around_zero = RATIOS.map(|ratio| {
        let width = (area / ratio).sqrt();
        let height = ratio * width;
        [-width / 2.0, -height / 2.0, width / 2.0, height / 2.0].map(|length| length as f32)
    });
    let at = |cell: usize| {
        let [x, y] = [cell % side, cell / side].map(|number| number as f32 * stride as f32);
        around_zero.map(|a| [a[0] + x, a[1] + y, a[2] + x, a[3] + y])
    };
    (0..side * side).flat_map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, golden};
    use super::*;

    #[test]
    fn anchors_are_detectron2s() {
        let Anchors { all, counts } = Anchors::new([256, 128, 64, 32, 16], 16);
        assert_eq!((all.len(), counts.iter().sum()), (261_888, 261_888));
        let golden = golden();
        let Anchors { all, counts } = Anchors::new([12, 6, 3, 2, 1], 16);
        let mut rest = all.as_slice();
        for (level, count) in counts.into_iter().enumerate() {
            let (ours, others) = rest.split_at(count);
            rest = others;
            assert_close("anchors", ours.as_flattened(), &golden[&format!("anchors.{level}")], 1e-7);
        }
    }
}
