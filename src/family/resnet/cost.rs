//! Formulas for the operations and the memory of a ResNet.

use super::{Block, Resnet, Shortcut};
use crate::family::Memory;

/// The operations of one stage's forward pass on one sample: the operations of the convolutions and of the head.
pub fn stage_flops(resnet: &Resnet, depths: &[usize], stage: usize) -> f64 {
    let stem = 2 * 9 * resnet.channels * resnet.width * resnet.image_size.pow(2);
    let head = 2 * resnet.features() * resnet.classes;
    let at = |own: usize, flops: usize| if stage == own { flops } else { 0 };
    let blocks: usize = resnet.blocks(depths)[stage].iter().map(|block| block_flops(resnet, block)).sum();
    (blocks + at(0, stem) + at(depths.len() - 1, head)) as f64
}

fn block_flops(resnet: &Resnet, block: &Block) -> usize {
    let has_projection = block.changes_shape() && resnet.shortcut == Shortcut::B;
    let kernels = 9 * (block.input + block.output) + if has_projection { block.input } else { 0 };
    2 * kernels * output(resnet, block)
}

/// How many numbers a block's output holds for one sample.
fn output(resnet: &Resnet, block: &Block) -> usize {
    block.output * resnet.image_size.div_ceil(1 << block.layer).pow(2)
}

/// The largest number of activations in memory for one sample. From the first trained stage on, each block keeps the inputs of its
/// two convolutions and two norms. If blocks are recomputed, each keeps its input alone.
pub fn activations(resnet: &Resnet, training: &Memory) -> f64 {
    let Memory { depths, trained, checkpointing, .. } = training;
    const KEPT: usize = 4;
    let stem = resnet.width * resnet.image_size.pow(2);
    let blocks = resnet.blocks(depths);
    let kept: Vec<usize> = blocks[trained.start..].iter().flatten().map(|block| output(resnet, block)).collect();
    let stem_kept = if trained.start == 0 { 2 * stem } else { 0 };
    let each = if *checkpointing { 1 } else { KEPT };
    // The last term bounds the block that is being computed. It has the size of a block at the stem's output, the largest output.
    (stem_kept + each * kept.iter().sum::<usize>() + KEPT * stem) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::family::Model;

    #[test]
    fn resnet_110_has_the_published_operations() {
        for (shortcut, multiply_adds) in [("A", 252_893_440), ("B", 252_893_440 + 262_144)] {
            let set = format!("model.shortcut={shortcut}");
            let Model::Resnet(resnet) = Config::parse("[model]\nfamily = \"resnet\"", &[set]).unwrap().model else {
                unreachable!()
            };
            let flops: f64 = (0..3).map(|stage| stage_flops(&resnet, &[18, 18, 18], stage)).sum();
            assert_eq!(flops, 2.0 * multiply_adds as f64);
        }
    }
}
