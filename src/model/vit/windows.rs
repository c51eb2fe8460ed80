//! Divides the tokens of an image into square windows within which they attend to each other, as ViTDet does (arXiv 2203.16527;
//! detectron2's `window_partition`). Windows that reach beyond the map are filled with the bias of q, k and v, which is their value
//! for a token of zeros, and these tokens are attended to. The class token attends to itself alone.
//!
//! Shapes: b = images, n = tokens of an image, g = rows and columns of the map, w = those of a window, y = rows of all windows'
//! tokens, c = numbers of a token.

use super::attention;
use tch::{Kind, Tensor};

/// The windows of a block.
#[derive(Debug, Clone, Copy)]
pub struct Windows {
    /// Rows, and columns, of a window.
    pub side: i64,
}

/// The tensors that the backward pass needs.
pub struct Kept {
    attention: attention::Kept,
    n: i64,
}

/// The gradients of q, k and v (m, 3·d), and of their bias (3·d) through the tokens beyond the map, in fp32.
pub struct Gradients {
    pub qkv_m3d: Tensor,
    pub bias: Option<Tensor>,
}

impl Windows {
    /// Attention within windows, of q, k and v side by side (b · n, 3·d), as (b · n, d). `bias` is that of q, k and v (3·d).
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
        (mixed_bnd.view([-1, d]), Kept { attention, n })
    }

    /// The gradients of the input from the gradient of the output (b · n, d).
    pub fn backward(self, gradient_md: &Tensor, kept: Kept, heads: i64) -> Gradients {
        let (n, d) = (kept.n, gradient_md.size()[1]);
        let windows_yd = self.split(gradient_md, n, None);
        let qkv_y3d = attention::backward(&windows_yd, kept.attention, self.side.pow(2), heads);
        let (qkv_bgg3d, bias) = self.join(&qkv_y3d, n);
        // The output of the class token is its own v.
        let class_b1d = gradient_md.view([-1, n, d]).narrow(1, 0, 1);
        let class_b13d = Tensor::cat(&[class_b1d.zeros_like().repeat([1, 1, 2]), class_b1d], 2);
        let qkv_bn3d = Tensor::cat(&[class_b13d, qkv_bgg3d.reshape([-1, n - 1, 3 * d])], 1);
        Gradients { qkv_m3d: qkv_bn3d.view([-1, 3 * d]), bias }
    }

    /// Rows, and columns, of the map of n − 1 tokens, and of the windows that cover it.
    fn sides(self, n: i64) -> [i64; 2] {
        let side = (n - 1).isqrt();
        [side, (side + self.side - 1) / self.side * self.side]
    }

    /// The tokens (b · n, c) without the class tokens, window after window (y, c). Tokens beyond the map are `beyond` (c), else 0.
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

    /// The inverse of [`Windows::split`]: the map (b, g, g, c), and the sum of the tokens beyond it (c) in fp32; none if the windows
    /// end with the map.
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

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn windows_and_their_gradients_are_those_of_attention_within_them() {
        let options = (Kind::Float, Device::Cpu);
        let wave = |shape: &[i64], phase: f64| {
            let count: i64 = shape.iter().product();
            (Tensor::arange(count, options) * 0.37 + phase).sin().view(shape)
        };
        let (b, d, heads) = (2, 8, 2);
        // Windows that divide the map, and windows that reach beyond it.
        for (side, window) in [(4, 2), (5, 3), (3, 4)] {
            let n = side * side + 1;
            let [qkv, bias, gradient] = [(b * n, 3 * d, 0.0), (1, 3 * d, 1.0), (b * n, d, 2.0)]
                .map(|(rows, columns, phase)| wave(&[rows, columns], phase));
            let [qkv, bias] = [qkv, bias].map(|tensor| tensor.set_requires_grad(true));
            let bias_row = bias.view([-1]);
            let windows = Windows { side: window };
            let (ours, kept) =
                tch::no_grad(|| windows.forward(&qkv.detach(), Some(&bias_row.detach()), (n, heads), true));
            // The same by a mask over all tokens, with a token for each cell that the windows cover.
            let covered = (side + window - 1) / window * window;
            let cell = |row: i64, column: i64| (row < side && column < side).then(|| 1 + row * side + column);
            let cells: Vec<(i64, i64)> =
                (0..covered).flat_map(|row| (0..covered).map(move |column| (row, column))).collect();
            let mut outputs = Vec::new();
            for image in 0..b {
                let rows = qkv.narrow(0, image * n, n);
                let token = |&(row, column): &(i64, i64)| match cell(row, column) {
                    Some(number) => rows.narrow(0, number, 1),
                    None => bias.shallow_clone(),
                };
                let all = Tensor::cat(&cells.iter().map(token).collect::<Vec<_>>(), 0);
                let [q, k, v] =
                    [0, 1, 2].map(|part| all.narrow(1, part * d, d).view([-1, heads, d / heads]).transpose(0, 1));
                let same =
                    |a: &(i64, i64), b: &(i64, i64)| (a.0 / window, a.1 / window) == (b.0 / window, b.1 / window);
                let mask: Vec<f32> = cells
                    .iter()
                    .flat_map(|a| cells.iter().map(move |b| if same(a, b) { 0.0 } else { f32::NEG_INFINITY }))
                    .collect();
                let mask = Tensor::from_slice(&mask).view([cells.len() as i64, cells.len() as i64]);
                let scores = q.bmm(&k.transpose(1, 2)) / ((d / heads) as f64).sqrt() + mask;
                let mixed = scores.softmax(-1, Kind::Float).bmm(&v).transpose(0, 1).reshape([-1, d]);
                let kept: Vec<i64> = cells
                    .iter()
                    .zip(0..)
                    .filter(|((row, column), _)| cell(*row, *column).is_some())
                    .map(|(_, i)| i)
                    .collect();
                let class = rows.narrow(0, 0, 1).narrow(1, 2 * d, d);
                outputs.push(Tensor::cat(&[class, mixed.index_select(0, &Tensor::from_slice(&kept))], 0));
            }
            let theirs = Tensor::cat(&outputs, 0);
            (&theirs * &gradient).sum(Kind::Float).backward();
            let Gradients { qkv_m3d, bias: of_bias } = tch::no_grad(|| windows.backward(&gradient, kept, heads));
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
