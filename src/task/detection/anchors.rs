//! The anchors of the maps of the pyramid: detectron2's `DefaultAnchorGenerator` with one size for each level and offset 0.

use super::boxes::Corners;
use crate::plan::detection::{LEVELS, RATIOS};

/// The side of a square anchor in cells of its level.
const CELLS: f64 = 8.0;

/// The anchors of each level, for maps with so many rows and columns, in the order row, column, ratio. Tokens are `patch` pixels wide,
/// and the third level has their grid. With patches of 16 pixels the sides of square anchors are 32, 64, 128, 256 and 512 pixels.
pub fn anchors(sides: [usize; LEVELS], patch: usize) -> [Vec<Corners>; LEVELS] {
    std::array::from_fn(|level| of_level(sides[level], stride(patch, level)))
}

/// The pixels between two cells of a level, counted from 0.
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
        let all = anchors([256, 128, 64, 32, 16], 16);
        assert_eq!(all.iter().map(Vec::len).sum::<usize>(), 261_888);
        let golden = golden();
        for (level, ours) in anchors([12, 6, 3, 2, 1], 16).iter().enumerate() {
            assert_close("anchors", ours.as_flattened(), &golden[&format!("anchors.{level}")], 1e-7);
        }
    }
}
