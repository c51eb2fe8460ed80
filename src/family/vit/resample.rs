//! Resamples position embeddings and patch kernels to another size.

use crate::family::parameter::Parameter;
use tch::{Device, Kind, Tensor};

/// The largest number of rows of position embeddings that are resampled: the rows of images of 4,096 pixels with patches of 16
/// pixels.
const LARGEST_GRID: i64 = 256 * 256 + 1;

/// Whether the parameter is the position embeddings, and `shape` is the shape of position embeddings for a square image of any
/// size.
pub fn is_another_grid(parameter: &Parameter, shape: &[i64]) -> bool {
    let is_grid = |rows: i64| (2..=LARGEST_GRID).contains(&rows) && (rows - 1).isqrt().pow(2) == rows - 1;
    parameter.name == "pos_embed"
        && matches!((shape, &parameter.shape[..]), (&[1, rows, a], &[1, _, b]) if a == b && is_grid(rows))
}

/// Resamples position embeddings (1, 1 + n², width) to a grid of `to` = [rows, columns] patches. The row of the class token stays
/// as it is.
///
/// The interpolation is bicubic without antialiasing, as in DeiT's and Deep Incubation's code (`main.py`, `--finetune`), ViTDet and
/// mmsegmentation.
pub fn positions(pos_embed_1nd: &Tensor, to: [i64; 2]) -> Tensor {
    let (_, rows, width) = pos_embed_1nd.size3().expect("position embeddings are (1, 1 + n², width)");
    let grid = (rows - 1).isqrt();
    if to == [grid, grid] {
        return pos_embed_1nd.shallow_clone();
    }
    let grid_1dhw = pos_embed_1nd.narrow(1, 1, rows - 1).view([1, grid, grid, width]).permute([0, 3, 1, 2]);
    let resized_1dhw = grid_1dhw.contiguous().upsample_bicubic2d(to, false, None, None);
    let resized_1nd = resized_1dhw.permute([0, 2, 3, 1]).reshape([1, to[0] * to[1], width]);
    Tensor::cat(&[pos_embed_1nd.narrow(1, 0, 1), resized_1nd], 1)
}

/// Resamples patch kernels (width, channels, p, p) to patches of `side`² pixels. A new kernel responds to a resized patch as nearly
/// as possible as the old kernel responds to the original patch. Interpolating the kernels would instead scale every response by
/// the ratio of the areas.
///
/// This is FlexiViT's pseudo-inverse resize (arXiv 2212.08013, section 3.4), computed like timm's `resample_patch_embed`.
pub fn patch_kernel(weight_dcpp: &Tensor, side: usize) -> Tensor {
    let (width, channels, patch, _) = weight_dcpp.size4().expect("patch kernels are (width, channels, p, p)");
    let side = side as i64;
    if patch == side {
        return weight_dcpp.shallow_clone();
    }
    // Resizing is a linear map. Its matrix consists of the resized images of single pixels.
    let pixels = Tensor::eye(patch * patch, (Kind::Double, Device::Cpu)).view([patch * patch, 1, patch, patch]);
    let resize = pixels.internal_upsample_bicubic2d_aa([side, side], false, None, None);
    let resize = resize.view([patch * patch, side * side]);
    let kernels = weight_dcpp.to_kind(Kind::Double).reshape([width * channels, patch * patch]);
    let resampled = kernels.matmul(&resize.linalg_pinv(1e-15, false).transpose(0, 1));
    resampled.to_kind(Kind::Float).view([width, channels, side, side])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::floats;

    #[test]
    fn positions_keep_the_class_row_and_a_flat_field_and_the_same_grid_is_untouched() {
        let rows: Vec<f32> = (0..17 * 2).map(|i| if i < 2 { 9.0 } else { [0.5, -1.0][i % 2] }).collect();
        let embedding = Tensor::from_slice(&rows).view([1, 17, 2]);
        assert_eq!(positions(&embedding, [4, 4]), embedding);
        let larger = positions(&embedding, [6, 6]);
        assert_eq!(larger.size(), [1, 37, 2]);
        assert_eq!(floats(&larger)[..2], [9.0, 9.0]);
        assert!(floats(&larger)[2..].chunks(2).all(|row| (row[0] - 0.5).abs() < 1e-5 && (row[1] + 1.0).abs() < 1e-5));
        assert_eq!(positions(&embedding, [2, 5]).size(), [1, 11, 2]);
    }

    #[test]
    fn a_larger_kernel_responds_to_a_resized_patch_as_the_old_one_to_the_patch() {
        let wave = |count: i64, step: f32| -> Tensor {
            Tensor::from_slice(&(0..count).map(|i| (step * i as f32).sin()).collect::<Vec<_>>())
        };
        let kernel = wave(3 * 2 * 14 * 14, 0.7).view([3, 2, 14, 14]);
        let patch = wave(2 * 14 * 14, 0.3).view([1, 2, 14, 14]);
        let resized = patch.internal_upsample_bicubic2d_aa([16, 16], false, None, None);
        let response = |kernel: &Tensor, patch: &Tensor| {
            (kernel * patch).sum_dim_intlist([1i64, 2, 3].as_slice(), false, Kind::Float)
        };
        let difference = response(&kernel, &patch) - response(&patch_kernel(&kernel, 16), &resized);
        assert!(difference.abs().max().double_value(&[]) < 1e-3, "{difference:?}");
    }
}
