//! Reorders activations between the layout by tokens and the layout by heads.

use super::element::{Bf16, Element};
use super::{by_kind, numbers, numbers_mut};
use crate::model::threads;
use tch::{Kind, Tensor};

/// The sizes of both layouts. By tokens, activations are (b, n, parts, heads, e), as linear layers give them. By heads, they are
/// (parts, b, heads, n, e), as matrix products take them. b = samples, n = tokens, parts = 3 for q, k and v or 1, e = width of a
/// head.
#[derive(Clone, Copy)]
pub struct Layout {
    pub b: usize,
    pub n: usize,
    pub parts: usize,
    pub heads: usize,
    pub e: usize,
}

/// Reorders (b·n, parts·heads·e) to (parts, b·heads, n, e).
pub fn split(joined: &Tensor, layout: Layout) -> Tensor {
    let Layout { b, n, parts, heads, e } = layout;
    let mut split = joined.empty_like().view([parts as i64, (b * heads) as i64, n as i64, e as i64]);
    by_kind!(joined, split_as(joined, &mut split, layout));
    split
}

/// The inverse of [`split`].
pub fn join(split: &Tensor, layout: Layout) -> Tensor {
    let Layout { b, n, parts, heads, e } = layout;
    let mut joined = split.empty_like().view([(b * n) as i64, (parts * heads * e) as i64]);
    by_kind!(split, join_as(split, &mut joined, layout));
    joined
}

fn split_as<T: Element>(joined: &Tensor, split: &mut Tensor, layout: Layout) {
    let (joined, split) = (numbers::<T>(joined), numbers_mut::<T>(split));
    let Layout { b, n, parts, heads, e } = layout;
    let each = n * e * threads::rows_each(parts * b * heads, split.len(), 1);
    threads::each(split.chunks_mut(each).enumerate(), |(chunk, out)| {
        for (number, matrix) in out.chunks_exact_mut(n * e).enumerate() {
            let (part, sample, head) = part_sample_head(chunk * each / (n * e) + number, layout);
            for (token, out) in matrix.chunks_exact_mut(e).enumerate() {
                let start = (((sample * n + token) * parts + part) * heads + head) * e;
                out.copy_from_slice(&joined[start..start + e]);
            }
        }
    });
    debug_assert_eq!(split.len(), parts * b * heads * n * e);
}

fn join_as<T: Element>(split: &Tensor, joined: &mut Tensor, layout: Layout) {
    let (split, joined) = (numbers::<T>(split), numbers_mut::<T>(joined));
    let Layout { b, n, parts, heads, e } = layout;
    let width = parts * heads * e;
    let each = width * threads::rows_each(b * n, joined.len(), 1);
    threads::each(joined.chunks_mut(each).enumerate(), |(chunk, out)| {
        for (number, row) in out.chunks_exact_mut(width).enumerate() {
            let token = chunk * each / width + number;
            for (piece, out) in row.chunks_exact_mut(e).enumerate() {
                let (part, head) = (piece / heads, piece % heads);
                let start = (((part * b + token / n) * heads + head) * n + token % n) * e;
                out.copy_from_slice(&split[start..start + e]);
            }
        }
    });
}

/// The part, sample and head to which the matrix (n, e) with this number in the split layout belongs.
fn part_sample_head(number: usize, layout: Layout) -> (usize, usize, usize) {
    let Layout { b, heads, .. } = layout;
    (number / (b * heads), number / heads % b, number % heads)
}

#[cfg(test)]
mod tests {
    use super::super::tests::wave;
    use super::*;

    #[test]
    fn splitting_equals_a_permutation_and_joining_is_its_inverse() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let layout = Layout { b: 5, n: 17, parts: 3, heads: 2, e: 12 };
            let joined = wave(&[5 * 17, 72], 1.0, kind);
            let split = split(&joined, layout);
            let expected = joined.view([5, 17, 3, 2, 12]).permute([2, 0, 3, 1, 4]).reshape([3, 10, 17, 12]);
            assert_eq!(split, expected);
            assert_eq!(join(&split, layout), joined);
        }
    }
}
