//! What ViTDet (arXiv 2203.16527) takes of a model, in detectron2 as in mmdetection: windowed attention with four global
//! blocks, patches of 16 pixels, position embeddings whole with their class row, and no final norm, head or class token.

use super::renamed::renamed;
use super::{Named, Whole, assignments, number, write_text};
use crate::family::vit::resample;
use anyhow::Result;
use serde_json::json;
use std::path::Path;

/// The backbone's tensors under timm's names.
pub fn backbone(whole: &Whole) -> Vec<Named> {
    let grid = whole.model.image_size() / PATCH;
    let mut tensors = renamed(&whole.tensors, |row| row.vitdet.then_some(row.timm));
    for Named { name, tensor } in &mut tensors {
        match name.as_str() {
            "patch_embed.proj.weight" => *tensor = resample::patch_kernel(tensor, PATCH),
            "pos_embed" => *tensor = resample::positions(tensor, grid.max(1)),
            _ => {}
        }
    }
    tensors
}

/// Its feature pyramid makes strides of 4 to 32 from patches of 16, also for ViT-H, whose patches have 14.
const PATCH: usize = 16;

/// Writes a config for each training length: the numbers of this model, then the framework's own lines.
///
/// 1× and 3× are detectron2's 90,000 and 270,000 steps of 16 images; drop path and layer decay are ViTDet's for B, L, H.
pub fn write_configs(whole: &Whole, folder: &Path, body: &str) -> Result<()> {
    let (model, data) = (whole.vit(), &whole.config.data);
    let global = whole.quarter_ends();
    let windowed: Vec<usize> = (0..whole.depth).filter(|block| !global.contains(block)).collect();
    for (name, steps, milestones) in [("1x", 90_000, [60_000, 80_000]), ("3x", 270_000, [210_000, 250_000])] {
        let numbers = assignments(&[
            ("embed_dim", json!(model.width)),
            ("depth", json!(whole.depth)),
            ("num_heads", json!(model.heads)),
            ("mlp_ratio", number(model.mlp_ratio)),
            ("in_chans", json!(model.channels)),
            ("patch_size", json!(PATCH)),
            ("pretrain_img_size", json!(model.image_size.max(PATCH))),
            ("layer_norm_eps", json!(model.layer_norm_eps)),
            ("windowed_blocks", json!(windowed)),
            ("drop_path_rate", json!(whole.by_depth([0.1, 0.4, 0.5]))),
            ("layer_decay", json!(whole.by_depth([0.7, 0.8, 0.9]))),
            ("pixel_mean", json!(Whole::of_bytes(&data.mean))),
            ("pixel_std", json!(Whole::of_bytes(&data.std))),
            ("max_iter", json!(steps)),
            ("milestones", json!(milestones)),
        ]);
        write_text(folder, &format!("mask_rcnn_{name}.py"), &body.replace("# NUMBERS\n", &numbers))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{SHAPES, shaped};
    use super::*;
    use std::collections::BTreeMap;

    /// Names and shapes of detectron2's ViT-B, L and H (`projects/ViTDet`), as the configs of its model zoo make them, less
    /// the relative positions, which are trained anew.
    fn detectron2(width: i64, depth: usize) -> BTreeMap<String, Vec<i64>> {
        let mut all = vec![
            ("pos_embed".to_string(), vec![1, 197, width]),
            ("patch_embed.proj.weight".into(), vec![width, 3, 16, 16]),
            ("patch_embed.proj.bias".into(), vec![width]),
        ];
        for block in 0..depth {
            for (name, shape) in [
                ("norm1.weight", vec![width]),
                ("norm1.bias", vec![width]),
                ("attn.qkv.weight", vec![3 * width, width]),
                ("attn.qkv.bias", vec![3 * width]),
                ("attn.proj.weight", vec![width, width]),
                ("attn.proj.bias", vec![width]),
                ("norm2.weight", vec![width]),
                ("norm2.bias", vec![width]),
                ("mlp.fc1.weight", vec![4 * width, width]),
                ("mlp.fc1.bias", vec![4 * width]),
                ("mlp.fc2.weight", vec![width, 4 * width]),
                ("mlp.fc2.bias", vec![width]),
            ] {
                all.push((format!("blocks.{block}.{name}"), shape));
            }
        }
        all.into_iter().map(|(name, shape)| (format!("backbone.net.{name}"), shape)).collect()
    }

    #[test]
    fn detectron2_is_given_the_names_and_shapes_of_its_own_vit_b_l_and_h() {
        for ((size, config), (width, depth, count)) in
            SHAPES.into_iter().zip([(768, 12, 147), (1024, 24, 291), (1280, 32, 387)])
        {
            let expected = detectron2(width, depth);
            assert_eq!(expected.len(), count);
            let given: BTreeMap<String, Vec<i64>> = shaped(config, super::super::detectron2::backbone)
                .into_iter()
                .map(|Named { name, tensor }| (name, tensor.size()))
                .collect();
            assert_eq!(given, expected, "ViT-{size}");
        }
    }
}
