//! What ViTDet (arXiv 2203.16527) takes of a model, in detectron2 as in mmdetection: windowed attention with four global
//! blocks, patches of 16 pixels, position embeddings whole with their class row, and no final norm, head or class token.

use super::names::renamed;
use super::{Named, Whole, assignments, number, write_text};
use crate::resample;
use anyhow::Result;
use serde_json::json;
use std::path::Path;

/// The backbone's tensors under timm's names.
pub fn backbone(whole: &Whole) -> Vec<Named> {
    let patch = patch(whole);
    let grid = whole.model.image_size / patch;
    let mut tensors = renamed(&whole.tensors, |row| row.vitdet.then_some(row.timm));
    for Named { name, tensor } in &mut tensors {
        match name.as_str() {
            "patch_embed.proj.weight" => *tensor = resample::patch_kernel(tensor, patch),
            "pos_embed" => *tensor = resample::positions(tensor, grid.max(1)),
            _ => {}
        }
    }
    tensors
}

/// Its feature pyramid needs strides that are powers of two, so ViT-H's patches of 14 become 16.
fn patch(whole: &Whole) -> usize {
    whole.model.patch_size.next_power_of_two()
}

/// Writes a config for each training length: the numbers of this model, then the framework's own lines.
///
/// 1× and 3× are detectron2's 90,000 and 270,000 steps of 16 images; drop path and layer decay are ViTDet's for B, L, H.
pub fn write_configs(whole: &Whole, folder: &Path, body: &str) -> Result<()> {
    let (model, data) = (&whole.model, &whole.config.data);
    let global = whole.quarter_ends();
    let windowed: Vec<usize> = (0..whole.depth).filter(|block| !global.contains(block)).collect();
    let patch = patch(whole);
    for (name, steps, milestones) in [("1x", 90_000, [60_000, 80_000]), ("3x", 270_000, [210_000, 250_000])] {
        let numbers = assignments(&[
            ("embed_dim", json!(model.width)),
            ("depth", json!(whole.depth)),
            ("num_heads", json!(model.heads)),
            ("mlp_ratio", number(model.mlp_ratio)),
            ("in_chans", json!(model.channels)),
            ("patch_size", json!(patch)),
            ("pretrain_img_size", json!(model.image_size.max(patch))),
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
