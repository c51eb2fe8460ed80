//! LayerNorm with fp32 statistics. Its backward pass also adds the gradient of the residual connection.

use super::element::{Bf16, Element};
use super::math::{dot, load, sum};
use super::{by_kind, numbers, numbers_mut};
use crate::model::threads;
use crate::weights::{floats, floats_mut};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// The mean and 1 / standard deviation of each row of activations.
pub type Statistics = Vec<[f32; 2]>;

/// Computes (x − mean) / deviation · weight + bias over the last dimension. `weight` and `bias` are fp32.
pub fn norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> (Tensor, Statistics) {
    let mut out = x.empty_like();
    let statistics = by_kind!(x, forward(x, &mut out, floats(weight), floats(bias), eps as f32));
    (out, statistics)
}

/// Computes the gradient of x from the gradient of norm(x), and adds it to `residual`, the gradient that reaches x along the
/// residual connection. If `sums` is given, adds the gradients of weight and bias to these two tensors.
pub fn norm_backward(
    residual: &mut Tensor,
    gradient: &Tensor,
    x: &Tensor,
    statistics: &Statistics,
    weight: &Tensor,
    sums: Option<[&mut Tensor; 2]>,
) {
    let sums = sums.map(|sums| sums.map(floats_mut));
    by_kind!(x, backward(residual, gradient, x, statistics, floats(weight), sums));
}

fn forward<T: Element>(x: &Tensor, out: &mut Tensor, weight: &[f32], bias: &[f32], eps: f32) -> Statistics {
    let (x, out, d) = (numbers::<T>(x), numbers_mut::<T>(out), weight.len());
    let rows = x.len() / d;
    let mut statistics = vec![[0.0; 2]; rows];
    let each = threads::rows_each(rows, x.len(), 1);
    let parts = x.chunks(each * d).zip(out.chunks_mut(each * d)).zip(statistics.chunks_mut(each));
    threads::each(parts, |((x, out), statistics)| forward_rows(x, out, statistics, weight, bias, eps));
    statistics
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn forward_rows<T: Element>(
    x: &[T],
    out: &mut [T],
    statistics: &mut [[f32; 2]],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
) {
    let d = weight.len();
    let mut row = vec![0.0; d];
    for ((x, out), statistics) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)).zip(statistics) {
        load(&mut row, x);
        let mean = sum(&row, |value| value) / d as f32;
        let variance = sum(&row, |value| (value - mean) * (value - mean)) / d as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        *statistics = [mean, scale];
        for (((out, value), weight), bias) in out.iter_mut().zip(&row).zip(weight).zip(bias) {
            *out = T::from_f32(((value - mean) * scale).mul_add(*weight, *bias));
        }
    }
}

/// The number of rows whose gradients of weight and bias are summed in one partial sum. It is fixed, so that the result does not
/// depend on the number of threads.
const ROWS: usize = 256;

fn backward<T: Element>(
    residual: &mut Tensor,
    gradient: &Tensor,
    x: &Tensor,
    statistics: &Statistics,
    weight: &[f32],
    sums: Option<[&mut [f32]; 2]>,
) {
    let (x, dy, dx, d) = (numbers::<T>(x), numbers::<T>(gradient), numbers_mut::<T>(residual), weight.len());
    let rows = x.len() / d;
    let mut partial = vec![0.0; if sums.is_some() { rows.div_ceil(ROWS) * 2 * d } else { 0 }];
    let each = threads::rows_each(rows, x.len(), ROWS);
    let mut partials: Vec<&mut [f32]> = partial.chunks_mut(each / ROWS * 2 * d).collect();
    partials.resize_with(rows.div_ceil(each), Default::default);
    let parts = x.chunks(each * d).zip(dy.chunks(each * d)).zip(dx.chunks_mut(each * d));
    let parts = parts.zip(statistics.chunks(each)).zip(partials);
    threads::each(parts, |((((x, dy), dx), statistics), sums)| {
        let mut sums = sums.chunks_mut(2 * d);
        let blocks = x.chunks(ROWS * d).zip(dy.chunks(ROWS * d)).zip(dx.chunks_mut(ROWS * d));
        for (((x, dy), dx), statistics) in blocks.zip(statistics.chunks(ROWS)) {
            backward_rows(x, dy, dx, statistics, weight, sums.next());
        }
    });
    if let Some([weight_sums, bias_sums]) = sums {
        for part in partial.chunks_exact(2 * d) {
            weight_sums.iter_mut().zip(&part[..d]).for_each(|(sum, p)| *sum += p);
            bias_sums.iter_mut().zip(&part[d..]).for_each(|(sum, p)| *sum += p);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn backward_rows<T: Element>(
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    statistics: &[[f32; 2]],
    weight: &[f32],
    mut sums: Option<&mut [f32]>,
) {
    let d = weight.len();
    let (mut normed, mut scaled) = (vec![0.0; d], vec![0.0; d]);
    let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(statistics);
    for (((x, dy), dx), &[mean, scale]) in rows {
        for (normed, x) in normed.iter_mut().zip(x) {
            *normed = (x.to_f32() - mean) * scale;
        }
        if let Some(sums) = &mut sums {
            let (weight_sums, bias_sums) = sums.split_at_mut(d);
            for (((weight_sum, bias_sum), dy), normed) in weight_sums.iter_mut().zip(bias_sums).zip(dy).zip(&normed) {
                *weight_sum += dy.to_f32() * normed;
                *bias_sum += dy.to_f32();
            }
        }
        for ((scaled, dy), weight) in scaled.iter_mut().zip(dy).zip(weight) {
            *scaled = dy.to_f32() * weight;
        }
        let mean_product = dot(&scaled, &normed) / d as f32;
        let mean_scaled = sum(&scaled, |value| value) / d as f32;
        for ((dx, scaled), normed) in dx.iter_mut().zip(&scaled).zip(&normed) {
            *dx = T::from_f32((scaled - mean_scaled - normed * mean_product).mul_add(scale, dx.to_f32()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, wave};
    use super::*;

    #[test]
    fn the_norm_and_its_gradients_equal_autograds() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (rows, d) in [(600, 48), (700, 21), (3, 192)] {
                let (x, dy, residual) =
                    (wave(&[rows, d], 3.0, kind), wave(&[rows, d], 1.0, kind), wave(&[rows, d], 0.5, kind));
                let leaf = |t: Tensor| t.to_kind(Kind::Float).set_requires_grad(true);
                let (w, b) = (leaf(wave(&[d], 1.0, Kind::Float) + 1.0), leaf(wave(&[d], 0.3, Kind::Float)));
                let exact = leaf(x.shallow_clone());
                let y = exact.layer_norm([d], Some(&w), Some(&b), 1e-6, false);
                let loss = (&y * dy.to_kind(Kind::Float)).sum(Kind::Float);
                let expected = Tensor::run_backward(&[&loss], &[&exact, &w, &b], false, false);

                let (w, b) = (w.detach(), b.detach());
                let (out, statistics) = norm(&x, &w, &b, 1e-6);
                assert_close(&out, &y.detach(), kind);
                let (mut dx, mut dw, mut db) = (residual.copy(), w.zeros_like(), b.zeros_like());
                norm_backward(&mut dx, &dy, &x, &statistics, &w, Some([&mut dw, &mut db]));
                assert_close(&dx, &(residual.to_kind(Kind::Float) + &expected[0]), kind);
                assert_close(&dw, &expected[1], Kind::Float);
                assert_close(&db, &expected[2], Kind::Float);
            }
        }
    }
}
