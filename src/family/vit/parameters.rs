//! The table of a ViT's parameters: stage, name within the stage, shape. The names are timm's names, but the number of a block
//! counts from the start of its stage.

use super::Vit;
use crate::family::parameter::{Grown, Initial, Parameter, Role};

/// The parameters of the network with these stage depths, in the order of timm's `state_dict`. Weight decay applies to matrices and
/// kernels only, not to 1-d parameters, `cls_token` or `pos_embed`.
pub fn parameters(vit: &Vit, depths: &[usize]) -> Vec<Parameter> {
    let (width, hidden) = (vit.width as i64, vit.hidden() as i64);
    let last = depths.len() - 1;
    let mut all = Vec::new();
    let mut add = |stage: usize, name: String, shape: &[i64], start: Initial, role: Role| {
        all.push(Parameter { stage, name, shape: shape.to_vec(), start, role });
    };
    let (channels, patch, classes) = (vit.channels as i64, vit.patch_size as i64, vit.classes as i64);
    add(0, "cls_token".into(), &[1, 1, width], Initial::Normal, Role::Plain);
    add(0, "pos_embed".into(), &[1, vit.tokens() as i64, width], Initial::Normal, Role::Plain);
    // The patch projection keeps PyTorch's default initialisation of a convolution, as in timm.
    let proj = Initial::FanIn { fan_in: (channels * patch * patch) as usize };
    add(0, "patch_embed.proj.weight".into(), &[width, channels, patch, patch], proj, Role::Decayed);
    add(0, "patch_embed.proj.bias".into(), &[width], proj, Role::Plain);
    for (stage, &depth) in depths.iter().enumerate() {
        for block in 0..depth {
            let mut pair = |name: &str, weight: &[i64], bias: bool| {
                let (start, role) = match weight.len() {
                    1 => (Initial::Ones, Role::Plain),
                    _ => (Initial::Normal, Role::Decayed),
                };
                add(stage, format!("blocks.{block}.{name}.weight"), weight, start, role);
                if bias {
                    add(stage, format!("blocks.{block}.{name}.bias"), &weight[..1], Initial::Zeros, Role::Plain);
                }
            };
            pair("norm1", &[width], true);
            pair("attn.qkv", &[3 * width, width], vit.qkv_bias);
            pair("attn.proj", &[width, width], true);
            pair("norm2", &[width], true);
            pair("mlp.fc1", &[hidden, width], true);
            pair("mlp.fc2", &[width, hidden], true);
        }
    }
    if vit.classes == 0 {
        return all;
    }
    add(last, "norm.weight".into(), &[width], Initial::Ones, Role::Plain);
    add(last, "norm.bias".into(), &[width], Initial::Zeros, Role::Plain);
    add(last, "head.weight".into(), &[classes, width], Initial::Normal, Role::Decayed);
    add(last, "head.bias".into(), &[classes], Initial::Zeros, Role::Plain);
    all
}

/// timm's name of the parameter in the whole network, in which blocks are numbered through all stages.
pub fn timm_name(parameter: &Parameter, depths: &[usize]) -> String {
    match block_of(parameter) {
        Some((block, rest)) => {
            let before: usize = depths[..parameter.stage].iter().sum();
            format!("blocks.{}.{rest}", before + block)
        }
        None => parameter.name.clone(),
    }
}

/// The layer of a parameter in BEiT's decay of learning rates. It is 0 for the embeddings. For a block, it is the block's number in
/// the whole network, counted from 1. For the final norm and all heads, it is the number of blocks + 1.
pub fn layer(parameter: &Parameter, depths: &[usize]) -> usize {
    match block_of(parameter) {
        Some((block, _)) => depths[..parameter.stage].iter().sum::<usize>() + block + 1,
        None if parameter.stage == 0
            && ["cls_token", "pos_embed", "patch_embed"].iter().any(|e| parameter.name.starts_with(e)) =>
        {
            0
        }
        None => depths.iter().sum::<usize>() + 1,
    }
}

/// How a parameter of a stage with `depth` blocks starts, so that the stage computes the same function as a stage with `meta_depth`
/// blocks. The blocks of the deep stage are divided as evenly as possible into one group for each block of the shallow stage. The
/// first block of each group copies the weights of its shallow block. In the other blocks, the last projections of both branches
/// are zero, so that these blocks pass on their input. Their other weights are fresh, so that they can learn.
pub fn grown(parameter: &Parameter, depth: usize, meta_depth: usize) -> Grown {
    let Some((block, rest)) = block_of(parameter) else { return Grown::Copied(parameter.name.clone()) };
    let source = |block: usize| block * meta_depth / depth;
    if block == 0 || source(block - 1) != source(block) {
        return Grown::Copied(format!("blocks.{}.{rest}", source(block)));
    }
    if rest.starts_with("attn.proj.") || rest.starts_with("mlp.fc2.") { Grown::Zeros } else { Grown::Fresh }
}

/// The number of a parameter's block in its stage, and the parameter's name within the block; none for a parameter outside the
/// blocks.
fn block_of(parameter: &Parameter) -> Option<(usize, &str)> {
    let (block, rest) = parameter.name.strip_prefix("blocks.")?.split_once('.')?;
    Some((block.parse().expect("a block's name holds its number"), rest))
}

/// How many numbers the parameters of each stage hold, computed from the parameters of a single block.
pub fn counts(vit: &Vit, depths: &[usize]) -> Vec<usize> {
    let (mut block, mut first, mut last) = (0, 0, 0);
    for parameter in parameters(vit, &[1]) {
        *match parameter.name.split('.').next() {
            Some("blocks") => &mut block,
            Some("norm" | "head") => &mut last,
            _ => &mut first,
        } += parameter.count();
    }
    let mut counts: Vec<usize> = depths.iter().map(|depth| depth * block).collect();
    counts[0] += first;
    counts[depths.len() - 1] += last;
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::family::Model;

    #[test]
    fn counts_by_stage_are_those_of_the_listed_parameters() {
        let Model::Vit(vit) = Config::parse("[model]\nqkv_bias = false", &[]).unwrap().model else { unreachable!() };
        for depths in [&[3][..], &[1, 4], &[2, 1, 3]] {
            let listed = parameters(&vit, depths);
            let of = |stage| listed.iter().filter(|p| p.stage == stage).map(|p| p.count()).sum();
            assert_eq!(counts(&vit, depths), (0..depths.len()).map(of).collect::<Vec<usize>>());
        }
    }
}
