//! Converts the outline of an object: draws polygons in a box as pixels, and computes the run lengths of masks.

use super::objects::Outline;
use anyhow::{Result, anyhow};
use hotcoco::mask::{decode, fr_polys};

/// Draws the part of an object in a box (left, top, right, bottom) on `side` × `side` pixels. Returns the pixels row after row: 1
/// inside of the object, 0 outside. As in detectron2's `rasterize_polygons_within_box`, a side of the box that is shorter than 0.1
/// counts as 0.1. If the outline is not given by polygons, all pixels are 0.
pub fn rasterised(outline: &Outline, [left, top, right, bottom]: [f32; 4], side: usize) -> Vec<u8> {
    let Outline::Polygons(polygons) = outline else { return vec![0; side * side] };
    let scale = |length: f32| f64::from(side as f32 / length.max(0.1));
    let (across, down) = (scale(right - left), scale(bottom - top));
    let moved = |polygon: &Vec<f64>| -> Vec<f64> {
        let moved = polygon.chunks_exact(2);
        moved.flat_map(|point| [(point[0] - f64::from(left)) * across, (point[1] - f64::from(top)) * down]).collect()
    };
    let moved: Vec<Vec<f64>> = polygons.iter().map(moved).collect();
    let drawn = decode(&fr_polys(&moved, side as u32, side as u32).expect("the mask is small"));
    (0..side * side).map(|i| drawn[i % side * side + i / side]).collect()
}

/// COCO's run lengths of an outline in an image of this height and width. Polygons are drawn as pycocotools draws them. The result
/// is empty if the outline is not known.
///
/// # Errors
/// Fails if polygons cannot be drawn, because the image is too large.
pub fn runs_of(outline: &Outline, [height, width]: [usize; 2]) -> Result<Vec<u32>> {
    match outline {
        Outline::None => Ok(Vec::new()),
        Outline::Polygons(polygons) => {
            let code = fr_polys(polygons, height as u32, width as u32);
            Ok(code.map_err(|error| anyhow!("a polygon cannot be drawn: {error}"))?.counts)
        }
        Outline::Runs(runs) => Ok(runs.clone()),
    }
}

/// COCO's run lengths ([`Outline::Runs`]) of a mask. A pixel is inside of the object only if its row is in `rows`, its column is in
/// `columns`, and `is_inside` returns true for its row and column.
pub fn run_lengths(
    [height, width]: [usize; 2],
    [rows, columns]: [std::ops::Range<usize>; 2],
    is_inside: impl Fn(usize, usize) -> bool,
) -> Vec<u32> {
    let (mut runs, mut start, mut inside) = (Vec::new(), 0, false);
    let mut see = |at: usize, now: bool| {
        if now != inside {
            runs.push((at - start) as u32);
            (start, inside) = (at, now);
        }
    };
    for column in columns.clone() {
        for row in rows.clone() {
            see(column * height + row, is_inside(row, column));
        }
        if rows.len() < height {
            see(column * height + rows.end, false);
        }
    }
    if columns.end < width {
        see(columns.end * height, false);
    }
    runs.push((height * width - start) as u32);
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use hotcoco::mask::encode;

    #[test]
    fn run_lengths_are_those_of_the_whole_mask() {
        let (height, width) = (5, 7);
        for [rows, columns] in [[1..4, 2..6], [0..5, 0..7], [0..2, 5..7], [3..5, 0..1], [0..0, 0..0], [0..5, 3..4]] {
            for pattern in 1..5 {
                let is_inside = |row: usize, column: usize| (row * 3 + column * 5) % pattern != 1;
                let mask: Vec<u8> = (0..height * width)
                    .map(|i| (i % height, i / height))
                    .map(|(row, column)| {
                        u8::from(rows.contains(&row) && columns.contains(&column) && is_inside(row, column))
                    })
                    .collect();
                let expected = encode(&mask, height as u32, width as u32).unwrap().counts;
                assert_eq!(run_lengths([height, width], [rows.clone(), columns.clone()], is_inside), expected);
            }
        }
    }
}
