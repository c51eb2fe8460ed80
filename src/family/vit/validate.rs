//! Checks the sizes of a ViT without data. Each error names the key, the value and the cure.

use super::Vit;
use crate::bounds::{at_most, positive, probability};
use crate::require;
use anyhow::Result;

const MOST_BLOCKS: usize = 100_000;
const MOST_PARAMETERS: f64 = 1e12;

pub fn validate(vit: &Vit) -> Result<()> {
    for (key, value, most) in [
        ("image_size", vit.image_size, 1 << 14),
        ("channels", vit.channels, 1 << 10),
        ("patch_size", vit.patch_size, 1 << 14),
        ("width", vit.width, 1 << 20),
        ("heads", vit.heads, 1 << 20),
        ("meta_depth", vit.meta_depth, 10_000),
    ] {
        require!(value >= 1, "model.{key} = 0: it must be at least 1");
        at_most(&format!("model.{key}"), value, most)?;
    }
    at_most("model.classes", vit.classes, 1 << 24)?;
    require!(
        vit.image_size.is_multiple_of(vit.patch_size),
        "model.image_size = {} is not a multiple of model.patch_size = {}; try image_size = {}",
        vit.image_size,
        vit.patch_size,
        vit.image_size.div_ceil(vit.patch_size) * vit.patch_size
    );
    require!(
        vit.width.is_multiple_of(vit.heads),
        "model.width = {} is not divisible by model.heads = {}; try width = {}",
        vit.width,
        vit.heads,
        vit.width.div_ceil(vit.heads) * vit.heads
    );
    require!(!vit.depths.is_empty(), "model.depths is empty: give the blocks of each stage, such as [3, 3, 3, 3]");
    require!(
        vit.depths.iter().all(|&d| (1..=10_000).contains(&d)) && vit.depths.len() <= 10_000,
        "model.depths = {:?}: every stage needs between 1 and 10000 blocks",
        vit.depths
    );
    let hidden = vit.width as f64 * vit.mlp_ratio;
    require!(
        hidden >= 1.0 && hidden.fract() == 0.0 && vit.mlp_ratio <= 1024.0,
        "model.mlp_ratio = {} times model.width = {} is not a whole number; try mlp_ratio = 4.0",
        vit.mlp_ratio,
        vit.width
    );
    positive("model.layer_norm_eps", vit.layer_norm_eps, 1e-6)?;
    probability("model.dropout", vit.dropout)?;
    fits_a_machine(vit)
}

/// Refuses more blocks or parameters than any machine can train.
fn fits_a_machine(vit: &Vit) -> Result<()> {
    let blocks = vit.depths.iter().sum::<usize>().max(vit.depths.len() * vit.meta_depth);
    require!(
        blocks <= MOST_BLOCKS,
        "model.depths and model.meta_depth give {blocks} blocks in all: at most {MOST_BLOCKS}; lower them"
    );
    let (width, patch) = (vit.width as f64, vit.patch_size as f64);
    let outside_blocks = vit.channels as f64 * patch * patch + (vit.tokens() + vit.classes) as f64;
    let parameters = width * (width * (4.0 + 2.0 * vit.mlp_ratio) * blocks as f64 + outside_blocks);
    require!(
        parameters <= MOST_PARAMETERS,
        "model.width = {} in {blocks} blocks has {parameters:.1e} parameters: more than any machine holds; lower \
         model.width or model.depths",
        vit.width
    );
    Ok(())
}
