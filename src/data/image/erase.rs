//! RandomErasing (timm 1.0: `random_erasing.py`, mode `pixel`, one box): replaces a rectangle of an image with normal noise.

use super::pixels::Region;
use crate::random::Random;
use std::sync::LazyLock;
use tch::{Kind, Tensor};

/// Draws a rectangle in a square of side `size`. The rectangle's share of the area is drawn uniformly from 2 % to one third. Its
/// ratio of height to width is drawn log-uniformly from 0.3 to 1/0.3. A rectangle as high or as wide as the square, or more, is
/// drawn again. After ten such draws, returns none.
pub fn rectangle(size: usize, random: &mut Random) -> Option<Region> {
    for _attempt in 0..10 {
        let area = random.between(0.02, 1.0 / 3.0) * (size * size) as f64;
        let ratio = random.between(0.3f64.ln(), (1.0 / 0.3f64).ln()).exp();
        let (height, width) = ((area * ratio).sqrt().round() as usize, (area / ratio).sqrt().round() as usize);
        if height >= size || width >= size {
            continue;
        }
        let (top, left) = (random.below(size - height + 1), random.below(size - width + 1));
        return Some(Region { left, top, width, height });
    }
    None
}

/// Calls `fill_row` on each row of the rectangle, in every plane of `size` × `size` numbers.
pub fn fill(out: &mut [f32], size: usize, region: Region, mut fill_row: impl FnMut(&mut [f32])) {
    for first in rows(out.len() / (size * size), size, region) {
        fill_row(&mut out[first..first + region.width]);
    }
}

/// The indices at which the rows of the rectangle begin, for `planes` planes of `size` × `size` numbers.
fn rows(planes: usize, size: usize, region: Region) -> impl Iterator<Item = usize> {
    let rows = region.top..region.top + region.height;
    (0..planes).flat_map(move |plane| rows.clone().map(move |row| (plane * size + row) * size + region.left))
}

/// The noise of RandomErasing for a batch whose images a device normalises. [`write_noise`] writes the noise into the images on the
/// device.
#[derive(Debug, Default)]
pub struct Erased {
    /// For each row of each rectangle in each plane, an offset and the row's width. The number at index i of `values` belongs at
    /// index i + offset of the batch's numbers.
    rows: Vec<[i64; 2]>,
    /// The noise of all rows.
    values: Vec<f32>,
}

impl Erased {
    /// Draws the noise of a rectangle. The image with the rectangle begins at index `start` of the batch's numbers, and has
    /// `planes` planes of `size` × `size` numbers. The noise is the same as the noise of [`fill`] with [`noise`].
    pub fn add(&mut self, (start, planes): (usize, usize), size: usize, region: Region, random: &mut Random) {
        for first in rows(planes, size, region) {
            let before = self.values.len();
            self.values.resize(before + region.width, 0.0);
            noise(&mut self.values[before..], random);
            self.rows.push([(start + first) as i64 - before as i64, region.width as i64]);
        }
    }

    /// `rows` (row, 2) and `values` as tensors in host memory. None if nothing is erased.
    pub fn tensors(&self) -> Option<[Tensor; 2]> {
        let rows = || Tensor::from_slice(self.rows.as_flattened()).view([-1, 2]);
        (!self.values.is_empty()).then(|| [rows(), Tensor::from_slice(&self.values)])
    }
}

/// Writes the noise of [`Erased::tensors`] into normalised images (batch, channel, row, column) on the same device.
pub fn write_noise(images_bchw: &Tensor, [rows_r2, values]: [&Tensor; 2]) {
    let count = values.size()[0];
    let (starts, widths) = (rows_r2.select(1, 0), rows_r2.select(1, 1));
    // Because the count is given, the host need not wait until a GPU has computed the sum of the widths.
    let starts = starts.repeat_interleave_self_tensor(&widths, 0, count);
    let places = starts + Tensor::arange(count, (Kind::Int64, values.device()));
    let _ = images_bchw.view(-1).index_copy_(0, &places, values);
}

/// Fills `out` with numbers whose distribution is nearly standard normal, in about a nanosecond each. Each number is the sum of two
/// random entries of `NORMAL`. The variance is 1, the fourth moment is 2.996 instead of 3, and no number is beyond ± 5.2.
pub fn noise(out: &mut [f32], random: &mut Random) {
    let table = &*NORMAL;
    for pair in out.chunks_mut(2) {
        let bits = random.bits();
        for (i, number) in pair.iter_mut().enumerate() {
            let draw = |which: usize| table[(bits >> (24 * i + 12 * which)) as usize & 4095];
            *number = draw(0) + draw(1);
        }
    }
}

/// The quantiles of the normal distribution at the middles of 4096 intervals of equal probability. They are scaled to a variance of
/// 1/2, so that the sum of two random entries has a variance of 1.
static NORMAL: LazyLock<Vec<f32>> = LazyLock::new(|| {
    let raw: Vec<f64> = (0..4096).map(|i| quantile((f64::from(i) + 0.5) / 4096.0)).collect();
    let variance = raw.iter().map(|z| z * z).sum::<f64>() / raw.len() as f64;
    raw.iter().map(|z| (z / (2.0 * variance).sqrt()) as f32).collect()
});

/// The quantile of the normal distribution at the probability `p`. It is computed by Acklam's rational approximation, whose
/// relative error is below 1.2e-9.
fn quantile(p: f64) -> f64 {
    const CENTRE_NUMERATOR: [f64; 6] = [
        -3.969683028665376e1,
        2.209460984245205e2,
        -2.759285104469687e2,
        1.38357751867269e2,
        -3.066479806614716e1,
        2.506628277459239,
    ];
    const CENTRE_DENOMINATOR: [f64; 6] = [
        -5.447609879822406e1,
        1.615858368580409e2,
        -1.556989798598866e2,
        6.680131188771972e1,
        -1.328068155288572e1,
        1.0,
    ];
    const TAIL_NUMERATOR: [f64; 6] = [
        -7.784894002430293e-3,
        -3.223964580411365e-1,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ];
    const TAIL_DENOMINATOR: [f64; 5] =
        [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1.0];
    let polynomial = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    if p > 0.5 {
        return -quantile(1.0 - p);
    }
    if p < 0.02425 {
        let q = (-2.0 * p.ln()).sqrt();
        return polynomial(&TAIL_NUMERATOR, q) / polynomial(&TAIL_DENOMINATOR, q);
    }
    let q = p - 0.5;
    q * polynomial(&CENTRE_NUMERATOR, q * q) / polynomial(&CENTRE_DENOMINATOR, q * q)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_is_normal() {
        let mut random = Random::new(&[1]);
        let mut values = vec![0.0; 200_000];
        noise(&mut values, &mut random);
        let mean = |f: &dyn Fn(f64) -> f64| values.iter().map(|&v| f(v.into())).sum::<f64>() / values.len() as f64;
        assert!(mean(&|v| v).abs() < 0.01);
        assert!((mean(&|v| v * v) - 1.0).abs() < 0.01);
        assert!((mean(&|v| v.powi(4)) - 3.0).abs() < 0.1);
        // Of a normal distribution, 31.73 % is beyond one standard deviation, and 4.55 % beyond two.
        assert!((mean(&|v| f64::from(v.abs() > 1.0)) - 0.3173).abs() < 0.005);
        assert!((mean(&|v| f64::from(v.abs() > 2.0)) - 0.0455).abs() < 0.003);
        let correlation = values.windows(2).map(|w| f64::from(w[0] * w[1])).sum::<f64>() / values.len() as f64;
        assert!(correlation.abs() < 0.01);
    }
}
