//! Counter-based randomness: the key alone decides all numbers of a generator. So the augmentation and the drop-path masks of a
//! sample are the same for any number of workers and ranks, and a resumed run needs no saved state of a generator.
//!
//! The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), seeded with the
//! mixed key.

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

/// Hashes the parts of a key, such as (seed, epoch, sample), into one number.
pub fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9E37_79B9_7F4A_7C15, |state, &part| mix(state.wrapping_add(mix(part ^ 0xD1B5_4A32_D192_ED03))))
}

/// Makes a part of a key from a text, such as the name of a phase (FNV-1a).
pub fn key_of_text(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// The mixing function of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    /// Starts the stream of a key.
    pub fn new(parts: &[u64]) -> Self {
        Random { state: key(parts) }
    }

    /// Draws 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.state)
    }

    /// Draws uniformly from [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Draws uniformly from [low, high).
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Draws a whole number uniformly from 0..bound by multiplication (Lemire). `bound` must be positive. If it is below 2^32, the
    /// bias is below 2^-32.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.bits()) * bound as u128) >> 64) as usize
    }

    /// Draws from the standard normal distribution (Box–Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Draws from Gamma(shape, 1) (Marsaglia and Tsang, 2000).
    fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = self.uniform().powf(1.0 / shape);
            return boost * self.gamma(shape + 1.0);
        }
        let d = shape - 1.0 / 3.0;
        loop {
            let x = self.normal();
            let v = (1.0 + x / (9.0 * d).sqrt()).powi(3);
            if v > 0.0 && (1.0 - self.uniform()).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    /// Draws from Beta(a, a), the distribution of the mixing ratio of Mixup and CutMix.
    pub fn beta(&mut self, a: f64) -> f64 {
        let (x, y) = (self.gamma(a), self.gamma(a));
        if x + y > 0.0 { x / (x + y) } else { 0.5 }
    }

    /// Shuffles in place (Fisher–Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_the_distributions_are_right() {
        let mut random = Random::new(&[1, 2]);
        let n = 200_000;
        let mean = |f: &mut dyn FnMut() -> f64| (0..n).map(|_| f()).sum::<f64>() / n as f64;
        assert!((mean(&mut || random.uniform()) - 0.5).abs() < 5e-3);
        assert!(mean(&mut || random.normal()).abs() < 1e-2);
        assert!((mean(&mut || random.normal().powi(2)) - 1.0).abs() < 2e-2);
        assert!((mean(&mut || random.beta(0.8)) - 0.5).abs() < 5e-3);
        // Var Beta(a, a) = 1 / (4 (2a + 1)).
        assert!((mean(&mut || (random.beta(0.8) - 0.5).powi(2)) - 1.0 / 10.4).abs() < 2e-3);
    }

    #[test]
    fn keys_that_differ_in_any_part_give_unrelated_streams() {
        let keys = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0]];
        let mut firsts: Vec<u64> = keys.iter().map(|k| Random::new(k).bits()).collect();
        firsts.sort_unstable();
        firsts.dedup();
        assert_eq!(firsts.len(), keys.len());
    }
}
