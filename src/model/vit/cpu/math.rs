//! Functions that the compiler can vectorise: they use no lookup tables, and their conditions only choose between two values.

use super::element::Element;

/// eˣ for x ≤ 88, within two units in the last place; 0 below −87.3.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // eˣ = 2ⁿ · eʳ with |r| ≤ ln 2 / 2. n · ln 2 is subtracted in two parts, so that r loses no precision (Cody and Waite).
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 · 2²³ rounds x / ln 2 to the nearest whole number n, and leaves n in the low bits of the sum.
    const MAGIC: f32 = 12_582_912.0;
    // `f32::max` would turn NaN into a number.
    let bounded = if x < -87.3 { -87.3 } else { x };
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, bounded));
    // The polynomial of Cephes' expf.
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let two_n = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { p * two_n }
}

/// The cumulative distribution and the density of the standard normal distribution at x, with an absolute error below 2e-7
/// (Abramowitz and Stegun 7.1.26).
#[inline(always)]
pub fn normal(x: f32) -> (f32, f32) {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / z.mul_add(0.327_591_1, 1.0);
    let p = 1.061_405_4f32;
    let p = p.mul_add(t, -1.453_152);
    let p = p.mul_add(t, 1.421_413_7);
    let p = p.mul_add(t, -0.284_496_74);
    let p = p.mul_add(t, 0.254_829_6);
    let bell = exp(-z * z);
    let upper = 0.5 * p * t * bell;
    let cumulative = if x < 0.0 { upper } else { 1.0 - upper };
    (cumulative, 0.398_942_3 * bell)
}

/// The number of independent partial sums (lanes) of a sum, which let the compiler vectorise it. The order of the additions is the
/// same on every machine.
pub const LANES: usize = 16;

/// Σ aᵢ · bᵢ.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = a.mul_add(*b, *lane);
        }
    }
    a_rest.iter().zip(b_rest).fold(across(lanes, |a, b| a + b), |sum, (a, b)| sum + a * b)
}

/// Σ f(aᵢ).
#[inline(always)]
pub fn sum(a: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, rest) = a.as_chunks::<LANES>();
    for a in a {
        for (lane, a) in lanes.iter_mut().zip(a) {
            *lane += f(*a);
        }
    }
    rest.iter().fold(across(lanes, |a, b| a + b), |sum, a| sum + f(*a))
}

/// Combines the lanes into one number. Repeatedly combines the first half of the lanes with the second half, lane by lane.
#[inline(always)]
pub fn across(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = join(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Converts the activations `from` to fp32, and writes them to `row`.
#[inline(always)]
pub fn load<T: Element>(row: &mut [f32], from: &[T]) {
    for (value, from) in row.iter_mut().zip(from) {
        *value = from.to_f32();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_the_normal_distribution_are_accurate() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 3e-7, "exp({x})");
        }
        assert_eq!((exp(-1000.0), exp(f32::NEG_INFINITY), exp(0.0)), (0.0, 0.0, 1.0));
        assert!(exp(f32::NAN).is_nan());
        // Φ(1.96) and φ(1.96).
        let (cumulative, density) = normal(1.96);
        assert!((cumulative - 0.975_002_1).abs() < 3e-7 && (density - 0.058_440_94).abs() < 3e-7);
        assert!((normal(-1.96).0 - 0.024_997_9).abs() < 3e-7);
    }
}
