//! CPU kernels for LayerNorm, GELU, softmax and the layouts of attention, forward and backward. A kernel reads its inputs from
//! memory once and writes its output once. libtorch needs several passes for a scaled softmax, and for LayerNorm's gradient with
//! the residual added. Activations are fp32 or bf16. All sums, statistics and functions are computed in fp32.
//!
//! The loops are plain Rust. The compiler vectorises them for several instruction sets. The program chooses the best instruction
//! set at run time. The loops run on libtorch's own threads ([`crate::model::threads`]). The results do not depend on the number of
//! threads.

mod element;
mod gelu;
mod heads;
mod math;
mod norm;
mod softmax;

pub use gelu::{gelu, gelu_backward};
pub use heads::{Layout, join, split};
pub use norm::{Statistics, norm, norm_backward};
pub use softmax::{softmax_, softmax_backward_};

use element::Element;
use tch::{Device, Kind, Tensor};

/// Whether the kernels support this tensor.
pub fn is_supported(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && matches!(tensor.kind(), Kind::Float | Kind::BFloat16) && tensor.is_contiguous()
}

/// Calls a generic function for the number type of `$tensor`.
macro_rules! by_kind {
    ($tensor:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $tensor.kind() {
            Kind::BFloat16 => $function::<Bf16>($($argument),*),
            _ => $function::<f32>($($argument),*),
        }
    };
}
use by_kind;

/// The numbers of a contiguous CPU tensor.
fn numbers<T: Element>(tensor: &Tensor) -> &[T] {
    assert!(is_supported(tensor) && tensor.kind() == T::KIND, "expected {:?}, got {tensor:?}", T::KIND);
    // SAFETY: `numel` values of this kind are contiguous in host memory, and the borrowed tensor keeps them alive.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// The mutable numbers of a contiguous CPU tensor.
fn numbers_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    assert!(is_supported(tensor) && tensor.kind() == T::KIND, "expected {:?}, got {tensor:?}", T::KIND);
    // SAFETY: as in `numbers`. By the exclusive borrow the caller promises that no other view of the tensor is in use.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A wave of numbers between −`largest` and `largest`.
    pub fn wave(shape: &[i64], largest: f64, kind: Kind) -> Tensor {
        let count: i64 = shape.iter().product();
        let k = Tensor::arange(count, (Kind::Double, Device::Cpu));
        ((k * 0.37 + 1.0).sin() * largest).view(shape).to_kind(kind)
    }

    /// Asserts that the tensors are equal up to the rounding of `kind`, relative to the largest number.
    #[track_caller]
    pub fn assert_close(ours: &Tensor, expected: &Tensor, kind: Kind) {
        let (ours, expected) = (ours.to_kind(Kind::Double), expected.to_kind(Kind::Double));
        let difference = (ours - &expected).abs().max().double_value(&[]) / expected.abs().max().double_value(&[]);
        let limit = if kind == Kind::Float { 1e-5 } else { 6e-3 };
        assert!(difference < limit, "{kind:?}: {difference:e}");
    }
}
