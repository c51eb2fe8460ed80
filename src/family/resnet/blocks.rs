//! The division of the blocks into stages, in the target, the meta model and a hybrid. A layer is a group of consecutive blocks
//! with the same width, as in torchvision's names `layer1`, `layer2`, …. A stage may begin within a layer.

use super::Resnet;
use crate::family::shape::Shape;

/// One basic block: two convolutions, and the shortcut around them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// The number of the block's layer, counted from 0.
    pub layer: usize,
    /// The number of the block in its layer, counted from 0. The number depends on the stage depths of the network, because a thin
    /// stage lacks some blocks.
    pub number: usize,
    /// The number of channels of the input.
    pub input: usize,
    /// The number of channels of the output.
    pub output: usize,
}

impl Block {
    /// Whether the block doubles the width and halves the resolution.
    pub fn changes_shape(&self) -> bool {
        self.input != self.output
    }

    pub fn stride(&self) -> usize {
        if self.changes_shape() { 2 } else { 1 }
    }
}

/// For each stage of the target, the layer of each block, and whether the block changes the shape. The first block of a layer
/// changes the shape, except in the first layer.
fn of_target(resnet: &Resnet) -> Vec<Vec<(usize, bool)>> {
    let layers = resnet.layers.iter().enumerate();
    let mut all = layers.flat_map(|(layer, &count)| (0..count).map(move |block| (layer, layer > 0 && block == 0)));
    resnet.depths.iter().map(|&depth| all.by_ref().take(depth).collect()).collect()
}

/// The number of blocks of each stage of the meta model.
pub fn thin_depths(resnet: &Resnet) -> Vec<usize> {
    let thin = |blocks: Vec<(usize, bool)>| {
        let changes = blocks.iter().filter(|(_, changes)| *changes).count();
        // The first stage has no blocks if it consists of the stem alone.
        changes.max(1).min(blocks.len())
    };
    of_target(resnet).into_iter().map(thin).collect()
}

/// The blocks of each stage if the stages have `depths` blocks. A stage with fewer blocks than in the target keeps all blocks that
/// change the shape. The first of its other blocks fill the rest of its depth.
pub fn blocks(resnet: &Resnet, depths: &[usize]) -> Vec<Vec<Block>> {
    let mut counts = vec![0; resnet.layers.len()];
    let mut kept = |(blocks, depth): (Vec<(usize, bool)>, &usize)| -> Vec<Block> {
        let changes = blocks.iter().filter(|(_, changes)| *changes).count();
        let mut others = depth.saturating_sub(changes);
        let keep = |(layer, changes): (usize, bool)| {
            let is_kept = changes || others > 0;
            others -= usize::from(is_kept && !changes);
            is_kept.then(|| {
                let (output, number) = (resnet.width << layer, counts[layer]);
                counts[layer] += 1;
                Block { layer, number, input: if changes { output / 2 } else { output }, output }
            })
        };
        blocks.into_iter().filter_map(keep).collect()
    };
    of_target(resnet).into_iter().zip(depths).map(&mut kept).collect()
}

/// The shape of a stage's output: the output of its last block, or the output of the stem in a first stage without blocks.
pub fn border(resnet: &Resnet, stage: usize) -> Shape {
    let blocks = blocks(resnet, &resnet.depths);
    let last = blocks[..=stage].iter().flatten().next_back();
    let (channels, layer) = last.map_or((resnet.width, 0), |block| (block.output, block.layer));
    Shape::Map { channels, side: resnet.image_size.div_ceil(1 << layer) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::family::{Family, Model};

    fn resnet(depths: &[usize]) -> Resnet {
        let set = format!("model.depths={depths:?}");
        let Model::Resnet(resnet) = Config::parse("[model]\nfamily = \"resnet\"", &[set]).unwrap().model else {
            unreachable!()
        };
        resnet
    }

    /// The width of each block's output, in one list for each stage.
    fn widths(resnet: &Resnet, depths: &[usize]) -> Vec<Vec<usize>> {
        blocks(resnet, depths).iter().map(|stage| stage.iter().map(|block| block.output).collect()).collect()
    }

    #[test]
    fn a_thin_stage_has_the_blocks_that_realise_the_shapes_at_its_borders() {
        for (depths, thin, expected) in [
            (&[18, 18, 18][..], &[1, 1, 1][..], &[&[16][..], &[32], &[64]][..]),
            // InfoPro divides ResNet-110 in this way for four modules.
            (&[12, 14, 14, 14], &[1, 1, 1, 1], &[&[16], &[32], &[64], &[64]]),
            (&[54], &[2], &[&[32, 64]]),
            (&[0, 19, 35], &[0, 1, 1], &[&[], &[32], &[64]]),
        ] {
            let resnet = resnet(depths);
            assert_eq!(resnet.meta_depths(), thin);
            assert_eq!(widths(&resnet, thin), expected, "{depths:?}");
            for stage in 0..depths.len() {
                let mut hybrid = thin.to_vec();
                hybrid[stage] = depths[stage];
                let (target, hybrid) = (blocks(&resnet, depths), blocks(&resnet, &hybrid));
                let border = |stages: &[Vec<Block>]| stages[stage].last().map_or(16, |block| block.output);
                assert_eq!(border(&target), border(&hybrid));
                assert_eq!(target[stage].len(), hybrid[stage].len());
            }
        }
    }

    #[test]
    fn blocks_are_counted_through_the_stages_of_a_layer() {
        let resnet = resnet(&[12, 14, 14, 14]);
        let target = blocks(&resnet, &resnet.depths);
        assert_eq!((target[1][5].layer, target[1][5].number), (0, 17));
        assert_eq!(target[1][6], Block { layer: 1, number: 0, input: 16, output: 32 });
        assert_eq!((target[3][13].layer, target[3][13].number), (2, 17));
        let meta = blocks(&resnet, &[1, 1, 1, 1]);
        assert_eq!((meta[3][0].layer, meta[3][0].number), (2, 1));
    }
}
