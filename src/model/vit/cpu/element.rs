//! The two number types that activations have in the CPU kernels.

use tch::Kind;

/// A number type of activations in memory. The kernels compute in fp32.
pub trait Element: Copy + Send + Sync + 'static {
    const KIND: Kind;
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
}

/// bf16: the upper half of an fp32 number.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(u16);

impl Element for Bf16 {
    const KIND: Kind = Kind::BFloat16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    /// Rounds to the nearest number, ties to even. NaN stays NaN.
    #[inline(always)]
    fn from_f32(value: f32) -> Bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        Bf16(if value.is_nan() { 0x7fc0 } else { rounded as u16 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    #[test]
    fn bf16_rounds_as_libtorch_does() {
        let values: Vec<f32> = (0..10_000).map(|i| (i as f32 * 0.731).sin() * 10f32.powi(i % 60 - 30)).collect();
        let values = [values, vec![0.0, -0.0, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE / 4.0]].concat();
        let theirs = Tensor::from_slice(&values).to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let ours: Vec<f32> = values.iter().map(|&v| Bf16::from_f32(v).to_f32()).collect();
        assert_eq!(Tensor::from_slice(&ours), theirs);
        assert!(Bf16::from_f32(f32::NAN).to_f32().is_nan());
    }
}
