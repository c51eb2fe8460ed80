//! Checks the sizes of a ResNet without data. Each error names the key, the value and the cure.

use super::{Resnet, Shortcut};
use crate::bounds::at_most;
use crate::require;
use anyhow::Result;

const MOST_BLOCKS: usize = 10_000;
const MOST_LAYERS: usize = 8;

pub fn validate(resnet: &Resnet) -> Result<()> {
    for (key, value, most) in [
        ("image_size", resnet.image_size, 1 << 14),
        ("channels", resnet.channels, 1 << 10),
        ("classes", resnet.classes, 1 << 24),
        ("width", resnet.width, 1 << 12),
    ] {
        require!(value >= 1, "model.{key} = 0: it must be at least 1");
        at_most(&format!("model.{key}"), value, most)?;
    }
    let Resnet { layers, depths, .. } = resnet;
    require!(
        (1..=MOST_LAYERS).contains(&layers.len()) && layers.iter().all(|blocks| (1..=MOST_BLOCKS).contains(blocks)),
        "model.layers = {layers:?}: give the blocks of 1 to {MOST_LAYERS} layers, each 1 to {MOST_BLOCKS}, such as [18, 18, 18]"
    );
    require!(!depths.is_empty(), "model.depths is empty: give the blocks of each stage, such as {layers:?}");
    require!(
        depths.iter().skip(1).all(|&depth| depth >= 1),
        "model.depths = {depths:?}: every stage but the first, which has the stem, needs at least 1 block"
    );
    let (blocks, staged) =
        (layers.iter().sum::<usize>(), depths.iter().fold(0, |sum: usize, d| sum.saturating_add(*d)));
    require!(
        blocks == staged,
        "model.depths = {depths:?} has {staged} blocks, but model.layers = {layers:?} has {blocks}; let both have the same sum, \
         such as depths = {layers:?}"
    );
    require!(
        resnet.shortcut == Shortcut::B || resnet.width.is_multiple_of(2),
        "model.width = {} is odd, but model.shortcut = \"A\" adds half as many channels of zeros on both sides; try width = {}",
        resnet.width,
        resnet.width + 1
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn sizes_that_make_no_network_are_refused_with_the_key_and_the_cure() {
        for (set, expected) in [
            (
                "model.depths=[18, 18]",
                "has 36 blocks, but model.layers = [18, 18, 18] has 54; let both have the same sum",
            ),
            ("model.depths=[54, 0]", "every stage but the first, which has the stem, needs at least 1 block"),
            ("model.depths=[]", "model.depths is empty: give the blocks of each stage"),
            ("model.layers=[]", "model.layers = []: give the blocks of 1 to 8 layers"),
            ("model.layers=[18, 0, 36]", "model.layers = [18, 0, 36]: give the blocks of 1 to 8 layers"),
            ("model.width=0", "model.width = 0: it must be at least 1"),
            ("model.shortcut=C", "model.shortcut"),
            ("model.heads=3", "model.heads"),
        ] {
            let error = Config::parse("[model]\nfamily = \"resnet\"", &[set.to_string()]).unwrap_err();
            assert!(format!("{error:#}").contains(expected), "{set}: {error:#}");
        }
        let odd = ["model.shortcut=A".to_string(), "model.width=15".to_string()];
        let error = Config::parse("[model]\nfamily = \"resnet\"", &odd).unwrap_err();
        assert!(error.to_string().contains("try width = 16"), "{error}");
        Config::parse("[model]\nfamily = \"resnet\"", &["model.width=15".to_string()]).unwrap();
    }
}
