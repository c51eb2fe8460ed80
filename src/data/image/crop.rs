//! Chooses the part of an image that becomes the network's input (timm 1.0: `transforms.py`, `RandomResizedCropAndInterpolation`;
//! torchvision: `Resize`, `CenterCrop`, `RandomCrop`).

use super::pixels::{Area, Region};
use crate::random::Random;

/// Draws a random part of an image. The part's share of the image's area is uniform in `scale`, and its ratio of width to height is
/// log-uniform in `ratio`. If ten draws in a row do not fit into the image, returns the largest central part whose ratio is in
/// `ratio`.
pub fn random_resized(random: &mut Random, height: usize, width: usize, scale: [f64; 2], ratio: [f64; 2]) -> Region {
    for _attempt in 0..10 {
        let area = random.between(scale[0], scale[1]) * (height * width) as f64;
        let aspect = random.between(ratio[0].ln(), ratio[1].ln()).exp();
        let w = (area * aspect).sqrt().round_ties_even() as usize;
        let h = (area / aspect).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let (top, left) = (random.below(height - h + 1), random.below(width - w + 1));
            return Region { left, top, width: w, height: h };
        }
    }
    let whole_ratio = width as f64 / height as f64;
    let (h, w) = if whole_ratio < ratio[0] {
        ((width as f64 / ratio[0]).round_ties_even() as usize, width)
    } else if whole_ratio > ratio[1] {
        (height, (height as f64 * ratio[1]).round_ties_even() as usize)
    } else {
        (height, width)
    };
    let (h, w) = (h.clamp(1, height), w.clamp(1, width));
    Region { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h }
}

/// The (height, width) of an image after its shorter side is resized to `size`, as by torchvision's `Resize`.
pub fn resized(height: usize, width: usize, size: usize) -> (usize, usize) {
    let long = |longer: usize, shorter: usize| (size as f64 * longer as f64 / shorter as f64) as usize;
    if width <= height { (long(height, width), size) } else { (size, long(width, height)) }
}

/// Draws a square of side `size` in an image with a border of `padding` pixels, as torchvision's `RandomCrop` does. Returns the
/// square's first (row, column). Both are counted from the image's own first pixel, and are negative if the square begins in the
/// border. The image's sides must not be shorter than `size`.
pub fn random_padded_start(
    random: &mut Random,
    (height, width): (usize, usize),
    size: usize,
    padding: usize,
) -> (isize, isize) {
    let mut start = |side: usize| random.below(side - size + 2 * padding + 1) as isize - padding as isize;
    (start(height), start(width))
}

/// The part of the stored image that becomes the input of evaluation, and the region that resampling this part reads. Both are in
/// pixels of the stored image. The image is resized so that its shorter side is `size` / `share`, rounded down. The part is the
/// central square of side `size` of the resized image.
pub fn centre(height: usize, width: usize, size: usize, share: f64) -> (Area, Region) {
    let (resized_h, resized_w) = resized(height, width, (size as f64 / share).floor() as usize);
    let offset = |resized: usize| ((resized - size) as f64 / 2.0).round_ties_even() as usize;
    let part = Region { left: offset(resized_w), top: offset(resized_h), width: size, height: size };
    source([height, width], [resized_h, resized_w], part)
}

/// Finds the area of the stored image that becomes `part` of the resized image, and the region that resampling this area reads.
/// Both results are in pixels of the stored image. The first two arguments are the (height, width) of the stored and of the resized
/// image.
pub fn source([height, width]: [usize; 2], resized: [usize; 2], part: Region) -> (Area, Region) {
    let (per_row, per_column) = (height as f64 / resized[0] as f64, width as f64 / resized[1] as f64);
    let area = Area {
        left: part.left as f64 * per_column,
        top: part.top as f64 * per_row,
        width: part.width as f64 * per_column,
        height: part.height as f64 * per_row,
    };
    let span = |start: f64, length: f64, per: f64, most: usize| {
        // A bicubic kernel reaches two output pixels, and at least two input pixels, to each side. A bilinear kernel reaches half
        // as far. One more pixel is a margin.
        let reach = 2.0 * per.max(1.0) + 1.0;
        let first = (start - reach).floor().max(0.0) as usize;
        let last = ((start + length + reach).ceil() as usize).min(most);
        (first, last - first)
    };
    let (left, region_width) = span(area.left, area.width, per_column, width);
    let (top, region_height) = span(area.top, area.height, per_row, height);
    (area, Region { left, top, width: region_width, height: region_height })
}

/// The largest n of 8, 4 and 2 for which `area`, decoded at 1/n of its size, still has at least `size` pixels on both sides. If
/// there is none, the result is 1.
pub fn reduction(area: Area, size: usize) -> usize {
    let fits = |n: &usize| area.height.min(area.width) >= (n * size) as f64;
    [8, 4, 2].into_iter().find(fits).unwrap_or(1)
}
