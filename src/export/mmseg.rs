//! A backbone and config for mmsegmentation: UPerNet on ADE20K.

use super::renamed::renamed;
use super::{Exported, Named, assignments, number, write_text, write_torch};
use anyhow::Result;
use serde_json::json;
use std::path::Path;
use tch::Tensor;

/// The smallest number of blocks. UPerNet reads the outputs of the last blocks of the four quarters of the network, which must be
/// four different blocks.
pub const LEAST_DEPTH: usize = 4;

pub fn write(exported: &Exported, folder: &Path) -> Result<()> {
    write_torch(folder, &backbone(exported), Some("state_dict"))?;
    write_text(folder, "upernet_80k.py", &config(exported))?;
    write_text(folder, "README.md", README)
}

pub fn backbone(exported: &Exported) -> Vec<Named> {
    fold_patch_bias(renamed(&exported.tensors, |row| row.mmseg))
}

/// Adds the bias of the patch projection to the position embeddings of the patches, and sets the bias itself to zero.
///
/// Unless `patch_bias=True`, mmsegmentation's patch projection has no bias, and its loader silently drops the bias of the file. As
/// a part of the position embeddings, the bias counts with and without `patch_bias`, even after the embeddings are resized.
fn fold_patch_bias(mut tensors: Vec<Named>) -> Vec<Named> {
    const BIAS: &str = "patch_embed.projection.bias";
    let bias = tensors.iter().find(|n| n.name == BIAS).expect("the table of names has it").tensor.shallow_clone();
    for Named { name, tensor } in &mut tensors {
        match name.as_str() {
            "pos_embed" => {
                let patches = tensor.narrow(1, 1, tensor.size()[1] - 1) + &bias;
                *tensor = Tensor::cat(&[tensor.narrow(1, 0, 1), patches], 1);
            }
            BIAS => *tensor = bias.zeros_like(),
            _ => {}
        }
    }
    tensors
}

fn config(exported: &Exported) -> String {
    let (model, data) = (exported.vit(), &exported.config.data);
    let numbers = assignments(&[
        ("embed_dims", json!(model.width)),
        ("num_layers", json!(exported.depth)),
        ("num_heads", json!(model.heads)),
        ("mlp_ratio", number(model.mlp_ratio)),
        ("in_channels", json!(model.channels)),
        ("patch_size", json!(model.patch_size)),
        // The crop of mmsegmentation's recipe, 512 pixels, rounded up to whole patches.
        ("crop", json!(512usize.next_multiple_of(model.patch_size))),
        ("layer_norm_eps", json!(model.layer_norm_eps)),
        ("out_indices", json!(exported.quarter_ends())),
        ("pixel_mean", json!(Exported::to_byte_range(&data.mean))),
        ("pixel_std", json!(Exported::to_byte_range(&data.std))),
    ]);
    include_str!("templates/mmseg.py").replace("# NUMBERS\n", &numbers)
}

const README: &str = "\
A backbone for mmsegmentation and its config for UPerNet on ADE20K in 80,000 steps: `upernet_80k.py`.

```sh
tools/dist_train.sh THIS_FOLDER/upernet_80k.py 8     # in a clone of mmsegmentation
```

The config inherits (`_base_`) from mmsegmentation's own configs, which it finds only through the installed package (`mmseg::`). So
install the package from the clone, for example of v1.2.2, with torch and mmcv 2.1 (`mim install mmcv==2.1.0`):
`pip install -e . --no-build-isolation` and `pip install ftfy`.

The images and label maps of ADE20K must be in `data/ade/ADEChallengeData2016` of the clone. `tools/dist_test.sh` with the same config
evaluates a trained model; with `--tta` it evaluates at several scales and with mirror images. `model.pth` is right for both settings
of `patch_bias`, because the bias of the patch projection is part of the position embeddings.
";
