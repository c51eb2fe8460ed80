//! Converts pixels to planes of the values that the network takes: (byte / 255 − mean) / standard deviation. Either the host
//! computes these values, or a device computes them from planes of bytes. Both give the same bits.

use super::pixels::{Pixel, Pixels};
use super::randaugment::{IDENTITY, Table};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// The normalisation of gray images or of colour images.
#[derive(Debug, Clone)]
pub enum Normalise {
    /// The normalised value of each of the 256 bytes. One plane is written, from the red of the pixels, because red, green and blue
    /// of a gray image are equal.
    Gray(Box<[f32; 256]>),
    /// The normalisation of red, green and blue. Three planes are written.
    Colour([Linear; 3]),
}

/// Turns a byte into byte · scale + bias.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    scale: f32,
    bias: f32,
}

impl Normalise {
    /// The normalisation by the mean and the standard deviation of each channel. One channel means gray images, and three channels
    /// mean colour images.
    pub fn new(mean: &[f64], std: &[f64]) -> Normalise {
        if let ([mean], [std]) = (mean, std) {
            return Normalise::Gray(Box::new(std::array::from_fn(|byte| ((byte as f64 / 255.0 - mean) / std) as f32)));
        }
        Normalise::Colour(std::array::from_fn(|c| Linear {
            scale: (1.0 / (255.0 * std[c])) as f32,
            bias: (-mean[c] / std[c]) as f32,
        }))
    }

    /// Writes the normalised planes of an image (channel, row, column). If `table` is given, it first replaces each byte. If
    /// `flipped`, each row is reversed.
    pub fn apply(&self, pixels: &Pixels, table: Option<&Table>, flipped: bool, out: &mut [f32]) {
        match self {
            Normalise::Gray(values) => {
                let [red_table, ..] = table.unwrap_or(&IDENTITY);
                let value = |pixel: &Pixel| values[red_table[pixel[0] as usize] as usize];
                out.iter_mut().zip(&pixels.rgbx).for_each(|(out, pixel)| *out = value(pixel));
            }
            Normalise::Colour(channels) => {
                let (red, rest) = out.split_at_mut(pixels.rgbx.len());
                let (green, blue) = rest.split_at_mut(pixels.rgbx.len());
                let planes = [red, green, blue];
                match table {
                    None => scaled(&pixels.rgbx, channels, planes),
                    Some(table) => looked_up(&pixels.rgbx, &values(channels, table), planes),
                }
            }
        }
        if flipped {
            mirror(out, pixels.width);
        }
    }

    /// The fp32 numbers that [`normalised`] takes. For gray images they are the value of each byte, with the shape (256). For
    /// colour images they are the scale and the bias of each channel, with the shape (2, 3, 1, 1).
    pub fn numbers(&self) -> Tensor {
        match self {
            Normalise::Gray(values) => Tensor::from_slice(&values[..]),
            Normalise::Colour(channels) => {
                let both = [channels.map(|channel| channel.scale), channels.map(|channel| channel.bias)];
                Tensor::from_slice(both.as_flattened()).view([2, 3, 1, 1])
            }
        }
    }

    /// Writes the three normalised planes of a colour image (channel, row, column) with `side` rows and columns. Below and to the
    /// right of the image, the planes are 0. If `flipped`, each row of the image is reversed. `planes` is scratch memory.
    pub fn apply_padded(&self, pixels: &Pixels, flipped: bool, side: usize, planes: &mut Vec<f32>, out: &mut [f32]) {
        let plane = pixels.width * pixels.height;
        planes.resize(3 * plane, 0.0);
        self.apply(pixels, None, flipped, planes);
        out.fill(0.0);
        for (padded, own) in out.chunks_exact_mut(side * side).zip(planes.chunks_exact(plane)) {
            for (row, own) in padded.chunks_exact_mut(side).zip(own.chunks_exact(pixels.width)) {
                row[..pixels.width].copy_from_slice(own);
            }
        }
    }
}

/// Writes the planes of an image as bytes (channel, row, column). From these bytes, [`normalised`] computes the values of
/// [`Normalise::apply`]. A gray image has one plane. If `table` is given, it first replaces each byte.
pub fn byte_planes(pixels: &Pixels, table: Option<&Table>, flipped: bool, out: &mut [u8]) {
    for (channel, plane) in out.chunks_exact_mut(pixels.rgbx.len()).enumerate() {
        let bytes = plane.iter_mut().zip(&pixels.rgbx);
        match table {
            None => bytes.for_each(|(out, pixel)| *out = pixel[channel]),
            Some(table) => bytes.for_each(|(out, pixel)| *out = table[channel][usize::from(pixel[channel])]),
        }
    }
    if flipped {
        out.chunks_exact_mut(pixels.width).for_each(<[u8]>::reverse);
    }
}

/// Normalises bytes (batch, channel, row, column) on their device. `numbers` is [`Normalise::numbers`] on the same device. The
/// result has the same bits as [`Normalise::apply`], because both round the product before they add the bias.
pub fn normalised(bytes_bchw: &Tensor, numbers: &Tensor) -> Tensor {
    if numbers.dim() == 1 {
        let values = numbers.index_select(0, &bytes_bchw.to_kind(Kind::Int).view(-1));
        return values.view_as(bytes_bchw);
    }
    (bytes_bchw * numbers.get(0)).g_add_(&numbers.get(1))
}

/// For each channel and each byte, the normalised value if `table` is applied to the byte first.
fn values(channels: &[Linear; 3], table: &Table) -> [[f32; 256]; 3] {
    std::array::from_fn(|c| {
        let Linear { scale, bias } = channels[c];
        table[c].map(|byte| f32::from(byte) * scale + bias)
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn scaled(pixels: &[Pixel], channels: &[Linear; 3], [red, green, blue]: [&mut [f32]; 3]) {
    let [r, g, b] = *channels;
    for (((pixel, red), green), blue) in pixels.iter().zip(red).zip(green).zip(blue) {
        let pixel = u32::from_le_bytes(*pixel);
        *red = (pixel & 255) as f32 * r.scale + r.bias;
        *green = (pixel >> 8 & 255) as f32 * g.scale + g.bias;
        *blue = (pixel >> 16 & 255) as f32 * b.scale + b.bias;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn looked_up(pixels: &[Pixel], tables: &[[f32; 256]; 3], [red, green, blue]: [&mut [f32]; 3]) {
    for (((pixel, red), green), blue) in pixels.iter().zip(red).zip(green).zip(blue) {
        *red = tables[0][pixel[0] as usize];
        *green = tables[1][pixel[1] as usize];
        *blue = tables[2][pixel[2] as usize];
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn mirror(out: &mut [f32], width: usize) {
    out.chunks_exact_mut(width).for_each(<[f32]>::reverse);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::weights::{bytes_mut, floats_mut};

    fn bits(numbers: &[f32]) -> Vec<u32> {
        numbers.iter().map(|number| number.to_bits()).collect()
    }

    #[test]
    fn a_device_normalises_every_byte_to_the_same_bits() {
        let mut random = Random::new(&[1]);
        let side = 16;
        // The red of the 256 pixels takes every value of a byte.
        let rgbx = (0..=255u8).map(|byte| [byte, byte ^ 0x5a, 255 - byte, 255]).collect();
        let pixels = Pixels { width: side, height: side, rgbx };
        let inverted: Table = IDENTITY.map(|channel| channel.map(|byte| 255 - byte / 2));
        for draw in 0..200 {
            let channels = if draw % 2 == 0 { 3 } else { 1 };
            let mut of_channels = |low, high| (0..channels).map(|_| random.between(low, high)).collect::<Vec<f64>>();
            let normalise = Normalise::new(&of_channels(0.0, 1.0), &of_channels(0.05, 0.9));
            let (table, flipped) = ((draw % 3 == 0).then_some(&inverted), draw % 4 < 2);
            let shape = [1, channels, side as i64, side as i64];
            let mut expected = Tensor::zeros(shape, (Kind::Float, tch::Device::Cpu));
            normalise.apply(&pixels, table, flipped, floats_mut(&mut expected));
            let mut bytes_bchw = Tensor::zeros(shape, (Kind::Uint8, tch::Device::Cpu));
            byte_planes(&pixels, table, flipped, bytes_mut(&mut bytes_bchw));
            let mut there = normalised(&bytes_bchw, &normalise.numbers());
            assert_eq!(there.size(), shape);
            assert!(bits(floats_mut(&mut there)) == bits(floats_mut(&mut expected)), "{normalise:?}");
        }
    }
}
