//! Shears, translates and rotates like Pillow's `Image.transform(…, AFFINE, resample=BICUBIC)` (`Geometry.c`). An output pixel is
//! interpolated from 4 × 4 input pixels by a cubic with a = −1. The result is truncated, not rounded. If the 4 × 4 pixels extend
//! beyond the image, the image's border pixels are repeated there. An output pixel whose centre comes from outside of the image
//! gets the fill colour.

use super::enhance::truncated;
use crate::data::image::pixels::Pixel;
use multiversion::multiversion;
use std::ops::Range;

/// A square image, and the memory into which an operation draws the changed image.
pub struct Drawing<'a> {
    pub from: &'a [Pixel],
    pub to: &'a mut [Pixel],
    /// The side of both images, in pixels.
    pub size: usize,
    /// The colour of pixels that come from outside of the image.
    pub fill: Pixel,
    pub scratch: &'a mut Scratch,
}

/// Memory that is reused from one operation to the next.
#[derive(Default)]
pub struct Scratch {
    /// The image or one of its rows, padded with repeated border pixels.
    padded: Vec<Pixel>,
    /// For each column: the whole part of its offset, the weights for the fraction of its offset, and the range of the output rows
    /// that come from inside the input image.
    columns: Vec<(isize, [f32; 4], Range<usize>)>,
}

/// How many pixels of padding a padded image or row has on each side.
const PAD: usize = 2;

/// The cubic's weights of four neighbouring pixels, for a point at `fraction` of the way from the second pixel to the third.
fn weights(fraction: f32) -> [f32; 4] {
    let (x, x2, x3) = (fraction, fraction * fraction, fraction * fraction * fraction);
    [-x + 2.0 * x2 - x3, 1.0 - 2.0 * x2 + x3, x + x2 - x3, x3 - x2]
}

/// A small number that is added before truncation. The weights add up to 1 only up to rounding. Without the small number, an area
/// of equal bytes 100 could become 99.
const SLACK: f32 = 1e-3;

/// Shifts each row to the left by `offset(row)` pixels. A negative offset shifts the row to the right.
pub fn shift_rows(drawing: Drawing, offset: impl Fn(usize) -> f64) {
    let Drawing { from, to, size, fill, scratch } = drawing;
    scratch.padded.resize(size + 2 * PAD, [0; 4]);
    for (row, (from, to)) in from.chunks_exact(size).zip(to.chunks_exact_mut(size)).enumerate() {
        let (whole, fraction, covered) = split_offset(offset(row), size);
        to.fill(fill);
        if covered.is_empty() {
            continue;
        }
        let padded = &mut scratch.padded[..];
        padded[PAD..PAD + size].copy_from_slice(from);
        padded[..PAD].fill(from[0]);
        padded[PAD + size..].fill(from[size - 1]);
        let first = (covered.start as isize + whole + PAD as isize - 1) as usize;
        let source = padded[first..first + covered.len() + 3].as_flattened();
        let taps = std::array::from_fn(|tap| &source[4 * tap..4 * (tap + covered.len())]);
        interpolate(taps, weights(fraction), to[covered].as_flattened_mut());
    }
}

/// Shifts the whole image up by `offset` pixels. A negative offset shifts the image down.
pub fn shift_up(drawing: Drawing, offset: f64) {
    let Drawing { from, to, size, fill, .. } = drawing;
    let (whole, fraction, covered) = split_offset(offset, size);
    for (row, to) in to.chunks_exact_mut(size).enumerate() {
        if !covered.contains(&row) {
            to.fill(fill);
            continue;
        }
        let taps = std::array::from_fn(|tap| {
            let row = (row as isize + whole + tap as isize - 1).clamp(0, size as isize - 1) as usize;
            from[row * size..(row + 1) * size].as_flattened()
        });
        interpolate(taps, weights(fraction), to.as_flattened_mut());
    }
}

/// Shifts each column up by `offset(column)` pixels. A negative offset shifts the column down.
pub fn shift_columns(drawing: Drawing, offset: impl Fn(usize) -> f64) {
    let Drawing { from, to, size, fill, scratch } = drawing;
    pad(from, size, &mut scratch.padded);
    scratch.columns.clear();
    scratch.columns.extend((0..size).map(|column| {
        let (whole, fraction, covered) = split_offset(offset(column), size);
        (whole, weights(fraction), covered)
    }));
    interpolate_columns(scratch, size, fill, to);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn interpolate_columns(scratch: &Scratch, size: usize, fill: Pixel, to: &mut [Pixel]) {
    let stride = size + 2 * PAD;
    for (row, to) in to.chunks_exact_mut(size).enumerate() {
        for (column, (to, (whole, weights, covered))) in to.iter_mut().zip(&scratch.columns).enumerate() {
            *to = if covered.contains(&row) {
                let first = ((row + PAD - 1) as isize + whole) as usize * stride + PAD + column;
                let mut sum = [SLACK; 4];
                for (tap, weight) in weights.iter().enumerate() {
                    let pixel = scratch.padded[first + tap * stride];
                    (0..4).for_each(|c| sum[c] += weight * f32::from(pixel[c]));
                }
                sum.map(truncated)
            } else {
                fill
            };
        }
    }
}

/// Splits an offset into its whole part and its fraction. Also returns the range of the output positions whose centres come from
/// inside the image.
fn split_offset(offset: f64, size: usize) -> (isize, f32, Range<usize>) {
    let whole = offset.floor();
    let index = |position: f64| position.ceil().clamp(0.0, size as f64) as usize;
    let covered = index(-0.5 - offset)..index(size as f64 - 0.5 - offset);
    (whole as isize, (offset - whole) as f32, covered)
}

/// Sets each output byte to the weighted sum of four input bytes. The sum is truncated, not rounded.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn interpolate(taps: [&[u8]; 4], weights: [f32; 4], out: &mut [u8]) {
    let [a, b, c, d] = taps.map(|tap| &tap[..out.len()]);
    for (i, out) in out.iter_mut().enumerate() {
        let value = |byte: u8, index: usize| f32::from(byte) * weights[index];
        *out = truncated(value(a[i], 0) + value(b[i], 1) + value(c[i], 2) + value(d[i], 3) + SLACK);
    }
}

/// Rotates the image counter-clockwise about its centre.
pub fn rotate(drawing: Drawing, degrees: f64) {
    let Drawing { from, to, size, fill, scratch } = drawing;
    pad(from, size, &mut scratch.padded);
    let angle = -degrees.to_radians();
    draw_rotated(&scratch.padded, size, [angle.cos(), angle.sin()], fill, to);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn draw_rotated(padded: &[Pixel], size: usize, [cos, sin]: [f64; 2], fill: Pixel, to: &mut [Pixel]) {
    let centre = size as f64 / 2.0;
    let inside = 0.0..size as f64;
    for (row, to) in to.chunks_exact_mut(size).enumerate() {
        let down = row as f64 + 0.5 - centre;
        for (column, to) in to.iter_mut().enumerate() {
            let right = column as f64 + 0.5 - centre;
            let (x, y) = (cos * right + sin * down + centre, cos * down - sin * right + centre);
            *to = if inside.contains(&x) && inside.contains(&y) {
                cubic(padded, size + 2 * PAD, x + (PAD as f64 - 0.5), y + (PAD as f64 - 0.5))
            } else {
                fill
            };
        }
    }
}

/// The interpolated pixel at a point of a padded image. Points with integer coordinates are the centres of pixels.
#[inline(always)]
fn cubic(padded: &[Pixel], stride: usize, x: f64, y: f64) -> Pixel {
    let (left, top) = (x as usize, y as usize);
    let (weights_x, weights_y) = (weights((x - left as f64) as f32), weights((y - top as f64) as f32));
    let mut sum = [SLACK; 4];
    for (tap, weight) in weights_y.into_iter().enumerate() {
        let row: &[Pixel; 4] =
            padded[(top + tap - 1) * stride + left - 1..].first_chunk().expect("the padding is wide enough");
        for c in 0..4 {
            let in_row: f32 = (0..4).map(|i| weights_x[i] * f32::from(row[i][c])).sum();
            sum[c] += weight * in_row;
        }
    }
    sum.map(truncated)
}

/// Writes the image to `padded`, with its border pixels repeated [`PAD`] times on each side.
fn pad(from: &[Pixel], size: usize, padded: &mut Vec<Pixel>) {
    let stride = size + 2 * PAD;
    padded.resize(stride * stride, [0; 4]);
    for (row, out) in padded.chunks_exact_mut(stride).enumerate() {
        let row = row.saturating_sub(PAD).min(size - 1);
        let from = &from[row * size..(row + 1) * size];
        out[..PAD].fill(from[0]);
        out[PAD..PAD + size].copy_from_slice(from);
        out[PAD + size..].fill(from[size - 1]);
    }
}
