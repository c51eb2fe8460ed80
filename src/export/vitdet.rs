//! Exports a backbone for ViTDet (arXiv 2203.16527) in detectron2 and in mmdetection. In ViTDet, all blocks except four attend
//! within windows, and a patch has a side of 16 pixels. The backbone has no class token, final norm or head. But its position
//! embeddings still have a row for the class token.

use super::renamed::renamed;
use super::{Exported, Named, assignments, number, write_text};
use crate::family::vit::resample;
use anyhow::Result;
use serde_json::json;
use std::path::Path;

/// The backbone's tensors under timm's names, resampled to patches of 16 pixels.
pub fn backbone(exported: &Exported) -> Vec<Named> {
    let grid = exported.model.image_size() / PATCH;
    let mut tensors = renamed(&exported.tensors, |row| row.vitdet.then_some(row.timm));
    for Named { name, tensor } in &mut tensors {
        match name.as_str() {
            "patch_embed.proj.weight" => *tensor = resample::patch_kernel(tensor, PATCH),
            "pos_embed" => *tensor = resample::positions(tensor, [grid.max(1) as i64; 2]),
            _ => {}
        }
    }
    tensors
}

/// The side of a patch in pixels. ViTDet's feature pyramid computes maps with strides of 4 to 32 from patches of 16 pixels. So
/// patches of another size, such as the 14 pixels of ViT-H, are resampled to 16 pixels.
const PATCH: usize = 16;

/// Writes a config for each of two training lengths, `1x` and `3x`. Each config is `template` with the numbers of this model.
///
/// `1x` and `3x` are detectron2's 90,000 and 270,000 steps of 16 images. The rates of drop path and layer decay are ViTDet's rates
/// for ViT-B, ViT-L and ViT-H, chosen by the depth of the model.
pub fn write_configs(exported: &Exported, folder: &Path, template: &str) -> Result<()> {
    let (model, data) = (exported.vit(), &exported.config.data);
    let global = exported.quarter_ends();
    let windowed: Vec<usize> = (0..exported.depth).filter(|block| !global.contains(block)).collect();
    for (name, steps, milestones) in [("1x", 90_000, [60_000, 80_000]), ("3x", 270_000, [210_000, 250_000])] {
        let numbers = assignments(&[
            ("embed_dim", json!(model.width)),
            ("depth", json!(exported.depth)),
            ("num_heads", json!(model.heads)),
            ("mlp_ratio", number(model.mlp_ratio)),
            ("in_chans", json!(model.channels)),
            ("patch_size", json!(PATCH)),
            ("pretrain_img_size", json!(model.image_size.max(PATCH))),
            ("layer_norm_eps", json!(model.layer_norm_eps)),
            ("windowed_blocks", json!(windowed)),
            ("drop_path_rate", json!(exported.by_depth([0.1, 0.4, 0.5]))),
            ("layer_decay", json!(exported.by_depth([0.7, 0.8, 0.9]))),
            ("pixel_mean", json!(Exported::to_byte_range(&data.mean))),
            ("pixel_std", json!(Exported::to_byte_range(&data.std))),
            ("max_iter", json!(steps)),
            ("milestones", json!(milestones)),
        ]);
        write_text(folder, &format!("mask_rcnn_{name}.py"), &template.replace("# NUMBERS\n", &numbers))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{PAPER_CONFIGS, with_zeros};
    use super::*;
    use std::collections::BTreeMap;

    /// The names and shapes of the parameters of a ViT in detectron2's model zoo (`projects/ViTDet`). The relative position
    /// embeddings are left out, because no exported model has them.
    fn of_model_zoo(width: i64, depth: usize) -> BTreeMap<String, Vec<i64>> {
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
    fn detectron2_gets_the_names_and_shapes_of_its_own_vit_b_l_and_h() {
        for ((size, config), (width, depth, count)) in
            PAPER_CONFIGS.into_iter().zip([(768, 12, 147), (1024, 24, 291), (1280, 32, 387)])
        {
            let expected = of_model_zoo(width, depth);
            assert_eq!(expected.len(), count);
            let given: BTreeMap<String, Vec<i64>> = with_zeros(config, super::super::detectron2::backbone)
                .into_iter()
                .map(|Named { name, tensor }| (name, tensor.size()))
                .collect();
            assert_eq!(given, expected, "ViT-{size}");
        }
    }
}
