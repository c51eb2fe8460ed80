//! The supervised contrastive loss (Khosla et al., arXiv 2004.11362, with one view of each image) as InfoPro uses it.

use crate::plan::local::CONTRAST_BLOCK;
use tch::{Kind, Tensor};

/// The temperature τ. InfoPro's code multiplies the loss by τ / base temperature. This factor is 1, because both are 0.07.
const TEMPERATURE: f64 = 0.07;
/// Replaces the similarity of a sample to itself, so that the softmax gives it a share of 0.
const NEVER: f64 = -1e9;

/// The sum of the losses of all samples, given their vectors (b, d) and class numbers (b). Samples are compared only within
/// blocks of [`CONTRAST_BLOCK`] consecutive samples of the global batch. So the caller must give whole blocks. Only the last
/// block of the global batch may be shorter.
pub fn loss(vectors_bd: &Tensor, classes_b: &Tensor) -> Tensor {
    let b = vectors_bd.size()[0];
    // The tiny number keeps the gradient of the square root finite at 0.
    let squares_b1 = vectors_bd.square().sum_dim_intlist([1i64].as_slice(), true, Kind::Float) + 1e-24;
    let unit_bd = vectors_bd / squares_b1.sqrt();
    let blocks = (0..b).step_by(CONTRAST_BLOCK).map(|start| {
        let size = (CONTRAST_BLOCK as i64).min(b - start);
        of_block(&unit_bd.narrow(0, start, size), &classes_b.narrow(0, start, size))
    });
    blocks.reduce(|sum, block| sum + block).expect("a part of a batch has samples")
}

/// The sum of the losses of a block's m samples, with unit vectors z (m, d) and the temperature τ. The loss of a sample is minus
/// the mean, over the other samples p of its class, of log (exp(z·z_p / τ) / Σ_a exp(z·z_a / τ)). Here a runs over all other
/// samples of the block. The loss is 0 if no other sample has this class.
fn of_block(unit_md: &Tensor, classes_m: &Tensor) -> Tensor {
    let m = unit_md.size()[0];
    let is_itself_mm = Tensor::eye(m, (Kind::Bool, unit_md.device()));
    let similarity_mm = unit_md.mm(&unit_md.tr()) / TEMPERATURE;
    let log_share_mm = similarity_mm.masked_fill(&is_itself_mm, NEVER).log_softmax(-1, Kind::Float);
    let is_pair_mm = classes_m.unsqueeze(1).eq_tensor(classes_m).logical_and(&is_itself_mm.logical_not());
    let pair_count_m = is_pair_mm.sum_dim_intlist([1i64].as_slice(), false, Kind::Float).clamp_min(1.0);
    let log_share_of_pairs_mm = log_share_mm.masked_fill(&is_pair_mm.logical_not(), 0.0);
    -(log_share_of_pairs_mm.sum_dim_intlist([1i64].as_slice(), false, Kind::Float) / pair_count_m).sum(Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// The loss by its formula, in a double loop over the samples of each block.
    fn by_loops(vectors: &[Vec<f64>], classes: &[i64]) -> f64 {
        let block_of = |i: usize| i / CONTRAST_BLOCK * CONTRAST_BLOCK..(i / CONTRAST_BLOCK + 1) * CONTRAST_BLOCK;
        let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let similarity = |i: usize, j: usize| {
            let product: f64 = vectors[i].iter().zip(&vectors[j]).map(|(a, b)| a * b).sum();
            product / norm(&vectors[i]) / norm(&vectors[j]) / TEMPERATURE
        };
        let mut sum = 0.0;
        for i in 0..vectors.len() {
            let others: Vec<usize> = block_of(i).filter(|&a| a != i && a < vectors.len()).collect();
            let all = others.iter().map(|&a| similarity(i, a).exp()).sum::<f64>().ln();
            let pairs: Vec<usize> = others.iter().copied().filter(|&p| classes[p] == classes[i]).collect();
            let of_pairs: f64 = pairs.iter().map(|&p| similarity(i, p) - all).sum();
            sum -= of_pairs / pairs.len().max(1) as f64;
        }
        sum
    }

    #[test]
    fn the_loss_is_that_of_the_double_loop_for_any_cut_into_whole_blocks() {
        let (b, d) = (300i64, 5i64);
        let vectors = (Tensor::arange(b * d, (Kind::Double, Device::Cpu)) * 0.61).sin().view([b, d]);
        let rows: Vec<Vec<f64>> = Vec::try_from(&vectors).unwrap();
        let vectors = vectors.to_kind(Kind::Float);
        for class_count in [1, 7, 1000] {
            let classes: Vec<i64> = (0..b).map(|i| i * i % class_count).collect();
            let expected = by_loops(&rows, &classes);
            let classes = Tensor::from_slice(&classes);
            let gradient = |cut: &[i64]| {
                let leaf = vectors.detach().set_requires_grad(true);
                let mut start = 0;
                let part = |size: &i64| {
                    start += size;
                    loss(&leaf.narrow(0, start - size, *size), &classes.narrow(0, start - size, *size))
                };
                let sum = cut.iter().map(part).reduce(|a, b| a + b).unwrap();
                let found = sum.double_value(&[]);
                assert!(
                    (found / expected - 1.0).abs() < 1e-5,
                    "{class_count} classes, cut {cut:?}: {found}, {expected}"
                );
                Tensor::run_backward(&[&sum], &[&leaf], false, false).swap_remove(0)
            };
            let whole = gradient(&[300]);
            for cut in [&[128, 172][..], &[256, 44], &[128, 128, 44]] {
                let difference = (gradient(cut) - &whole).abs().max().double_value(&[]);
                assert!(difference < 1e-6 * whole.abs().max().double_value(&[]), "cut {cut:?}: {difference:e}");
            }
        }
    }

    #[test]
    fn images_of_different_classes_have_no_loss_and_no_gradient() {
        let leaf = Tensor::randn([6, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let sum = loss(&leaf, &Tensor::arange(6, (Kind::Int64, Device::Cpu)));
        let gradient = Tensor::run_backward(&[&sum], &[&leaf], false, false).swap_remove(0);
        assert_eq!((sum.double_value(&[]), gradient.abs().max().double_value(&[])), (0.0, 0.0));
    }
}
