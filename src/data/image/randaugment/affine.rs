//! Shears, translations and rotations as Pillow's `Image.transform(…, AFFINE, resample=BICUBIC)` (`Geometry.c`): a cubic
//! with a = −1 over 4 × 4 pixels, the result cut off, not rounded; the border's pixels repeat outside; output pixels whose
//! centre falls outside keep the fill colour.

use super::enhance::truncated;
use crate::data::image::pixels::Pixel;
use multiversion::multiversion;
use std::ops::Range;

/// Memory that is used again.
#[derive(Default)]
pub struct Scratch {
    padded: Vec<Pixel>,
    /// Of each column: whole pixels, weights, and the rows that are shown.
    columns: Vec<(isize, [f32; 4], Range<usize>)>,
}

/// Pixels that a padded image has beyond each border.
const PAD: usize = 2;

/// The cubic's weights of the four neighbours at a fraction between the middle two.
fn weights(d: f32) -> [f32; 4] {
    let (d2, d3) = (d * d, d * d * d);
    [-d + 2.0 * d2 - d3, 1.0 - 2.0 * d2 + d3, d + d2 - d3, d3 - d2]
}

/// The weights' sum is 1 but for rounding: without this, a flat 100 might be cut off to 99.
const SLACK: f32 = 1e-3;

/// Each output row is the input's row moved left by `offset(row)` pixels.
pub fn rows(
    from: &[Pixel],
    size: usize,
    offset: impl Fn(usize) -> f64,
    fill: Pixel,
    to: &mut [Pixel],
    scratch: &mut Scratch,
) {
    scratch.padded.resize(size + 2 * PAD, [0; 4]);
    for (row, (from, to)) in from.chunks_exact(size).zip(to.chunks_exact_mut(size)).enumerate() {
        let (whole, fraction, shown) = split(offset(row), size);
        to.fill(fill);
        if shown.is_empty() {
            continue;
        }
        let padded = &mut scratch.padded[..];
        padded[PAD..PAD + size].copy_from_slice(from);
        padded[..PAD].fill(from[0]);
        padded[PAD + size..].fill(from[size - 1]);
        let first = (shown.start as isize + whole + PAD as isize - 1) as usize;
        let source = padded[first..first + shown.len() + 3].as_flattened();
        let taps = std::array::from_fn(|tap| &source[4 * tap..4 * (tap + shown.len())]);
        combine(taps, weights(fraction), to[shown].as_flattened_mut());
    }
}

/// The whole image moved up by `offset` pixels.
pub fn up(from: &[Pixel], size: usize, offset: f64, fill: Pixel, to: &mut [Pixel]) {
    let (whole, fraction, shown) = split(offset, size);
    for (row, to) in to.chunks_exact_mut(size).enumerate() {
        if !shown.contains(&row) {
            to.fill(fill);
            continue;
        }
        let taps = std::array::from_fn(|tap| {
            let row = (row as isize + whole + tap as isize - 1).clamp(0, size as isize - 1) as usize;
            from[row * size..(row + 1) * size].as_flattened()
        });
        combine(taps, weights(fraction), to.as_flattened_mut());
    }
}

/// Each output column is the input's column moved up by `offset(column)` pixels.
pub fn columns(
    from: &[Pixel],
    size: usize,
    offset: impl Fn(usize) -> f64,
    fill: Pixel,
    to: &mut [Pixel],
    scratch: &mut Scratch,
) {
    pad(from, size, &mut scratch.padded);
    scratch.columns.clear();
    scratch.columns.extend((0..size).map(|column| {
        let (whole, fraction, shown) = split(offset(column), size);
        (whole, weights(fraction), shown)
    }));
    shift_columns(scratch, size, fill, to);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn shift_columns(scratch: &Scratch, size: usize, fill: Pixel, to: &mut [Pixel]) {
    let stride = size + 2 * PAD;
    for (row, to) in to.chunks_exact_mut(size).enumerate() {
        for (column, (to, (whole, weights, shown))) in to.iter_mut().zip(&scratch.columns).enumerate() {
            *to = if shown.contains(&row) {
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

/// Whole pixels and fraction of an offset, and the output positions that it leaves inside.
fn split(offset: f64, size: usize) -> (isize, f32, Range<usize>) {
    let whole = offset.floor();
    let inside = |position: f64| position.ceil().clamp(0.0, size as f64) as usize;
    let shown = inside(-0.5 - offset)..inside(size as f64 - 0.5 - offset);
    (whole as isize, (offset - whole) as f32, shown)
}

/// Each byte the weighted sum of four, cut off.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn combine(taps: [&[u8]; 4], weights: [f32; 4], out: &mut [u8]) {
    let [a, b, c, d] = taps.map(|tap| &tap[..out.len()]);
    for (i, out) in out.iter_mut().enumerate() {
        let value = |byte: u8, weight: usize| f32::from(byte) * weights[weight];
        *out = truncated(value(a[i], 0) + value(b[i], 1) + value(c[i], 2) + value(d[i], 3) + SLACK);
    }
}

/// Rotates about the centre, counter-clockwise.
pub fn rotate(from: &[Pixel], size: usize, degrees: f64, fill: Pixel, to: &mut [Pixel], scratch: &mut Scratch) {
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

/// The value at a point of a padded image.
#[inline(always)]
fn cubic(padded: &[Pixel], stride: usize, x: f64, y: f64) -> Pixel {
    let (left, top) = (x as usize, y as usize);
    let (across, along) = (weights((x - left as f64) as f32), weights((y - top as f64) as f32));
    let mut sum = [SLACK; 4];
    for (tap, weight) in along.into_iter().enumerate() {
        let row: &[Pixel; 4] = padded[(top + tap - 1) * stride + left - 1..].first_chunk().expect("it is padded");
        for c in 0..4 {
            let part: f32 = (0..4).map(|i| across[i] * f32::from(row[i][c])).sum();
            sum[c] += weight * part;
        }
    }
    sum.map(truncated)
}

/// Copies the image into one whose border pixels repeat `PAD` times.
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
