//! Photometric distortion like mmsegmentation 1.2.2's `PhotoMetricDistortion`. Hue and saturation are changed in OpenCV's 8-bit
//! HSV, in which the hue has 180 values.

use super::pixels::Pixel;
use crate::random::Random;

/// The largest number that a change of brightness adds to the colour bytes or subtracts from them.
const MAX_BRIGHTNESS_MOVE: f64 = 32.0;
/// The range of the factors that change contrast and saturation.
const FACTORS: [f64; 2] = [0.5, 1.5];
/// The hue is shifted by a whole number from −`MAX_HUE_MOVE` to `MAX_HUE_MOVE` − 1.
const MAX_HUE_MOVE: usize = 18;
/// The number of values of the hue: 0 to 179.
const HUE_VALUES: i32 = 180;

/// Changes brightness, contrast, saturation and hue, each with a probability of one half. The contrast changes either before
/// saturation and hue or after them, also with a probability of one half.
pub fn distort(pixels: &mut [Pixel], random: &mut Random) {
    let coin = |random: &mut Random| random.uniform() < 0.5;
    if coin(random) {
        let shift = random.between(-MAX_BRIGHTNESS_MOVE, MAX_BRIGHTNESS_MOVE);
        scale_and_shift(pixels, 1.0, shift);
    }
    let is_contrast_first = coin(random);
    let contrast = coin(random).then(|| random.between(FACTORS[0], FACTORS[1]));
    let contrast_if = |pixels: &mut [Pixel], now: bool| {
        contrast.iter().filter(|_| now).for_each(|&factor| scale_and_shift(pixels, factor, 0.0));
    };
    contrast_if(pixels, is_contrast_first);
    if coin(random) {
        let factor = random.between(FACTORS[0], FACTORS[1]) as f32;
        in_hsv(pixels, |[h, s, v]| [h, byte(f32::from(s) * factor), v]);
    }
    if coin(random) {
        let shift = random.below(2 * MAX_HUE_MOVE) as i32 - MAX_HUE_MOVE as i32;
        in_hsv(pixels, |[h, s, v]| [(i32::from(h) + shift).rem_euclid(HUE_VALUES) as u8, s, v]);
    }
    contrast_if(pixels, !is_contrast_first);
}

/// Clips a number to 0…255 and drops its fraction.
fn byte(value: f32) -> u8 {
    value.clamp(0.0, 255.0) as u8
}

/// Replaces each colour byte with `factor` · byte + `shift`, clipped to 0…255.
fn scale_and_shift(pixels: &mut [Pixel], factor: f64, shift: f64) {
    let table: [u8; 256] = std::array::from_fn(|value| byte(value as f32 * factor as f32 + shift as f32));
    pixels.iter_mut().for_each(|pixel| pixel[..3].iter_mut().for_each(|value| *value = table[usize::from(*value)]));
}

/// Applies `change` to the (hue, saturation, value) of each pixel.
fn in_hsv(pixels: &mut [Pixel], change: impl Fn([u8; 3]) -> [u8; 3]) {
    for pixel in pixels {
        let [r, g, b, _] = *pixel;
        pixel[..3].copy_from_slice(&to_rgb(change(to_hsv([r, g, b]))));
    }
}

/// Converts bytes as OpenCV's `COLOR_RGB2HSV` does, in fixed-point numbers with 12 fraction bits.
fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    const BITS: i32 = 12;
    let fixed = |numerator: i32, denominator: i32| {
        (f64::from(numerator << BITS) / f64::from(denominator)).round_ties_even() as i32
    };
    let (r, g, b) = (i32::from(r), i32::from(g), i32::from(b));
    let v = r.max(g).max(b);
    let range = v - r.min(g).min(b);
    if range == 0 {
        return [0, 0, v as u8];
    }
    let s = (range * fixed(255, v) + (1 << (BITS - 1))) >> BITS;
    let sixths = if v == r {
        g - b
    } else if v == g {
        b - r + 2 * range
    } else {
        r - g + 4 * range
    };
    let h = (sixths * fixed(HUE_VALUES, 6 * range) + (1 << (BITS - 1))) >> BITS;
    [(if h < 0 { h + HUE_VALUES } else { h }) as u8, s as u8, v as u8]
}

/// Converts bytes as OpenCV's `COLOR_HSV2RGB` does.
fn to_rgb([h, s, v]: [u8; 3]) -> [u8; 3] {
    let sixths = f32::from(h) * (6.0 / HUE_VALUES as f32);
    let (s, v) = (f32::from(s) / 255.0, f32::from(v) / 255.0);
    let (sector, part) = (sixths.floor() as usize % 6, sixths.fract());
    let (p, q, t) = (v * (1.0 - s), v * (1.0 - s * part), v * (1.0 - s * (1.0 - part)));
    let rgb = [[v, t, p], [q, v, p], [p, v, t], [p, q, v], [t, p, v], [v, p, q]][sector];
    rgb.map(|level| (level * 255.0).round_ties_even() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hsv_of_bytes_is_opencvs() {
        // The expected HSV values are from cv2 4.11. The conversion back must give each input byte within 1.
        for (rgb, hsv) in [
            ([255, 0, 0], [0, 255, 255]),
            ([0, 255, 0], [60, 255, 255]),
            ([0, 0, 255], [120, 255, 255]),
            ([10, 20, 30], [105, 170, 30]),
            ([200, 100, 50], [10, 191, 200]),
            ([7, 7, 7], [0, 0, 7]),
        ] {
            assert_eq!(to_hsv(rgb), hsv);
            let back = to_rgb(hsv);
            assert!(rgb.iter().zip(back).all(|(&a, b)| a.abs_diff(b) <= 1), "{rgb:?} and {back:?}");
        }
    }

    #[test]
    fn distortion_is_a_function_of_its_key_and_changes_most_images() {
        let image: Vec<Pixel> = (0..64u8).map(|i| [4 * i, 255 - 3 * i, 100, 255]).collect();
        let distorted = |key: u64| {
            let mut pixels = image.clone();
            distort(&mut pixels, &mut Random::new(&[key]));
            pixels
        };
        let changed = (0..64).filter(|&key| distorted(key) != image).count();
        assert!((50..64).contains(&changed), "15 of 16 on average: {changed}");
        assert_eq!(distorted(3), distorted(3));
    }
}
