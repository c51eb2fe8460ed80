//! Multi-head self-attention between its two projections, forward and backward.
//!
//! On a CPU it is products of matrices with a softmax between them: for the few hundred tokens of an image libtorch's
//! fused kernel is up to four times slower there in bf16, and slower for small heads in fp32. On other devices it is
//! libtorch's fused attention.

use super::cpu;
use crate::libtorch;
use tch::Tensor;

/// What the backward pass needs.
pub enum Kept {
    Products { qkv_3xne: Tensor, p_xnn: Tensor },
    Fused { qkv_bhne: [Tensor; 3], mixed_bhne: Tensor },
}

/// Softmax(q · kᵀ / √e) · v of (m, 3·d), with heads of width e = d / heads; x = b · heads. Always fused unless `products`.
pub fn forward(qkv_m3d: &Tensor, n: i64, heads: i64, products: bool) -> (Tensor, Kept) {
    let (m, d) = (qkv_m3d.size()[0], qkv_m3d.size()[1] / 3);
    let (b, e) = (m / n, d / heads);
    if !products || !cpu::takes(qkv_m3d) {
        return fused(&qkv_m3d.view([b, n, 3, heads, e]).permute([2, 0, 3, 1, 4]), m);
    }
    let qkv_3xne = cpu::split(qkv_m3d, layout(3, b, n, heads, e));
    let mut p_xnn = qkv_3xne.get(0).bmm(&qkv_3xne.get(1).transpose(1, 2));
    cpu::softmax_(&mut p_xnn, 1.0 / (e as f32).sqrt());
    let mixed_md = cpu::join(&p_xnn.bmm(&qkv_3xne.get(2)), layout(1, b, n, heads, e));
    (mixed_md, Kept::Products { qkv_3xne, p_xnn })
}

fn layout(parts: usize, b: i64, n: i64, heads: i64, e: i64) -> cpu::Layout {
    cpu::Layout { b: b as usize, n: n as usize, parts, heads: heads as usize, e: e as usize }
}

fn fused(qkv_3bhne: &Tensor, m: i64) -> (Tensor, Kept) {
    let qkv_bhne = [0, 1, 2].map(|i| qkv_3bhne.get(i).detach().set_requires_grad(true));
    let [q, k, v] = &qkv_bhne;
    let mixed_bhne =
        tch::with_grad(|| Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, false, None, false));
    let mixed_md = mixed_bhne.detach().transpose(1, 2).reshape([m, -1]);
    (mixed_md, Kept::Fused { qkv_bhne, mixed_bhne })
}

/// The gradient of (m, 3·d) from that of (m, d).
pub fn backward(gradient_md: &Tensor, kept: Kept, n: i64, heads: i64) -> Tensor {
    let (m, d) = (gradient_md.size()[0], gradient_md.size()[1]);
    let (b, e) = (m / n, d / heads);
    match kept {
        Kept::Products { qkv_3xne, p_xnn } => {
            let gradient_xne = cpu::split(gradient_md, layout(1, b, n, heads, e)).get(0);
            let [q, k, v] = [0, 1, 2].map(|i| qkv_3xne.get(i));
            let out_3xne = qkv_3xne.empty_like();
            let _ = p_xnn.transpose(1, 2).bmm_out(&out_3xne.get(2), &gradient_xne);
            let mut scores_xnn = gradient_xne.bmm(&v.transpose(1, 2));
            cpu::softmax_backward_(&mut scores_xnn, &p_xnn, 1.0 / (e as f32).sqrt());
            let _ = scores_xnn.bmm_out(&out_3xne.get(0), &k);
            let _ = scores_xnn.transpose(1, 2).bmm_out(&out_3xne.get(1), &q);
            cpu::join(&out_3xne, layout(3, b, n, heads, e))
        }
        Kept::Fused { qkv_bhne, mixed_bhne } => {
            let gradient_bhne = gradient_md.view([b, n, heads, e]).transpose(1, 2);
            let gradients_bnhe =
                libtorch::gradients(&mixed_bhne, &qkv_bhne, &gradient_bhne).map(|bhne| bhne.transpose(1, 2));
            Tensor::stack(&gradients_bnhe, 2).view([m, 3 * d])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cpu::tests::{close, wave};
    use super::*;
    use tch::Kind;

    #[test]
    fn products_and_fused_attention_agree_forward_and_backward() {
        let (b, n, heads, e) = (3, 17, 2, 12);
        let (qkv, gradient) =
            (wave(&[b * n, 3 * heads * e], 2.0, Kind::Float), wave(&[b * n, heads * e], 1.0, Kind::Float));
        let (ours, kept) = forward(&qkv, n, heads, true);
        let split = qkv.view([b, n, 3, heads, e]).permute([2, 0, 3, 1, 4]);
        let (expected, kept_fused) = fused(&split, b * n);
        close(&ours, &expected, Kind::Float);
        let ours = backward(&gradient, kept, n, heads);
        close(&ours, &backward(&gradient, kept_fused, n, heads), Kind::Float);
    }
}
