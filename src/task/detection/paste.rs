//! Masks of detected objects at the size of the image: detectron2's `paste_masks_in_image`.

use super::boxes::Corners;
use crate::coco::outlines::run_lengths;

/// A pixel is inside of the object if its probability is at least this value.
const INSIDE: f32 = 0.5;

/// Stretches a mask of probabilities (side, side), stored row after row, over a box of an image of this height and width. Returns
/// COCO's run lengths of the pixels inside of the object. The probability at the centre of a pixel is interpolated between the
/// cells of the mask. Cells outside of the mask count as 0.
pub fn pasted(mask: &[f32], corners: &Corners, [height, width]: [usize; 2]) -> Vec<u32> {
    let side = mask.len().isqrt();
    let [left, top, right, bottom] = *corners;
    let [columns, rows] = [(left, right, width), (top, bottom, height)].map(|(low, high, length)| {
        let start = (low.floor() - 1.0).max(0.0) as usize;
        let end = ((high.ceil() + 1.0).max(0.0) as usize).min(length);
        (start.min(end)..end, (start.min(end)..end).map(|pixel| place(pixel, [low, high], side)).collect::<Vec<f32>>())
    });
    let value = |row: usize, column: usize| {
        let (y, x) = (rows.1[row - rows.0.start], columns.1[column - columns.0.start]);
        let (y0, x0) = (y.floor(), x.floor());
        let cell = |dy: f32, dx: f32| {
            let (row, column) = (y0 + dy, x0 + dx);
            let within = |place: f32| (0.0..side as f32).contains(&place);
            if within(row) && within(column) { mask[row as usize * side + column as usize] } else { 0.0 }
        };
        let (down, right) = (y - y0, x - x0);
        cell(0.0, 0.0) * (1.0 - right) * (1.0 - down)
            + cell(0.0, 1.0) * right * (1.0 - down)
            + cell(1.0, 0.0) * (1.0 - right) * down
            + cell(1.0, 1.0) * right * down
    };
    let is_inside = |row: usize, column: usize| value(row, column) >= INSIDE;
    run_lengths([height, width], [rows.0.clone(), columns.0.clone()], is_inside)
}

/// The position of a pixel's centre, in cells, of which there are `cells` from `low` to `high`. The centre of the first cell is
/// at 0.
fn place(pixel: usize, [low, high]: [f32; 2], cells: usize) -> f32 {
    let from_minus_one = (pixel as f32 + 0.5 - low) / (high - low) * 2.0 - 1.0;
    ((from_minus_one + 1.0) * cells as f32 - 1.0) / 2.0
}

#[cfg(test)]
mod tests {
    use super::super::tests::{corners, golden};
    use super::*;
    use hotcoco::mask::decode;
    use tch::Kind;

    #[test]
    fn pasted_masks_are_detectron2s() {
        let golden = golden();
        let boxes = corners(&golden["found.boxes"]);
        let masks = golden["found.mask"].to_kind(Kind::Float);
        let (count, height, width) = golden["found.pasted"].size3().unwrap();
        for number in 0..count {
            let mask = Vec::<f32>::try_from(masks.get(number).flatten(0, -1)).unwrap();
            let size = [height as usize, width as usize];
            let counts = pasted(&mask, &boxes[number as usize], size);
            let ours = decode(&hotcoco::Rle { h: size[0] as u32, w: size[1] as u32, counts });
            let expected = golden["found.pasted"].get(number).transpose(0, 1).flatten(0, -1);
            assert_eq!(ours, Vec::<u8>::try_from(expected.contiguous()).unwrap(), "mask {number}");
        }
    }
}
