//! The exact GELU, x · Φ(x), not its approximation by tanh.

use super::element::{Bf16, Element};
use super::math::normal;
use super::{by_kind, numbers, numbers_mut};
use crate::model::threads;
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Computes gelu(x).
pub fn gelu(x: &Tensor) -> Tensor {
    let mut out = x.empty_like();
    by_kind!(x, forward(x, &mut out));
    out
}

/// Turns the gradient of gelu(x) into the gradient of x, in place.
pub fn gelu_backward(gradient: &mut Tensor, x: &Tensor) {
    by_kind!(x, backward(gradient, x));
}

fn forward<T: Element>(x: &Tensor, out: &mut Tensor) {
    let x = numbers::<T>(x);
    let each = threads::rows_each(x.len(), x.len(), 64);
    let parts = x.chunks(each).zip(numbers_mut::<T>(out).chunks_mut(each));
    threads::each(parts, |(x, out)| forward_part(x, out));
}

fn backward<T: Element>(gradient: &mut Tensor, x: &Tensor) {
    let x = numbers::<T>(x);
    let each = threads::rows_each(x.len(), x.len(), 64);
    let parts = x.chunks(each).zip(numbers_mut::<T>(gradient).chunks_mut(each));
    threads::each(parts, |(x, gradient)| backward_part(x, gradient));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn forward_part<T: Element>(x: &[T], out: &mut [T]) {
    for (x, out) in x.iter().zip(out) {
        let x = x.to_f32();
        *out = T::from_f32(x * normal(x).0);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn backward_part<T: Element>(x: &[T], gradient: &mut [T]) {
    for (x, gradient) in x.iter().zip(gradient) {
        let x = x.to_f32();
        let (cumulative, density) = normal(x);
        *gradient = T::from_f32(gradient.to_f32() * x.mul_add(density, cumulative));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, wave};
    use super::*;

    #[test]
    fn gelu_and_its_gradient_equal_libtorchs() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (x, dy) = (wave(&[37, 1000], 3.0, kind), wave(&[37, 1000], 1.0, kind));
            assert_close(&gelu(&x), &x.gelu("none"), kind);
            let mut dx = dy.copy();
            gelu_backward(&mut dx, &x);
            assert_close(&dx, &x.gelu_backward(&dy, "none"), kind);
        }
    }
}
