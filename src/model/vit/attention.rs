//! Computes multi-head self-attention, without the projections before and after it, forward and backward.
//!
//! On a CPU, attention to at most [`MOST_TOKENS_OF_PRODUCTS`] tokens is two matrix products with a softmax between them. For a few
//! hundred tokens, libtorch's fused kernel for CPUs is up to four times slower in bf16. In fp32 it is slower for small heads.
//! Attention to more tokens uses the fused kernel. It is twice as fast as matrix products there, and keeps no probabilities, which
//! would take gigabytes. On a GPU, attention is one of libtorch's fused kernels, or matrix products if no fused kernel supports the
//! tensors.
//!
//! Tensor names end in their shape, as in the other files of the ViT. In addition, e = width of a head, x = b · heads.

use super::cpu;
use crate::family::vit::cost::MOST_TOKENS_OF_PRODUCTS;
use crate::libtorch;
use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

/// The tensors that the backward pass needs.
pub enum Kept {
    /// For matrix products: q, k and v, and the probabilities.
    Products {
        qkv_3xne: Tensor,
        p_xnn: Tensor,
    },
    Fused(libtorch::Attention),
}

/// Computes softmax(q · kᵀ / √e) · v as (m, d) from q, k and v side by side in (m, 3·d). On a CPU, this function uses matrix
/// products if `prefers_products` is true and there are at most [`MOST_TOKENS_OF_PRODUCTS`] tokens. Otherwise, it uses a fused
/// kernel of libtorch, if one supports the tensors.
pub fn forward(qkv_m3d: &Tensor, n: i64, heads: i64, prefers_products: bool) -> (Tensor, Kept) {
    let layout = layout(qkv_m3d.size()[0], qkv_m3d.size()[1], n, heads, 3);
    let are_few = n as usize <= MOST_TOKENS_OF_PRODUCTS;
    let fused = if prefers_products && are_few && cpu::is_supported(qkv_m3d) {
        None
    } else {
        fused(qkv_m3d, n, heads).unwrap_or_else(|error| panic!("{error:#}"))
    };
    match fused {
        Some(fused) => (fused.output().transpose(1, 2).reshape([qkv_m3d.size()[0], -1]), Kept::Fused(fused)),
        None => products(qkv_m3d, layout),
    }
}

/// Computes attention with a fused kernel. Returns none if no kernel supports the tensors.
fn fused(qkv_m3d: &Tensor, n: i64, heads: i64) -> Result<Option<libtorch::Attention>> {
    let qkv_3bhne = qkv_m3d.view([-1, n, 3, heads, qkv_m3d.size()[1] / (3 * heads)]).permute([2, 0, 3, 1, 4]);
    libtorch::attention([0, 1, 2].map(|i| qkv_3bhne.get(i)))
}

/// Computes attention with matrix products.
fn products(qkv_m3d: &Tensor, layout: cpu::Layout) -> (Tensor, Kept) {
    let qkv_3xne = split(qkv_m3d, layout);
    let scores_xnn = qkv_3xne.get(0).bmm(&qkv_3xne.get(1).transpose(1, 2));
    let p_xnn = softmax(scores_xnn, scale(layout));
    let mixed_md = join(&p_xnn.bmm(&qkv_3xne.get(2)), cpu::Layout { parts: 1, ..layout });
    (mixed_md, Kept::Products { qkv_3xne, p_xnn })
}

/// Computes the gradient of q, k and v side by side (m, 3·d) from the gradient of the output (m, d).
pub fn backward(gradient_md: &Tensor, kept: Kept, n: i64, heads: i64) -> Tensor {
    let (m, d) = (gradient_md.size()[0], gradient_md.size()[1]);
    match kept {
        Kept::Products { qkv_3xne, p_xnn } => {
            let layout = layout(m, d, n, heads, 1);
            let gradient_xne = split(gradient_md, layout).get(0);
            let [q, k, v] = [0, 1, 2].map(|i| qkv_3xne.get(i));
            let out_3xne = qkv_3xne.empty_like();
            let _ = p_xnn.transpose(1, 2).bmm_out(&out_3xne.get(2), &gradient_xne);
            let scores_xnn = softmax_backward(gradient_xne.bmm(&v.transpose(1, 2)), &p_xnn, scale(layout));
            let _ = scores_xnn.bmm_out(&out_3xne.get(0), &k);
            let _ = scores_xnn.transpose(1, 2).bmm_out(&out_3xne.get(1), &q);
            join(&out_3xne, cpu::Layout { parts: 3, ..layout })
        }
        Kept::Fused(fused) => {
            let gradient_bhne = gradient_md.view([m / n, n, heads, d / heads]).transpose(1, 2);
            fused.backward(&gradient_bhne).unwrap_or_else(|e| panic!("{e:#}")).view([m, 3 * d])
        }
    }
}

/// The layout of tokens (m, `width`) that hold `parts` tensors side by side: 3 for q, k and v, else 1. Each part has all heads.
fn layout(m: i64, width: i64, n: i64, heads: i64, parts: usize) -> cpu::Layout {
    let [b, n, heads, e] = [m / n, n, heads, width / heads / parts as i64].map(|size| size as usize);
    cpu::Layout { b, n, parts, heads, e }
}

fn scale(layout: cpu::Layout) -> f32 {
    1.0 / (layout.e as f32).sqrt()
}

/// Reorders (b·n, parts·heads·e) to (parts, b·heads, n, e).
fn split(joined: &Tensor, layout: cpu::Layout) -> Tensor {
    if cpu::is_supported(joined) {
        return cpu::split(joined, layout);
    }
    let [b, n, parts, heads, e] = [layout.b, layout.n, layout.parts, layout.heads, layout.e].map(|size| size as i64);
    joined.view([b, n, parts, heads, e]).permute([2, 0, 3, 1, 4]).reshape([parts, b * heads, n, e])
}

/// The inverse of [`split`].
fn join(split: &Tensor, layout: cpu::Layout) -> Tensor {
    if cpu::is_supported(split) {
        return cpu::join(split, layout);
    }
    let [b, n, parts, heads, e] = [layout.b, layout.n, layout.parts, layout.heads, layout.e].map(|size| size as i64);
    split.view([parts, b, heads, n, e]).permute([1, 3, 0, 2, 4]).reshape([b * n, parts * heads * e])
}

/// Computes the softmax of scores · scale over the last dimension.
fn softmax(mut scores_xnn: Tensor, scale: f32) -> Tensor {
    if cpu::is_supported(&scores_xnn) {
        cpu::softmax_(&mut scores_xnn, scale);
        return scores_xnn;
    }
    (scores_xnn * f64::from(scale)).softmax(-1, None::<Kind>)
}

/// Computes the gradient of the scores from the gradient of the probabilities.
fn softmax_backward(mut gradient_xnn: Tensor, p_xnn: &Tensor, scale: f32) -> Tensor {
    if cpu::is_supported(&gradient_xnn) {
        cpu::softmax_backward_(&mut gradient_xnn, p_xnn, scale);
        return gradient_xnn;
    }
    Tensor::internal_softmax_backward_data(&gradient_xnn, p_xnn, -1, p_xnn.kind()) * f64::from(scale)
}

/// The largest accepted [`difference`] between bf16 and fp64. On a CPU and for random numbers, the matrix products and the fused
/// kernel both differ from fp64 by 0.2 to 0.5 %.
const BF16_ERROR: f64 = 1e-2;

/// The norm of the difference of two tensors, relative to the norm of the expected tensor.
fn difference(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let norm = |x: &Tensor| x.f_norm()?.f_double_value(&[]);
    Ok(norm(&(found.to_kind(Kind::Double) - expected))? / norm(expected)?)
}

/// The number of tokens and the width of a head of usual ViTs. Their images and patches have 224 and 16 pixels, 224 and 14, 384 and
/// 16, and 32 and 4.
const SIZES: [(i64, i64); 4] = [(197, 64), (257, 80), (577, 64), (65, 64)];

/// Computes attention in bf16 at the sizes of ViTs, forward and backward, and compares it with matrix products in fp64. Returns
/// a sentence that names the kernel and the largest difference.
///
/// # Errors
/// No fused kernel supports bf16 on this device, or a difference is 1 % or more.
pub fn prove(device: Device) -> Result<String> {
    let heads = 2;
    let mut largest_difference = 0f64;
    let mut kernel = None;
    for (n, e) in SIZES {
        let (m, d) = (2 * n, heads * e);
        let drawn = |width: i64| Tensor::f_randn([m, width], (Kind::Float, device)).map(|x| x.to_kind(Kind::BFloat16));
        let (qkv_m3d, gradient_md) = (drawn(3 * d)?, drawn(d)?);
        let kept = fused(&qkv_m3d, n, heads)?.context("libtorch has no fused attention in bf16 for this device")?;
        kernel = Some(kept.kernel);
        let output_md = kept.output().transpose(1, 2).f_reshape([m, d])?;
        let gradient_bhne = gradient_md.view([m / n, n, heads, e]).transpose(1, 2);
        let gradient_m3d = kept.backward(&gradient_bhne)?.f_view([m, 3 * d])?;
        let (expected_md, kept) = products(&qkv_m3d.to_kind(Kind::Double), layout(m, 3 * d, n, heads, 3));
        let expected_m3d = backward(&gradient_md.to_kind(Kind::Double), kept, n, heads);
        for (what, found, expected) in [("output", output_md, expected_md), ("gradient", gradient_m3d, expected_m3d)] {
            let difference = difference(&found, &expected)?;
            ensure!(
                difference < BF16_ERROR,
                "the {what} of {kernel:?} attention in bf16 is off by {:.1} %, with {n} tokens and heads of {e}",
                100.0 * difference
            );
            largest_difference = largest_difference.max(difference);
        }
    }
    let kernel = kernel.context("there are sizes")?;
    Ok(format!("{kernel:?} in bf16, forward and backward, differs from fp64 by {:.1} %", 100.0 * largest_difference))
}

#[cfg(test)]
mod tests {
    use super::super::cpu::tests::{assert_close, wave};
    use super::*;

    /// Computes the output and the gradient of q, k and v (m, 3·d) in fp64 with autograd.
    fn exact(qkv_m3d: &Tensor, gradient_md: &Tensor, n: i64, heads: i64) -> [Tensor; 2] {
        let (m, d) = (gradient_md.size()[0], gradient_md.size()[1]);
        let leaf = qkv_m3d.to_kind(Kind::Double).set_requires_grad(true);
        let [q, k, v] = [0, 1, 2].map(|i| leaf.view([m / n, n, 3, heads, d / heads]).permute([2, 0, 3, 1, 4]).get(i));
        let p = (q.matmul(&k.transpose(-2, -1)) / ((d / heads) as f64).sqrt()).softmax(-1, None::<Kind>);
        let out = p.matmul(&v).transpose(1, 2).reshape([m, d]);
        let weighted = (&out * gradient_md.to_kind(Kind::Double)).sum(Kind::Double);
        let gradient = Tensor::run_backward(&[weighted], &[&leaf], false, false).remove(0);
        [out.detach(), gradient]
    }

    #[test]
    fn fused_attention_and_products_equal_autograds_in_fp64_at_the_sizes_of_vits() {
        for (n, e) in [(197, 64), (257, 80), (577, 64), (65, 64), (17, 12)] {
            let (b, heads) = (2, 2);
            for kind in [Kind::Float, Kind::BFloat16] {
                tch::manual_seed(1);
                let drawn = |width| Tensor::randn([b * n, width], (Kind::Float, Device::Cpu)).to_kind(kind);
                let (qkv, gradient) = (drawn(3 * heads * e), drawn(heads * e));
                let [out, gradient_of_qkv] = exact(&qkv, &gradient, n, heads);
                let _guard = tch::no_grad_guard();
                let check = |(ours, kept): (Tensor, Kept)| {
                    let limit = if kind == Kind::Float { 1e-5 } else { BF16_ERROR };
                    let gradient = backward(&gradient, kept, n, heads);
                    for (found, expected) in [(ours, &out), (gradient, &gradient_of_qkv)] {
                        let difference = difference(&found, expected).unwrap();
                        assert!(difference < limit, "{n} tokens, heads of {e}, {kind:?}: {difference:e}");
                    }
                };
                check(forward(&qkv, n, heads, true));
                let fused = fused(&qkv, n, heads).unwrap().expect("the CPU has a fused kernel");
                assert_eq!(fused.kernel, libtorch::Kernel::FlashForCpu);
                check((fused.output().transpose(1, 2).reshape([b * n, -1]), Kept::Fused(fused)));
            }
        }
    }

    #[test]
    fn many_tokens_keep_no_probabilities() {
        let _guard = tch::no_grad_guard();
        for (n, expected) in [(1024, false), (1025, true)] {
            let (_, kept) = forward(&wave(&[2 * n, 24], 1.0, Kind::Float), n, 1, true);
            assert_eq!(matches!(kept, Kept::Fused(_)), expected, "{n} tokens");
        }
    }

    #[test]
    fn products_without_the_cpu_kernels_equal_autograds() {
        let (qkv, gradient) = (wave(&[3 * 17, 72], 2.0, Kind::Double), wave(&[3 * 17, 24], 1.0, Kind::Double));
        let [out, gradient_of_qkv] = exact(&qkv, &gradient, 17, 2);
        let _guard = tch::no_grad_guard();
        let (ours, kept) = products(&qkv, layout(3 * 17, 72, 17, 2, 3));
        assert_close(&ours, &out, Kind::Float);
        assert_close(&backward(&gradient, kept, 17, 2), &gradient_of_qkv, Kind::Float);
    }

    #[test]
    fn the_proof_of_attention_holds_on_the_cpu() {
        let _guard = tch::no_grad_guard();
        assert!(prove(Device::Cpu).unwrap().starts_with("FlashForCpu"));
    }
}
