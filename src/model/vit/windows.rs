//! Divides the map of an image's tokens into square windows, and lets tokens attend to each other only within a window, as ViTDet
//! does (arXiv 2203.16527; detectron2's `window_partition`). A window may reach beyond the map. Its cells outside the map are
//! padding: tokens of zeros, whose q, k and v equal the bias of the linear layer. The other tokens of the window also attend to the
//! padding. The class token attends to itself alone.
//!
//! Shapes: b = images, n = tokens of an image, g = rows and columns of the map, w = rows and columns of a window, y = tokens of all
//! windows of all images, c = numbers of a token, d = width, m = b · n.

use super::attention;
use tch::{Kind, Tensor};

/// The windows of a block.
#[derive(Debug, Clone, Copy)]
pub struct Windows {
    /// The number of rows, and of columns, of a window.
    pub side: i64,
}

/// The tensors that the backward pass needs.
pub struct Kept {
    windows: Windows,
    attention: attention::Kept,
    n: i64,
}

/// The gradients of the input.
pub struct Gradients {
    /// The gradient of q, k and v.
    pub qkv_m3d: Tensor,
    /// The gradient of the bias of q, k and v (3·d) through the tokens beyond the map, in fp32; none if there are no such tokens.
    pub bias: Option<Tensor>,
}

impl Windows {
    /// Computes attention within windows as (m, d) from q, k and v side by side (m, 3·d). `bias` is the bias of q, k and v (3·d).
    pub fn forward(
        self,
        qkv_m3d: &Tensor,
        bias: Option<&Tensor>,
        (n, heads): (i64, i64),
        prefers_products: bool,
    ) -> (Tensor, Kept) {
        let d = qkv_m3d.size()[1] / 3;
        let windows_y3d = self.split(qkv_m3d, n, bias);
        let (mixed_yd, attention) = attention::forward(&windows_y3d, self.side.pow(2), heads, prefers_products);
        let class_b1d = qkv_m3d.view([-1, n, 3 * d]).narrow(1, 0, 1).narrow(2, 2 * d, d);
        let (mixed_bggd, _) = self.join(&mixed_yd, n);
        let mixed_bnd = Tensor::cat(&[class_b1d, mixed_bggd.reshape([-1, n - 1, d])], 1);
        (mixed_bnd.view([-1, d]), Kept { windows: self, attention, n })
    }

    /// The side of the square map of n − 1 tokens, and the side of the square that all windows cover together.
    fn sides(self, n: i64) -> [i64; 2] {
        let side = (n - 1).isqrt();
        [side, (side + self.side - 1) / self.side * self.side]
    }

    /// Reorders tokens (m, c) without the class tokens to (y, c), window after window. Tokens beyond the map have the values
    /// `beyond` (c), or zeros if `beyond` is none.
    fn split(self, x_mc: &Tensor, n: i64, beyond: Option<&Tensor>) -> Tensor {
        let ([side, covered], c, w) = (self.sides(n), x_mc.size()[1], self.side);
        let map_bggc = x_mc.view([-1, n, c]).narrow(1, 1, n - 1).unflatten(1, [side, side]);
        let b = map_bggc.size()[0];
        let whole = if side == covered {
            map_bggc
        } else {
            let whole = match beyond {
                Some(beyond) => beyond.to_kind(x_mc.kind()).expand([b, covered, covered, c], false).contiguous(),
                None => x_mc.new_zeros([b, covered, covered, c], (x_mc.kind(), x_mc.device())),
            };
            whole.narrow(1, 0, side).narrow(2, 0, side).copy_(&map_bggc);
            whole
        };
        let along = covered / w;
        whole.reshape([b, along, w, along, w, c]).transpose(2, 3).reshape([-1, c])
    }

    /// The inverse of [`Windows::split`]: the map (b, g, g, c), and the sum (c) of the tokens beyond the map in fp32. The sum is
    /// none if the windows do not reach beyond the map.
    fn join(self, windows_yc: &Tensor, n: i64) -> (Tensor, Option<Tensor>) {
        let ([side, covered], c, w) = (self.sides(n), windows_yc.size()[1], self.side);
        let along = covered / w;
        let whole = windows_yc.view([-1, along, along, w, w, c]).transpose(2, 3).reshape([-1, covered, covered, c]);
        let inner = whole.narrow(1, 0, side).narrow(2, 0, side);
        let sum = |part: Tensor| part.sum_dim_intlist([0i64, 1, 2].as_slice(), false, Kind::Float);
        let beyond = (side < covered).then(|| {
            let below = whole.narrow(1, side, covered - side);
            let beside = whole.narrow(1, 0, side).narrow(2, side, covered - side);
            sum(below) + sum(beside)
        });
        (inner, beyond)
    }
}

impl Kept {
    /// Computes the gradients of the input from the gradient of the output (m, d).
    pub fn backward(self, gradient_md: &Tensor, heads: i64) -> Gradients {
        let Kept { windows, attention, n } = self;
        let d = gradient_md.size()[1];
        let windows_yd = windows.split(gradient_md, n, None);
        let qkv_y3d = attention::backward(&windows_yd, attention, windows.side.pow(2), heads);
        let (qkv_bgg3d, bias) = windows.join(&qkv_y3d, n);
        // The output of the class token is its own v.
        let class_b1d = gradient_md.view([-1, n, d]).narrow(1, 0, 1);
        let class_b13d = Tensor::cat(&[class_b1d.zeros_like().repeat([1, 1, 2]), class_b1d], 2);
        let qkv_bn3d = Tensor::cat(&[class_b13d, qkv_bgg3d.reshape([-1, n - 1, 3 * d])], 1);
        Gradients { qkv_m3d: qkv_bn3d.view([-1, 3 * d]), bias }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);
    const HEADS: i64 = 2;
    const WIDTH: i64 = 8;

    fn wave(shape: &[i64], phase: f64) -> Tensor {
        let count: i64 = shape.iter().product();
        (Tensor::arange(count, OPTIONS) * 0.37 + phase).sin().view(shape)
    }

    /// Computes attention (n, d) of an image's q, k and v (n, 3·d) with a mask over all cells that the windows cover. Cells beyond
    /// the map have the bias (1, 3·d).
    fn masked(qkv_n3d: &Tensor, bias: &Tensor, side: i64, window: i64) -> Tensor {
        let covered = (side + window - 1) / window * window;
        let cells: Vec<[i64; 2]> = (0..covered).flat_map(|row| (0..covered).map(move |column| [row, column])).collect();
        let is_within = |cell: &[i64; 2]| cell[0] < side && cell[1] < side;
        let token = |cell: &[i64; 2]| match is_within(cell) {
            true => qkv_n3d.narrow(0, 1 + cell[0] * side + cell[1], 1),
            false => bias.shallow_clone(),
        };
        let all = Tensor::cat(&cells.iter().map(token).collect::<Vec<_>>(), 0);
        let e = WIDTH / HEADS;
        let part = |part| all.narrow(1, part * WIDTH, WIDTH).view([-1, HEADS, e]).transpose(0, 1);
        let [q, k, v] = [0, 1, 2].map(part);
        let is_same = |a: &[i64; 2], b: &[i64; 2]| a.map(|at| at / window) == b.map(|at| at / window);
        let mask = |a: &[i64; 2], b: &[i64; 2]| if is_same(a, b) { 0.0 } else { f32::NEG_INFINITY };
        let mask: Vec<f32> = cells.iter().flat_map(|a| cells.iter().map(move |b| mask(a, b))).collect();
        let mask = Tensor::from_slice(&mask).view([cells.len() as i64; 2]);
        let scores = q.bmm(&k.transpose(1, 2)) / (e as f64).sqrt() + mask;
        let mixed = scores.softmax(-1, Kind::Float).bmm(&v).transpose(0, 1).reshape([-1, WIDTH]);
        let within: Vec<i64> = cells.iter().zip(0..).filter(|(cell, _)| is_within(cell)).map(|(_, i)| i).collect();
        let class = qkv_n3d.narrow(0, 0, 1).narrow(1, 2 * WIDTH, WIDTH);
        Tensor::cat(&[class, mixed.index_select(0, &Tensor::from_slice(&within))], 0)
    }

    #[test]
    fn windows_and_their_gradients_are_those_of_attention_within_them() {
        let b = 2;
        // Windows that divide the map, and windows that reach beyond it.
        for (side, window) in [(4, 2), (5, 3), (3, 4)] {
            let n = side * side + 1;
            let gradient = wave(&[b * n, WIDTH], 2.0);
            let [qkv, bias] =
                [(b * n, 0.0), (1, 1.0)].map(|(rows, phase)| wave(&[rows, 3 * WIDTH], phase).set_requires_grad(true));
            let windows = Windows { side: window };
            let beyond = bias.detach().view([-1]);
            let (ours, kept) = tch::no_grad(|| windows.forward(&qkv.detach(), Some(&beyond), (n, HEADS), true));
            let of_image = |image: i64| masked(&qkv.narrow(0, image * n, n), &bias, side, window);
            let theirs = Tensor::cat(&(0..b).map(of_image).collect::<Vec<_>>(), 0);
            (&theirs * &gradient).sum(Kind::Float).backward();
            let Gradients { qkv_m3d, bias: of_bias } = tch::no_grad(|| kept.backward(&gradient, HEADS));
            let close = |what: &str, a: &Tensor, b: &Tensor| {
                let difference = (a - b).abs().max().double_value(&[]);
                assert!(difference < 2e-6, "{what} for windows of {window} on {side}: {difference}");
            };
            close("output", &ours, &theirs.detach());
            close("gradient", &qkv_m3d, &qkv.grad());
            match of_bias {
                Some(of_bias) => close("gradient of the bias", &of_bias, &bias.grad().view([-1])),
                None => assert!(side % window == 0),
            }
        }
    }
}
