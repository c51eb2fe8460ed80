//! Tables for operations that map each byte to a new byte. Some of the tables are computed from the histogram of the image.

use super::enhance::blend;
use crate::data::image::pixels::Pixel;

/// For each channel (red, green, blue), the new value of each possible byte.
pub type Table = [[u8; 256]; 3];

/// For each channel, the number of pixels with each value.
pub type Histogram = [[u32; 256]; 3];

/// The table that leaves every byte unchanged.
pub static IDENTITY: Table = {
    let mut table = [[0; 256]; 3];
    let mut value = 0;
    while value < 256 {
        table[0][value] = value as u8;
        table[1][value] = value as u8;
        table[2][value] = value as u8;
        value += 1;
    }
    table
};

/// The table that maps the bytes of all channels by the same function.
pub fn uniform(new_value: impl Fn(u32) -> u32) -> Table {
    [std::array::from_fn(|value| new_value(value as u32) as u8); 3]
}

/// Changes `table` so that it does two steps at once: first the old `table`, then `after`.
pub fn compose(table: &mut Table, after: &Table) {
    for (table, after) in table.iter_mut().zip(after) {
        table.iter_mut().for_each(|value| *value = after[*value as usize]);
    }
}

/// Counts how many pixels have each value, for each channel.
pub fn histogram(pixels: &[Pixel]) -> Histogram {
    // Neighbouring pixels often have the same value. If both incremented the same number, the second increment would wait for the
    // first. So even and odd pixels are counted in two histograms.
    let mut counts = [[[0u32; 256]; 3]; 2];
    let mut count = |which: usize, pixel: &Pixel| {
        for (counts, &value) in counts[which].iter_mut().zip(pixel) {
            counts[value as usize] += 1;
        }
    };
    for pair in pixels.chunks(2) {
        pair.iter().enumerate().for_each(|(which, pixel)| count(which, pixel));
    }
    let [mut sum, other] = counts;
    sum.as_flattened_mut().iter_mut().zip(other.as_flattened()).for_each(|(sum, other)| *sum += other);
    sum
}

/// The histogram of an image after `table` is applied. `histogram` is the histogram before `table` is applied.
pub fn mapped(histogram: &Histogram, table: &Table) -> Histogram {
    let mut result = [[0; 256]; 3];
    for channel in 0..3 {
        for value in 0..256 {
            result[channel][table[channel][value] as usize] += histogram[channel][value];
        }
    }
    result
}

/// Pillow's `ImageOps.autocontrast` without a cutoff: the values of each channel are stretched linearly to 0…255.
pub fn auto_contrast(histogram: &Histogram) -> Table {
    std::array::from_fn(|channel| {
        let counts = &histogram[channel];
        let low = counts.iter().position(|&n| n > 0).unwrap_or(0);
        let high = counts.iter().rposition(|&n| n > 0).unwrap_or(0);
        if high <= low {
            return IDENTITY[channel];
        }
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        // The conversion truncates the number and clips it to 0…255.
        std::array::from_fn(|value| (value as f64 * scale + offset) as u8)
    })
}

/// Pillow's `ImageOps.equalize`, which flattens the histogram of each channel.
pub fn equalize(histogram: &Histogram) -> Table {
    std::array::from_fn(|channel| {
        let counts = &histogram[channel];
        let last = counts.iter().rfind(|&&n| n > 0).copied().unwrap_or(0);
        let step = (counts.iter().sum::<u32>() - last) / 255;
        if step == 0 {
            return IDENTITY[channel];
        }
        let mut sum = step / 2;
        std::array::from_fn(|value| {
            let level = (sum / step).min(255);
            sum += counts[value];
            level as u8
        })
    })
}

/// Pillow's `Image.blend` of a constant with each byte. The factor 0 gives the constant, and the factor 1 gives the byte.
pub fn blend_with(constant: u8, factor: f64) -> Table {
    uniform(|value| blend(constant, value as u8, factor as f32).into())
}
