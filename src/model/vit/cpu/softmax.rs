//! Softmax of scaled scores over the last dimension, in place.

use super::element::{Bf16, Element};
use super::math::{LANES, across, dot, exp, load, sum};
use super::{by_kind, numbers, numbers_mut};
use crate::model::threads;
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Replaces the scores by softmax(scale · scores), for scale > 0.
pub fn softmax_(scores: &mut Tensor, scale: f32) {
    let n = *scores.size().last().expect("scores have rows") as usize;
    by_kind!(scores, forward(scores, n, scale));
}

/// Turns the gradient of the probabilities softmax(scale · scores) into the gradient of the scores, in place.
pub fn softmax_backward_(gradient: &mut Tensor, probabilities: &Tensor, scale: f32) {
    let n = *probabilities.size().last().expect("scores have rows") as usize;
    by_kind!(probabilities, backward(gradient, probabilities, n, scale));
}

fn forward<T: Element>(scores: &mut Tensor, n: usize, scale: f32) {
    let scores = numbers_mut::<T>(scores);
    let each = n * threads::rows_each(scores.len() / n, scores.len(), 1);
    threads::each(scores.chunks_mut(each), |part| forward_rows(part, n, scale));
}

fn backward<T: Element>(gradient: &mut Tensor, probabilities: &Tensor, n: usize, scale: f32) {
    let p = numbers::<T>(probabilities);
    let each = n * threads::rows_each(p.len() / n, p.len(), 1);
    let parts = p.chunks(each).zip(numbers_mut::<T>(gradient).chunks_mut(each));
    threads::each(parts, |(p, gradient)| backward_rows(p, gradient, n, scale));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn forward_rows<T: Element>(scores: &mut [T], n: usize, scale: f32) {
    // The row is padded with −∞ to a multiple of LANES. The exponential of the padding is 0, so it does not change the sum.
    let mut row = vec![f32::NEG_INFINITY; n.next_multiple_of(LANES)];
    for scores in scores.chunks_exact_mut(n) {
        load(&mut row[..n], scores);
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for values in row.as_chunks::<LANES>().0 {
            for (lane, &value) in lanes.iter_mut().zip(values) {
                *lane = if value > *lane { value } else { *lane };
            }
        }
        let shift = scale * across(lanes, |a, b| if a > b { a } else { b });
        for values in row.as_chunks_mut::<LANES>().0 {
            for value in values {
                *value = exp(value.mul_add(scale, -shift));
            }
        }
        let inverse_sum = 1.0 / sum(&row, |value| value);
        for (score, value) in scores.iter_mut().zip(&row) {
            *score = T::from_f32(value * inverse_sum);
        }
        row[n..].fill(f32::NEG_INFINITY);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn backward_rows<T: Element>(p: &[T], gradient: &mut [T], n: usize, scale: f32) {
    let (mut p_row, mut gradient_row) = (vec![0.0; n], vec![0.0; n]);
    for (p, gradient) in p.chunks_exact(n).zip(gradient.chunks_exact_mut(n)) {
        load(&mut p_row, p);
        load(&mut gradient_row, gradient);
        let mean = dot(&p_row, &gradient_row);
        for ((p, dp), gradient) in p_row.iter().zip(&gradient_row).zip(gradient) {
            *gradient = T::from_f32(scale * p * (dp - mean));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, wave};
    use super::*;

    #[test]
    fn softmax_and_its_gradient_equal_libtorchs() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for n in [5, 17, 197, 577] {
                let (x, dy) = (wave(&[40, n], 20.0, kind), wave(&[40, n], 1.0, kind));
                let mut p = x.copy();
                softmax_(&mut p, 0.125);
                let expected = (x.to_kind(Kind::Float) * 0.125).softmax(-1, Kind::Float);
                assert_close(&p, &expected, kind);
                let mut dx = dy.copy();
                softmax_backward_(&mut dx, &p, 0.125);
                let p = p.to_kind(Kind::Float);
                let dy = dy.to_kind(Kind::Float);
                assert_close(&dx, &(Tensor::internal_softmax_backward_data(&dy, &p, -1, Kind::Float) * 0.125), kind);
            }
        }
    }

    #[test]
    fn a_score_that_is_not_a_number_gives_probabilities_that_are_not() {
        let mut scores = Tensor::from_slice(&[1.0f32, f32::NAN, 2.0]).view([1, 3]);
        softmax_(&mut scores, 1.0);
        assert!(scores.isnan().any().int64_value(&[]) == 1);
    }
}
