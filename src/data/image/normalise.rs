//! Bytes to the numbers that the network takes: (byte / 255 − mean) / deviation, in planes.

use super::pixels::{Pixel, Pixels};
use super::randaugment::Table;
use multiversion::multiversion;

/// Per channel, the normalised value of each byte.
#[derive(Debug, Clone)]
pub struct Normalise {
    channels: [Channel; 3],
}

#[derive(Debug, Clone, Copy)]
struct Channel {
    scale: f32,
    bias: f32,
}

impl Normalise {
    pub fn new(mean: &[f64], std: &[f64]) -> Normalise {
        // A config for gray images has one value; its images never come this way.
        let at = |c: usize| c.min(mean.len() - 1);
        let of =
            |c: usize| Channel { scale: (1.0 / (255.0 * std[at(c)])) as f32, bias: (-mean[at(c)] / std[at(c)]) as f32 };
        Normalise { channels: std::array::from_fn(of) }
    }

    /// Writes planes (channel, row, column) of an image, after `table` and mirrored where asked for.
    pub fn apply(&self, pixels: &Pixels, table: Option<&Table>, flipped: bool, out: &mut [f32]) {
        let plane = pixels.rgbx.len();
        let (red, rest) = out.split_at_mut(plane);
        let (green, blue) = rest.split_at_mut(plane);
        let planes = [red, green, blue];
        match table {
            None => scaled(&pixels.rgbx, &self.channels, planes),
            Some(table) => looked_up(&pixels.rgbx, &self.tables(table), planes),
        }
        if flipped {
            mirror(out, pixels.width);
        }
    }

    fn tables(&self, table: &Table) -> [[f32; 256]; 3] {
        std::array::from_fn(|c| {
            let Channel { scale, bias } = self.channels[c];
            table[c].map(|byte| f32::from(byte) * scale + bias)
        })
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn scaled(pixels: &[Pixel], channels: &[Channel; 3], [red, green, blue]: [&mut [f32]; 3]) {
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
