//! The operations Color and Sharpness, and the mean gray value for the operation Contrast (Pillow: `ImageEnhance.py`, `Blend.c`,
//! `Filter.c`). Color blends an image with a gray copy, and Sharpness blends an image with a smoothed copy.

use crate::data::image::pixels::Pixel;
use multiversion::multiversion;

/// Clips a number to 0…255 and truncates it, as `value as u8` does. The compiler vectorises this form, but not `value as u8`. The
/// number must be finite.
#[inline(always)]
pub fn truncated(value: f32) -> u8 {
    // SAFETY: a finite number clipped to 0…255 fits into an i32.
    unsafe { value.clamp(0.0, 255.0).to_int_unchecked::<i32>() as u8 }
}

/// Blends two bytes as Pillow's `Image.blend` does: the result is truncated, not rounded. The factor 0 gives `from`, and the factor
/// 1 gives `to`. A factor outside of 0…1 extrapolates, and the result is clipped to 0…255.
#[inline(always)]
pub fn blend(from: u8, to: u8, factor: f32) -> u8 {
    truncated(f32::from(from) + factor * (f32::from(to) - f32::from(from)))
}

/// The gray value of a pixel, by Pillow's conversion to mode `L`.
#[inline(always)]
fn gray([r, g, b, _]: Pixel) -> u8 {
    ((u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16) as u8
}

/// The mean gray value of an image, rounded as in Pillow's `ImageEnhance.Contrast`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub fn mean_gray(pixels: &[Pixel]) -> u8 {
    let sum: u64 =
        pixels.chunks(1024).map(|part| u64::from(part.iter().map(|&p| u32::from(gray(p))).sum::<u32>())).sum();
    (sum as f64 / pixels.len() as f64 + 0.5) as u8
}

/// Blends each pixel with its gray value: the factor 0 gives gray, the factor 1 changes nothing.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub fn color(pixels: &mut [Pixel], factor: f32) {
    for pixel in pixels {
        let gray = gray(*pixel);
        *pixel = pixel.map(|value| blend(gray, value, factor));
    }
}

/// Blends each pixel with the smoothed image: the factor 0 gives the smoothed image, the factor 1 changes nothing. The image is
/// smoothed by the kernel (1 1 1, 1 5 1, 1 1 1) / 13. The border pixels of the image do not change.
pub fn sharpness(from: &[Pixel], size: usize, factor: f32, to: &mut [Pixel]) {
    to.copy_from_slice(from);
    for row in 1..size - 1 {
        let line = |row: usize| from[row * size..(row + 1) * size].as_flattened();
        let out = to[row * size..(row + 1) * size].as_flattened_mut();
        sharpen_row([line(row - 1), line(row), line(row + 1)], factor, out);
    }
}

/// Writes one row except its first and last pixel. A pixel has four bytes. So the bytes `i` and `i + 4` are the same channel of
/// neighbouring pixels.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn sharpen_row([above, own, below]: [&[u8]; 3], factor: f32, out: &mut [u8]) {
    let inner = out.len() - 8;
    let (a, o, b) = (&above[..inner + 8], &own[..inner + 8], &below[..inner + 8]);
    let out = &mut out[4..inner + 4];
    for i in 0..inner {
        let column = |i: usize| u32::from(a[i]) + u32::from(o[i]) + u32::from(b[i]);
        let sum = column(i) + column(i + 4) + column(i + 8) + 4 * u32::from(o[i + 4]);
        // Pillow rounds sum / 13 to the nearest number.
        let smooth = ((2 * sum + 13) / 26) as u8;
        out[i] = blend(smooth, o[i + 4], factor);
    }
}
