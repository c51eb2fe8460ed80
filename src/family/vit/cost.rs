//! Formulas for the operations and the memory of a ViT. n = tokens, d = width, h = hidden units of the MLP.

use super::Vit;
use crate::family::Memory;
use std::ops::Range;

/// The operations of one stage's forward pass on one sample.
pub fn stage_flops(vit: &Vit, depths: &[usize], stage: usize) -> f64 {
    let whole = depths[stage] as f64 * block_flops(vit);
    whole + end_flops(vit, stage, depths.len())
        - windows_of(vit, depths, stage) * (attention_flops(vit) - window_flops(vit))
}

/// The operations of one block: per token, 4d² + 2dh multiply-adds in linear layers; and attention of all tokens to each other.
fn block_flops(vit: &Vit) -> f64 {
    let (n, d, h) = (vit.tokens() as f64, vit.width as f64, vit.hidden() as f64);
    2.0 * n * (4.0 * d * d + 2.0 * d * h) + attention_flops(vit)
}

/// The operations of attention of all tokens to each other.
fn attention_flops(vit: &Vit) -> f64 {
    4.0 * (vit.tokens() as f64).powi(2) * vit.width as f64
}

/// The operations of attention within windows.
fn window_flops(vit: &Vit) -> f64 {
    4.0 * (pairs(vit) * vit.width) as f64
}

/// The number of pairs of tokens that attend to each other within windows. The windows at the border may reach beyond the map.
/// Their padding counts as tokens.
fn pairs(vit: &Vit) -> usize {
    let along = vit.grid().div_ceil(vit.window.max(1));
    along.pow(2) * vit.window.pow(4)
}

/// How many blocks of a stage attend within windows.
fn windows_of(vit: &Vit, depths: &[usize], stage: usize) -> f64 {
    if vit.window == 0 {
        return 0.0;
    }
    let (before, blocks) = (depths[..stage].iter().sum::<usize>(), depths.iter().sum());
    (before..before + depths[stage]).filter(|&number| vit.has_windows(number, blocks)).count() as f64
}

/// The operations of the patch projection if this is the first stage, and of the head if it is the last.
fn end_flops(vit: &Vit, stage: usize, stages: usize) -> f64 {
    let d = vit.width as f64;
    let patch = 2.0 * (vit.tokens() - 1) as f64 * d * (vit.channels * vit.patch_size.pow(2)) as f64;
    let head = 2.0 * d * vit.classes as f64;
    let at = |own: usize, flops: f64| if stage == own { flops } else { 0.0 };
    at(0, patch) + at(stages - 1, head)
}

/// The number of tokens up to which attention on a CPU is computed with matrix products, which keep the probabilities. For more
/// tokens, libtorch's fused kernel computes attention and keeps no probabilities.
pub const MOST_TOKENS_OF_PRODUCTS: usize = 1024;

/// The number of activations that the first trained stage and all later stages keep for the backward pass of one sample. The
/// number also includes the temporary activations of the one block that is being computed.
pub fn activations(vit: &Vit, training: &Memory) -> f64 {
    let Memory { depths, trained, checkpointing, on_cpu } = training;
    let (n, d, h) = (vit.tokens() as f64, vit.width as f64, vit.hidden() as f64);
    let blocks = |stages: Range<usize>| depths[stages].iter().sum::<usize>() as f64;
    let (trained, suffix) = (blocks(trained.clone()), blocks(trained.end..depths.len()));
    // On a CPU, attention to few tokens also keeps its probabilities.
    let is_fused = vit.tokens() > MOST_TOKENS_OF_PRODUCTS;
    let probabilities = if *on_cpu && !is_fused { vit.heads as f64 * n * n } else { 0.0 };
    let (trained_block, frozen_block) = (n * (9.0 * d + 2.0 * h) + probabilities, n * (6.0 * d + h) + probabilities);
    // A block with windows keeps fewer probabilities than a block that attends to the whole image. But if the image has too many
    // tokens for matrix products, only the blocks with small windows keep probabilities. With checkpointing, the estimate needs no
    // correction, because it counts the probabilities of one block alone.
    let in_windows = (0..depths.len()).map(|stage| windows_of(vit, depths, stage)).sum::<f64>();
    let share = if vit.window == 0 { 0.0 } else { 1.0 - pairs(vit) as f64 / (n * n) };
    let of_windows = if *on_cpu && is_fused && vit.window.pow(2) <= MOST_TOKENS_OF_PRODUCTS {
        in_windows * vit.heads as f64 * pairs(vit) as f64
    } else {
        0.0
    };
    let fewer = if *checkpointing { 0.0 } else { in_windows * share * probabilities - of_windows };
    let kept = if *checkpointing {
        (trained + suffix) * n * d + trained_block
    } else {
        trained * trained_block + suffix * frozen_block
    };
    kept - fewer + n * (6.0 * d + 2.0 * h)
}
